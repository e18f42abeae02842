"""A test in a process of its own, that neither breaks the run's process nor is broken by it.

``parent`` hands tests over in each process that runs some, ``process`` starts and ends the
fresh one, ``child`` is what runs there: pytest with the run's own arguments, and one test.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from pytest_gpumem.plugin.state import is_apart, is_isolated

if TYPE_CHECKING:
    from pytest_gpumem.plugin.state import State


def begin(session: pytest.Session, state: State) -> None:
    """Have tests run in processes of their own, as the settings and the marks say.

    Raises:
        pytest.UsageError: in one sentence, where that cannot be.

    """
    from pytest_gpumem.plugin.isolate.parent import Isolating

    config, which = session.config, state.settings.isolate
    plan_only = any(map(config.getoption, ("collectonly", "setupplan", "setuponly")))
    if plan_only or is_apart(config) or config.pluginmanager.hasplugin(Isolating.NAME):
        return
    isolated = (item.nodeid for item in session.items if is_isolated(item, which))
    first = next(isolated, "")
    if not first and which != "failed":
        return
    shown = first or f"--gpumem-isolate={which}"
    if config.getoption("usepdb", False) or config.getoption("trace", False):
        raise pytest.UsageError(
            f"--pdb and --trace stop in no process but this one, and a process of its own is for "
            f"{shown}; add --gpumem-isolate=off to run it here"
        )
    if sys.platform == "win32":
        raise pytest.UsageError(f"{shown}: processes for single tests are not for Windows")
    config.pluginmanager.register(Isolating(config, state), Isolating.NAME)
