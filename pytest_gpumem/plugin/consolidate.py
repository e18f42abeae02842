"""Consolidation under pytest: after a test, when a card has filled up, what was registered goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_gpumem.archive import shared
from pytest_gpumem.plugin.state import STATE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.archive.consolidator import GpuConsolidator
    from pytest_gpumem.archive.store import ArchiveStore


def configure(config: pytest.Config) -> None:
    """Set up this process's consolidator as the suite's options say."""
    settings = config.stash[STATE].settings

    def store() -> ArchiveStore:
        from pytest_gpumem.archive.store import ArchiveStore

        return ArchiveStore(
            settings.archive, key=settings.archive_key_file, quota=settings.archive_quota
        )

    shared.configure(store=store, above=settings.consolidate_above)


def unconfigure() -> None:
    """Leave nothing of this run to the next one in the same process."""
    shared.configure()


@pytest.fixture
def gpu_consolidator() -> GpuConsolidator:
    """Return this process's consolidator, set up as the suite's options say."""
    return shared.get_gpu_consolidator()


@pytest.fixture
def consolidate_gpu_memory(request: pytest.FixtureRequest) -> Iterator[GpuConsolidator]:
    """Consolidate after the test, when needed, what is registered; in every mode.

    With ``--gpumem=on`` every test has this without asking. That is done by a hook: an autouse
    fixture would cost each test more than all the rest of the plugin.
    """
    yield shared.get_gpu_consolidator()
    consolidate_if_needed(request.node)


def consolidate_if_needed(item: pytest.Item) -> None:
    """Consolidate after the teardown of a test, when needed, what is registered."""
    here = shared.registered()
    if here is not None and here.should_consolidate():
        from pytest_gpumem.records import properties

        done = here.consolidate_gpu_memory(process_context=item.name)
        properties.tell_consolidated(item.user_properties, done)
