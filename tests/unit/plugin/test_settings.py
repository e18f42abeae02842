from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from pytest_gpumem.devices import CardsFound
from pytest_gpumem.plugin import hooks as plugin
from pytest_gpumem.plugin.option import Which, which
from pytest_gpumem.plugin.resolve import BadSettingError, check_files, resolve
from pytest_gpumem.plugin.settings import OPTIONS, Settings
from pytest_gpumem.plugin.state import STATE, State
from pytest_gpumem.records import Card

# A text other than the default for every option, and what it means.
EXAMPLES = {
    "mode": ("off", "off"),
    "simulate": ("1GiB", (2**30,)),
    "simulate_context": ("1MiB", 2**20),
    "simulate_workspace": ("8320KiB", 8320 * 2**10),
    "simulate_compiled": ("true", True),
    "simulate_anyway": ("true", True),
    "simulate_card": ("card", None),
    "json": ("run.json", None),
    "stacks": ("yes", True),
    "peaks": ("5", Which(largest=5)),
    "snapshots": ("snapshots", None),
    "top": ("3", 3),
    "vram_limit": ("2GiB", 2**31),
    "vram_leak_limit": ("0B", 0),
    "budget": ("budgets.toml", None),
    "budget_update": ("yes", True),
    "budget_tolerance": ("1.5%,16MiB", (0.015, 16 * 2**20)),
    "leak_warmups": ("2", 2),
    "module_leak_limit": ("1MiB", 2**20),
    "children": ("off", "off"),
    "sample_interval": ("0.5", 0.5),
    "ram": ("yes", True),
    "worker_ram": ("3GiB", 3 * 2**30),
    "archive": ("store", None),
    "archive_key_file": ("key", None),
    "archive_quota": ("20GiB", 20 * 2**30),
    "consolidate_above": ("70%", 0.7),
    "schedule": ("off", "off"),
    "headroom": ("0B", 0),
    "context": ("300MiB", 300 * 2**20),
    "too_large": ("skip", "skip"),
    "isolate": ("failed", "failed"),
    "oom": ("fail", "fail"),
    "oom_at": ("every", "every"),
    "oom_tries": ("7", 7),
    "lease_timeout": ("2.5", 2.5),
    "history": ("history.json", None),
    "jax_preallocate": ("off", "off"),
    "fraction": ("auto", 0.0),
    "trace": ("trace.json", None),
    "html": ("page.html", None),
    "html_library": ("linked", "linked"),
    "github": ("off", "off"),
    "base": ("base.json", None),
    "route_full": ("90%", 0.9),
    "route_busy": ("60%", 0.6),
    "route_large": ("1GiB", 2**30),
    "route_transformers": ("50%", 0.5),
    "embedding_model": ("models/small", "models/small"),
}


def settings(cli=None, env=None, ini=None, asked=False):
    return resolve(cli or {}, env or {}, (ini or {}).get, asked=asked)


def test_every_option_has_an_example_here():
    assert {option.field for option in OPTIONS} == set(EXAMPLES)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.field)
@pytest.mark.parametrize("place", ["cli", "env", "ini"])
def test_each_option_is_read_from_each_place(option, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, meaning = EXAMPLES[option.field]
    name = option.env if place == "env" else option.dest
    value = getattr(settings(**{place: {name: text}}), option.field)

    assert value != getattr(Settings(), option.field)
    assert meaning is None or value == meaning


def test_the_command_line_beats_the_environment_beats_the_ini_file():
    cli, env, ini = {"gpumem_top": "1"}, {"GPUMEM_TOP": "2"}, {"gpumem_top": "3"}

    assert settings(cli, env, ini).top == 1
    assert settings({}, env, ini).top == 2
    assert settings({}, {}, ini).top == 3


def test_asking_for_the_plugin_turns_it_on_unless_the_mode_is_given():
    assert settings().mode == "track"
    assert settings(asked=True).mode == "on"
    assert settings(ini={"gpumem": "track"}, asked=True).mode == "track"


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("mode", "maybe", "'maybe' is not a mode; allowed are off, track, on"),
        ("simulate", "2 potatoes", "'2 potatoes' is not a size"),
        ("simulate", "0B", "'0B' is an empty card"),
        ("simulate", "900TiB", "is more than this machine's memory"),
        ("simulate_context", "-1MiB", "'-1MiB' is not a size"),
        ("simulate_anyway", "perhaps", "'perhaps' is neither true nor false"),
        ("top", "ten", "'ten' is not a number of lines"),
        ("peaks", "0", "'0' is not a number of tests; allowed is 1 or more"),
        ("peaks", "-3", "'-3' is not a number of tests"),
        ("peaks", "2.5", "'2.5' is not a number of tests"),
        ("peaks", "--", "'--' names no tests; allowed are offenders, a number, and a nodeid"),
        ("vram_limit", "much", "'much' is not a size"),
        ("archive_quota", "all", "'all' is not a size"),
        ("consolidate_above", "0%", "'0%' is not a part; allowed is more than 0% and up to 100%"),
        ("consolidate_above", "0.85", "'0.85' is not a part"),
    ],
)
@pytest.mark.parametrize("place", ["cli", "env", "ini"])
def test_a_bad_value_is_one_sentence_that_names_its_place(field, value, sentence, place):
    option = next(option for option in OPTIONS if option.field == field)
    name = option.env if place == "env" else option.dest
    where = {"cli": option.flag, "env": "in the environment", "ini": "in the ini file"}[place]
    with pytest.raises(BadSettingError) as caught:
        settings(**{place: {name: value}})

    assert sentence in str(caught.value)
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["json", "trace", "html", "history"])
def test_a_file_that_cannot_be_written_is_refused(field, tmp_path):
    option = next(option for option in OPTIONS if option.field == field)
    for value, sentence in (
        (tmp_path, "is a directory"),
        (tmp_path / "no" / "run.json", "there is no directory"),
    ):
        with pytest.raises(BadSettingError, match=f"^{option.flag}: .*{sentence}"):
            check_files(settings({option.dest: str(value)}))
    check_files(settings({option.dest: str(tmp_path / "new.json")}))


