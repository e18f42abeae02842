"""Budgets: what the file holds, how it is kept, and when a test is above its line."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem import files
from pytest_gpumem.records import (
    SCHEMA,
    BudgetVerdict,
    Card,
    CardUsage,
    RecordedTest,
    RunRecord,
)
from pytest_gpumem.records.budget import Budget, Own, Tolerance, judge, verdicts, why_above
from pytest_gpumem.reports import budgets as report

MIB = 2**20
CARDS = (Card("GPU-1", "NVIDIA L4", 24 * 2**30), Card("GPU-2", "NVIDIA L4", 24 * 2**30))
TOLERANCE = Tolerance(0.02)


def taken(name, own, left=0, outcome="passed", card="GPU-1", **fields):
    used = CardUsage(card, 0, own, left, own, own, 0, 0, None, own=own, own_left=left)
    return RecordedTest(name, outcome, 1.0, "", (used,), **fields)


def run(*tests):
    return RunRecord(SCHEMA, "on", CARDS, False, 0, tests)


def budget(**lines):
    return Budget({f"a.py::{name}": {"NVIDIA L4": own} for name, own in lines.items()})


def judged(tests, lines, gone=()):
    found = verdicts(run(*tests), lines, gone, TOLERANCE)
    return {each.nodeid: each.verdict for each in found}


# The file

names = st.text(
    st.characters(exclude_categories=[]), min_size=1
)  # any, lone surrogates and control characters too
sizes = st.integers(0, 2**62)
lines = st.dictionaries(
    names,
    st.dictionaries(names.filter(str.isprintable), st.tuples(sizes, sizes), min_size=1),
    max_size=5,
)


@given(lines)
def test_what_is_written_is_read_again(tmp_path_factory, plain):
    path = tmp_path_factory.getbasetemp() / "written.toml"
    written = Budget()
    for nodeid, line in plain.items():
        for card, (own, left) in line.items():
            written.apply(BudgetVerdict(nodeid, card, "new", own, left), TOLERANCE)
    written.save(path)

    read = Budget.load(path)
    assert read.plain() == written.plain()
    assert all(read[nodeid].keys() == line.keys() for nodeid, line in plain.items())
    assert read.text() == path.read_text()


def test_the_file_has_a_line_for_each_test_in_order(tmp_path):
    found = budget(b=(5 * MIB, 0), a=(1 * MIB, 512))
    found.save(tmp_path / "b.toml")

    head, table, *rest = (tmp_path / "b.toml").read_text().splitlines()
    assert head.startswith("# ")
    assert table == "[peaks]"
    assert rest == [
        '"a.py::a" = {"NVIDIA L4" = {peak = 1_048_576, left = 512}}',
        '"a.py::b" = {"NVIDIA L4" = 5_242_880}',
    ]


def test_tables_may_be_written_by_hand(tmp_path):
    path = tmp_path / "b.toml"
    path.write_text('[peaks."t 1"]\n"A" = 5\n\n[peaks."t 2"]\n"A" = 5\n')
    assert Budget.load(path).plain() == {"t 1": {"A": (5, 0)}, "t 2": {"A": (5, 0)}}

    path.write_text('[peaks."t 1"]\n"A" = 5\n\n[peaks."t 1"]\n"A" = 5\n')
    with pytest.raises(ValueError, match="is not TOML"):
        Budget.load(path)


def test_a_size_may_be_written_by_hand(tmp_path):
    path = tmp_path / "b.toml"
    path.write_text('[peaks]\n"t" = {"A" = "1.5GiB", "B" = {peak = "2MiB", left = 7}}\n')

    assert Budget.load(path)["t"] == {"A": Own(3 * 2**29), "B": Own(2 * MIB, 7)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "it is no budget: allowed is one table, [peaks]"),
        ("[peaks]\n[other]\n", "it is no budget"),
        ("peaks = 3", "it is no budget"),
        ("[peaks]\nt = 5", "the budget of 't' names no card"),
        ('[peaks]\nt = {"A" = -1}', "the budget of 't': -1 is negative"),
        ('[peaks]\nt = {"A" = true}', "the budget of 't': True is not a size"),
        ('[peaks]\nt = {"A" = "much"}', "the budget of 't': 'much' is not a size"),
        ('[peaks]\nt = {"A" = {left = 1}}', "the budget of 't': allowed are a size, or peak and"),
        ('[peaks]\nt = {"A" = {peak = 1, more = 1}}', "allowed are a size, or peak and left"),
        ("[peaks]\nt = {", "is not TOML"),
        ('[peaks]\nt = {"A" = 1}\nt = {"A" = 2}\n', "is not TOML"),
        ("[peaks]\n\n<<<<<<< HEAD\n=======\n>>>>>>> a\n", "a conflict of git at line 3"),
        ("[peaks]\n||||||| base\n", "a conflict of git at line 2"),
        (
            '[peaks]\n"a \\" b" = {"A" = 1}\n\n"a \\" b"={"A" = 1}\n',
            'two lines for "a \\" b", 2 and 4: keep the one that is meant',
        ),
        (b"\xff\xfe", "is not TOML"),
    ],
)
def test_what_is_no_budget_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "b.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"b\.toml") as error:
        Budget.load(path)

    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ours", "theirs", "problem"),
    [
        ({"a.py::t3": 1}, {"z.py::t1": 1, "z.py::t2": 2}, ""),
        ({"a.py::t3": 1, "b.py::t": 2}, {"a.py::t31": 1, "b.py::t2": 3}, ""),
        ({"z.py::t1": 1}, {"z.py::t2": 2}, ""),
        ({"a.py::t2": 1}, {"a.py::t4": 2}, 'two lines for "a.py::t2", 4 and 6'),
        ({"a.py::t2": 1}, {"a.py::t2": 2}, 'two lines for "a.py::t2", 4 and 5'),
    ],
    ids=["apart", "side by side", "at the end", "neighbours changed", "one changed twice"],
)
def test_branches_that_add_tests_merge(tmp_path, ours, theirs, problem):
    base = {f"a.py::t{number}": 1000 + number for number in range(0, 10, 2)}
    for side, changed in {"base": {}, "ours": ours, "theirs": theirs}.items():
        plain = {name: {"A": (size,)} for name, size in (base | changed).items()}
        Budget(plain).save(tmp_path / side)
    # What git does where .gitattributes says merge=union, as the how-to has it.
    command = ["git", "merge-file", "--union", "ours", "base", "theirs"]
    subprocess.run(command, cwd=tmp_path, check=True)

    if problem:
        with pytest.raises(ValueError, match=re.escape(problem)):
            Budget.load(tmp_path / "ours")
    else:
        assert {*ours, *theirs} <= {*Budget.load(tmp_path / "ours").names({"A"})}


SHARD = """
import sys
from pathlib import Path
from pytest_gpumem import files
from pytest_gpumem.records import BudgetVerdict
from pytest_gpumem.records.budget import Budget, Tolerance

