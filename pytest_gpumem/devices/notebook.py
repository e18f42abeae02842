"""What could not be measured, each said once: a run reports it and goes on."""

from __future__ import annotations

_notes: dict[str, None] = {}


def note(sentence: str) -> None:
    """Remember ``sentence`` for the run's report, once however often it is said."""
    _notes.setdefault(sentence)


def note_failure(what: str, error: Exception) -> None:
    """Remember that ``what`` failed with ``error``, by the first line of its message."""
    message = str(error).strip().partition("\n")[0] or type(error).__name__
    note(f"{what} failed: {message}")


def notes() -> tuple[str, ...]:
    """Return the sentences remembered in this process, oldest first."""
    return tuple(_notes)
