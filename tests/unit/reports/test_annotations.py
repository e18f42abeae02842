"""Remarks at lines of tests: which there are, and how services take them."""

from __future__ import annotations

import json

import pytest

from pytest_gpumem import records
from pytest_gpumem.cli import main as cli
from pytest_gpumem.records import BudgetVerdict, Card, CardUsage, Holder, RecordedTest, RunRecord
from pytest_gpumem.reports.annotations import Annotation, github, of_run

MIB = 2**20


def leaking(name: str, size: int, where: str, line: int = 3) -> RecordedTest:
    holder = Holder(where, (4,), "float32", size)
    usage = CardUsage("GPU-1", 0, size, size, 0, 0, 0, 0, None, size, (holder,))
    return RecordedTest(name, "passed", 0.5, "", (usage,), file="tests/test_x.py", line=line)


def felled(name: str, size: int) -> RecordedTest:
    oom = f"CUDA out of memory. Tried to allocate {size}.00 MiB"
    return RecordedTest(name, "failed", 0.5, "", oom=oom, file="tests/test_y.py", line=9)


def test_a_test_above_its_budget_is_told_at_its_line():
    verdicts = (
        BudgetVerdict("a", "A card", "above", own=3 * MIB, budget=2 * MIB),
        BudgetVerdict("b", "A card", "within", own=1, budget=2),
        BudgetVerdict("gone", "A card", "gone"),
    )
    tests = (felled("a", 1)._replace(oom=""), felled("b", 1)._replace(oom=""))
    (told,) = of_run(run(*tests)._replace(budgets=verdicts))

    assert told[:3] == ("error", "tests/test_y.py", 9)
    assert told.message == "took 3.00 MiB on A card, its budget is 2.00 MiB"


def run(*tests: RecordedTest) -> RunRecord:
    return RunRecord(records.SCHEMA, "on", (Card("GPU-1", "A card", 2**32),), False, 0, tests)


def test_each_kind_is_told_once_where_the_largest_of_it_is():
    kept = [leaking(f"t{n}", (n + 1) * MIB, f"x.py: module global KEPT[{n}]", n) for n in range(9)]
    told = list(of_run(run(*kept, felled("a", 5), felled("b", 7), leaking("c", 1, "x.py: OTHER"))))

    assert [(each.level, each.file, each.line) for each in told] == [
        ("error", "tests/test_y.py", 9),
        ("warning", "tests/test_x.py", 8),
        ("warning", "tests/test_x.py", 3),
    ]
    assert told[0].message.splitlines()[1:] == ["likewise 1 test: b"]
    assert told[1].message.splitlines() == [
        "9.00 MiB leaked by t8",
        "held by x.py: module global KEPT[8]",
        "likewise 8 leaks: 8.00 MiB by t7, 7.00 MiB by t6, 6.00 MiB by t5, and 5 more",
    ]


@pytest.mark.parametrize(
    ("annotation", "command"),
    [
        (Annotation("error", "a.py", 7, "t", "m"), "::error file=a.py,line=7,title=t::m"),
        (Annotation("notice", "", 0, "t", "m"), "::notice title=t::m"),
        (
            Annotation("warning", "a,b:c.py", 1, "x::y, 50%", "5%: a,b\nnext\r"),
            "::warning file=a%2Cb%3Ac.py,line=1,title=x%3A%3Ay%2C 50%25::5%25: a,b%0Anext\\x0d",
        ),
        (
            Annotation("error", "a.py", 1, "t", "\x1b[31m"),
            "::error file=a.py,line=1,title=t::\\x1b[31m",
        ),
    ],
)
def test_a_workflow_command_is_one_line_that_ends_nothing_early(annotation, command):
    assert list(github([annotation])) == [command]


def test_of_each_level_there_are_as_many_as_github_shows():
    told = list(github(Annotation("warning", "a.py", n, "t", f"m{n}") for n in range(30)))
    others = list(github(Annotation("error", "a.py", n, "t", f"m{n}") for n in range(10)))

    assert len(told) == len(others) == 10
    assert told[8].endswith("::m8")
    assert "21 more" in told[9]
    assert others[9].endswith("::m9")


def test_gitlab_gets_every_leak_with_a_fingerprint_that_outlives_its_size(tmp_path, capsys):
    def report(*tests: RecordedTest) -> list[dict[str, object]]:
        records.save(run(*tests), tmp_path / "run.json")
        assert cli.main(["report", str(tmp_path / "run.json"), "--format", "gitlab"]) == 0
        return list(json.loads(capsys.readouterr().out))

    one, two = report(leaking("a", MIB, "x.py: KEPT[0]"), leaking("b", MIB, "x.py: KEPT[1]", 0))
    (again,) = report(leaking("a", 2 * MIB, "x.py: KEPT[0]"))

    assert one["location"] == {"path": "tests/test_x.py", "lines": {"begin": 3}}
    assert two["location"]["lines"] == {"begin": 1}
    assert one["fingerprint"] == again["fingerprint"] != two["fingerprint"]
    assert set(one) == {"description", "check_name", "fingerprint", "severity", "location"}
