"""The library of the compiled card: made once for each torch, and used once it was proven.

It lies in the user's cache under a key of what it was made of and proven with: this package's
source, in C++ and in Python, and the torch at hand. Beside it, in the place of a library that could
not be made or did not pass its proof, lies the reason. A compiler and the headers in torch's own
wheel are all that is needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem import files

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(__file__).with_name("card")
"""The directory of what is compiled, ``card.cpp`` and its parts."""
COMPILERS = ("c++", "g++", "clang++")
"""What is looked for on the path, behind ``CXX``."""
COMPILE_TIMEOUT = 600
"""Seconds after which a compiler or a proof is given up: hundreds of times what they take."""


class CannotCompileError(Exception):
    """There is no compiled card for this torch: why, in a clause."""


def library() -> Path:
    """Return the library for the torch at hand; the first process to ask makes it.

    That takes a compiler some ten seconds, once for each torch.

    Raises:
        CannotCompileError: why there is none.

    """
    torch = _torch_directory()
    compiler = _compiler()
    place = _cache() / _key(torch)
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(place):
            if not (ready := place / "card.so").exists():
                _make(compiler, torch, ready)
    except OSError as error:
        raise CannotCompileError(f"{error.filename or place}: {error.strerror}") from None
    return ready


def fits(path: Path) -> bool:
    """Return whether the library at ``path`` was made for the torch at hand."""
    return path.exists() and path.parent.name == _key(_torch_directory())


def _make(compiler: str, torch: Path, ready: Path) -> None:
    failed = ready.with_name("why-not")
    if failed.exists():
        raise CannotCompileError(files.read_text(failed).strip())
    made = ready.with_name("unproven.so")
    proof = [sys.executable, "-m", f"{__package__}.proof", str(made)]
    reason = (
        _said_wrong(_command(compiler, torch, made), "the compiler says")
        or ("" if made.exists() else "the compiler wrote nothing")
        or _said_wrong(proof, "it did not pass its proof")
    )
    if reason:
        made.unlink(missing_ok=True)
        with files.replace(failed) as file:
            file.write(f"{reason}\n")
        raise CannotCompileError(reason)
    made.rename(ready)


def _command(compiler: str, torch: Path, made: Path) -> list[str]:
    include = torch / "include"
    return [
        *compiler.split(),
        *("-std=c++20", "-O1", "-fPIC", "-shared", "-w"),
        *(f"-D_GLIBCXX_USE_CXX11_ABI={_string_abi(torch)}",),
        *(f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"),
        str(SOURCE / "card.cpp"),
        *(f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(made)),
    ]


def _string_abi(torch: Path) -> int:
    """Return which of libstdc++'s two kinds of string torch was built with."""
    new = b"_ZN3c105ErrorC1ENS_14SourceLocationENSt7__cxx1112basic_string"
    return int(new in (torch / "lib" / "libc10.so").read_bytes())


def _said_wrong(command: list[str], what: str) -> str:
    """Run a command; return why it failed, an empty text where it did not."""
    # Of the run around it the process is no child: it would be given that run's card.
    environment = {name: value for name, value in os.environ.items() if "GPUMEM" not in name}
    try:
        done = subprocess.run(  # noqa: S603  # the user's compiler, or this interpreter
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILE_TIMEOUT,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"{what}: nothing for {COMPILE_TIMEOUT} s"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines[-1:]
    return f"{what}: {telling[0][:300] if telling else f'status {done.returncode}'}"


def _torch_directory() -> Path:
    """Return where torch is installed, without importing it.

    Raises:
        CannotCompileError: when it is not, or without its headers.

    """
    found = importlib.util.find_spec("torch")
    if found is None or not found.origin:
        raise CannotCompileError("torch is not installed")
    torch = Path(found.origin).parent
    if not (torch / "include" / "torch" / "library.h").exists():
        raise CannotCompileError(f"{torch} has no headers")
    return torch


def _compiler() -> str:
    chosen = os.environ.get("CXX", "").strip()
    for name in [chosen] if chosen else COMPILERS:
        if shutil.which(name.split()[0]):
            return name
    wanted = chosen or "c++, g++ or clang++"
    raise CannotCompileError(f"there is no compiler for C++ here ({wanted})")


def _key(torch: Path) -> str:
    version = (torch / "version.py").read_bytes()
    sources = *sorted(SOURCE.iterdir()), *sorted(SOURCE.parent.glob("*.py"))
    parts = [path.read_bytes() for path in sources]
    made_of = (*parts, version, str(torch).encode(), platform.machine().encode())
    return hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]


def _cache() -> Path:
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if named else Path.home() / ".cache") / "pytest-gpumem"


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
