"""What a request waits for, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.admission import room
from pytest_gpumem.devices import host
from pytest_gpumem.leases.entries import KEPT
from pytest_gpumem.leases.request import Hope, Want, called
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.leases.entries import Entry
    from pytest_gpumem.leases.outside import Outside
    from pytest_gpumem.leases.view import View

_ALL = Hope(spared=True, freed=True, timed=True)
"""What a request may still wait for, though no lease that ends brings it."""


def situation(view: View, request: Entry, owner: Callable[[Entry], str]) -> str:
    """Return what ``request`` waits for and who has it; ``owner`` names an entry's.

    Of several cards, and main memory, those that it does not have to wait for are left out.
    """
    claims = request.claims
    lacking = {key: claims[key] for key in claims if not view.admits_on(request, key, _ALL)}
    return "; ".join(
        f"{'all' if (want := Want.of(claim)).size is None else want} of "
        f"{called(view.cards[key].uuid)}: {_on_card(view, request, key, owner)}"
        for key, claim in (lacking or claims).items()
    )


def _on_card(view: View, request: Entry, key: str, owner: Callable[[Entry], str]) -> str:
    total, beside = view.cards[key].total, view.beside(key)
    free = max(0, room(total, beside.foreign, view.headroom, view.against(request, key)))
    parts = [f"{format_bytes(free)} of {format_bytes(total)} are free"]
    for entry in view.page.taken:
        if key in entry.claims and not view.page.covers(entry, request):
            kept = entry.state in KEPT
            size = format_bytes(entry.claims[key].resident) if kept else Want.of(entry.claims[key])
            parts.append(f"{size} {'kept' if kept else 'held'} by {owner(entry)}")
    if beside.foreign:
        parts.append(_used_by_others(beside, pool=host.is_pool(view.cards[key].uuid)))
    if beside.family:
        parts.append(f"{format_bytes(beside.family)} used by programs of the same family")
    if ahead := len(view.page.ahead(request, key)):
        parts.append(f"{ahead} waiting before")
    return ", ".join(parts)


def _used_by_others(found: Outside, *, pool: bool) -> str:
    size = format_bytes(found.foreign)
    if pool:  # by everybody, as a rule
        return f"{size} used without a lease"
    if not found.strangers:
        return f"{size} used without a lease, it cannot be told by whom"
    listed = (
        f"pid {pid}" if size is None else f"pid {pid}: {format_bytes(size)}"
        for pid, size in found.strangers
    )
    return f"{size} used by other programs ({', '.join(listed)})"
