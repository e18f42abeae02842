"""Anchors: what a user keeps elsewhere to know later that a store was not put back.

Whoever can change a store's directory can put back an old copy of the whole, and each file of it
is true. An anchor is a random number that the store notes in a sealed file; an older copy has not
noted it. Beside it are the entries of that moment: one that was removed before and is back shows.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem import files
from pytest_gpumem.archive import disk, sealing
from pytest_gpumem.errors import ArgumentError, DamagedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pytest_gpumem.archive.catalogue import Entry

NAME: Final = "anchors"
_FORM: Final = re.compile("gpumem-anchor-[0-9a-f]{32}")
_KEPT: Final = 10_000
"""Anchors that are noted; of older ones nothing can be said."""
_MOST: Final = 64 * 2**20


class Anchors:
    """The anchors of the store in ``folder``."""

    def __init__(self, folder: Path, secret: bytes) -> None:
        self._path = folder / NAME
        self._secret = secret

    def drop(self, entries: Sequence[Entry]) -> str:
        """Return an anchor of a store with these entries: the last one, if that had the same.

        For one process at a time.

        Raises:
            DamagedError: the file of anchors is not what was written.
            OSError: the system would not read or write it.

        """
        noted = self._read()
        names = sorted(entry.id for entry in entries)
        if noted["anchors"] and noted["entries"] == names:
            return str(noted["anchors"][-1])
        anchor = f"gpumem-anchor-{secrets.token_hex(16)}"
        body = {
            "anchors": [*noted["anchors"], anchor][-_KEPT:],
            "entries": names,
            "time": time.time(),
        }
        sealed = sealing.close_whole(self._secret, sealing.ANCHORS, json.dumps(body).encode())
        disk.write_small(self._path, sealed)
        return anchor

    def problems(self, anchor: str, entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
        """Yield what shows that the store was put back to before ``anchor``.

        Raises:
            ArgumentError: that is no anchor.
            DamagedError, OSError: see ``drop``.

        """
        if not (isinstance(anchor, str) and _FORM.fullmatch(anchor)):
            raise ArgumentError(
                f"{str(anchor)[:60]!r} is not an anchor: those are 'gpumem-anchor-' and 32 "
                "hexadecimal digits"
            )
        noted = self._read()
        if anchor not in noted["anchors"]:
            told = (
                f"the store does not know {anchor}: it was put back to an older state, or the "
                f"anchor is another store's or older than its last {_KEPT}"
            )
            yield NAME, told
            return
        then = set(noted["entries"])
        for entry in entries:
            if entry.id not in then and entry.created < noted["time"]:
                told = (
                    f"the entry {entry.id} is by its time older than the last anchor, and was not "
                    "there then: probably it was removed before that, and put back"
                )
                yield entry.id, told

    def _read(self) -> dict[str, Any]:
        try:
            sealed = files.read_own(self._path, _MOST)
        except FileNotFoundError:
            return {"anchors": [], "entries": [], "time": 0.0}
        try:
            found = json.loads(sealing.open_whole(self._secret, sealing.ANCHORS, sealed))
        except DamagedError as error:
            raise type(error)(f"the file {str(self._path)!r} cannot be read: {error}") from None
        return found  # type: ignore[no-any-return]
