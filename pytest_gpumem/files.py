"""Files that are whole or not there: written aside, synced, renamed."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

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
