"""The section of a run in the terminal: what is shown, in which order, how much of it."""

from __future__ import annotations

import re

import pytest

from pytest_gpumem import records
from pytest_gpumem.records import (
    Alive,
    AliveGroup,
    BudgetVerdict,
    Card,
    CardUsage,
    FixtureUsage,
    Holder,
    Left,
    Process,
    RecordedTest,
    RunRecord,
    ScopeUsage,
)
from pytest_gpumem.reports import terminal

MIB = 2**20


def usage(peak: int, baseline: int = 0, leaked: int = 0, where: str = "") -> CardUsage:
    holders = (Holder(where, (4,), "float32", leaked),) if where else ()
    made = CardUsage("GPU-1", baseline, peak, leaked, 0, 0, 0, 0, None)
    return made._replace(leaked=leaked, holders=holders)


def recorded(name: str, *cards: CardUsage, **more: object) -> RecordedTest:
    return RecordedTest(name, "passed", 0.5, "", cards)._replace(**more)


def shown(
    *tests: RecordedTest,
    top: int = 10,
    verbosity: int = 0,
    budgets: tuple[BudgetVerdict, ...] = (),
    width: int = 0,
) -> list[str]:
    run = RunRecord(
        schema=records.SCHEMA,
        mode="on",
        cards=(Card("GPU-1", "A card", 1000 * MIB),),
        simulated=False,
        workers=0,
        tests=tests,
        budgets=budgets,
    )
    return [line.text for line in terminal.lines(run, top, verbosity, width)]


def table(lines: list[str]) -> list[str]:
    (head,) = [n for n, line in enumerate(lines) if line.endswith("  test")]
    rows = lines[head + 1 :]
    return rows[: rows.index("")] if "" in rows else rows


def cells(row: str) -> list[str]:
    return re.split(r"  +", row.strip())


def test_a_run_without_a_card_has_no_section():
    assert shown(recorded("a")) == []


def test_the_table_ranks_by_what_each_test_took_itself():
    standing = [recorded(f"idle{n}", usage(100 * MIB, 100 * MIB)) for n in range(20)]
    lines = shown(*standing, recorded("mine", usage(90 * MIB)), recorded("small", usage(4096)))

    assert lines[0].startswith("2 of 22 tests used VRAM, highest own peak 90.00 MiB, 0 leaks, ")
    assert [cells(row) for row in table(lines)] == [
        ["90.00 MiB", "9%", "90.00 MiB", "0 B", "mine"],
        ["4.00 KiB", "<1%", "4.00 KiB", "0 B", "small"],
    ]


def test_a_test_that_ran_again_has_one_row_with_its_highest_peak():
    first = recorded("again", usage(5 * MIB), outcome="rerun")
    (row,) = table(shown(first, recorded("again", usage(3 * MIB), step="alone")))
    assert cells(row)[0] == "5.00 MiB"


def test_long_lists_are_bounded_and_say_by_how_much():
    tests = [recorded(f"t{n}", usage((n + 1) * MIB)) for n in range(30)]

    assert len(table(shown(*tests))) == 11
    assert table(shown(*tests))[-1] == "... 20 more tests; --gpumem-top=0 shows all"
    assert len(table(shown(*tests, top=0))) == len(table(shown(*tests, verbosity=2))) == 30


@pytest.mark.parametrize(
    ("own", "part"),
    [
        (1, "<1%"),
        (10 * MIB - 1, "<1%"),
        (10 * MIB, "1%"),
        (16 * MIB, "2%"),
        (900 * MIB, "90%"),
    ],
)
def test_the_part_of_the_card_is_never_nothing_where_something_was_taken(own, part):
    (row,) = table(shown(recorded("t", usage(own))))
    assert cells(row)[1] == part


