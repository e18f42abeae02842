"""A CUDA card for machines without one, as far as memory goes.

One file is the card; every process that opens it shares its capacity. Suites written for
``device="cuda"`` then run on host memory that is charged to the card, with PyTorch's allocator
policy, its statistics and its out-of-memory errors, and with NVML's answers.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from os import environ, getuid
from pathlib import Path
from typing import ClassVar

from pytest_gpumem.on_import import when_imported
from pytest_gpumem.simulator.card import SharedCard


class Simulation:
    """One simulated card as this process sees it; ``start`` makes the card, ``attach`` joins it."""

    NOT_SIMULATED = (
        "not simulated: speed, streams, CUDA graphs, TF32, library workspaces, scratch memory"
        " inside one operation, sparse tensors, DLPack, IPC, TorchScript devices, CUDA extensions"
    )

    installed: ClassVar[Simulation | None] = None
    """The one that this process's torch and pynvml answer for, for as long as it lives."""

    def __init__(self, card: SharedCard, directory: Path | None = None) -> None:
        self.card = card
        self.closed = False
        self._directory = directory

    @classmethod
    def start(cls, total: int, context: int) -> Simulation:
        """Create a card of ``total`` bytes where each process costs ``context`` bytes.

        Its file lies in a new directory that only this user may enter.

        Raises:
            ValueError: when the sizes make no sense.

        """
        directory = Path(tempfile.mkdtemp(prefix="gpumem-", dir=_private_directory()))
        try:
            card = SharedCard.create(directory / "card", total=total, context=context)
        except ValueError:
            shutil.rmtree(directory)
            raise
        return cls(card, directory)

    @classmethod
    def join(cls, name: str, total: int, context: int) -> Simulation:
        """Open the card that is called ``name`` on this machine; the first one makes it.

        For processes that start at the same time and have no common parent here. ``name`` must
        not be guessable: the file may lie where anybody can write.

        Raises:
            ValueError: when the sizes make no sense.

        """
        directory = Path(_private_directory() or tempfile.gettempdir()) / f"gpumem-{name}"
        if directory.exists():
            return cls.attach(str(directory / "card"))
        own = cls.start(total, context)
        own.card.close()
        made = Path(own.path).parent
        try:
            made.rename(directory)
        except OSError:  # somebody else was faster
            shutil.rmtree(made)
            return cls.attach(str(directory / "card"))
        return cls(SharedCard.open(directory / "card"), directory)

    @classmethod
    def attach(cls, path: str) -> Simulation:
        """Open the card that another process started.

        Raises:
            ValueError: when there is no simulated card at ``path``.

        """
        return cls(SharedCard.open(Path(path)))

    @staticmethod
    def card_files() -> list[Path]:
        """Return the files of the cards that this user's runs have made and not yet removed."""
        found = []
        place = Path(_private_directory() or tempfile.gettempdir())
        for path in sorted(place.glob("gpumem-*/card")):
            with suppress(OSError):
                if path.stat().st_uid == getuid():
                    found.append(path)
        return found

    @property
    def path(self) -> str:
        """The file of the card, for ``attach``."""
        return str(self.card.path)

    def install(self) -> None:
        """Let torch and pynvml answer for the card, now or as soon as each is imported.

        With torch comes pynvml: only an imported pynvml tells the driver's side of the card where
        there is no driver. It cannot be undone in this process. Once more, for a program that was
        given the card of its run and attaches it itself, is harmless.
        """
        before = Simulation.installed
        if before is not None and not before.closed and before.path == self.path:
            return
        Simulation.installed = self
        when_imported("pynvml", self._install_nvml)
        when_imported("torch", self._install_torch)

    def close(self) -> None:
        """Give back what this process holds; the process that started the card removes it."""
        self.closed = True
        self.card.leave()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _install_nvml(self) -> None:
        from pytest_gpumem.simulator import nvml_face

        nvml_face.install(self.card)

    def _install_torch(self) -> None:
        from pytest_gpumem.simulator import torch_face

        torch_face.install(self.card)
        import pynvml  # noqa: F401  # see install


def _private_directory() -> str | None:
    """Return the user's runtime directory (in memory on Linux), or None for the system's own."""
    directory = environ.get("XDG_RUNTIME_DIR", "")
    return directory if directory and Path(directory).is_dir() else None
