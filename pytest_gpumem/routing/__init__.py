"""Where a task runs: device choice, models that several tests share, the way back to the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpumem.plugin.settings import Settings

settings: Settings | None = None
"""Those of the run of pytest in this process, for whoever routes first; None outside of one."""