def test_a_narrow_terminal_has_nodeids_on_lines_of_their_own():
    """At 60 columns every name breaks, at 80 the longer one, at 120 none."""
    long, short = "tests/test_search.py::test_batches[a b]", "tests/test_a.py::test_b"
    tests = (
        recorded(long, usage(300 * MIB), worker="gw0"),
        recorded(short, usage(90 * MIB, leaked=2 * MIB, where="tests/test_a.py: module global A")),
    )
    first, second = " 300.00 MiB      30%  300.00 MiB         0 B", (
        "  90.00 MiB       9%   90.00 MiB    2.00 MiB"
    )  # fmt: skip

    assert table(shown(*tests, width=60)) == ([first, f"    {long} [gw0]", second, f"    {short}"])
    assert table(shown(*tests, width=80)) == [first, f"    {long} [gw0]", f"{second}  {short}"]
    assert table(shown(*tests, width=120)) == [f"{first}  {long} [gw0]", f"{second}  {short}"]
    assert max(map(len, shown(*tests, width=60))) <= 60


def test_two_hundred_leaks_of_one_global_are_one_entry():
    tests = [
        recorded(f"t{n}", usage(MIB, leaked=MIB, where=f"test_x.py: module global KEPT[{n}]"))
        for n in range(200)
    ]
    large = recorded("large", usage(MIB, leaked=300 * MIB, where="test_x.py: module global OTHER"))
    lines = shown(*tests, large)

    assert "201 leaks (500.00 MiB)" in lines[0]
    leaked = lines[lines.index("leaked") :]
    assert leaked == [
        "leaked",
        "  300.00 MiB by large",
        "      held by test_x.py: module global OTHER",
        "          tensor float32 4, 300.00 MiB in all",
        "    1.00 MiB by t0",
        "      held by test_x.py: module global KEPT[0]",
        "          tensor float32 4, 1.00 MiB in all",
        "      likewise 199.00 MiB in 199 leaks; -v shows all",
    ]
    verbose = shown(*tests, large, verbosity=1)
    assert len(verbose) == len(lines) + 199
    assert verbose[-1] == "            1.00 MiB by t199"


def test_leaks_whose_holder_nobody_found_are_not_thrown_together():
    lines = shown(*[recorded(f"t{n}", usage(MIB, leaked=MIB)) for n in range(12)])

    assert sum(" by t" in line for line in lines) == 10
    assert lines[-1] == "  ... 2 more leaks, 2.00 MiB; --gpumem-top=0 shows all"


def test_quiet_names_whoever_leaked():
    fixture = FixtureUsage("model", "module", "GPU-1", MIB, MIB, 0, leaked=MIB)
    lines = shown(
        recorded("a", usage(MIB, leaked=2 * MIB)),
        recorded("b", fixtures=(fixture,)),
        recorded("c", usage(MIB)),
        verbosity=-1,
    )

    assert [line.strip() for line in lines[1:]] == [
        "2.00 MiB leaked by a",
        "1.00 MiB leaked by fixture model (module), torn down after b",
    ]


def test_quiet_names_each_kind_of_leak_once():
    leaks = [
        recorded(f"{kind}{at}", usage(MIB, leaked=(at + 1) * MIB, where=f"t.py: {kind}[{at}]"))
        for kind in "abc"
        for at in range(2)
    ]
    assert [line.strip() for line in shown(*leaks, top=2, verbosity=-1)[1:]] == [
        "2.00 MiB leaked by a1, likewise 1.00 MiB in 1 leak",
        "2.00 MiB leaked by b1, likewise 1.00 MiB in 1 leak",
        "... 2 more leaks; --gpumem-top=0 shows all",
    ]


def test_what_ran_out_is_grouped_by_cause():
    oom = "CUDA out of memory. Tried to allocate {}.00 MiB"
    felled = [recorded(f"t{n}", outcome="failed", oom=oom.format(n + 20)) for n in range(150)]
    stranger = recorded(
        "beside", outcome="failed", oom=oom.format(7), beside=(Process(7, "vllm", 9 * MIB),)
    )
    sibling = Process(8, "python -c import sys", 9 * MIB, worker="gw1")
    felled[0] = felled[0]._replace(beside=(sibling,))
    felled[2] = felled[2]._replace(oom="CUDA out of memory. Tried to allocate 1.50 GiB")
    lines = shown(*felled, stranger)

    assert "151 failures out of memory" in lines[0]
    assert "            1.50 GiB for t2" in shown(*felled, stranger, verbosity=1)
    assert lines[lines.index("out of memory") :] == [
        "out of memory",
        "  t0",
        "      CUDA out of memory. Tried to allocate 20.00 MiB",
        "      beside it: worker gw1 of this run holds 9.00 MiB",
        "      likewise 149 tests; -v shows all",
        "  beside",
        "      CUDA out of memory. Tried to allocate 7.00 MiB",
        "      beside it: process 7 (vllm) holds 9.00 MiB",
    ]


