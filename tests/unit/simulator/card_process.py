"""Runs tests in processes that have a simulated card, so that pytest's own torch stays as it is.

``@on_card`` sends a test to one server process, which has imported torch and installed the
simulation but not initialised CUDA. The server forks a child per test: each begins with an
untouched card of ``TOTAL`` bytes. ``@on_two_cards`` has a server with two of them, and
``@on_compiled_cards`` one with two compiled cards. ``GPUMEM_TEST_COMPILED=1`` has all of them
compiled.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 2**20
TOTAL = 1024 * MIB
CONTEXT = 100 * MIB
PATIENCE = 60


def on_card(test: Callable[..., None]) -> Callable[..., None]:
    """Run ``test`` in a process of its own, with a simulated card; arguments travel as JSON."""
    return _sent(test, 1)


def on_two_cards(test: Callable[..., None]) -> Callable[..., None]:
    """Run ``test`` as ``on_card`` does, with two cards."""
    return _sent(test, 2)


def on_compiled_cards(test: Callable[..., None]) -> Callable[..., None]:
    """Run ``test`` as ``on_two_cards`` does, with compiled cards; skip it without a compiler."""
    return _sent(test, 2, compiled=True)


COMPILED = "GPUMEM_TEST_COMPILED"


def _sent(
    test: Callable[..., None], cards: int, *, compiled: bool = COMPILED in os.environ
) -> Callable[..., None]:
    @functools.wraps(test)
    def sent(**arguments: Any) -> None:
        problem = _server(cards, compiled).ask(test.__code__.co_filename, test.__name__, arguments)
        if problem:
            raise AssertionError(problem)

    return sent


class _Server:
    def __init__(self, cards: int, library: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__, str(cards), library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.stop)

    def ask(self, *request: Any) -> str:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer: str = json.loads(self._process.stdout.readline() or '"the server died"')
        return answer

    def stop(self) -> None:
        self._process.communicate()


@functools.cache
def _server(cards: int, compiled: bool) -> _Server:
    return _Server(cards, library() if compiled else "")


@functools.cache
def library() -> str:
    """Return the compiled card's library; skip the test that asks where there is no compiler."""
    import pytest

    from pytest_gpumem.simulator.torch_face import compilation

    try:
        return str(compilation.library())
    except compilation.CannotCompileError as error:
        if "compiler for C++" in str(error):
            pytest.skip(str(error))
        raise


@functools.cache
def _module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_child(work: Callable[[], Any]) -> tuple[int, str]:
    """Run ``work`` in a forked child; return its exit status and what it returned or raised."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(PATIENCE)
        status = 0
        try:
            said = work() or ""
        except BaseException:
            status, said = 1, traceback.format_exc()
        with os.fdopen(writing, "w") as pipe:
            pipe.write(str(said))
        sys.stdout.flush()
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    return os.waitpid(child, 0)[1], said


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what tests print must not get between the answers
    sys.path.append(str(Path(__file__).parent))  # which PYTHONSAFEPATH leaves out
    from pytest_gpumem.simulator import Simulation

    library = Path(sys.argv[2]) if sys.argv[2] else None
    simulation = Simulation.start([TOTAL] * int(sys.argv[1]), CONTEXT, library=library)
    simulation.install()
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # Once here instead of in every child whose optimizer or checkpoint needs it.
        warnings.simplefilter("ignore")
        import torch._dynamo
    for line in sys.stdin:
        path, name, arguments = json.loads(line)
        test = getattr(_module(path), name).__wrapped__
        status, said = in_child(lambda: test(**arguments))  # noqa: B023  # runs at once
        print(json.dumps(said or (status and f"died: {status}") or ""), file=answers, flush=True)
    simulation.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))
    sys.modules["card_process"] = sys.modules["__main__"]
    _serve()
