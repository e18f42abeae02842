"""The plan of the house: which room may use which."""

import ast
import re
from pathlib import Path

import pytest

import pytest_gpumem

ROOT = Path(pytest_gpumem.__file__).parent
REPOSITORY = Path(__file__).parents[2]
FLOORS = (
    {
        "units",
        "tuples",
        "errors",
        "records",
        "files",
        "admission",
        "slots",
        "on_import",
        "clock",
        "simulator",
    },
    {"devices", "forensics"},
    {"tracking", "scheduling", "leases", "archive", "reports"},
    {"routing"},
    {"__init__"},
    {"agent"},
    {"plugin", "cli"},
)
"""From the ground up; a room uses those below it, and those of the ground one another."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
EXCEPTIONS = {("cli/simulated_cards.py", "simulator"), ("agent.py", "simulator")}
"""Commands read the ledger of a simulated card, as they read the driver's, and give one to what
they start; the agent gives it to what tests start."""


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def module(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in sorted(ROOT.rglob("*.py"))}


def uses(path: Path) -> set[str]:
    """Return the modules that ``path`` names in its imports, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


every_file = pytest.mark.parametrize(
    "path", MODULES.values(), ids=lambda path: str(path.relative_to(ROOT))
)


@every_file
def test_rooms_use_only_what_lies_below(path):
    own, name = room(path), str(path.relative_to(ROOT))
    for used in sorted(uses(path)):
        first, _, rest = used.partition(".")
        if first in {"pytest", "_pytest", "pluggy", "xdist"}:
            assert own == "plugin", f"{name} uses {first}, which only plugin/ knows"
        if first == "xdist":
            assert name.startswith("plugin/xdist/"), f"{name} uses xdist"
        if first != "pytest_gpumem":
            continue
        other = rest.partition(".")[0]
        other = other if other in FLOOR else "__init__"
        if other == own or (name, other) in EXCEPTIONS:
            continue
        assert FLOOR[other] < FLOOR[own] or FLOOR[other] == FLOOR[own] == 0, f"{name} uses {other}"
        if other == "simulator":
            assert own == "plugin", f"{name} uses the simulator"


OF_THE_MACHINE = {"monotonic", "sleep", "thread_time", "perf_counter", "clock_gettime"}
"""Functions of ``time`` that a suite may replace while its tests run, and see who asks."""


@every_file
def test_what_runs_beside_tests_asks_the_machines_clock(path):
    name = str(path.relative_to(ROOT))
    if name == "clock.py":
        return
    if name.startswith(("cli/", "plugin/xdist/")) and name != "plugin/xdist/worker.py":
        return  # commands and xdist's controller run no tests
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "time"
    }
    assert not used & OF_THE_MACHINE, f"{name} uses time, not clock"


NEWER = {
    *("Approx", "HIDDEN_PARAM", "ParameterSet", "PytestApproxDecimalToleranceWarning"),
    *("PytestFDWarning", "PytestRemovedIn10Warning", "RaisesExc", "RaisesGroup", "ScopeName"),
    *("SubtestReport", "Subtests", "TerminalReporter", "register_fixture"),
}
"""Names of pytest 9.2 that the oldest, 8.0, does not have."""


@every_file
def test_nothing_is_taken_from_pytest_that_the_oldest_does_not_have(path):
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "pytest"
    }
    assert not used & NEWER


def test_no_circle_of_files():
    """A reader finds the file that comes first; imports for types count as well."""
    above = {}
    for name, path in MODULES.items():
        found = (used if used in MODULES else used.rpartition(".")[0] for used in uses(path))
        above[name] = {used for used in found if used in MODULES and used != name}
    while free := {name for name, used in above.items() if not used & above.keys()}:
        above = {name: used for name, used in above.items() if name not in free}
    # What only leads into a circle is no part of it.
    while tips := above.keys() - set().union(*above.values()):
        above = {name: used for name, used in above.items() if name not in tips}
    assert sorted(above) == []


LARGEST_MODULE, LARGEST_CLASS = 450, 300
"""Lines: what a reader holds in the head."""


@every_file
def test_no_module_and_no_class_is_long(path):
    text = path.read_text()
    parts = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef)
    }
    long = {name: lines for name, lines in parts.items() if lines > LARGEST_CLASS}
    if (lines := len(text.splitlines())) > LARGEST_MODULE:
        long["the module"] = lines
    assert not long


def test_the_plan_names_files_that_are_there():
    named = set(re.findall(r"[\w/]+\.py\b", (REPOSITORY / "ARCHITECTURE.md").read_text()))
    trees = (ROOT, REPOSITORY / "tests", REPOSITORY / "scripts")
    there = [path.as_posix() for tree in trees for path in tree.rglob("*.py")]
    missing = {name for name in named if not any(path.endswith(f"/{name}") for path in there)}
    assert "planner.py" in named
    assert sorted(missing) == []
