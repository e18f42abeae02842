"""torch's face of the simulated card.

Tensors stay on the host; two torch modes (``modes``; ``calls`` for single functions) let them look
and cost as if they lived on a card. ``memory`` keeps the account, ``cuda_functions`` answers
for the driver below torch's own Python, ``stubs`` are CUDA's objects, ``torch_python`` changes the
few places of torch's Python that would see through the face. Everything private of torch that the
simulator uses is in this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from pytest_gpumem.simulator.card import SharedCard


def install(cards: Sequence[SharedCard], note: Callable[[str], None]) -> None:
    """Give this process's torch ``cards``, from now on and in threads started from now on.

    CUDA is initialised, and a card's context taken, by the first call that needs it. There is no
    way back in this process. ``note`` is told in a sentence what is asked for and not obeyed.

    Raises:
        RuntimeError: in one sentence, when this version of torch lacks something private that the
            face needs.

    """
    from pytest_gpumem.simulator.torch_face import modes, torch_python
    from pytest_gpumem.simulator.torch_face.cuda_functions import functions
    from pytest_gpumem.simulator.torch_face.memory import CardMemory

    memory = CardMemory(cards, note)
    try:
        torch_python.prepare(memory, functions(memory))
    except AttributeError as error:
        import torch

        raise RuntimeError(
            f"the simulated card does not fit torch {torch.__version__}: {error}"
        ) from None

    def enter() -> AbstractContextManager[None]:
        # Not before torch is prepared, whose functions its table is of.
        from pytest_gpumem.simulator.torch_face import calls

        charges = modes.Charges(memory)
        return modes.entered(modes.Face(memory, charges, calls.HANDLERS, calls.create))

    torch_python.enter_everywhere(enter)
