"""What a thread works at while it codes, seals, opens or decodes a chunk: its scratch memory."""

from __future__ import annotations

import contextlib
import mmap
import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_gpumem.archive import codec, disk
from pytest_gpumem.archive.sealing import TAG

if TYPE_CHECKING:
    from collections.abc import Generator

_LONGEST = codec.CHUNK + codec.SLACK + TAG
_local = threading.local()


class Desk:
    """The memory for one piece of work on one chunk, each part made when it is needed."""

    def __init__(self) -> None:
        self._staging: dict[str, tuple[Any, codec.Bytes]] = {}

    @cached_property
    def coder(self) -> codec.Coder:
        """For one chunk at a time."""
        return codec.Coder()

    @cached_property
    def sealed(self) -> mmap.mmap:
        """For a sealed chunk as the disk gives it, from a page to a page."""
        return disk.scratch(_LONGEST + 3 * mmap.PAGESIZE)

    @cached_property
    def coded(self) -> codec.Bytes:
        """For a chunk that was opened."""
        return np.empty(_LONGEST, np.uint8)

    def staging(self, *, pinned: bool) -> tuple[Any, codec.Bytes]:
        """Return the memory for a decoded chunk, as a tensor and as an array.

        Page-locked where cards are involved: they copy from other memory at half the speed.
        """
        import torch

        name = "pinned" if pinned and torch.cuda.is_available() else "pageable"
        if name not in self._staging:
            tensor = torch.empty(codec.CHUNK, dtype=torch.uint8, pin_memory=name == "pinned")
            self._staging[name] = tensor, tensor.numpy()
        return self._staging[name]


@contextlib.contextmanager
def lent() -> Generator[Desk, None, None]:
    """Lend a desk of this thread to one piece of work.

    In the middle of it a finaliser or a signal's handler may wake another model in the same
    thread: at the same desk it would overwrite the chunk, and what is read back would be what was
    written. So that gets a second one, which later ones find.
    """
    desks: list[Desk] = vars(_local).setdefault("desks", [])
    try:
        desk = desks.pop()
    except IndexError:
        desk = Desk()
    try:
        yield desk
    finally:
        desks.append(desk)
