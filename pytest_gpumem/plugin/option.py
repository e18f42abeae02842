"""How an option is written: its names, its values, and what is said of it."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpumem.tuples import NamedTuple
from pytest_gpumem.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


GROUPS = {
    "measure": "GPU memory: measuring and limits",
    "report": "GPU memory: what a run leaves",
    "share": "GPU memory: sharing cards",
    "place": "GPU memory: archives, and where tasks run",
    "simulate": "GPU memory: the simulated card",
}
"""In the order of ``pytest --help``."""


class Option(NamedTuple):
    """One option: how it is written and read."""

    field: str
    parse: Callable[[Any], Any]
    what: str
    metavar: str | None
    """None for a flag."""
    default: str
    """As a user would write it, or in words where there is no value."""
    needs_on: bool
    """Whether it is about sharing a card, and has no effect in another mode."""
    group: str
    """A key of ``GROUPS``, under which ``pytest --help`` shows it."""
    value: Any
    """What holds where it is not given."""

    @property
    def suffix(self) -> str:
        """What distinguishes its names from those of the mode."""
        return "" if self.field == "mode" else f"_{self.field}"

    @property
    def dest(self) -> str:
        """Name in the ini file and on pytest's option object."""
        return f"gpumem{self.suffix}"

    @property
    def flag(self) -> str:
        """Name on the command line."""
        return f"--{self.dest.replace('_', '-')}"

    @property
    def env(self) -> str:
        """Name in the environment."""
        return self.dest.upper()

    @property
    def help(self) -> str:
        """What ``pytest --help`` says of it."""
        return f"{self.what} Default: {self.default}." if self.default else self.what


def declared(
    parse: Callable[[Any], Any],
    what: str,
    metavar: str | None = None,
    *,
    default: str | None = None,
    otherwise: str = "",
    needs_on: bool = False,
    group: str = "measure",
) -> Any:
    """Declare a field of ``Settings``, whose name is the option's.

    Args:
        parse: returns the value that a text means; raises ``ValueError`` in one sentence.
        what: sentences of ``--help``, without the default.
        metavar: what stands for its value; None for a flag, which is off.
        default: the text whose value holds where the option is not given; None: ``None`` holds.
        otherwise: what ``None`` means, in words.
        needs_on: whether it has an effect with ``--gpumem=on`` only.
        group: a key of ``GROUPS``.

    """
    value = False if metavar is None else None if default is None else parse(default)
    return Option("", parse, what, metavar, default or otherwise, needs_on, group, value)


def options_of(settings: type) -> tuple[Option, ...]:
    """Return the options that the fields of ``settings`` declare."""
    return tuple(
        each._replace(field=name)
        for part in reversed(settings.__mro__)
        for name, each in vars(part).items()
        if isinstance(each, Option)
    )


def one_of(words: Sequence[str], what: str) -> Callable[[str], str]:
    """Return a parser of the ``words``; ``what`` is what each of them is."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is not {what}; allowed are {', '.join(words)}")
        return text

    return parse


def flag(text: str | bool) -> bool:
    """Return whether a flag is set."""
    if isinstance(text, bool):
        return text
    flags = {"1": True, "true": True, "yes": True, "on": True}
    flags |= {"0": False, "false": False, "no": False, "off": False}
    if text.lower() not in flags:
        raise ValueError(f"{text!r} is neither true nor false; allowed are {', '.join(flags)}")
    return flags[text.lower()]


def count(what: str) -> Callable[[str], int]:
    """Return a parser of a number of ``what``."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()):
            raise ValueError(f"{text!r} is not a number of {what}; allowed is 0 or more")
        return int(text)

    return parse


def allocation(text: str) -> str | int:
    """Return the number of an allocation, or which of them are meant."""
    if text in ("first", "every"):
        return text
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise ValueError(
            f"{text!r} is not an allocation; allowed are first, every and a number from 1 on"
        )
    return int(text)


