"""The two torch modes that make host tensors look and cost as if they lived on a card.

``Face`` sees every call of torch's public interface: it answers which device a tensor is on, and
turns what names a card into what the host can do (``calls`` says how, function by function).
``Charges`` sees every operation below autograd: what comes out of operands on a card is charged
to that card.

Modes belong to a thread; ``entered`` enters both.
"""

from __future__ import annotations

import functools
import re
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_gpumem.simulator.torch_face.memory import lies_outside
from pytest_gpumem.simulator.torch_face.refusal import OutOfMemoryError
from pytest_gpumem.simulator.torch_face.traits import (
    INDEXING,
    NUMBERS,
    Traits,
    traits_of,
    with_tensors,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pytest_gpumem.simulator.torch_face.memory import CardMemory

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_C: Any = torch._C
Tensor: Any = torch.Tensor
Function = Any

_ON_CUDA = _C.DispatchKeySet(_C.DispatchKey.CUDA)
_SIZES = frozenset(("__get__", "size"))
"""What has tensors of the host while torch traces: sizes."""
_ENGINE = -1
"""Stands for the thread of autograd's that works for a card."""
_HOST_FULL = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")


class Charges(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's has no types
    """Charges a card for every new storage that comes out of operands on it."""

    supports_higher_order_operators = True

    def __init__(self, memory: CardMemory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.memory = memory
        self.aside = False
        """Whether someone else decides where the results of this thread's operations live."""
        self.thread = threading.get_ident()
        """Which thread would do this on a card: this one, or autograd's."""
        self.call: tuple[Any, ...] = ()
        """The arguments of the call under way that led to these operations."""
        self._traits: dict[Any, Traits] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else every call would pass a wrapper of the compiler

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Do not keep the compiler from working, where somebody turns it on."""
        return True

    def run_aside(self, func: Function, *args: Any, **kwargs: Any) -> Any:
        """Run ``func`` and charge nothing for it."""
        before, self.aside = self.aside, True
        try:
            return func(*args, **kwargs)
        finally:
            self.aside = before

    @contextmanager
    def during(self, *call: Any) -> Iterator[None]:
        """Say which tensors the operations meanwhile are about."""
        outer, self.call = self.call, call
        try:
            yield
        finally:
            self.call = outer

    def __torch_dispatch__(
        self, func: Function, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.aside:
            return func(*args, **kwargs)
        if types and any(map(dispatches_itself, types)):
            if any(issubclass(kind, _stand_ins()) for kind in types):
                return func(*args, **kwargs)  # torch's own modes below this one know them
            return self._hand_over(func, types, args, kwargs)
        traits = self._traits.get(func)
        if traits is None:
            traits = self._traits[func] = traits_of(func)
        func = traits.run
        if traits.no_numbers and args and type(args[0]) in NUMBERS:
            args = with_tensors(traits, args)
        card, others = self.places(args)
        if kwargs:
            card, others = self.places(kwargs.values(), card, others)
        if card is None:
            if not others:
                # Inside a call that knows a card, a factory stands for one on the same device.
                card = self.places(self.call)[0]
            if card is None:
                return func(*args, **kwargs)
        try:
            if traits.in_python:  # which sees the card, as the program's other code does
                with self, face_again():
                    return func.redispatch(_ON_CUDA, *args, **kwargs)
            if traits.composite and torch.is_inference_mode_enabled():
                # Without autograd nobody takes them apart, and the parts are what costs.
                with self:
                    return func.decompose(*args, **kwargs)
            if others:
                card = self._place_of_result(traits, func, args, kwargs)
                if card is None:
                    return func(*args, **kwargs)
            return self._run_on_card(traits, func, args, kwargs, card)
        except OutOfMemoryError as error:
            args = kwargs = None
            raise _bare(error)  # noqa: B904  # it is the same error

    def _hand_over(self, func: Function, types: Any, args: Any, kwargs: Any) -> Any:
        """Let subclasses go first; their code sees the card, as the program's other code does."""
        if dtensor() in types:  # which C++ takes apart
            return NotImplemented
        with self, face_again():
            for kind in filter(dispatches_itself, types):
                result = kind.__torch_dispatch__(func, types, args, kwargs)
                if result is not NotImplemented:
                    return result
        return NotImplemented

    def places(
        self, values: Iterable[Any], card: torch.device | None = None, others: bool = False
    ) -> tuple[torch.device | None, bool]:
        """Return the first card that ``values`` have tensors on, and whether some are elsewhere."""
        where = self.memory.where
        for value in values:
            if isinstance(value, Tensor):
                place = where(value)
                if place is None or (card is not None and place is not card):
                    others = True
                else:
                    card = place
            elif isinstance(value, (list, tuple)):
                card, others = self.places(value, card, others)
        return card, others

    def _place_of_result(
        self, traits: Traits, func: Any, args: Any, kwargs: Any
    ) -> torch.device | None:
        """Return the card of the result of tensors from several devices, None for the host.

        Raises:
            RuntimeError: what CUDA's indexing raises for indices on another card, and what
                ``TensorIterator`` raises where only scalars may be elsewhere, on the host.

        """
        tensors = list(_tensors_in((*args, *kwargs.values())))
        places = [self.memory.where(tensor) for tensor in tensors]
        first = places[0]
        if traits.name in INDEXING and any(
            place is not None and place is not first for place in places[1:]
        ):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor"
                f" ({first or 'cpu'})"
            )
        if traits.mixes:
            return first
        card = next(place for place in places if place is not None)
        written = [
            value
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        strangers = [
            place
            for tensor, place in zip(tensors, places, strict=True)
            if place is not card and (tensor.dim() or place is not None)
        ]
        if strangers or self.places(written)[1]:
            first_two = list(dict.fromkeys(str(place or "cpu") for place in places))[:2]
            raise RuntimeError(
                "Expected all tensors to be on the same device,"
                f" but found at least two devices, {' and '.join(first_two)}!"
            )
        return card

    def _run_on_card(
        self, traits: Traits, func: Any, args: Any, kwargs: Any, card: torch.device
    ) -> Any:
        if traits.multiplies:
            self.memory.multiply(card, self.thread)
        try:
            if traits.random:
                generator = self.memory.cards[card.index].generator
                with generator.instead_of_the_hosts(kwargs.get("generator")):
                    result = func(*args, **kwargs)
            else:
                result = func(*args, **kwargs)
        except (IndexError, RuntimeError) as error:
            if traits.chooses and lies_outside(str(error)):
                self.memory.lose()
                self.memory.check()  # CUDA would say so no later than at the next call
            host_full = _HOST_FULL.search(str(error))
            if host_full:  # before the card was asked; it has less room, as a rule
                self.memory.give_back(self.memory.take(int(host_full[1]), card), card)
            raise
        if traits.resizes:
            for tensor in _tensors_in((*args, *kwargs.values())):
                if self.memory.where(tensor):
                    self.memory.recharge(tensor)
        # The lengths of packed sequences stay on the host.
        parts = result[0] if traits.name == "aten::_pack_padded_sequence" else result
        self.charge_all(parts, card)
        return result

    def charge_all(self, result: Any, card: torch.device) -> None:
        """Charge every tensor of a result."""
        if isinstance(result, Tensor):
            self.memory.charge(result, card)
        elif isinstance(result, (list, tuple)):
            for part in result:
                self.charge_all(part, card)


def _bare(error: Any) -> Any:
    """Return ``error`` without the frames that it came through.

    A caught error must not keep operands alive: CUDA's has no frame that knows them.
    """
    error.__context__ = None
    return error.with_traceback(None)


@functools.cache
def dispatches_itself(kind: Any) -> bool:
    """Tell whether a kind of tensor has operations of its own below autograd."""
    return kind.__torch_dispatch__ is not _C._disabled_torch_dispatch_impl


@functools.cache
def _answers_itself(kind: Any) -> bool:
    own = kind.__torch_function__
    return own not in (_C._disabled_torch_function_impl, Tensor.__torch_function__) and (
        getattr(own, "__func__", own) is not Tensor.__torch_function__.__func__
    )


@functools.cache
def _stand_ins() -> tuple[Any, ...]:
    """Return the kinds of tensor that stand for others while torch traces."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return FakeTensor, FunctionalTensor


def dtensor() -> Any:
    """Return torch's kind of distributed tensor, if somebody uses it."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def _tensors_in(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)


Handler = Callable[["Face", Function, Any, Any], Any]
_this_thread = threading.local()


class Face(TorchFunctionMode):
    """Lets host tensors that ``CardMemory`` holds appear on their cards."""

    def __init__(
        self,
        memory: CardMemory,
        charges: Charges,
        handlers: Mapping[Any, Handler],
        create: Handler,
    ) -> None:
        super().__init__()
        self.memory = memory
        self.charges = charges
        self._handlers = handlers
        """What is done for single functions."""
        self._create = create
        """What is done for every other that is told a device."""

    def __torch_function__(
        self, func: Function, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if types and _C._is_torch_function_enabled() and any(map(_answers_itself, types)):
            return NotImplemented  # they go first; then this mode sees what they make of it
        if self.memory.lost and func.__name__ != "__get__":  # a shape is no call of CUDA
            self._refuse(args, kwargs)
        handler = self._handlers.get(func)
        charges = self.charges
        outer, charges.call = charges.call, (*args, *kwargs.values()) if kwargs else args
        kwargs = kwargs or {}
        try:
            if handler is not None:
                return handler(self, func, args, kwargs)
            if kwargs.get("device") is not None or kwargs.get("pin_memory"):
                return self._create(self, func, args, kwargs)
            if _C._get_tracing_state() is not None:
                return self._trace(func, args, kwargs)
            return func(*args, **kwargs)
        except OutOfMemoryError as error:
            args = kwargs = None
            raise _bare(error)  # noqa: B904  # it is the same error
        finally:
            charges.call = outer

    def _trace(self, func: Function, args: Any, kwargs: Any) -> Any:
        """Run ``func`` and charge for its result.

        Under a mode of dispatch torch's tracer to TorchScript does not see convolutions.
        """
        with _C._DisableTorchDispatch():
            result = func(*args, **kwargs)
        card, _ = self.charges.places((*args, *kwargs.values()))
        if card is not None and func.__name__ not in _SIZES:
            self.charges.charge_all(result, card)
        return result

    def _refuse(self, args: Any, kwargs: Any) -> None:
        """Raise as CUDA where the context is lost and a tensor on a card takes part."""
        given = (*args, *(kwargs or {}).values())
        if any(isinstance(each, torch.Tensor) and self.memory.where(each) for each in given):
            self.memory.check()


@contextmanager
def entered(face: Face) -> Iterator[None]:
    """Enter both modes in this thread."""
    _this_thread.face = face
    with face, face.charges:
        yield


def face_again() -> AbstractContextManager[Any]:
    """Return the context of this thread's face, for Python that torch calls from inside."""
    face = getattr(_this_thread, "face", None)
    on = (_C._get_function_stack_at(place) for place in range(_C._len_torch_function_stack()))
    return nullcontext() if face is None or any(each is face for each in on) else face


def charges_again() -> AbstractContextManager[Any]:
    """Return the context that charges, for Python that torch runs without modes."""
    face = getattr(_this_thread, "face", None)
    return nullcontext() if face is None else face.charges


def making_tensors_beside(tensors: Any) -> AbstractContextManager[None]:
    """Return the context in which tensors that C++ makes lie where ``tensors`` do."""
    face = getattr(_this_thread, "face", None)
    return nullcontext() if face is None else face.charges.during(*tensors)


def backward_on_the_card(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap autograd's engine: zeros that it makes up belong to the tensors it starts from."""

    @functools.wraps(run)
    def run_backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        face = getattr(_this_thread, "face", None)
        if face is None:
            return run(tensors, *args, **kwargs)
        outer, face.charges.thread = face.charges.thread, _ENGINE
        try:
            with face.charges.during(*tensors):
                return run(tensors, *args, **kwargs)
        finally:
            face.charges.thread = outer

    return run_backward
