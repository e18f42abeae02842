"""Puts a chain of references into words: ``tests/test_x.py: module global CACHE['a'].weight``."""

from __future__ import annotations

import contextvars
import functools
import gc
import inspect
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple, cast

from pytest_gpumem.devices.heap import instances
from pytest_gpumem.tracking.release import GENERATORS, SUSPENDABLE
from pytest_gpumem.tracking.torch_heap import class_namespace, is_a, mro, namespace

_INSTALLED = ("site-packages", "dist-packages")
_LRU_CACHE = functools._lru_cache_wrapper


class Part(NamedTuple):
    """One object of a chain from a root down to a tensor."""

    thing: object
    step: str | None = None
    """How the part before reaches it, where that is known; found out otherwise."""


class Place(NamedTuple):
    """Where a tensor is held: a name, and the steps from what it names down to the tensor."""

    name: str
    steps: tuple[str, ...] = ()


Chain = Sequence[Part]
Namer = Callable[[Chain, Path], Place]


def is_root(thing: object) -> bool:
    """Tell whether ``thing`` is named by itself, so that nobody asks who holds it."""
    return _namer(thing) is not None


def certainly_lives(root: Any) -> bool:
    """Tell whether ``root`` is reached from the modules that are loaded, or runs.

    Else it may be garbage that was not collected: a function or class that refers to itself.
    """
    if type(root) is types.FrameType:
        return any(frame is root for _, frame in running_frames())
    if type(root) is dict:
        return namespace(sys.modules.get(str(root.get("__name__")))) is root
    named: Any = namespace(root).get("__wrapped__") if is_a(root, _LRU_CACHE) else root
    if is_a(named, type):
        name, module = type.__getattribute__(named, "__qualname__"), _module_of(named)
    elif type(named) is types.FunctionType:
        name, module = named.__qualname__, named.__globals__
    else:
        return False
    found: Any = sys.modules.get(str(module.get("__name__")))
    for part in str(name).split("."):
        attributes = class_namespace(found) if is_a(found, type) else namespace(found)
        found = attributes.get(part)
    return found is root


def suspended_code(thing: Any) -> types.CodeType | None:
    """Return the code of a generator, None of what is none.

    Up to Python 3.10 the collector shows a generator's frame as the holder of its variables.
    """
    if type(thing) is types.GeneratorType:
        return thing.gi_code
    if sys.version_info < (3, 11) and type(thing) is types.FrameType:
        frame = cast("types.FrameType", thing)
        return frame.f_code if frame.f_code.co_flags & SUSPENDABLE else None
    return None


def place(chain: Chain, root: Path) -> Place:
    """Return the name of the root ``chain[0]`` and the steps down the chain."""
    namer = _namer(chain[0].thing)
    if namer is None:
        raise ValueError(f"{type(chain[0].thing).__name__} is no root")
    return namer(chain, root)


def below(name: str, chain: Chain) -> Place:
    """Return the place ``name`` when that stands for the first part of ``chain``."""
    return Place(name, _steps(chain))


def rootless(above: str, chain: Chain) -> Place:
    """Return the place of a chain that begins where the search ended; ``above`` says with what."""
    kind = _class_name(type(chain[0].thing))
    return Place(f"{above} above {kind}", _steps(chain))


def cycle(chain: Chain) -> Place:
    """Return the place of a chain that ends with the object it begins with."""
    ring = list(chain[1:])
    start = next((i for i, part in enumerate(ring) if type(part.thing) not in _CONTAINERS), 0)
    ring = [*ring[start:], *ring[: start + 1]]
    name = _class_name(type(ring[0].thing))
    return Place(f"reference cycle through {name}{_steps(ring)[0]}")


_CONTAINERS = (dict, list, tuple, set, types.CellType)


def common(places: Sequence[Place]) -> str:
    """Return the text for places of one name: that name and the steps they have in common."""
    ways = [_up_to_graph(each.steps) for each in places]
    together = zip(*ways, strict=False)  # the shortest ends it
    shared = [step for step, *_ in takewhile(lambda each: len(set(each)) == 1, together)]
    text = places[0].name + "".join(shared)
    return f"{text}[...].grad_fn" if ".grad_fn" in ways[0] and ".grad_fn" not in shared else text


