"""Run something right after a module has been imported, without importing it; import our own fast.

Each child of a run imports this as it starts, so it imports nothing itself: ``importlib.abc``,
whose classes these would be, takes 5 ms.
"""

from __future__ import annotations

import gc
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


_complete: set[str] = set()
"""Modules whose callbacks are being called: the import goes on until they return."""


def when_imported(name: str, callback: Callable[[], None]) -> None:
    """Call ``callback`` once: now if the module ``name`` is imported, else when it has been.

    An import that fails leaves the callback waiting for the next one. What ``callback`` raises
    reaches whoever imports the module.
    """
    module = sys.modules.get(name)
    importing = getattr(getattr(module, "__spec__", None), "_initializing", False)
    if module is not None and (not importing or name in _complete):
        callback()
    else:
        sys.meta_path.insert(0, _Watcher(name, callback))


def find_own_modules() -> None:
    """Let Python alone find the modules of this package, which are imported as they are needed."""
    if not any(isinstance(finder, _OwnFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OwnFinder())


class collecting_later:  # noqa: N801  # reads as a statement: with collecting_later(): ...
    """Start this plugin within without collections of garbage.

    What it makes stays. The dozen collections by which it would be looked through bring the next
    one of all objects forward, 0.05 s in a suite of 4,000 tests.
    """

    def __enter__(self) -> None:
        self._collects = gc.isenabled()
        gc.disable()

    def __exit__(self, *_error: object) -> None:
        if self._collects:
            gc.enable()


class _OwnFinder:
    """Stands before the finder of pytest.

    Which would rewrite asserts, of which there are none here, in all modules of a plugin, and reads
    and hashes each source for that: half of what this plugin added to the start of pytest.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_OWN):
            return None
        from importlib.machinery import PathFinder

        return PathFinder.find_spec(fullname, path, target)


_OWN = f"{__name__.partition('.')[0]}."


class _Watcher:
    """Finds one module the way the other finders do, and wraps its loader."""

    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self.name = name
        self.callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Announcing(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None

    def imported(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            _complete.add(self.name)
            try:
                self.callback()
            finally:
                _complete.discard(self.name)


class _Announcing:
    """A module's own loader, which tells the watcher once the module is there."""

    def __init__(self, loader: Any, watcher: _Watcher) -> None:
        self._loader = loader
        self._watcher = watcher

    def __getattr__(self, name: str) -> Any:
        # Whoever only looks the module up asks its loader for files, sources, resources.
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._watcher.imported()