def test_a_file_that_is_no_history_is_not_replaced_by_one(tmp_path):
    (tmp_path / "poem.txt").write_text("Whose woods these are")
    with pytest.raises(BadSettingError, match=r"poem\.txt' are ignored: it is not JSON"):
        check_files(settings({"gpumem_history": str(tmp_path / "poem.txt")}))


def test_a_card_too_small_for_one_context_is_refused():
    with pytest.raises(BadSettingError, match=r"no room for a context of 384\.00 MiB"):
        settings({"gpumem_simulate": "300MiB"})


def test_a_card_too_small_for_context_and_workspace_is_refused():
    sizes = {"gpumem_simulate": "400MiB", "gpumem_simulate_workspace": "8320KiB"}
    assert settings(sizes).simulate_workspace == 8320 * 2**10
    with pytest.raises(BadSettingError, match=r"no room for 32\.00 MiB beside a context of 384"):
        settings(sizes | {"gpumem_simulate_workspace": "32MiB"})


@pytest.mark.parametrize(
    ("cli", "env", "expected"),
    [
        ({"gpumem_oom": "fail"}, {}, ("--gpumem-oom",)),
        ({}, {"GPUMEM_FRACTION": "auto"}, ("GPUMEM_FRACTION in the environment",)),
        ({"gpumem_top": "3", "gpumem_context": "1GiB"}, {}, ()),
        ({"gpumem_oom": "fail", "gpumem": "on"}, {}, ()),
    ],
)
def test_options_about_sharing_have_an_effect_only_with_on(cli, env, expected):
    assert settings(cli, env).without_effect == expected


def test_a_simulated_card_that_no_test_can_use_is_said_to_be_so(monkeypatch):
    state = State(
        Settings(mode="on", simulate=(2**30,)),
        CardsFound((Card("GPU-1", "Simulated CUDA card", 2**30),)),
        simulation=SimpleNamespace(not_simulated="not simulated: speed", notes=[]),
    )
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    lines = plugin.pytest_report_header(
        SimpleNamespace(stash={STATE: state}, get_verbosity=lambda: 0)
    )
    assert "gpumem: torch is not installed: no test can use the simulated card" in lines


@pytest.mark.parametrize(
    ("pattern", "named", "others"),
    [
        ("test_a.py", ["test_a.py::test_x", "test_a.py::TestX::test_y[1]"], ["test_a.py2::test_x"]),
        ("tests", ["tests/test_a.py::test_x"], ["tests2/test_a.py::test_x", "test_a.py::tests"]),
        ("a.py::test_x", ["a.py::test_x", "a.py::test_x[1]"], ["a.py::test_xy", "b.py::test_x"]),
        ("a.py::test_x[1]", ["a.py::test_x[1]"], ["a.py::test_x[11]", "a.py::test_x1"]),
        ("*big*", ["a.py::test_big", "big/a.py::test_x[\nü]"], ["a.py::test_small"]),
        ("a.py::test_x[?]", ["a.py::test_x[?]"], ["a.py::test_x[1]"]),
        ("a.py::Test*::test_x", ["a.py::TestA::test_x"], ["a.py::test_x"]),
    ],
)
def test_a_pattern_names_tests_as_they_are_written(pattern, named, others):
    chosen = which(pattern)
    assert not chosen.later
    assert [name for name in (*named, *others) if chosen.names(name)] == named


def test_offenders_and_the_largest_name_no_test_beforehand():
    for chosen in (which("offenders"), which(" 3 ")):
        assert chosen.later
        assert not chosen.names("offenders")
    assert which("offenders").offenders
    assert which("3").largest == 3


def test_a_directory_for_snapshots_can_be_made_and_be_written(tmp_path):
    check_files(Settings(snapshots=tmp_path / "not" / "yet"))
    (tmp_path / "file").touch()
    for name, words in (("file", "is a file"), ("file/x", "not writable")):
        with pytest.raises(BadSettingError, match="--gpumem-snapshots: .*" + words):
            check_files(Settings(snapshots=tmp_path / name))


def test_settings_are_those_that_exist_and_stay_as_they_are():
    with pytest.raises(TypeError, match="no settings: colour"):
        Settings(colour="red")
    settings = Settings()
    with pytest.raises(AttributeError, match=r"replace\(children=...\) makes others"):
        settings.children = "off"
    assert settings.replace(children="off").children == "off" != settings.children