def test_who_asks_for_more_than_the_card_is_told_how_large_it_is():
    def told(size):
        oom = f"CUDA out of memory. Tried to allocate {size}"
        lines = shown(recorded("t", outcome="failed", oom=oom))
        return lines[lines.index("out of memory") + 3 :]

    assert told("9.00 GiB") == ["      more than the card has, 1000.00 MiB"]
    assert told("1001.00 MiB") == []  # as 1000.00 MiB may be rounded
    assert told("20.00 MiB") == []
    assert told("1.2.3 MiB") == []


def test_whoever_left_a_limit_is_named_where_it_felled_another():
    culprit = recorded("culprit", left=(Left("memory fraction of cuda:0", "1", "0.25"),))
    oom = "CUDA out of memory. Tried to allocate 1.00 GiB (900.00 MiB allowed)"
    lines = shown(culprit, recorded("innocent", outcome="failed", oom=oom))
    lifted = shown(
        culprit,
        recorded("lifts", left=(Left("memory fraction of cuda:0", "0.25", "1", put_back=True),)),
        recorded("innocent", outcome="failed", oom=oom),
    )

    sentence = "      memory fraction of cuda:0 is 0.25: culprit left it so"
    assert sentence in lines
    assert sentence not in lifted


def test_a_fixture_is_one_line_however_often_it_was_set_up():
    def instance(took: int, worker: str) -> RecordedTest:
        made = FixtureUsage("model", "session", "GPU-1", took, took)
        return recorded("t", fixtures=(made,), worker=worker)

    lines = shown(*(instance(n * MIB, f"gw{n}") for n in range(1, 5)))
    assert cells(lines[-1]) == ["4.00 MiB", "4.00 MiB", "model (session, largest of 4)"]


def test_what_workers_left_of_a_module_is_held_by_whoever_holds_most():
    small, large = (Holder(f"test_a.py: {name}", (4,), "float32", size) for name, size in
                    (("KEPT[0]", 4000), ("Cache.store", 60 * MIB)))  # fmt: skip
    lines = shown(
        recorded("a", scopes=(ScopeUsage("module", "test_a.py", "GPU-1", 4096, (small,)),)),
        recorded("b", scopes=(ScopeUsage("module", "test_a.py", "GPU-1", 61 * MIB, (large,)),)),
    )

    assert lines[-1] == "  61.00 MiB  test_a.py, held by Cache.store"


def test_who_only_tears_a_fixture_down_used_no_vram():
    model = FixtureUsage("model", "module", "GPU-1", 8 * MIB, 8 * MIB)
    lines = shown(
        recorded("a", usage(MIB), fixtures=(model,)),
        recorded("b", fixtures=(model._replace(released=8 * MIB),)),
        recorded("c", fixtures=(model._replace(name="own", released=8 * MIB),)),
    )

    assert lines[0].startswith("2 of 3 tests used VRAM")


def group(size: int, where: str = "", owner: str = "this test", **more: object) -> AliveGroup:
    return AliveGroup(size * MIB, owner, "unknown", where)._replace(**more)


def alive(*groups: AliveGroup, moment: str = "peak", **more: object) -> Alive:
    size = sum(each.size for each in groups)
    return Alive("GPU-1", moment, size, groups, moment != "failed")._replace(**more)


def section(lines: list[str], title: str) -> list[str]:
    """Return the lines below a title."""
    rest = lines[lines.index(title) + 1 :] if title in lines else []
    return rest[: rest.index("")] if "" in rest else rest


