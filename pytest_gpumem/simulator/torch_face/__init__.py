"""torch's face of the simulated card.

There are two faces behind ``install``. Of the one, tensors stay on the host; two torch modes
(``modes``; ``calls`` for single functions) let them look and cost as if they lived on a card. Of
the other (``compiled``), which takes a compiler, C++ itself takes them for a card's. Both share the
rest: ``memory`` keeps the account, ``cuda_functions`` answers
for the driver below torch's own Python, ``stubs`` are CUDA's objects, ``torch_python`` changes the
few places of torch's Python that would see through the face. Everything private of torch that the
simulator uses is in this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from pytest_gpumem.simulator.card import SharedCard


def install(
    cards: Sequence[SharedCard], note: Callable[[str], None], library: Path | None = None
) -> None:
    """Give this process's torch ``cards``, from now on and in threads started from now on.

    With a ``library`` that was made for this torch they are compiled ones. CUDA is initialised, and
    a card's context taken, by the first call that needs it. There is no way back in this process.
    ``note`` is told in a sentence what is asked for and not obeyed.

    Raises:
        RuntimeError: in one sentence, when this version of torch lacks something private that the
            face needs.

    """
    try:
        if library is not None and _fits(library, note):
            _install_compiled(cards, note, library)
        else:
            _install_modes(cards, note)
    except AttributeError as error:
        import torch

        raise RuntimeError(
            f"the simulated card does not fit torch {torch.__version__}: {error}"
        ) from None


def _fits(library: Path, note: Callable[[str], None]) -> bool:
    from pytest_gpumem.simulator.torch_face import compilation

    if compilation.fits(library):
        return True
    note("the compiled card was made for another torch than this one: it is simulated in Python")
    return False


def _install_compiled(
    cards: Sequence[SharedCard], note: Callable[[str], None], library: Path
) -> None:
    from pytest_gpumem.simulator.torch_face import torch_python
    from pytest_gpumem.simulator.torch_face.compiled import CompiledMemory
    from pytest_gpumem.simulator.torch_face.cuda_functions import functions

    memory = CompiledMemory(cards, note, library)
    torch_python.prepare(memory, functions(memory))
    memory.install()


def _install_modes(cards: Sequence[SharedCard], note: Callable[[str], None]) -> None:
    from pytest_gpumem.simulator.torch_face import modes, torch_python
    from pytest_gpumem.simulator.torch_face.cuda_functions import functions
    from pytest_gpumem.simulator.torch_face.memory import CardMemory

    memory = CardMemory(cards, note)
    torch_python.prepare(memory, functions(memory))
    torch_python.prepare_for_modes(memory)

    # Not before torch is prepared, whose functions its table is of; nor at each thread's start: a
    # run within a test, as of pytester, forgets the modules that it imported, torch among them.
    from pytest_gpumem.simulator.torch_face import calls

    def enter() -> AbstractContextManager[None]:
        charges = modes.Charges(memory)
        return modes.entered(modes.Face(memory, charges, calls.HANDLERS, calls.create))

    torch_python.enter_everywhere(enter)
