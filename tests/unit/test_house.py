"""The plan of the house: which room may use which."""

import ast
from pathlib import Path

import pytest

import pytest_gpumem

ROOT = Path(pytest_gpumem.__file__).parent
FLOORS = (
    {"units", "errors", "records", "files", "admission", "slots", "on_import", "simulator"},
    {"devices", "forensics"},
    {"tracking", "scheduling", "leases", "archive", "reports"},
    {"routing"},
    {"__init__"},
    {"agent"},
    {"plugin", "cli"},
)
"""From the ground up; a room uses those below it, and those of the ground one another."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
EXCEPTIONS = {("cli/monitor.py", "simulator"), ("agent.py", "simulator")}
"""The monitor reads the ledger of a simulated card, as it reads the driver's; the agent gives it to
what tests start."""


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def uses(path: Path) -> set[str]:
    """Return the modules that ``path`` names in its imports, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    "path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
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