def _up_to_graph(steps: tuple[str, ...]) -> list[str]:
    """Cut ``steps`` at an autograd graph: what lies in it has no name of its own."""
    return list(steps[: steps.index(".grad_fn") + 1] if ".grad_fn" in steps else steps)


def running_frames() -> list[tuple[int, types.FrameType]]:
    """Return thread and frame of all running functions but our own.

    Modules and class bodies are left out: their variables are attributes of the module.
    """
    found = []
    for thread, top in sys._current_frames().items():
        # No variable may end up with this function's own frame: that cycle would keep the
        # variables of all its callers alive.
        frame: types.FrameType | None = top
        del top
        while frame is not None:
            if frame.f_code.co_flags & inspect.CO_OPTIMIZED and not is_ours(frame):
                found.append((thread, frame))
            frame = frame.f_back
    return found


def is_ours(thing: object) -> bool:
    """Tell whether ``thing`` is a frame or generator of this package."""
    frame = _frame(thing)
    if frame is None:
        return False
    return str(frame.f_globals.get("__name__")).startswith("pytest_gpumem.")


def local_variables(frame: types.FrameType) -> dict[str, object]:
    """Return the local variables of ``frame``, leaving nothing behind in it.

    Up to Python 3.12 ``f_locals`` of a function is a snapshot that the frame keeps, and with it
    the values; it is emptied again unless the program itself uses it.
    """
    snapshot = frame.f_locals
    variables = dict(snapshot)
    if (
        sys.version_info < (3, 13)
        and frame.f_code.co_flags & inspect.CO_OPTIMIZED
        and sys.getrefcount(snapshot) <= _REFERENCES_OF_AN_UNUSED_SNAPSHOT
    ):
        snapshot.clear()
    return variables


_REFERENCES_OF_AN_UNUSED_SNAPSHOT = 3  # the frame's, our variable's and the call's


# Roots


def _namer(thing: object) -> Namer | None:
    for kind, namer in _NAMERS:
        if is_a(thing, kind):
            return namer
    if type(thing) is dict and _is_module(thing):
        return _module_global
    return None


def _is_module(thing: Any) -> bool:
    return type(thing.get("__name__")) is str and "__spec__" in thing


def _module_global(chain: Chain, root: Path) -> Place:
    attributes: Any = chain[0].thing
    name = _entry(attributes, chain[1].thing) or "?"
    own, spec = namespace(sys.modules.get(attributes["__name__"])), attributes["__spec__"]
    # doctest works on one; a module that was imported anew has another spec.
    is_copy = own is not attributes and spec is not None and own.get("__spec__") is spec
    suffix = " (in a copy of the module's globals)" if is_copy else ""
    return below(_qualified("module global", attributes, name, root) + suffix, chain[1:])


def _class_attribute(chain: Chain, root: Path) -> Place:
    cls: Any = chain[0].thing
    attributes = class_namespace(cls)
    chain = chain[2:] if type(chain[1].thing) is dict and len(chain) > 2 else chain[1:]
    name = f"{_class_name(cls)}.{_entry(attributes, chain[0].thing) or '?'}"
    return below(_qualified("class attribute", _module_of(cls), name, root), chain)


def _function(chain: Chain, root: Path) -> Place:
    function: Any = chain[0].thing
    via: Any = chain[1].thing
    code = function.__code__
    name = _function_name(function)

    def named(kind: str, suffix: str, rest: Chain) -> Place:
        return below(_qualified(kind, function.__globals__, name, root) + suffix, rest)

    if via is function.__closure__:
        cells = [id(cell) for cell in function.__closure__]
        variable = code.co_freevars[cells.index(id(chain[2].thing))]
        return named("closure of", f" (variable {variable})", chain[3:])
    if via is function.__defaults__:
        index = [id(value) for value in function.__defaults__].index(id(chain[2].thing))
        arguments = code.co_varnames[: code.co_argcount]
        argument = arguments[index - len(function.__defaults__)]
        return named("default argument of", f" ({argument})", chain[2:])
    if via is function.__kwdefaults__:
        argument = _entry(function.__kwdefaults__, chain[2].thing)
        return named("default argument of", f" ({argument})", chain[2:])
    if via is namespace(function):
        return named("function attribute", f".{_entry(via, chain[2].thing)}", chain[2:])
    return named("function", "", chain)


