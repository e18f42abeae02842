"""Takes out of an error what varies, so that the same error counts as one."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_ATTRIBUTE = re.compile(r"'(\w+)' object has no attribute '(\w+)'")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_PATH = re.compile(r"/(?:[\w.@+-]+/)+[\w.@+-]+")


def signature(text: str) -> str:
    """Return ``text`` without its addresses, numbers, paths and class names."""
    text = _ATTRIBUTE.sub(r"'X' object has no attribute '\2'", text)
    text = _ADDRESS.sub("0x?", text)
    text = _PATH.sub("/...", text)
    return _NUMBER.sub("N", text).removesuffix("...").rstrip()[:300]


def subject(text: str) -> str | None:
    """Return the class that stood where ``signature`` writes 'X'."""
    match = _ATTRIBUTE.search(text)
    return match[1] if match else None
