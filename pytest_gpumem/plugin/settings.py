"""Every option once: command line over environment over ini file over default.

An option called ``NAME`` here is ``--gpumem-NAME`` on the command line, ``GPUMEM_NAME`` in the
environment and ``gpumem_NAME`` in the ini file; the mode itself is plain ``--gpumem``,
``GPUMEM`` and ``gpumem``.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MODES = ("off", "track", "on")
NEED_ON = frozenset(
    ("schedule", "headroom", "too_large", "oom", "lease_timeout", "history", "fraction")
)
"""Options that are about sharing a card."""
SCHEDULES = ("careful", "optimistic", "off")


class Settings(NamedTuple):
    """What the user asked for; sizes in bytes."""

    mode: str = "track"
    simulate: int | None = None
    simulate_context: int = 384 * 2**20
    simulate_anyway: bool = False
    simulate_card: Path | None = None
    json: Path | None = None
    stacks: bool = False
    top: int = 10
    vram_limit: int | None = None
    vram_leak_limit: int | None = None
    children: str = "watch"
    sample_interval: float = 0.05
    archive: Path | None = None
    archive_key_file: Path | None = None
    archive_quota: int | None = None
    consolidate_above: float = 0.85
    schedule: str = "careful"
    headroom: int = 64 * 2**20
    context: int = 512 * 2**20
    too_large: str = "fail"
    oom: str = "cpu"
    lease_timeout: float | None = None
    history: Path | None = None
    fraction: float | None = None
    """0 means by the number of workers."""
    trace: Path | None = None
    html: Path | None = None
    route_full: float = 0.85
    route_busy: float = 0.70
    route_large: int = 200 * 2**20
    route_transformers: float = 0.80
    embedding_model: str = "all-MiniLM-L6-v2"
    without_effect: tuple[str, ...] = ()
    """Options that were given and need another mode, each with where it stands."""

    @property
    def simulated(self) -> bool:
        """Whether the run uses a simulated card."""
        return self.simulate is not None or self.simulate_card is not None

    @property
    def context_cost(self) -> int:
        """Bytes that a process is taken to cost once it uses a card."""
        return self.simulate_context if self.simulated else self.context


def _one_of(words: Sequence[str], what: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is not {what}; allowed are {', '.join(words)}")
        return text

    return parse


def _flag(text: str | bool) -> bool:
    if isinstance(text, bool):
        return text
    flags = {"1": True, "true": True, "yes": True, "on": True}
    flags |= {"0": False, "false": False, "no": False, "off": False}
    if text.lower() not in flags:
        raise ValueError(f"{text!r} is neither true nor false; allowed are {', '.join(flags)}")
    return flags[text.lower()]


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a number of lines; allowed is 0 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{text!r} is not a number of seconds; allowed is 0 or more")
    return seconds


def _fraction(text: str) -> float:
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


def _simulated_size(text: str) -> int:
    size = parse_bytes(text)
    if size == 0:
        raise ValueError(f"{text!r} is an empty card; allowed is more than 0 bytes")
    ram = _ram()
    if ram is not None and size > ram:
        raise ValueError(
            f"{text!r} is more than this machine's memory of {format_bytes(ram)}, "
            "in which the simulated card's tensors really live"
        )
    return size


def _ram() -> int | None:
    """Return the bytes of main memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _file(text: str) -> Path:
    return Path(text).absolute()


def check_files(settings: Settings) -> None:
    """Make sure that the files which the user asked for can be written.

    Before the first test runs, so that an hour's results are not lost at its end. Only where they
    will be written: a worker of xdist on another machine need not have their directories.

    Raises:
        BadSettingError: when one cannot be written, or is to be read and is of another kind.

    """
    for field, path in (
        ("json", settings.json),
        ("trace", settings.trace),
        ("html", settings.html),
        ("history", settings.history),
    ):
        if path is not None:
            problem = _why_not_written(path)
            if field == "html" and importlib.util.find_spec("plotly") is None:
                problem = "plotly is not installed; pip install 'pytest-gpumem[html]' has it"
            if field == "history" and not problem:
                from pytest_gpumem.scheduling.history import History

                problem = History.load(path).problem
            if problem:
                raise BadSettingError(f"--gpumem-{field}: {problem}")