def test_what_was_alive_is_told_by_line_and_owner():
    groups = (
        group(20, "t.py:6 take"),
        group(5, "t.py:9 run", kind="activation"),
        group(4, "t.py:9 run", kind="gradient"),
        group(3, "", "left by t.py::test_b"),
        group(2, "t.py:1 model", "fixture 'model' (module)", kind="parameter"),
        group(1, "t.py:7 take"),
        group(1, "t.py:8 take"),
    )
    test = recorded("t.py::test_a", alive=(alive(*groups, note="cut", snapshot="/x.pickle"),))
    assert section(shown(test), "alive") == [
        "  t.py::test_a: 36.00 MiB at its peak",
        "        20.00 MiB  t.py:6 take",
        "         9.00 MiB  t.py:9 run, activation, gradient",
        "         3.00 MiB  left by t.py::test_b",
        "         2.00 MiB  t.py:1 model, parameter, fixture 'model' (module)",
        "         1.00 MiB  t.py:7 take",
        "         1.00 MiB  in 1 more; -v shows all",
        "      cut",
        "      snapshot: /x.pickle",
    ]
    assert "         1.00 MiB  t.py:8 take" in shown(test, verbosity=1)


def test_of_several_attempts_the_recorded_one_is_told_and_recovery_only_with_lines():
    full = alive(group(9, "t.py:6 take"), moment="out of memory", refused=8 * MIB)
    left = alive(group(7, dtype="uint8", shape=(7, MIB), allocations=2), moment="failed")
    oom = {"oom": "out of memory"}
    tests = [
        recorded("felled", outcome="failed", alive=(left,), **oom),
        recorded("told", outcome="rerun", alive=(left,), **oom),
        recorded("told", step="alone", outcome="failed", alive=(full,), **oom),
        recorded("recovered", outcome="rerun", alive=(left,), **oom),
        recorded("recovered", step="cpu"),
    ]
    assert section(shown(*tests), "alive") == [
        "  told: 9.00 MiB when it ran out of memory, asking for 8.00 MiB",
        "         9.00 MiB  t.py:6 take",
        "  felled: 7.00 MiB still held by tensors when it had failed",
        "         7.00 MiB  2 tensors uint8 7x1048576",
    ]
    assert section(shown(*tests, top=1), "alive")[-1] == "  ... 1 more; --gpumem-top=0 shows all"
    unseen = recorded("unseen", outcome="failed", **oom)
    assert section(shown(*tests, unseen), "alive")[-1] == (
        "  not looked at: 1 further test out of memory; --gpumem-peaks=offenders records all"
    )
    assert "alive" not in shown(unseen)


def test_tests_that_failed_beside_the_same_are_told_together():
    same = alive(group(7, "", "left by t.py::test_leaks"), moment="failed")
    other = alive(group(9, "", "left by t.py::test_leaks"), moment="failed")
    tests = [
        recorded(f"t{number}", outcome="failed", oom="out of memory", alive=(each,))
        for number, each in enumerate([same, same, other, same, same, same])
    ]
    expected = [
        "  t2: 9.00 MiB still held by tensors when it had failed",
        "         9.00 MiB  left by t.py::test_leaks",
        "  t0: 7.00 MiB still held by tensors when it had failed",
        "         7.00 MiB  left by t.py::test_leaks",
        "      likewise 4 tests; -v shows all",
    ]
    assert section(shown(*tests), "alive") == expected
    few = [*expected[:-1], "      likewise 3 tests", "          t1", "          t3", "          t4"]
    assert section(shown(*tests[:-1]), "alive") == few
    assert section(shown(*tests, verbosity=1), "alive")[-1] == "          t5"
    assert section(shown(*tests, top=1), "alive") == [
        *expected[:2],
        "  ... 5 more; --gpumem-top=0 shows all",
    ]


def test_a_test_that_held_nothing_is_told_in_words():
    test = recorded("t", outcome="failed", oom="out of memory", alive=(alive(moment="failed"),))
    expected = ["  t: nothing still held by tensors when it had failed"]
    assert section(shown(test), "alive") == expected


def test_a_test_above_its_budget_is_told_how_to_see_its_lines():
    above = BudgetVerdict("t.py::test_a", "A card", "above", 9 * MIB, 0, 5 * MIB)
    hint = "    --gpumem-peaks=offenders tells line by line what was alive"
    lines = shown(recorded("t.py::test_a", usage(9 * MIB)), budgets=(above,))
    assert hint in section(lines, "budgets")
    known = recorded("t.py::test_a", usage(9 * MIB), alive=(alive(group(9, "t.py:6 take")),))
    assert hint not in section(shown(known, budgets=(above,)), "budgets")
