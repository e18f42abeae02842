"""What a library of the compiled card must show before it is used.

It runs in a process of its own, which may end as it likes: the library lays hands on tables of
torch's C++. ``python -m pytest_gpumem.simulator.torch_face.proof LIBRARY``.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 2**20


def prove(library: Path) -> None:
    """Use two cards of the library's as a suite does.

    Raises:
        AssertionError: what it does not do.

    """
    from pytest_gpumem.simulator import Simulation

    simulation = Simulation.start([64 * MIB] * 2, 8 * MIB)
    simulation.library = library
    try:
        simulation.install()
        import torch

        for step in (
            _operations,
            _sparse_tensors,
            _random_numbers,
            _gradients,
            _account,
            _full,
            _threads,
            _second_card,
        ):
            step(torch)
            _hold(torch.cuda.memory_allocated() == 0, f"{step.__name__} left memory behind")
    finally:
        simulation.close()


def _hold(fact: bool, otherwise: str) -> None:
    if not fact:
        raise AssertionError(otherwise)


def _operations(torch: Any) -> None:
    card = torch.arange(6.0, device="cuda").reshape(2, 3)
    host = torch.arange(6.0).reshape(2, 3)
    card.t()[0].add_(1)
    host.t()[0].add_(1)
    parts = torch.cat([card, card.exp()]).split(2)
    _hold("CUDA" in str(torch._C._dispatch_keys(card)), "C++ does not take it for a card's")
    _hold(parts[1].device == torch.device("cuda:0"), "a result is not on the card")
    _hold(torch.equal(parts[1].cpu(), host.exp()), "a result is wrong")
    _hold((host + 1).device.type == "cpu", "a tensor of the host is not on the host")


def _sparse_tensors(torch: Any) -> None:
    sparse = torch.eye(3, device="cuda").to_sparse()
    product = sparse.mul_(2) @ torch.ones(3, 1, device="cuda")
    _hold(sparse.is_cuda and product.is_cuda, "a sparse tensor is not on the card")
    _hold(product.tolist() == [[2], [2], [2]], "a sparse product is wrong")


def _random_numbers(torch: Any) -> None:
    drawn = []
    for _ in range(2):
        chosen = torch.Generator(device="cuda")
        chosen.manual_seed(1)
        torch.manual_seed(2)
        drawn.append((torch.rand(2, device="cuda", generator=chosen), torch.rand(2, device="cuda")))
    for first, second in zip(*drawn, strict=True):
        _hold(torch.equal(first, second), "a seed is not obeyed")
    _hold(torch.ones(2).pin_memory().is_pinned(), "memory cannot be pinned")


def _gradients(torch: Any) -> None:
    leaf = torch.ones(3, device="cuda", requires_grad=True)
    for _ in range(2):
        (leaf * leaf + leaf).sum().backward()
    _hold(leaf.grad.tolist() == [6, 6, 6], "a gradient is wrong")
    _hold(leaf.grad.is_cuda, "a gradient is not on the card")


def _account(torch: Any) -> None:
    kept = torch.empty(MIB, dtype=torch.uint8, device="cuda")
    view = kept[: MIB // 2]
    _hold(torch.cuda.memory_allocated() == MIB, "a tensor costs something else than its bytes")
    del kept
    _hold(torch.cuda.memory_allocated() == MIB, "a view does not keep its memory")
    view.resize_(2 * MIB)
    _hold(torch.cuda.memory_allocated() == 2 * MIB, "a resized tensor costs what it did")


def _full(torch: Any) -> None:
    part = torch.zeros(1, device="cuda").expand(2**38)
    asking: tuple[Callable[[], Any], ...] = (
        lambda: torch.empty(2**40, device="cuda"),
        lambda: torch.cat([part, part]),
    )
    for ask in asking:
        try:
            ask()
        except torch.cuda.OutOfMemoryError as error:
            _hold(str(error).startswith("CUDA out of memory. Tried"), "a full card has other words")
        else:
            raise AssertionError("a card is never full")


def _threads(torch: Any) -> None:
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(torch.ones(1, device="cuda").is_cuda))
    thread.start()
    thread.join()
    _hold(seen == [True], "a thread does not have the card")


def _second_card(torch: Any) -> None:
    layer = torch.nn.Linear(3, 3).to("cuda:1")
    layer(torch.randn(2, 3, device=1)).sum().backward()
    _hold(layer.weight.grad.device.index == 1, "a gradient is not on the second card")
    with torch.cuda.device(1):
        _hold(torch.ones(1, device="cuda").device.index == 1, "the current card is not obeyed")
    _hold(torch.cuda.memory_allocated(1) > 0, "the second card is not charged")


if __name__ == "__main__":
    prove(Path(sys.argv[1]))
