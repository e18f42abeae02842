"""CUDA cards for machines without one, as far as memory goes.

A file is a card; every process that opens it shares its capacity. Suites written for
``device="cuda"`` then run on host memory that is charged to the card, with PyTorch's allocator
policy, its statistics and its out-of-memory errors, and with NVML's answers.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from contextlib import suppress
from os import environ, getuid
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pytest_gpumem.on_import import when_imported
from pytest_gpumem.simulator.card import SharedCard

if TYPE_CHECKING:
    from collections.abc import Sequence

_LIBRARY = "library"
"""The file beside the cards that names the compiled card's library."""


class Simulation:
    """Simulated cards as this process sees them; ``start`` makes them, ``attach`` joins them.

    The first card's file names them all; ``.1``, ``.2`` and so on is added for the others.
    """

    _NEVER_SIMULATED = (
        "not simulated: speed, streams, CUDA graphs, TF32, library workspaces, scratch memory"
        " inside one operation, NCCL, CUDA extensions"
    )

    installed: ClassVar[Simulation | None] = None
    """The one that this process's torch and pynvml answer for, for as long as it lives."""

    def __init__(self, cards: Sequence[SharedCard], directory: Path | None = None) -> None:
        self.cards = tuple(cards)
        self.closed = False
        self.notes: list[str] = []
        """A sentence for each setting that a program made and the simulated card does not obey."""
        self.library: Path | None = None
        """What the compiled card is loaded from, in processes whose torch it was made for."""
        self._directory = directory

    @property
    def not_simulated(self) -> str:
        """What these cards lack, in one line."""
        further = "" if self.library else ", DLPack, TorchScript devices"
        return f"{self._NEVER_SIMULATED}{further}"

    @classmethod
    def start(
        cls, totals: Sequence[int], context: int, workspace: int = 0, library: Path | None = None
    ) -> Simulation:
        """Create a card of so many bytes for each of ``totals``; a process costs ``context`` on it.

        cuBLAS takes ``workspace`` bytes for each thread and stream that multiplies. Their files
        lie in a new directory that only this user may enter. With a ``library`` every process of
        a run has the compiled card.

        Raises:
            ValueError: when the sizes make no sense.

        """
        directory = Path(tempfile.mkdtemp(prefix="gpumem-", dir=_private_directory()))
        try:
            cards = [
                SharedCard.create(
                    _file(directory / "card", place),
                    total=total,
                    context=context,
                    workspace=workspace,
                )
                for place, total in enumerate(totals)
            ]
        except ValueError:
            shutil.rmtree(directory)
            raise
        if library is not None:
            (directory / _LIBRARY).write_text(str(library), encoding="utf-8")
        started = cls(cards, directory)
        started.library = library
        return started

    @classmethod
    def join(
        cls,
        name: str,
        totals: Sequence[int],
        context: int,
        workspace: int = 0,
        library: Path | None = None,
    ) -> Simulation:
        """Open the cards that are called ``name`` on this machine; the first one makes them.

        For processes that start at the same time and have no common parent here. ``name`` must
        not be guessable: the file may lie where anybody can write.

        Raises:
            ValueError: when the sizes make no sense.

        """
        directory = Path(_private_directory() or tempfile.gettempdir()) / f"gpumem-{name}"
        if directory.exists():
            return cls.attach(str(directory / "card"))
        own = cls.start(totals, context, workspace, library)
        for card in own.cards:
            card.close()
        made = Path(own.path).parent
        try:
            made.rename(directory)
        except OSError:  # somebody else was faster
            shutil.rmtree(made)
            return cls.attach(str(directory / "card"))
        joined = cls.attach(str(directory / "card"))
        joined._directory = directory
        return joined

    @classmethod
    def attach(cls, path: str) -> Simulation:
        """Open the cards that another process started, by the first one's file.

        Raises:
            ValueError: when there is no simulated card at ``path``.

        """
        cards = [SharedCard.open(Path(path))]
        while (further := _file(Path(path), len(cards))).exists():
            cards.append(SharedCard.open(further))
        attached = cls(cards)
        with suppress(FileNotFoundError):
            named = Path(path).with_name(_LIBRARY).read_text(encoding="utf-8")
            attached.library = Path(named)
        return attached

    @staticmethod
    def card_files() -> list[Path]:
        """Return the first card's file of each run of this user that has not yet removed them."""
        found = []
        place = Path(_private_directory() or tempfile.gettempdir())
        for path in sorted(place.glob("gpumem-*/card")):
            with suppress(OSError):
                if path.stat().st_uid == getuid():
                    found.append(path)
        return found

    @property
    def path(self) -> str:
        """The file of the first card, for ``attach``."""
        return str(self.cards[0].path)

    def install(self) -> None:
        """Let torch and pynvml answer for the cards, now or as soon as each is imported.

        With torch comes pynvml: only an imported pynvml tells the driver's side of a card where
        there is no driver. It cannot be undone in this process. Once more, for a program that was
        given the card of its run and attaches it itself, is harmless.
        """
        before = Simulation.installed
        if before is not None and not before.closed and before.path == self.path:
            return
        Simulation.installed = self
        when_imported("pynvml", self._install_nvml)
        when_imported("torch", self._install_torch)

    def load_driver(self) -> None:
        """Load the driver's binding, without which nobody asks for the driver's side of a card.

        Only where that is asked for: it takes some 20 ms.
        """
        importlib.import_module("pynvml")

    def close(self) -> None:
        """Give back what this process holds; the process that started the cards removes them."""
        self.closed = True
        for card in self.cards:
            card.leave()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def _install_nvml(self) -> None:
        from pytest_gpumem.simulator import nvml_face

        nvml_face.install(self.cards)

    def _install_torch(self) -> None:
        from pytest_gpumem.simulator import torch_face

        torch_face.install(self.cards, self._note, self.library)
        import pynvml  # noqa: F401  # see install


def _file(first: Path, place: int) -> Path:
    """Return the file of the card at ``place``, from that of the first."""
    return first.with_name(f"{first.name}.{place}") if place else first


def _private_directory() -> str | None:
    """Return the user's runtime directory (in memory on Linux), or None for the system's own."""
    directory = environ.get("XDG_RUNTIME_DIR", "")
    return directory if directory and Path(directory).is_dir() else None