def _why_not_written(path: Path) -> str:
    if path.is_dir():
        return f"{str(path)!r} is a directory; allowed is the name of a file"
    if not path.parent.is_dir():
        return f"cannot write {str(path)!r}: there is no directory {str(path.parent)!r}"
    # The file is replaced by a rename, so the directory must be writable.
    if not os.access(path.parent, os.W_OK):
        return f"cannot write {str(path)!r}: {str(path.parent)!r} is not writable"
    return ""


def _place(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _share(text: str) -> float:
    """Return the part of 1 that a text like ``85%`` names."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*%\s*", text, re.ASCII)
    if match is None or not 0 < float(match[1]) <= 100:
        raise ValueError(f"{text!r} is not a part; allowed is more than 0% and up to 100%")
    return float(match[1]) / 100


class Option(NamedTuple):
    """One option: how it is written and read."""

    field: str
    parse: Callable[[Any], Any]
    help: str
    metavar: str | None = None
    """None for a flag."""

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


OPTIONS = (
    Option(
        "mode",
        _one_of(MODES, "a mode"),
        "off: do nothing; track: measure and report; on: everything (what -p gpumem means). "
        "Default: track.",
        "MODE",
    ),
    Option(
        "simulate",
        _simulated_size,
        "Give the suite a simulated CUDA card of this size, shared by all workers, "
        "such as 3.81GiB.",
        "SIZE",
    ),
    Option(
        "simulate_context",
        parse_bytes,
        "What each process costs on the simulated card once it uses it. Default: 384MiB.",
        "SIZE",
    ),
    Option("simulate_anyway", _flag, "Simulate a card even though a real one is visible."),
    Option(
        "simulate_card",
        Path,
        "Use the simulated card that another run made, named by its file.",
        "FILE",
    ),
    Option("json", _file, "Write the run's records to this file.", "FILE"),
    Option("stacks", _flag, "Record where leaked tensors were allocated (slower)."),
    Option(
        "top",
        _count,
        "Entries shown of each list of the report: peaks, leaks, causes; 0: all. Default: 10.",
        "N",
    ),
    Option(
        "vram_limit",
        parse_bytes,
        "Fail each test that takes more than this size above its baseline, unless its vram_limit "
        "mark says otherwise.",
        "SIZE",
    ),
    Option(
        "vram_leak_limit",
        parse_bytes,
        "Fail each test that leaks more than this size, unless its vram_leak_limit mark says "
        "otherwise.",
        "SIZE",
    ),
    Option(
        "children",
        _one_of(("watch", "off"), "a way to treat child processes"),
        "watch: charge the processes that tests start to them, and give those of a simulated run "
        "the simulated card; off: leave them alone. Default: watch.",
        "HOW",
    ),
    Option(
        "sample_interval",
        _seconds,
        "Seconds between two looks at what the driver says of child processes; 0 for none "
        "between the beginning and the end of a test. Default: 0.05.",
        "SECONDS",
    ),
    Option(
        "archive",
        _place,
        "The store of archived model state. Default: gpumem/archive in the user's data directory.",
        "DIR",
    ),
    Option(
        "archive_key_file",
        _place,
        "The key file of the archives. Default: gpumem/archive.key in the user's config directory.",
        "FILE",
    ),
    Option("archive_quota", parse_bytes, "Most that the archives may take on the disk.", "SIZE"),
    Option(
        "consolidate_above",
        _share,
        "Consolidate registered models when more than this part of a card is used. Default: 85%.",
        "PERCENT",
    ),
    Option(
        "route_full",
        _share,
        "Send tasks to the CPU when more than this part of a card is used. Default: 85%.",
        "PERCENT",
    ),
    Option(
        "route_busy",
        _share,
        "Send large tasks to the CPU when more than this part is used. Default: 70%.",
        "PERCENT",
    ),
    Option(
        "route_large",
        parse_bytes,
        "What a large task wants more than. Default: 200MiB.",
        "SIZE",
    ),
    Option(
        "route_transformers",
        _share,
        "Send sentence transformers to the CPU when more than this part is reserved. Default: 80%.",
        "PERCENT",
    ),
    Option(
        "embedding_model",
        str,
        "Name or path of the model of the fixture embedding_model. Default: all-MiniLM-L6-v2.",
        "MODEL",
    ),
    Option(
        "schedule",
        _one_of(SCHEDULES, "a way to schedule"),
        "How xdist's workers get their tests in place of --dist load. careful: tests of unknown "
        "peak run alone on the card first; optimistic: they share it, and run again alone if "
        "they run out of memory; off: xdist schedules, and tests wait for leases. "
        "Default: careful.",
        "HOW",
    ),
    Option(
        "headroom",
        parse_bytes,
        "What is never given out of a card. Default: 64MiB.",
        "SIZE",
    ),
    Option(
        "context",
        parse_bytes,
        "What a process is taken to cost once it uses a real card. Default: 512MiB.",
        "SIZE",
    ),
    Option(
        "too_large",
        _one_of(("fail", "skip"), "an outcome"),
        "fail or skip a test that asks for more than the card has. Default: fail.",
        "OUTCOME",
    ),
    Option(
        "oom",
        _one_of(("fail", "retry", "cpu"), "an answer"),
        "When a test runs out of memory. fail: let it fail; retry: run it again, alone on the "
        "card and with model state consolidated; cpu: and then on the CPU, if it asked where "
        "to work. Default: cpu.",
        "ANSWER",
    ),
    Option(
        "lease_timeout",
        _seconds,
        "Fail a test that waits longer than this for its lease. Default: wait.",
        "SECONDS",
    ),
    Option(
        "history",
        _file,
        "Keep learned peaks and durations in this file instead of in pytest's cache.",
        "FILE",
    ),
    Option(
        "fraction",
        _fraction,
        "Let torch's allocator in each process have this part of a card at most, or auto: an "
        "even share beside the contexts.",
        "PART",
    ),
    Option("trace", _file, "Write a trace of the run that opens in Perfetto.", "FILE"),
    Option("html", _file, "Write a report of the run as one page.", "FILE"),
)


class BadSettingError(Exception):
    """One sentence that names the option, where it stands, and what is allowed."""


def resolve(
    options: Mapping[str, Any],
    environ: Mapping[str, str],
    ini: Callable[[str], str | None],
    *,
    asked: bool,
) -> Settings:
    """Return the settings that hold.

    Args:
        options: values from the command line by ``Option.dest``, None where not given.
        environ: the environment.
        ini: returns the ini file's text for a name, None or ``""`` where not given.
        asked: whether the plugin was asked for by name (``-p gpumem``), which makes the
            mode ``on`` unless it is given outright.

    Raises:
        BadSettingError: when a value cannot be used.

    """
    found: dict[str, Any] = {"mode": "on"} if asked else {}
    places: dict[str, str] = {}
    for option in OPTIONS:
        for place, value in (
            (option.flag, options.get(option.dest)),
            (f"{option.env} in the environment", environ.get(option.env)),
            (f"{option.dest} in the ini file", ini(option.dest)),
        ):
            if value is None or value == "":
                continue
            try:
                found[option.field] = option.parse(value)
            except ValueError as error:
                raise BadSettingError(f"{place}: {error}") from None
            places[option.field] = place
            break
    settings = Settings(**found)
    if settings.mode != "on":
        idle = tuple(place for field, place in places.items() if field in NEED_ON)
        settings = settings._replace(without_effect=idle)
    if settings.simulate is not None and settings.simulate_context >= settings.simulate:
        raise BadSettingError(
            f"--gpumem-simulate: a card of {format_bytes(settings.simulate)} has no room for a "
            f"context of {format_bytes(settings.simulate_context)}; "
            "make --gpumem-simulate-context smaller"
        )
    return settings
