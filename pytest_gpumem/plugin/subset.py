"""Runs some tests of a suite, in an order that is asked for, and writes down how each ended.

For commands that run pytest: it is asked for by ``-p``, see ``cli/subset.py``. Arguments would name
tests by text, which is not every node id; here each is known by the node id that pytest itself
gives it, whatever is in it, from whatever directory, and however many they are.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

VARIABLE = "GPUMEM_SUBSET"
"""Names the file that says what is wanted: ``told`` is the file to write, ``wanted`` are the node
ids in their order or null for all, ``imported`` those whose files are imported as well, ``spread``
whether xdist may start workers."""


_SPREAD = pytest.StashKey[bool]()
"""Whether xdist would have started workers."""


def _wish() -> dict[str, Any] | None:
    asked = os.environ.get(VARIABLE)
    return None if asked is None else json.loads(Path(asked).read_text(encoding="utf-8"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, object, object]:
    """Keep what is to be one process so, whatever the configuration says of xdist's workers."""
    wish = _wish()
    if wish is not None and not wish["spread"] and hasattr(config.option, "numprocesses"):
        config.stash[_SPREAD] = bool(config.option.numprocesses)
        # What -n 0 comes to, before xdist reads it.
        config.option.numprocesses, config.option.dist, config.option.tx = 0, "no", []
    return (yield)


def pytest_configure(config: pytest.Config) -> None:
    """Take part where a command asked for it."""
    wish = _wish()
    if wish is not None:
        config.pluginmanager.register(Subset(config, wish), "gpumem-subset")


class Subset:
    """Chooses the tests, and tells of them."""

    def __init__(self, config: pytest.Config, wish: dict[str, Any]) -> None:
        self._told = Path(wish["told"])
        self._wanted: list[str] | None = wish["wanted"]
        self._deselected: list[str] = []
        self._files: set[Path] | None = None
        if self._wanted is not None:
            names = [*self._wanted, *wish["imported"]]
            self._files = {config.rootpath / name.partition("::")[0] for name in names}

    @pytest.hookimpl(tryfirst=True)
    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Leave out files of which nothing is wanted: to import them may be what matters."""
        if self._files is None or collection_path in self._files:
            return None
        if collection_path.name == "__init__.py" or not collection_path.is_file():
            return None
        return True

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Take note of what others left out."""
        self._deselected += [item.nodeid for item in items]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave out what is not wanted, and put the rest in its order."""
        if self._wanted is None:
            return
        there: dict[str, pytest.Item] = {}
        for item in items:
            there.setdefault(item.nodeid, item)
        chosen = [there[nodeid] for nodeid in self._wanted if nodeid in there]
        rest = {id(item) for item in items} - {id(item) for item in chosen}
        if rest:
            config.hook.pytest_deselected(items=[item for item in items if id(item) in rest])
        items[:] = chosen

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Tell what there is."""
        config = session.config
        self._tell(
            collected=[item.nodeid for item in session.items],
            deselected=self._deselected,
            root=str(config.rootpath),
            spread=config.stash.get(_SPREAD, False),
            cached=config.pluginmanager.hasplugin("cacheprovider"),
            measured=config.pluginmanager.hasplugin("gpumem"),
            paths=config.args if config.args_source is config.ArgsSource.ARGS else [],
        )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Tell that a test begins: it may end its process."""
        self._tell(began=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Tell of what failed, or was skipped."""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = str(getattr(crash, "message", "") or report.longrepr or "").strip()
            self._tell(failed=report.nodeid, when=report.when, why=why.partition("\n")[0][:200])
        elif report.skipped:
            self._tell(skipped=report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Tell that a test has ended."""
        self._tell(ended=nodeid)

    def _tell(self, **line: Any) -> None:
        with self._told.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
