"""What is shown of main memory, and of tests whose allocations were made to fail."""

from __future__ import annotations

import pytest

from pytest_gpumem import records
from pytest_gpumem.records import (
    Card,
    LostWorker,
    Proof,
    RamUsage,
    RecordedTest,
    Refusal,
    RunRecord,
)
from pytest_gpumem.reports import proofs, ram, terminal

MIB = 2**20
CARDS = (Card("GPU-1", "A card", 1024 * MIB), Card("GPU-2", "A card", 5000))


def recorded(name: str, worker: str = "", **more: object) -> RecordedTest:
    return RecordedTest(name, "passed", 0.5, worker)._replace(**more)


def run_of(*tests: RecordedTest, **more: object) -> RunRecord:
    run = RunRecord(records.SCHEMA, "on", CARDS, simulated=True, workers=2, tests=tests)
    return run._replace(**more)


def used(peak: int, kept: int, children: int = 0) -> RamUsage:
    return RamUsage(100 * MIB, (100 + peak) * MIB, kept * MIB, children * MIB)


def test_who_took_or_kept_most_main_memory_comes_first_each_test_once():
    run = run_of(
        recorded("a.py::small", ram=used(3, 0)),
        recorded("a.py::again", ram=used(2, 1)),
        recorded("a.py::again", ram=used(50, 9, children=7)),
        recorded("a.py::keeps", ram=used(1, 20)),
        recorded("a.py::not_measured"),
        worker_ram=300 * MIB,
    )

    assert list(ram.lines(run, 2)) == [
        "   own peak    children        kept  test",
        "  50.00 MiB    7.00 MiB    9.00 MiB  a.py::again",
        "   1.00 MiB               20.00 MiB  a.py::keeps",
        "... 1 more test; --gpumem-top=0 shows all",
        "  a worker kept 300.00 MiB at most, without the files that it maps",
    ]
    alone = list(ram.lines(run._replace(workers=0), 10))[-1]
    assert alone == "  the process kept 300.00 MiB at most, without the files that it maps"
    assert list(ram.lines(run_of(recorded("a.py::a")), 10)) == []


@pytest.mark.parametrize(
    ("kept", "sentences"),
    [
        ((1, 4, 2, 3, 5), ["5.00 MiB", "4.00 MiB", "3.00 MiB", "3.00 MiB kept by 2 other tests"]),
        ((0, -2), ["its tests kept nothing"]),
        ((), ["--gpumem-ram tells which tests keep it"]),
    ],
)
def test_a_lost_worker_is_told_with_the_tests_that_kept_most(kept, sentences):
    tests = [recorded(f"a.py::t{n}", "gw1", ram=used(9, size)) for n, size in enumerate(kept)]
    lost = LostWorker("gw1", "SIGKILL ended it", "a.py::dies")
    run = run_of(*tests, lost=(lost,))
    found = list(ram.who_kept(run, "gw1"))

    assert len(found) == len(sentences)
    assert all(line.startswith(said) for line, said in zip(found, sentences, strict=True)), found
    shown = [line.text for line in terminal.lines(run, 10)]
    assert f"  gw1 at a.py::dies: {lost.why}" in shown
    assert f"      {found[0]}" in shown


def test_each_allocation_that_a_test_did_not_recover_from_is_told_with_a_line_to_repeat_it():
    good = Proof(3, tuple(Refusal(at, "recovered") for at in (1, 2, 3)))
    bad = Proof(
        5,
        (
            Refusal(1, "leaked", leaked=2 * MIB),
            Refusal(2, "other error", "KeyError: 'x'", MIB),
            Refusal(3, "not reached"),
        ),
        "more are not tried",
        proofs.simulating(CARDS, 16 * MIB, compiled=True),
    )
    tests = [
        recorded("a.py::good", proof=good),
        recorded("a.py::bad[a b]", proof=bad),
        recorded("a.py::untried", proof=Proof(7, (), "it fails undisturbed")),
        recorded("a.py::other"),
    ]
    cards = "--gpumem-simulate 1024MiB,5000 --gpumem-simulate-context 16MiB"
    again = f"      pytest -p gpumem {cards} --gpumem-simulate-compiled --gpumem-oom-at"

    assert list(proofs.lines(tests, 10)) == [
        (
            "  6 allocations of 2 tests failed: 3 recovered, 1 leaked, 1 ended in another error, "
            "1 made fewer allocations this time"
        ),
        "  at allocation 1 it leaked 2.00 MiB",
        f"{again} 1 'a.py::bad[a b]'",
        "  at allocation 2 it ended in another error, and leaked 1.00 MiB: KeyError: 'x'",
        f"{again} 2 'a.py::bad[a b]'",
        "  3 of 5 allocations of a.py::bad[a b] were tried: more are not tried",
        "  0 of 7 allocations of a.py::untried were tried: it fails undisturbed",
    ]
    few = list(proofs.lines(tests, 1))
    assert few[3:] == [
        "  and 1 more",
        "  3 of 5 allocations of a.py::bad[a b] were tried: more are not tried",
        "  and so of 1 more test",
    ]
    assert list(proofs.lines([recorded("a.py::other")], 10)) == []
