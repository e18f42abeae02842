from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_gpumem.tracking import holders, verdict
from pytest_gpumem.tracking.newcomers import Newcomers
from pytest_gpumem.tracking.verdict import TensorLedger

if TYPE_CHECKING:
    from collections.abc import Iterator

MARK = torch.float64
"""Tensors of this type stand for those on a card."""
EVERY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Card:
    """Counts what tensors asked for, as an allocator does; and keeps the tensors of a suite."""

    asked = 0
    """Of all, as a ledger sees the tensors of all: garbage of others may die at any time."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.owners: dict[int, str | None] = {}
        """By address, as they should be told."""

    def count(self, thing: object, address: int, size: int) -> None:
        Card.asked += size
        self.owners[address] = None
        weakref.finalize(thing, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        Card.asked -= size
        del self.owners[address]

    def take(self, size: int, *, leaf: bool = False) -> torch.Tensor:
        tensor = torch.zeros(size, dtype=MARK, requires_grad=leaf)
        storage = tensor.untyped_storage()
        self.count(storage, storage.data_ptr(), storage.nbytes())
        return tensor


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """One entry for each look at all objects."""
    counted: list[int] = []
    plain = holders.live_storages

    def counting(on_card: Any) -> Any:
        counted.append(1)
        return plain(on_card)

    monkeypatch.setattr(holders, "live_storages", counting)
    monkeypatch.setattr(verdict, "on_card", lambda tensor: tensor.dtype == MARK)
    return counted


ACTS = st.one_of(
    st.tuples(st.sampled_from(["take", "take a leaf", "cycle", "view"]), st.integers(1, 5)),
    st.tuples(st.just("free"), st.integers(0, 9)),
    st.tuples(st.just("collect"), st.integers(0, 2)),
    st.tuples(st.just("boundary"), st.integers(0, 3)),
)


def perform(act: str, number: int, card: Card, ledger: TensorLedger) -> None:
    if act == "take":
        card.kept.append(card.take(number))
    elif act == "take a leaf":
        card.kept.append(card.take(number, leaf=True))
    elif act == "cycle":
        ring: list[Any] = [card.take(number)]
        ring.append(ring)
    elif act == "view" and card.kept:
        at = number % len(card.kept)
        card.kept[at] = card.kept[at][:]
    elif act == "free" and card.kept:
        card.kept.pop(number % len(card.kept))
    elif act == "collect":
        gc.collect(number)
    elif act == "boundary":
        ledger.remember(f"owner {number}", lambda: Card.asked)
        for address, owner in card.owners.items():
            card.owners[address] = owner or f"owner {number}"
        told = dict(ledger.owners())
        assert {each: told.get(each) for each in card.owners} == card.owners


@EVERY
@given(acts=st.lists(ACTS, max_size=40))
def test_each_tensor_is_laid_at_the_door_of_who_ran_when_it_came(acts, passes) -> None:
    """Whatever came, was collected and died between two boundaries."""
    card, ledger = Card(), TensorLedger()
    passes.clear()
    for act, number in acts:
        perform(act, number, card, ledger)
    assert len(passes) <= 1


@settings(EVERY, max_examples=3)
@given(acts=st.lists(ACTS, max_size=15))
def test_a_look_at_all_objects_tells_the_same(acts, passes) -> None:
    card, ledger = Card(), TensorLedger()
    for act, number in acts:
        ledger._unseen = None
        perform(act, number, card, ledger)


def test_a_gradient_that_python_has_not_met_is_found_by_its_leaf(passes) -> None:
    card, ledger = Card(), TensorLedger()
    leaf = card.take(4, leaf=True)
    ledger.remember("fixture", lambda: Card.asked)
    (leaf * 2).sum().backward()
    Card.asked += leaf.untyped_storage().nbytes()
    ledger.remember("test", lambda: Card.asked)

    assert leaf.grad is not None
    assert dict(ledger.owners())[leaf.grad.data_ptr()] == "test"
    assert len(passes) == 1


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
@pytest.mark.parametrize(
    "hide",
    [
        pytest.param(gc.freeze, id="frozen"),
        pytest.param(lambda: (gc.callbacks.clear(), gc.collect()), id="nobody was told"),
    ],
)
def test_what_was_out_of_sight_is_looked_for_among_all(passes, hide) -> None:
    before, card, ledger = [*gc.callbacks], Card(), TensorLedger()
    ledger.remember("fixture", lambda: Card.asked)
    tensor = card.take(4)
    hide()
    gc.callbacks[:] = before
    ledger.remember("test", lambda: Card.asked)

    assert dict(ledger.owners())[tensor.data_ptr()] == "test"
    assert len(passes) == 2


def test_memory_that_no_tensor_holds_is_looked_for_once(passes) -> None:
    card, ledger = Card(), TensorLedger()
    ledger.remember("fixture", lambda: Card.asked)
    Card.asked += 512
    for owner in "abc":
        card.kept.append(card.take(4))
        ledger.remember(owner, lambda: Card.asked)

    assert len(passes) == 2


def test_newcomers_are_met_once_and_not_kept() -> None:
    found = Newcomers()
    found.watch()
    found.take()
    old = torch.zeros(1)
    gc.collect()
    young = torch.zeros(1)
    assert {id(old), id(young)} <= {*map(id, found.take())}
    assert id(old) not in {*map(id, found.take())}

    witnesses = weakref.ref(old), weakref.ref(young)
    del old, young
    assert [each() for each in witnesses] == [None, None]


def test_nobody_watches_for_a_ledger_that_is_gone() -> None:
    before = [*gc.callbacks]
    found = Newcomers()
    found.watch()
    found.watch()
    assert len(gc.callbacks) == len(before) + 1
    del found
    assert gc.callbacks == before


def test_tensors_may_die_while_their_owners_are_told(passes):
    """As they do where a collection begins in the middle of it."""
    card, ledger = Card(), TensorLedger()
    for _ in range(1000):
        cycle: list[Any] = [card.take(1)]
        cycle.append(cycle)
    ledger.remember("test", lambda: Card.asked)
    del cycle
    before = gc.get_threshold()
    gc.set_threshold(500)
    try:
        told = sum(owner == "test" for _, owner in ledger.owners())
    finally:
        gc.set_threshold(*before)
    assert told > 0
