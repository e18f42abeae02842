from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem import files
from pytest_gpumem.records import CardUsage, RamUsage, RecordedTest
from pytest_gpumem.scheduling import history as histories
from pytest_gpumem.scheduling.history import (
    FAMILY_MARGIN,
    MARGIN,
    PEAKS,
    History,
    Learned,
    expected_peak,
    family,
    module,
    with_margin,
)

nodeids = st.text(min_size=1, max_size=20) | st.builds(
    "tests/{}.py::test_{}[{}]".format,
    st.sampled_from("ab"),
    st.sampled_from("xy"),
    st.text(max_size=5),
)
runs = st.lists(
    st.tuples(nodeids, st.integers(0, 2**50), st.floats(0, 10**6), st.booleans()), max_size=30
)


def history_of(noted: list[tuple[str, int, float, bool]]) -> History:
    history = History()
    for run in noted:
        history.note(*run)
    return history


def saved(history: History, path: Path) -> History:
    history.save(path)
    return History.load(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("history") / "history.json"


@given(runs)
def test_what_is_saved_is_loaded_in_the_same_order(file, noted) -> None:
    history = history_of(noted)
    loaded = saved(history, file)
    assert not loaded.problem
    assert list(loaded) == list(history)


@given(runs, st.data())
def test_a_damaged_file_is_one_sentence_or_a_history(file, noted, data) -> None:
    history_of(noted).save(file)
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place : place + data.draw(st.integers(1, 9))] = data.draw(st.binary(max_size=9))
    file.write_bytes(content)
    loaded = History.load(file)
    if loaded.problem:
        assert len(loaded) == 0
        assert str(file) in loaded.problem
        assert "\n" not in loaded.problem


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(values, values, values, values)
def test_an_entry_with_foreign_values_is_never_a_traceback(
    file, peaks, duration, count, gpu
) -> None:
    entry = {"peaks": peaks, "duration": duration, "runs": count, "gpu": gpu}
    file.write_text(json.dumps({"schema": 1, "tests": {"t": entry}}))
    loaded = History.load(file)
    assert bool(loaded.problem) == (len(loaded) == 0)


@pytest.mark.parametrize(
    "content", ["", "[" * 100_000, "[]", '{"schema": 2, "tests": {}}', '{"schema": 1}', "\udcff"]
)
def test_a_file_that_is_no_history_is_said_to_be_none(file, content) -> None:
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    loaded = History.load(file)
    assert len(loaded) == 0
    assert loaded.problem.startswith("the learned peaks in ")


def test_no_file_is_an_empty_history_without_a_word(tmp_path) -> None:
    loaded = History.load(tmp_path / "none.json")
    assert len(loaded) == 0
    assert loaded.problem == ""


def test_the_file_has_one_line_per_test(tmp_path) -> None:
    history_of([("a.py::x", 10, 0.5, True), ("a.py::y", 0, 1.0, False)]).save(tmp_path / "h.json")
    lines = (tmp_path / "h.json").read_text().splitlines()
    assert lines[3] == (
        '  "a.py::x": {"peaks": [10], "fixtures": 0, "duration": 0.5, "runs": 1, "gpu": true},'
    )
    assert len(lines) == 7


