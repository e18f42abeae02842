"""Every option once; where its value comes from says ``resolve``.

An option called ``NAME`` here is ``--gpumem-NAME`` on the command line, ``GPUMEM_NAME`` in the
environment and ``gpumem_NAME`` in the ini file; the mode itself is plain ``--gpumem``,
``GPUMEM`` and ``gpumem``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_gpumem.plugin.option import (
    Which,
    allocation,
    count,
    declared,
    file,
    flag,
    fraction,
    one_of,
    options_of,
    positive_size,
    seconds,
    share,
    simulated_sizes,
    tolerance,
    user_path,
    which,
)
from pytest_gpumem.units import parse_bytes


class SimulationSettings:
    """What the user asked for of simulated cards; sizes in bytes."""

    simulate: tuple[int, ...] | None = declared(
        simulated_sizes,
        "Give the suite a simulated CUDA card of this size, shared by all workers, such as "
        "3.81GiB; 4GiB*2 for two, 4GiB,8GiB for unlike ones.",
        "SIZE",
        group="simulate",
    )
    simulate_context: int = declared(
        parse_bytes,
        "VRAM that each process costs once it uses the simulated card.",
        "SIZE",
        default="384MiB",
        group="simulate",
    )
    simulate_workspace: int = declared(
        parse_bytes,
        "VRAM that cuBLAS takes on the simulated card for each thread and stream that multiplies "
        "matrices, such as 8320KiB.",
        "SIZE",
        default="0B",
        group="simulate",
    )
    simulate_compiled: bool = declared(
        flag,
        "Compile the simulated card for the installed torch, once: torch's C++ then takes its "
        "tensors for a card's, and tensors of the host cost nothing more.",
        group="simulate",
    )
    simulate_anyway: bool = declared(
        flag,
        "Simulate a card even though a real one is visible.",
        group="simulate",
    )
    simulate_card: Path | None = declared(
        Path,
        "Use the simulated card that another run made, named by its file.",
        "FILE",
        group="simulate",
    )

    @property
    def simulated(self) -> bool:
        """Whether the run uses simulated cards."""
        return self.simulate is not None or self.simulate_card is not None


class PlaceSettings:
    """What the user asked for of archives and of where tasks run; sizes in bytes."""

    archive: Path | None = declared(
        user_path,
        "The store of archived model state.",
        "DIR",
        otherwise="gpumem/archive in the user's data directory",
        group="place",
    )
    archive_key_file: Path | None = declared(
        user_path,
        "The key file of the archives.",
        "FILE",
        otherwise="gpumem/archive.key in the user's config directory",
        group="place",
    )
    archive_quota: int | None = declared(
        parse_bytes,
        "The most that the archives may take on the disk.",
        "SIZE",
        group="place",
    )
    consolidate_above: float = declared(
        share,
        "Consolidate registered models when more than this part of a card is used.",
        "PERCENT",
        default="85%",
        group="place",
    )
    route_full: float = declared(
        share,
        "Send tasks to the CPU when more than this part of a card is used.",
        "PERCENT",
        default="85%",
        group="place",
    )
    route_busy: float = declared(
        share,
        "Send large tasks to the CPU when more than this part is used.",
        "PERCENT",
        default="70%",
        group="place",
    )
    route_large: int = declared(
        parse_bytes,
        "A task that needs more than this is a large one.",
        "SIZE",
        default="200MiB",
        group="place",
    )
    route_transformers: float = declared(
        share,
        "Send sentence transformers to the CPU when more than this part is reserved.",
        "PERCENT",
        default="80%",
        group="place",
    )
    embedding_model: str = declared(
        str,
        "Name or path of the model of the fixture embedding_model.",
        "MODEL",
        default="all-MiniLM-L6-v2",
        group="place",
    )


class Settings(SimulationSettings, PlaceSettings):
    """What the user asked for; sizes in bytes."""

    mode: str = declared(
        one_of(("off", "track", "on"), "a mode"),
        "off: do nothing; track: measure and report; on: everything (what -p gpumem means).",
        "MODE",
        default="track",
    )
    json: Path | None = declared(
        file,
        "Write the run's records to this file.",
        "FILE",
        group="report",
    )
    stacks: bool = declared(flag, "Record where leaked tensors were allocated (slower).")
    peaks: Which | None = declared(
        which,
        "Tell line by line what was alive at the peak of these tests. offenders: those above their "
        "budget or limit, or out of memory; a number: as many of the largest; else a nodeid, in "
        "which * stands for anything. Offenders and the largest run once more for that.",
        "TESTS",
        group="report",
    )
    snapshots: Path | None = declared(
        file,
        "Write a snapshot of each test that is recorded, for pytorch.org/memory_viz, into this "
        "directory.",
        "DIR",
        group="report",
    )
    top: int = declared(
        count("lines"),
        "Entries shown of each list of the report: peaks, leaks, causes; 0: all.",
        "N",
        default="10",
        group="report",
    )
    vram_limit: int | None = declared(
        parse_bytes,
        "Fail each test that takes more than this size above its baseline, unless its "
        "vram_limit mark says otherwise.",
        "SIZE",
    )
    vram_leak_limit: int | None = declared(
        parse_bytes,
        "Fail each test that leaks more than this size, unless its vram_leak_limit mark says "
        "otherwise.",
        "SIZE",
    )
    budget: Path | None = declared(
        Path,
        "Fail each test that takes more VRAM than this file, which is kept in git, allows it.",
        "FILE",
    )
    budget_update: bool = declared(
        flag,
        "Write budgets of new tests, and lower those of tests that took less by more than the "
        "tolerance.",
    )
    budget_tolerance: tuple[float, int] = declared(
        tolerance,
        "What a test may be above its budget: a part of it, a size, or both, the larger of which "
        "holds, such as 2%,16MiB.",
        "TOLERANCE",
        default="2%",
    )
    leak_warmups: int = declared(
        count("calls"),
        "Call each test this many times before the call whose leak counts, for caches that fill "
        "once.",
        "N",
        default="0",
    )
    module_leak_limit: int | None = declared(
        parse_bytes,
        "Fail the teardown of each module that leaves more than this size on a card when its own "
        "fixtures are gone.",
        "SIZE",
    )
    children: str = declared(
        one_of(("watch", "off"), "a way to treat child processes"),
        "watch: charge the processes that tests start to them, and give those of a simulated run "
        "the simulated card; off: leave them alone.",
        "HOW",
        default="watch",
    )
    sample_interval: float = declared(
        seconds,
        "Seconds between two looks at what the driver says of child processes; 0 for none "
        "between the beginning and the end of a test.",
        "SECONDS",
        default="0.05",
    )
    ram: bool = declared(
        flag,
        "Measure the main memory of tests and of what they start, and let workers and runs "
        "share it.",
    )
    schedule: str = declared(
        one_of(("on", "off"), "a way to schedule"),
        "How xdist's workers get their tests. on: in place of --dist load, as there is VRAM for "
        "them; off: xdist schedules, and tests wait for leases.",
        "HOW",
        default="on",
        needs_on=True,
        group="share",
    )
    headroom: int = declared(
        parse_bytes,
        "VRAM of each card that is never handed out.",
        "SIZE",
        default="64MiB",
        needs_on=True,
        group="share",
    )
    context: int = declared(
        parse_bytes,
        "VRAM that each process is assumed to cost once it uses a real card.",
        "SIZE",
        default="512MiB",
        group="share",
    )
    too_large: str = declared(
        one_of(("fail", "skip"), "an outcome"),
        "fail or skip a test that asks for more than the card has.",
        "OUTCOME",
        default="fail",
        needs_on=True,
        group="share",
    )
    oom: str = declared(
        one_of(("fail", "retry", "cpu"), "an answer"),
        "When a test runs out of memory. fail: let it fail; retry: run it again, alone on the"
        " card and with model state consolidated; cpu: and then on the CPU, if it asked where"
        " to work.",
        "ANSWER",
        default="cpu",
        needs_on=True,
        group="share",
    )
    isolate: str = declared(
        one_of(("off", "marked", "failed", "all"), "a choice of tests to isolate"),
        "Which tests run in a fresh process each. marked: those marked gpu(isolated=True); failed:"
        " these, and again those that ran out of memory or lost the CUDA context; all: every test;"
        " off: none.",
        "WHICH",
        default="marked",
        needs_on=True,
        group="share",
    )
    oom_at: str | int | None = declared(
        allocation,
        "Let each test run out of memory at this allocation of its call, at the first, or at "
        "every one in turn, and say which it recovered from.",
        "N",
    )
    oom_tries: int = declared(
        count("allocations"),
        "Allocations of each test that --gpumem-oom-at=every lets fail at most; 0: all.",
        "N",
        default="100",
    )
    lease_timeout: float | None = declared(
        seconds,
        "Fail a test that waits longer than this for its lease.",
        "SECONDS",
        otherwise="wait",
        needs_on=True,
        group="share",
    )
    worker_ram: int | None = declared(
        positive_size,
        "Replace a worker of xdist whose main memory has grown beyond this size, before it goes "
        "on to another module.",
        "SIZE",
        otherwise="no bound",
        needs_on=True,
        group="share",
    )
    history: Path | None = declared(
        file,
        "Keep learned peaks and durations in this file instead of in pytest's cache.",
        "FILE",
        otherwise="pytest's cache",
        needs_on=True,
        group="share",
    )
    jax_preallocate: str = declared(
        one_of(("keep", "off"), "a way to treat JAX's preallocation"),
        "keep: JAX reserves most of a card, unless its own settings differ; off: what it needs.",
        "HOW",
        default="keep",
        group="share",
    )
    fraction: float | None = declared(
        fraction,
        "Let torch's allocator in each process have this part of a card at most, or auto: an "
        "even share beside the contexts.",
        "PART",
        otherwise="no cap",
        needs_on=True,
        group="share",
    )
    """0 means by the number of workers."""
    trace: Path | None = declared(
        file,
        "Write a trace of the run that opens in Perfetto.",
        "FILE",
        group="report",
    )
    html: Path | None = declared(
        file,
        "Write a report of the run as one page.",
        "FILE",
        group="report",
    )
    html_library: str = declared(
        one_of(("inside", "linked"), "a place for the page's library"),
        "inside: the page has all that it needs, 5 MB; linked: it loads what draws its timeline "
        "from Plotly's server.",
        "WHERE",
        default="inside",
        group="report",
    )
    github: str = declared(
        one_of(("auto", "off"), "a way to speak to GitHub"),
        "auto: in GitHub Actions, annotate leaks and tests that ran out of memory, and write a job "
        "summary; off: do neither.",
        "HOW",
        default="auto",
        group="report",
    )
    base: Path | None = declared(
        file,
        "Set the job summary against this earlier run, a file of --gpumem-json.",
        "FILE",
        group="report",
    )
    without_effect: tuple[str, ...] = ()
    """Options that were given and need another mode, each with where it stands."""

    # No data class, which would take three milliseconds of each start of pytest.
    def __init__(self, **values: Any) -> None:
        if not all(hasattr(Settings, name) for name in values):
            raise TypeError(f"no settings: {', '.join(values.keys() - set(dir(Settings)))}")
        vars(self).update({option.field: option.value for option in OPTIONS}, **values)

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse to be changed: who has read a setting may have acted upon it.

        Raises:
            AttributeError: always.

        """
        raise AttributeError(f"settings stay as they are; replace({name}=...) makes others")

    def replace(self, **values: Any) -> Settings:
        """Return the same settings but for these values."""
        return Settings(**vars(self) | values)

    @property
    def context_cost(self) -> int:
        """Bytes that a process is taken to cost once it uses a card."""
        return self.simulate_context if self.simulated else self.context


OPTIONS = options_of(Settings)
