"""Files that are whole or not there: written aside, synced, renamed; and those of TOML."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def replace(path: Path) -> Iterator[TextIO]:
    """Write text to ``path``: all of it is there when the block ends, or what was there before.

    Raises:
        OSError: of ``path``, when it cannot be written; what stood there is untouched.

    """
    # Beside it, so that the rename stays within one file system; with the process's number, so
    # that two processes which write one file do not write into each other's.
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        aside.unlink(missing_ok=True)


def read_toml(path: Path) -> dict[str, Any]:
    """Return what a file of TOML says.

    Raises:
        OSError: when it cannot be read.
        ValueError: in one sentence, when it is no TOML.

    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pytest needs it there too
    try:
        plain: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not TOML: {error}") from None
    return plain
