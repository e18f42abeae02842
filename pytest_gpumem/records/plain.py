"""Records as the builtin types that xdist and JSON carry, and back; runs as files of JSON."""

from __future__ import annotations

import functools
import json
import typing
from typing import Any, TypeVar

from pytest_gpumem import files
from pytest_gpumem.records.run import SCHEMA, RunRecord

if typing.TYPE_CHECKING:
    from pathlib import Path

R = TypeVar("R")


def to_plain(record: Any) -> Any:
    """Return ``record`` as dicts, lists, strings and numbers."""
    if hasattr(record, "_fields"):
        return {name: to_plain(getattr(record, name)) for name in record._fields}
    return list(map(to_plain, record)) if isinstance(record, tuple) else record


def from_plain(kind: type[R], plain: dict[str, Any]) -> R:
    """Return the record of class ``kind`` that ``plain`` describes.

    Unknown keys are ignored, so that a newer writer can be read.

    Raises:
        ValueError: when a key without a default is missing.

    """
    hints, defaults = _hints(typing.cast("Any", kind)), typing.cast("Any", kind)._field_defaults
    fields = {name: _value(hints[name], plain[name]) for name in hints if name in plain}
    if lacks := [name for name in hints if name not in {*fields, *defaults}]:
        raise ValueError(f"a {kind.__name__} lacks {', '.join(lacks)}")
    return kind(**fields)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """Return the types of a record's fields; resolving them for each test would show."""
    return typing.get_type_hints(kind)


def _value(hint: Any, plain: Any) -> Any:
    """Return ``plain`` as the type ``hint`` of a record's field."""
    if typing.get_origin(hint) is tuple and isinstance(plain, list | tuple):
        return tuple(_value(typing.get_args(hint)[0], each) for each in plain)
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if hasattr(kind, "_fields")]
    if kinds and isinstance(plain, dict):
        return from_plain(kinds[0], plain)
    if not isinstance(plain, _leaves(hint)):
        raise ValueError(f"{plain!r:.40} is no {getattr(hint, '__name__', hint)}")
    return plain


@functools.cache
def _leaves(hint: Any) -> tuple[type, ...]:
    """Return the builtin types that a field may have; JSON writes a whole float as an integer."""
    kinds = () if typing.get_origin(hint) is tuple else typing.get_args(hint) or (hint,)
    plain = {kind for kind in kinds if kind in {int, float, str, bool, type(None)}}
    return (*plain, *([int] if float in plain else []))


def save(run: RunRecord, path: Path) -> None:
    """Write ``run`` as JSON to ``path``, whole or not at all.

    Raises:
        OSError: when the file cannot be written; what stood there before is untouched.

    """
    write_json(to_plain(run), path)


def write_json(plain: dict[str, Any], path: Path) -> None:
    """Write ``plain`` as JSON to ``path``, whole or not at all.

    Raises:
        OSError: when the file cannot be written; what stood there before is untouched.

    """
    with files.replace(path) as file:
        json.dump(plain, file, indent=1)
        file.write("\n")


def load_run(path: Path) -> RunRecord:
    """Return the run that ``save`` wrote to ``path``.

    Raises:
        OSError: when the file cannot be read.
        ValueError: in one sentence, when it is not such a file.

    """
    try:
        return parse(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} {error}") from None


def parse(text: bytes) -> RunRecord:
    """Return the run that ``save`` wrote.

    Raises:
        ValueError: in one sentence, without a subject, when it is none.

    """
    try:
        plain = json.loads(text, parse_int=_number, parse_float=_number, parse_constant=_number)
    except RecursionError:
        raise ValueError("is not JSON of ours: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(plain, dict) or plain.get("schema") != SCHEMA:
        raise ValueError(f"is not a run of schema {SCHEMA} (--gpumem-json)")
    try:
        return from_plain(RunRecord, plain)
    except ValueError as error:
        raise ValueError(f"is a damaged run: {error}") from None


_LARGEST = 2**63
"""No card has more bytes, no run more seconds."""


def _number(text: str) -> float:
    """Return a number as an int where it is one; one that cannot be is refused."""
    whole = text.lstrip("-").isdigit()
    number = (int(text) if len(text) < 20 else _LARGEST) if whole else float(text)
    if text == "NaN":
        raise ValueError(f"{text[:20]} is not a number")
    if not -_LARGEST < number < _LARGEST:
        raise ValueError(f"{text[:20]} is too large a number")
    return number