def _lru_cache(chain: Chain, root: Path) -> Place:
    wrapper: Any = chain[0].thing
    wrapped: Any = namespace(wrapper).get("__wrapped__")
    caches = [each for each in gc.get_referents(wrapper) if type(each) is dict]
    rest = chain[1:]
    suffix = ""
    if _LRU_CACHE.cache_info(wrapper).maxsize is None:
        rest = rest[1:]  # otherwise the wrapper itself refers to the values
    if any(rest[0].thing is key for cache in caches for key in cache):
        rest, suffix = rest[1:], " (an argument of a cached call)"
    if type(wrapped) is types.FunctionType:
        name = _qualified(
            "functools.lru_cache of", wrapped.__globals__, _function_name(wrapped), root
        )
    else:
        name = f"functools.lru_cache of {_class_name(type(wrapped))}"
    return below(name + suffix, rest)


def _context_variable(chain: Chain, _root: Path) -> Place:
    context = cast("contextvars.Context", chain[0].thing)
    for index, part in enumerate(chain):
        for variable, value in context.items():
            if value is part.thing:
                return below(f"context variable {variable.name}", chain[index:])
    return below("a context", chain)


def _frame_local(chain: Chain, root: Path) -> Place:
    frame = _frame(chain[0].thing)
    if frame is None:
        return below(_class_name(type(chain[0].thing)), chain)
    variables = local_variables(frame)
    # A variable that inner functions use lies in a cell.
    rest = chain[2:] if type(chain[1].thing) is types.CellType and len(chain) > 2 else chain[1:]
    variable = _entry(variables, rest[0].thing)
    where = _qualified(_state(frame), frame.f_globals, _code_name(frame.f_code), root)
    return below(f"{where} (variable {variable})" if variable else where, rest)


def _state(frame: types.FrameType) -> str:
    """Return why ``frame`` is there: it runs, is suspended, or an exception kept it."""
    thread = next((thread for thread, running in running_frames() if running is frame), None)
    if thread == threading.get_ident():
        return "running"
    if thread is not None:
        return f"thread {_thread_name(thread)!r} running"
    for error in instances(BaseException):
        if _passed_through(error, frame):
            last = error is getattr(sys, "last_value", None)
            return f"{'sys.last_value: ' if last else ''}traceback of {type(error).__name__} in"
    return "suspended" if frame.f_code.co_flags & SUSPENDABLE else "frame of"


def _thread_name(ident: int) -> str:
    return next((each.name for each in threading.enumerate() if each.ident == ident), str(ident))


def _passed_through(error: BaseException, frame: types.FrameType) -> bool:
    traceback = BaseException.__dict__["__traceback__"].__get__(error)
    while traceback is not None:
        if traceback.tb_frame is frame:
            return True
        traceback = traceback.tb_next
    return False


def _frame(thing: Any) -> types.FrameType | None:
    """Return the frame of a generator or coroutine, or ``thing`` if it is a frame."""
    kind = type(thing)
    if kind is types.FrameType:
        return cast("types.FrameType", thing)
    if kind is types.GeneratorType:
        return cast("types.FrameType | None", thing.gi_frame)
    if kind is types.CoroutineType:
        return cast("types.FrameType | None", thing.cr_frame)
    if kind is types.AsyncGeneratorType:
        return cast("types.FrameType | None", thing.ag_frame)
    return None


_NAMERS: tuple[tuple[type, Namer], ...] = (
    (type, _class_attribute),
    (types.FunctionType, _function),
    (_LRU_CACHE, _lru_cache),
    (contextvars.Context, _context_variable),
    (types.FrameType, _frame_local),
    *((kind, _frame_local) for kind in GENERATORS),
)