def seconds(text: str) -> float:
    """Return a number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{text!r} is not a number of seconds; allowed is 0 or more")
    return seconds


def positive_size(text: str) -> int:
    """Return the bytes that a size names, more than none."""
    size = parse_bytes(text)
    if size == 0:
        raise ValueError(f"{text!r} is no bound; allowed is more than 0 bytes")
    return size


def fraction(text: str) -> float:
    """Return a part of a card, 0 for ``auto``."""
    if text == "auto":
        return 0.0
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1
    if not 0 < fraction <= 1:
        raise ValueError(
            f"{text!r} is not a part of a card; allowed are auto and numbers above 0 and up to 1"
        )
    return fraction


def tolerance(text: str) -> tuple[float, int]:
    """Return the part and the bytes that a text like ``2%``, ``16MiB`` or ``2%,16MiB`` names."""
    part, size = 0.0, 0
    for each in text.split(","):
        if match := re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*%\s*", each, re.ASCII):
            part = float(match[1]) / 100
        else:
            try:
                size = parse_bytes(each)
            except ValueError:
                raise ValueError(
                    f"{text!r} is not a tolerance; allowed are a part, a size, or both, the larger "
                    "of which holds: 2%, 16MiB, 2%,16MiB"
                ) from None
    return part, size


MOST_CARDS = 64
"""As many as ``CUDA_VISIBLE_DEVICES`` leaves visible where it is unset, by torch's reading."""


def simulated_sizes(text: str) -> tuple[int, ...]:
    """Return the bytes of each simulated card, which this machine's memory holds together."""
    sizes: list[int] = []
    for each in text.split(","):
        size, times, count = each.partition("*")
        if times and not re.fullmatch(r"\s*0*[1-9]\d{0,2}\s*", count, re.ASCII):
            raise ValueError(
                f"{text!r} is not a number of cards; allowed are a size, 4GiB*2 for two of that "
                "size, and 4GiB,8GiB for unlike ones"
            )
        total = parse_bytes(size)
        if total == 0:
            raise ValueError(f"{text!r} is an empty card; allowed is more than 0 bytes")
        sizes += [total] * int(count or 1)
    if len(sizes) > MOST_CARDS:
        raise ValueError(f"{text!r} is {len(sizes)} cards; allowed are {MOST_CARDS}")
    ram = _ram()
    if ram is not None and sum(sizes) > ram:
        raise ValueError(
            f"{text!r} is more than this machine's memory of {format_bytes(ram)}, "
            "in which the simulated card's tensors really live"
        )
    return tuple(sizes)


def _ram() -> int | None:
    """Return the bytes of main memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def file(text: str) -> Path:
    """Return the path of a file to write."""
    return Path(text).absolute()


class Which(NamedTuple):
    """The tests whose peak is looked at."""

    offenders: bool = False
    """Those that took more than they may, or ran out of memory."""
    largest: int = 0
    """As many of those that took most."""
    pattern: str = ""
    """A nodeid, or the beginning of some, in which ``*`` stands for anything."""

    @property
    def later(self) -> bool:
        """Whether only the end of a run shows which they are."""
        return self.offenders or self.largest > 0

    def names(self, nodeid: str) -> bool:
        """Return whether the pattern is a test's."""
        if not self.pattern:
            return False
        whole = ".*".join(map(re.escape, self.pattern.split("*")))
        # A file names its tests, a class its methods, a function its parameters.
        return re.fullmatch(rf"{whole}(?:(?:::|/|\[).*)?", nodeid, re.DOTALL) is not None


def which(text: str) -> Which:
    """Return which tests a text means: ``offenders``, a number, or a pattern of nodeids."""
    text = text.strip()
    if text == "offenders":
        return Which(offenders=True)
    if re.fullmatch(r"[+-]?[0-9.]+", text):
        if not text.isdecimal() or int(text) == 0:
            raise ValueError(f"{text!r} is not a number of tests; allowed is 1 or more")
        return Which(largest=int(text))
    if not text or text.startswith("-"):
        raise ValueError(
            f"{text!r} names no tests; allowed are offenders, a number, and a nodeid, in which * "
            "stands for anything"
        )
    return Which(pattern=text)


def user_path(text: str) -> Path:
    """Return a path of the user's, who may write ``~``."""
    return Path(text).expanduser().absolute()


def share(text: str) -> float:
    """Return the part of 1 that a text like ``85%`` names."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*%\s*", text, re.ASCII)
    if match is None or not 0 < float(match[1]) <= 100:
        raise ValueError(f"{text!r} is not a part; allowed is more than 0% and up to 100%")
    return float(match[1]) / 100