path, shard = Path(sys.argv[1]), sys.argv[2]
for number in range(50):
    with files.undisturbed(path):
        budget = Budget.load(path)
        budget.apply(BudgetVerdict(f"a.py::test_{shard}_{number}", "A card", "new", 1), Tolerance())
        budget.save(path)
"""


def test_shards_that_write_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "b.toml"
    Budget().save(path)
    shards = [
        subprocess.Popen([sys.executable, "-c", SHARD, str(path), str(number)])
        for number in range(4)
    ]

    assert [shard.wait(120) for shard in shards] == [0] * 4
    assert len(Budget.load(path).plain()) == 200


# One test


@pytest.mark.parametrize(
    ("own", "allowed", "verdict"),
    [
        (Own(100), Own(100), "within"),
        (Own(102), Own(100), "within"),
        (Own(103), Own(100), "above"),
        (Own(1), Own(0), "above"),
        # It filled a cache that another test fills as a rule, with a copy while it did so.
        (Own(150, left=50), Own(100), "left"),
        (Own(200, left=50), Own(100), "left"),
        (Own(203, left=50), Own(100), "above"),
        # It was written with the cache filled by it: both orders are within.
        (Own(150, left=50), Own(150, left=50), "within"),
        (Own(100), Own(150, left=50), "within"),
        (Own(154, left=50), Own(150, left=50), "above"),
    ],
)
def test_a_test_is_above_its_budget_beyond_the_tolerance(own, allowed, verdict):
    assert judge(own, allowed, TOLERANCE) == verdict


@pytest.mark.parametrize(
    ("tolerance", "limit"),
    [((0.0, 0), 1000), ((0.02, 0), 1020), ((0.02, 50), 1050), ((0.1, 50), 1100)],
)
def test_the_larger_tolerance_holds(tolerance, limit):
    assert Tolerance(*tolerance).limit(1000) == limit


def test_the_sentence_names_the_growth():
    text = why_above(110 * MIB, "NVIDIA L4", 100 * MIB)
    assert text == (
        "took 110.00 MiB of NVIDIA L4, 10.00 MiB (10.0%) more than its budget of 100.00 MiB"
    )
    assert "%" not in why_above(5, "NVIDIA L4", 0)


# A run


def test_each_test_has_a_verdict():
    found = judged(
        [
            taken("a.py::same", 100),
            taken("a.py::grown", 110),
            taken("a.py::fresh", 100),
            taken("a.py::unused", 0),
            taken("a.py::failed", 50, outcome="failed"),
            taken("a.py::above_and_error", 110, outcome="error"),
            taken("a.py::error", 50, outcome="error"),
            taken("a.py::again", 500, outcome="rerun"),
            taken("a.py::again", 100),
            taken("a.py::on_cpu", 5, step="cpu"),
        ],
        budget(
            same=(100,), grown=(100,), failed=(10,), above_and_error=(100,), error=(100,),
            again=(100,), on_cpu=(1,), elsewhere=(100,),
        ),
    )  # fmt: skip

    assert found == {
        "a.py::same": "within",
        "a.py::grown": "above",
        "a.py::fresh": "new",
        "a.py::above_and_error": "above",
        "a.py::again": "within",
    }


def test_of_two_cards_of_a_model_the_one_counts_on_which_it_took_more():
    lower = taken("a.py::x", 50, card="GPU-2")
    both = taken("a.py::x", 100)._replace(cards=(*taken("a.py::x", 100).cards, *lower.cards))
    (found,) = verdicts(run(both), budget(x=(60,)), (), TOLERANCE)

    assert (found.own, found.verdict) == (100, "above")


@pytest.mark.parametrize(
    ("new", "gone", "before"),
    [
        # Another name in the file, and another file with the name.
        ([("a.py::y", 101)], {"x": 100}, {"a.py::y": "a.py::x"}),
        ([("b.py::x", 500)], {"x": 100}, {"b.py::x": "a.py::x"}),
        ([("b.py::T::x[1::2]", 500)], {"x[1::2]": 100}, {"b.py::T::x[1::2]": "a.py::x[1::2]"}),
        # Another size, or a choice.
        ([("a.py::y", 300)], {"x": 100}, {}),
        ([("a.py::y", 100), ("a.py::z", 100)], {"x": 100}, {}),
        ([("a.py::z", 100)], {"x": 100, "y": 100}, {}),
    ],
)
def test_a_renamed_test_is_recognised_where_there_is_no_choice(new, gone, before):
    lines = budget(**{name: (own,) for name, own in gone.items()})
    lost = {f"a.py::{name}" for name in gone}
    found = verdicts(run(*(taken(*each) for each in new)), lines, lost, TOLERANCE)

    assert {each.nodeid: each.before for each in found if each.before} == before
    left = {each.nodeid for each in found if each.verdict == "gone"}
    assert left == lost - set(before.values())


def test_an_update_writes_and_lowers_and_never_raises():
    lines = budget(
        less=(100,), more=(100,), slightly=(100,), hardly=(100,), lost=(100,), old=(7,), other=(1,)
    )
    lines.apply(BudgetVerdict("a.py::lost", "Tesla T4", "new", 3), TOLERANCE)
    tests = [
        taken("a.py::less", 60),
        taken("a.py::more", 300),
        taken("a.py::slightly", 101),
        taken("a.py::hardly", 99),
        taken("a.py::fresh", 50),
        taken("b.py::old", 900),
    ]
    written = [
        each.nodeid
        for each in verdicts(run(*tests), lines, {"a.py::lost", "a.py::old"}, TOLERANCE)
        if lines.apply(each, TOLERANCE)
    ]

    assert written == ["a.py::less", "a.py::fresh", "b.py::old", "a.py::lost"]
    assert lines.plain() == {
        "a.py::less": {"NVIDIA L4": (60, 0)},
        "a.py::more": {"NVIDIA L4": (100, 0)},
        "a.py::slightly": {"NVIDIA L4": (100, 0)},
        "a.py::hardly": {"NVIDIA L4": (100, 0)},
        "a.py::lost": {"Tesla T4": (3, 0)},
        "a.py::fresh": {"NVIDIA L4": (50, 0)},
        "b.py::old": {"NVIDIA L4": (900, 0)},
        "a.py::other": {"NVIDIA L4": (1, 0)},
    }


def test_the_report_says_how_one_that_filled_a_cache_is_judged():
    left = BudgetVerdict("a.py::t", "NVIDIA L4", "left", 3 * MIB, 2 * MIB, MIB)
    assert list(report.lines([left], 2)) == [
        "  1 not judged: they left more behind than when their budget was written",
        "    a.py::t: 3.00 MiB, budget 1.00 MiB, left 2.00 MiB, NVIDIA L4",
        "    --gpumem-leak-warmups=1 judges those that filled a cache",
    ]


def test_the_report_tells_what_somebody_has_to_look_at():
    tests = [taken("a.py::same", 10), taken("a.py::fine", 10)]
    tests += [taken(f"a.py::grown_{number}", 200 * MIB + number) for number in range(3)]
    lines = budget(same=(10,), fine=(10,), lost=(5,), **{f"grown_{n}": (MIB,) for n in range(3)})
    found = verdicts(run(*tests), lines, {"a.py::lost"}, TOLERANCE)

    assert list(report.lines(found, 2)) == [
        "  3 above their budget",
        "    a.py::grown_2: 200.00 MiB, budget 1.00 MiB, NVIDIA L4",
        "    a.py::grown_1: 200.00 MiB, budget 1.00 MiB, NVIDIA L4",
        "    and 1 more",
        "    --gpumem-peaks=offenders tells line by line what was alive",
        "  1 gone (--gpumem-budget-update writes them)",
        "    a.py::lost, NVIDIA L4",
    ]
    assert list(report.lines(verdicts(run(*tests[:2]), lines, (), TOLERANCE), 2)) == []


def test_a_file_is_undisturbed_where_there_is_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError), files.undisturbed(tmp_path / "none" / "b.toml"):
        pass