# Names


def _qualified(kind: str, module: Mapping[str, object], name: str, root: Path) -> str:
    """Return ``file: kind name`` for the user's modules, ``kind module.name`` for others."""
    file = module.get("__file__")
    if isinstance(file, str) and not any(part in _INSTALLED for part in Path(file).parts):
        path = Path(file)
        if path.is_relative_to(root):
            return f"{path.relative_to(root).as_posix()}: {kind} {name}"
    module_name = module.get("__name__")
    return f"{kind} {module_name}.{name}" if module_name else f"{kind} {name}"


def _module_of(cls: type) -> Mapping[str, object]:
    name = type.__getattribute__(cls, "__module__")
    return namespace(sys.modules.get(str(name))) or {"__name__": name}


def _class_name(cls: type) -> str:
    return str(type.__getattribute__(cls, "__qualname__")).replace(".<locals>", "")


def _function_name(function: types.FunctionType) -> str:
    return function.__qualname__.replace(".<locals>", "")


def _code_name(code: types.CodeType) -> str:
    # Python 3.10 knows only the bare name.
    return str(getattr(code, "co_qualname", code.co_name)).replace(".<locals>", "")


# Steps


def _steps(chain: Chain) -> tuple[str, ...]:
    """Return how each part of ``chain`` reaches the next."""
    return tuple(
        _step(holder.thing, held.thing) if held.step is None else held.step
        for holder, held in pairwise(_without_namespaces(chain))
    )


def _without_namespaces(chain: Chain) -> list[Part]:
    """Leave out each ``__dict__`` between an object and its attribute."""
    kept = list(chain[:1])
    for before, part in pairwise(chain):
        if type(part.thing) is not dict or part.thing is not namespace(before.thing):
            kept.append(part)
    return kept


_SILENT_KEYS = ("ReferenceType", "_localdummy")
"""Keys that say nothing to a reader; thread-local objects keep their data under such."""


def _step(holder: Any, held: object) -> str:
    """Return how ``holder`` reaches ``held``: ``.name``, ``[3]``, ``['key']``."""
    if is_a(holder, dict):
        for key, value in list(dict.items(holder)):
            if value is held:
                return "" if type(key).__name__ in _SILENT_KEYS else f"[{_key(key)}]"
            if key is held:
                return " (a key)"
    sequences: tuple[Any, ...] = (list, tuple, deque)
    for kind in sequences:
        if is_a(holder, kind):
            for index, value in enumerate(kind.__iter__(holder)):
                if value is held:
                    return f"[{index}]"
    if is_a(holder, set) or is_a(holder, frozenset):
        return " (in a set)"
    if type(holder) is types.CellType or is_a(holder, threading.local):
        return ""
    name = _entry(namespace(holder), held) or _slot(holder, held)
    return f".{name}" if name else f".<{_class_name(type(held))}>"


def _entry(attributes: Mapping[str, object], held: object) -> str | None:
    """Return the name under which ``held`` stands in ``attributes``."""
    return next((str(name) for name, value in list(attributes.items()) if value is held), None)


def _slot(holder: object, held: object) -> str | None:
    """Return the name of the slot of ``holder`` that ``held`` is in."""
    for kind in mro(type(holder)):
        for name, member in class_namespace(kind).items():
            if type(member) is types.MemberDescriptorType or (
                kind is BaseException and type(member) is types.GetSetDescriptorType
            ):
                try:
                    if member.__get__(holder) is held:
                        return str(name)
                except AttributeError:  # an empty slot
                    continue
    return None


def _key(key: object) -> str:
    """Return a short text for a dictionary key without running foreign code."""
    if type(key) is tuple:
        return f"({', '.join(map(_key, key))})"
    if key is None or type(key) in (str, int, float, bool, bytes):
        text = repr(key)
        return text if len(text) <= _KEY_LENGTH else f"{text[:_KEY_LENGTH]}...{text[0]}"
    return f"<{_class_name(type(key))}>"


_KEY_LENGTH = 40