def test_saving_makes_the_directory_and_leaves_no_other_file(tmp_path) -> None:
    history_of([("a.py::x", 10, 0.5, True)]).save(tmp_path / "new" / "h.json")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["h.json"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "h.json"
    history_of([("a.py::x", 10, 0.5, True)]).save(path)
    before = path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        history_of([("a.py::y", 10, 0.5, True)]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@given(runs, st.integers(1, 5))
def test_it_remembers_the_tests_seen_last(noted, capacity) -> None:
    history = History(capacity)
    for run in noted:
        history.note(*run)
    latest = list(dict.fromkeys(run[0] for run in reversed(noted)))[:capacity]
    assert [nodeid for nodeid, _ in history] == latest[::-1]


@given(st.lists(st.integers(0, 2**50), min_size=1, max_size=40))
def test_the_expected_peak_covers_most_of_the_latest_peaks(peaks) -> None:
    history = history_of([("a.py::x", peak, 1.0, True) for peak in peaks])
    latest = peaks[-histories.PEAKS :]
    expected = history["a.py::x"].peak
    covered = sum(peak <= expected for peak in latest)
    assert covered >= histories.PERCENTILE * len(latest)
    assert expected <= max(latest) * histories.MARGIN + 1
    if len(latest) < 5:
        assert covered == len(latest)


def test_one_outlier_in_eight_is_forgotten() -> None:
    history = history_of([("a.py::x", peak, 1.0, True) for peak in [100] * 7 + [9_000]])
    assert history["a.py::x"] == Learned(110, 1.0, 8, gpu=True)


def test_a_mark_counts_before_what_was_learned_and_that_before_the_family() -> None:
    history = history_of([("a.py::x[1]", 100, 2.0, True), ("a.py::y", 500, 4.0, True)])
    assert history.expect("a.py::x[1]", 7)[:4] == (7, 2.0, "mark", True)
    assert history.expect("a.py::x[1]")[:4] == (110, 2.0, "learned", True)
    assert history.expect("a.py::x[2]")[:4] == (130, 2.0, "family", True)
    assert history.expect("a.py::z")[:4] == (650, 3.0, "family", True)
    assert history.expect("b.py::z")[:4] == (None, histories.DURATION, "guess", False)
    assert history.expect("b.py::z", 7)[:4] == (7, histories.DURATION, "mark", True)


def test_what_fixtures_hold_is_expected_too_but_is_part_of_a_mark() -> None:
    history = History()
    history.note("a.py::x", 10, 1.0, gpu=True, fixtures=70)
    assert history.expect("a.py::x").fixtures == 70
    assert history.expect("a.py::y").fixtures == 70
    assert history.expect("a.py::x", 7).fixtures == 7  # of the seven
    assert history.expect("a.py::y", 7).fixtures == 0  # whether it uses them is not known
    history.note("a.py::x", 10, 1.0, gpu=True, fixtures=20)
    assert history["a.py::x"].fixtures == 20


def test_a_run_teaches_by_the_tests_that_came_to_their_end() -> None:
    usage = CardUsage("GPU-1", 5, 9, 0, 8, 12, 0, 0, None, extra=7, fixture_bytes=3)
    run = [
        RecordedTest("a.py::x", "rerun", 9.0, "gw0", (usage._replace(extra=1),)),
        RecordedTest("a.py::x", "passed", 2.0, "gw0", (usage,)),
        RecordedTest("a.py::y", "failed", 3.0, "gw1"),
        RecordedTest("a.py::z", "skipped", 0.0, "gw1"),
        RecordedTest("a.py::w", "crashed", 0.0, "gw1"),
        RecordedTest("a.py::v", "failed", 1.0, "gw1", (usage,), oom="CUDA out of memory"),
    ]
    history = History()
    history.learn(run)
    assert dict(history) == {
        "a.py::x": (expected_peak([7]), 2.0, 1, True, 3, 0),
        "a.py::y": (0, 3.0, 1, False, 0, 0),
        "a.py::v": (0, 1.0, 1, True, 0, 0),
    }
    assert history.expect("a.py::v") == (None, 1.0, "learned", True, 0, 0, 0)


def test_main_memory_is_learned_where_a_run_measured_it() -> None:
    def test(name: str, peak: int, kept: int = 0) -> RecordedTest:
        return RecordedTest(name, "passed", 1.0, "", ram=RamUsage(100, 100 + peak, kept))

    history = History()
    history.learn([test("a.py::x[1]", 40), RecordedTest("a.py::y", "passed", 1.0, "")], 1000)
    history.learn([test("a.py::x[1]", 20)], 300)  # a run of one test says little of the others
    unmeasured = RecordedTest("a.py::x[1]", "passed", 1.0, "")
    history.learn([unmeasured])
    again = History.read(history.text())

    for known in (history, again):
        assert known.expect("a.py::x[1]").ram == expected_peak([40, 20])
        assert known.expect("a.py::x[2]").ram == with_margin(40, FAMILY_MARGIN)
        assert known.expect("a.py::y").ram == 0
        assert known.worker_ram == with_margin(1000, MARGIN)
    assert History().worker_ram == 0
    for _ in range(PEAKS):
        history.learn([], 200)
    assert history.worker_ram == with_margin(200, MARGIN)


def test_a_history_without_main_memory_is_written_as_before() -> None:
    assert "ram" not in history_of([("a.py::x", 7, 2.0, True)]).text()


@pytest.mark.parametrize("told", [-1, 1, "1", [1.5], [-1], [True], {"a": 1}])
def test_main_memory_that_is_no_size_is_no_history(told: object) -> None:
    entry = {"peaks": [], "fixtures": 0, "duration": 1.0, "runs": 1, "gpu": False}
    for plain in (
        {"schema": 1, "tests": {}, "worker_ram": told},
        {"schema": 1, "tests": {"a.py::x": entry | {"ram": told}}},
    ):
        with pytest.raises(ValueError, match=r"ram is no list|entry for 'a.py::x'"):
            History.read(json.dumps(plain))


def test_a_test_that_never_used_a_card_has_a_duration_and_no_peak() -> None:
    history = history_of([("a.py::x", 0, 2.0, False)])
    assert history.expect("a.py::x")[:4] == (None, 2.0, "learned", False)
    assert history.expect("a.py::y")[:4] == (None, 2.0, "family", False)


def test_what_is_noted_later_changes_what_is_expected_of_relatives() -> None:
    history = history_of([("a.py::x[1]", 100, 2.0, True)])
    assert history.expect("a.py::x[2]").peak == 130
    history.note("a.py::x[3]", 200, 2.0, True)
    assert history.expect("a.py::x[2]").peak == 260


few = st.builds("{}.py::{}[{}]".format, *map(st.sampled_from, ("ab", "xy", "123")))
noted_few = st.tuples(few, st.integers(0, 9), st.floats(0, 10**6), st.booleans(), st.integers(0, 9))


@given(st.lists(noted_few, max_size=30), st.integers(1, 6), few)
def test_relatives_are_summed_up_as_if_all_were_looked_at_each_time(noted, capacity, asked) -> None:
    history = History(capacity)
    for run in noted:
        assert history.expect(asked) == naive_expectation(history, asked)
        history.note(*run)
    assert history.expect(asked) == naive_expectation(history, asked)


def naive_expectation(history: History, nodeid: str) -> histories.Expectation:
    known = json.loads(history.text())["tests"]
    if nodeid in known:
        return history.expect(nodeid)
    kin = [known[each] for each in known if family(each) == family(nodeid)]
    kin = kin or [known[each] for each in known if module(each) == module(nodeid)]
    if not kin:
        return histories.Expectation(None, histories.DURATION, "guess", gpu=False)
    peaks = [peak for each in kin for peak in each["peaks"]]
    return histories.Expectation(
        max(peaks) * 130 // 100 if peaks else None,
        pytest.approx(sum(each["duration"] for each in kin) / len(kin), abs=1e-9),
        "family",
        any(each["gpu"] for each in kin),
        max(each["fixtures"] for each in kin),
    )


def test_what_a_test_costs_does_not_depend_on_how_many_came_before() -> None:
    def steps(tests: int) -> int:
        """Count the lines of Python that a run of ``tests`` tests takes in the history."""
        history, count = History(), 0

        def line(*_: object) -> Callable[..., object]:
            nonlocal count
            count += 1
            return line

        before = sys.gettrace()
        sys.settrace(line)
        try:
            for number in range(tests):
                history.expect(f"a.py::x[{number}]")
                history.note(f"a.py::x[{number}]", number, 1.0, gpu=True)
        finally:
            sys.settrace(before)
        return count

    assert steps(400) < 2.5 * steps(200)


@pytest.mark.parametrize(
    ("nodeid", "function", "file_part"),
    [
        ("tests/a.py::T::x[1-a::b[2]]", "tests/a.py::T::x", "tests/a.py"),
        ("tests/a.py::x", "tests/a.py::x", "tests/a.py"),
        ("odd[dir]/a.py::x[1]", "odd[dir]/a.py::x", "odd[dir]/a.py"),
        ("tests/a.py", "tests/a.py", "tests/a.py"),
        ("", "", ""),
    ],
)
def test_a_node_id_has_a_family_and_a_module(nodeid, function, file_part) -> None:
    assert family(nodeid) == function
    assert module(nodeid) == file_part
