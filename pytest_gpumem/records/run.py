"""What a run leaves behind: named tuples, the only thing reports read.

Every size is in bytes, every duration in seconds. The JSON form is described in ``docs/json.md``;
``SCHEMA`` changes with it, see ``plain``.
"""

# Annotations are no text here: typing would compile that of each field at every run's start.

from collections.abc import Sequence

from pytest_gpumem.tuples import NamedTuple
from pytest_gpumem.units import format_bytes

SCHEMA = 1
"""Version of the JSON form of a ``RunRecord``."""


class Card(NamedTuple):
    """A physical GPU or MIG slice, known by its UUID."""

    uuid: str
    name: str
    total: int
    kind: str = "cuda"
    """The torch device type that reaches it: ``cuda``, ``xpu``, ``mps``."""
    host: str = ""
    """The machine it is in; empty for the one that reports."""

    def called(self, cards: Sequence[object]) -> str:
        """Return its name, and of several ``cards`` the end of the UUID that tells it from them."""
        return f"{self.name} {short(self.uuid)}" if len(cards) > 1 else self.name


def short(uuid: str) -> str:
    """Return the end of a card's UUID, which tells it from the others."""
    return uuid[-8:]


class Holder(NamedTuple):
    """Tensors (storages) that outlived their test, and who refers to them."""

    where: str
    """In words a person can act on: ``tests/test_x.py: module global CACHE[3]``."""
    shape: tuple[int, ...]
    """Of the largest of them, as is ``dtype``."""
    dtype: str
    size: int
    """Bytes of all of them."""
    tensors: int = 1
    """How many are held at the same place."""
    stack: tuple[str, ...] = ()
    """Where it was allocated, innermost frame first, when allocation stacks are recorded."""
    whole: int = 0
    """Bytes that they have where ``size`` is only the part that counts as leaked: the rest took
    the place of what was freed."""


class CardUsage(NamedTuple):
    """What one test did to one card, as this process's allocator and the driver tell it."""

    card: str
    """UUID of the card."""
    baseline: int
    """Allocated when the test began, with its wider fixtures set up."""
    peak: int
    """Highest allocated while the test ran, baseline included, and by what it started."""
    leftover: int
    """Allocated after the test beyond its baseline and beyond what wider fixtures took."""
    reserved: int
    """Reserved by the allocator after the test."""
    reserved_peak: int
    retries: int
    """Times the allocator had to give its cache back and try again."""
    ooms: int
    """Out-of-memory errors the allocator raised, caught ones too."""
    process: int | None
    """Driver-side bytes of this process, where the driver tells them."""
    leaked: int = 0
    """The part of ``leftover`` that was confirmed as a leak."""
    holders: tuple[Holder, ...] = ()
    note: str = ""
    """Why leftover is not (all) a leak: ``library workspace``, ``held by fixture 'model'``."""
    extra: int = 0
    """Bytes to set aside for it: the most that its process reserved beyond what it kept anyway,
    and the most that what it started used."""
    fixture_bytes: int = 0
    """Held by the wider fixtures it uses, and by what they started: what a process without them
    needs on top."""
    children_peak: int = 0
    """The part of ``peak`` that the processes had which the test started: by torch's allocators,
    and by the driver where those tell nothing."""
    orphaned: int = 0
    """The part of ``leaked`` that these processes held when the test was over."""
    own: int = 0
    """The most that tensors of its own process asked for beyond what there was without it. Unlike
    ``peak`` it does not depend on which tests came before, so it can be compared with a budget."""
    own_left: int = 0
    """The part of it that was still there at its end: leaked, or kept for later tests."""
    vague: tuple[str, ...] = ()
    """Frameworks that took part and do not tell the peak of a test: ``peak`` and ``own`` are what
    was seen at its boundaries, or the highest of the process where that rose; it may have been
    more."""


class Left(NamedTuple):
    """Something that a test set for its whole process and did not set back."""

    what: str
    """``memory fraction of cuda:0``, ``default device``, ``CUDA_VISIBLE_DEVICES``."""
    before: str
    after: str
    put_back: bool = False
    """Whether it was set to what it was before."""


class Process(NamedTuple):
    """Another process on a card, as the driver's list tells."""

    pid: int
    command: str
    """Empty where the system does not tell it."""
    size: int | None
    """Bytes of the card; None where the driver does not tell."""
    worker: str = ""
    """The worker of the same run that it is."""

    @property
    def text(self) -> str:
        """Return it in words."""
        size = "memory" if self.size is None else format_bytes(self.size)
        if self.worker:
            return f"worker {self.worker} of this run holds {size}"
        command = f" ({self.command})" if self.command else ""
        return f"process {self.pid}{command} holds {size}"


class ChildUsage(NamedTuple):
    """What a process that a test or fixture started did to one card; it may not be over yet."""

    pid: int
    """0 where it is numbered in another pid namespace."""
    command: str
    """Empty where the system does not tell it."""
    card: str
    """UUID of the card."""
    started_by: str
    """The test, or the fixture in words: ``fixture 'engine' (module)``."""
    peak: int | None = None
    """Highest allocated by torch; None where it told nothing, and the driver alone knows of it."""
    reserved_peak: int | None = None
    used_peak: int | None = None
    """The most that the driver saw it use, its context and its libraries included."""
    used: int = 0
    """Bytes of the card that it holds now; 0 once it has ended."""
    leaked: int = 0
    """What it still held when who started it was over: then it is an orphan."""
    ooms: int = 0
    """Out-of-memory errors that its allocator raised, caught ones too."""
    start: float = 0.0
    """When it was first seen to use the card, in seconds since the epoch."""
    end: float = 0.0
    """When it was seen to have ended; 0 while it runs."""

    @property
    def other(self) -> int | None:
        """The most that was not torch's: its context, libraries, other frameworks."""
        if self.used_peak is None or self.reserved_peak is None:
            return self.used_peak
        return max(0, self.used_peak - self.reserved_peak)


class FixtureUsage(NamedTuple):
    """What one fixture's set-up and teardown did to one card."""

    name: str
    scope: str
    card: str
    allocated: int
    """Net bytes its set-up allocated; fixtures it asked for itself are not counted."""
    peak: int
    """Highest allocated during its set-up."""
    released: int | None = None
    """Net bytes that came back at its teardown; None while it has not been torn down."""
    leaked: int = 0
    """The part that did not come back and was confirmed as a leak."""
    holders: tuple[Holder, ...] = ()
    orphaned: int = 0
    """The part of ``leaked`` that processes hold which it started, and which still run."""


class ScopeUsage(NamedTuple):
    """What a module, or the whole run, left on one card when all of its own fixtures were gone."""

    scope: str
    """``module`` or ``session``."""
    name: str
    """The module's nodeid; empty for the run."""
    card: str
    """UUID of the card."""
    left: int
    """Bytes of its tests and fixtures that stayed, and were confirmed as a leak."""
    holders: tuple[Holder, ...] = ()
    note: str = ""
    """Why more than that stayed."""


class RamUsage(NamedTuple):
    """What one test did to main memory: its process (RSS), and what it started (PSS)."""

    baseline: int
    """Resident of its process when its set-up began."""
    peak: int
    """Highest while it ran, baseline included, and ``children_peak``."""
    kept: int
    """More than before when it was over, its children's part included; negative: less."""
    children_peak: int = 0
    """The most that the processes which it started were seen to have at one moment."""

    @property
    def own_peak(self) -> int:
        """The peak above what was there when it began, in bytes."""
        return self.peak - self.baseline


class LeaseUsage(NamedTuple):
    """Permission to use bytes of a card, as one test had it."""

    cards: tuple[str, ...]
    """UUIDs."""
    size: int
    """On each of the cards, beyond what its process keeps."""
    alone: bool
    """Whether no other test could use the cards meanwhile."""
    waited: float
    """Seconds before its start."""
    marked: int | None = None
    """What its mark asks for on each card, None where it has none that says so."""


class AliveGroup(NamedTuple):
    """Allocations that were alive together, and have line, owner and kind in common."""

    size: int
    """Bytes that were asked for."""
    owner: str
    """``this test``, a wider fixture in words, ``left by`` another test."""
    kind: str
    """What torch used it for: ``parameter``, ``gradient``, ``optimizer state``, ``activation``,
    ``other``; ``unknown`` where that cannot be told."""
    where: str = ""
    """``file:line function`` of the innermost frame that is the user's own code; ``in torch``
    where none is; empty where it was not recorded."""
    allocations: int = 1
    """How many they are."""
    shape: tuple[int, ...] = ()
    """Of the largest of their tensors, as is ``dtype``, where tensors were looked at."""
    dtype: str = ""


class Alive(NamedTuple):
    """What was alive on one card at one moment of a test."""

    card: str
    """UUID of the card."""
    moment: str
    """``peak``; ``out of memory``: when the card refused; ``failed``: what its tensors still held
    when the test had failed for that."""
    size: int
    """Bytes that were asked for, which the groups sum to."""
    groups: tuple[AliveGroup, ...]
    """The largest first."""
    recorded: bool = False
    """Whether allocations were recorded: then there are lines."""
    refused: int = 0
    """Bytes of the request that the card refused."""
    refused_at: str = ""
    """Where that was made, as ``AliveGroup.where``."""
    note: str = ""
    """What to know of it: how much of the record was kept."""
    snapshot: str = ""
    """The file that has the whole record, for pytorch.org/memory_viz."""


class Route(NamedTuple):
    """Where a task was sent."""

    task: str
    """Its kind."""
    size: int
    """Bytes it was said to need; 0 when not said."""
    device: str
    """``cuda`` or ``cpu``."""
    reason: str
    fell_back: bool = False
    """Whether it is on the CPU though it was worth a card."""


class Refusal(NamedTuple):
    """What a test did when one of its allocations was made to fail."""

    at: int
    """The number of the allocation, from 1, in the order of the test's call."""
    verdict: str
    """``recovered`` (the test passed), ``leaked``, ``other error`` (than out of memory), ``out of
    memory`` (which nobody handled), ``endless`` (it tried again and again), ``skipped`` (or
    expected to fail), ``not reached`` (this time it made fewer allocations)."""
    text: str = ""
    """The error that ended it, in a sentence."""
    leaked: int = 0
    """Bytes beyond what it leaks without that."""


class Proof(NamedTuple):
    """Whether a test recovers wherever it runs out of memory."""

    allocations: int
    """That its call makes, undisturbed."""
    tried: tuple[Refusal, ...] = ()
    """Fewer than that where the trials were cut, or only some were asked for."""
    why: str = ""
    """Why none was tried."""
    simulated: str = ""
    """The options that give such simulated cards; empty: they were real ones."""


class RecordedTest(NamedTuple):
    """One test (or one attempt of it), with its usage on every card it touched."""

    nodeid: str
    outcome: str
    """``passed``, ``failed``, ``error``, ``skipped``, ``xfailed``, ``xpassed``, ``crashed``, or
    ``rerun`` for an attempt after which another one was made."""
    duration: float
    worker: str
    """``gw0`` and so on; empty without xdist."""
    cards: tuple[CardUsage, ...] = ()
    fixtures: tuple[FixtureUsage, ...] = ()
    oom: str = ""
    """First sentence of the out-of-memory error that failed it, else empty."""
    start: float = 0.0
    """When its set-up began, in seconds since the epoch by its worker's clock."""
    lease: LeaseUsage | None = None
    """What it was granted, None where it asked for nothing."""
    host: str = ""
    """Where it ran; empty for the machine that reports."""
    broke: str = ""
    """First sentence of the CUDA error after which its process was of no use, else empty."""
    routes: tuple[Route, ...] = ()
    """Where its tasks were sent."""
    step: str = ""
    """Why this is a further attempt after one ran out of memory: ``alone`` on the card,
    ``released`` after model state was consolidated, or on the ``cpu``."""
    left: tuple[Left, ...] = ()
    """What it set for its whole process and left so."""
    beside: tuple[Process, ...] = ()
    """Who else was on the card right after it ran out of memory, the largest first."""
    children: tuple[ChildUsage, ...] = ()
    """Processes that it started, and those of others of which something became known in it."""
    place: int = -1
    """Its index in the collection; -1 where that is the order of ``start``."""
    file: str = ""
    """Where it is defined, from pytest's rootdir."""
    line: int = 0
    """Of that file, counted from 1; 0 where that is not known."""
    scopes: tuple[ScopeUsage, ...] = ()
    """What the module and the run left that ended with it."""
    alive: tuple[Alive, ...] = ()
    """What was alive on each card at its peak, or when memory ran out, where that is known."""
    ram: RamUsage | None = None
    """What it did to main memory, None where that was not measured or is not worth telling."""
    proof: Proof | None = None
    """What became of it when its allocations were made to fail, where that was asked for."""

    @property
    def fell_back(self) -> bool:
        """Whether a task of it ended up on the CPU though it was worth a card."""
        last = {route.task: route for route in self.routes}
        return self.step == "cpu" or any(route.fell_back for route in last.values())


class LostWorker(NamedTuple):
    """A worker of xdist that ended before its run did."""

    worker: str
    why: str
    """In words: ``it had grown to 1.20 GiB of main memory``."""
    nodeid: str = ""
    """The test that it ran, or had run last; empty where it ran none."""


class BudgetVerdict(NamedTuple):
    """How a test stands to its budget on one card model."""

    nodeid: str
    card: str
    """The model."""
    verdict: str
    """``within``, ``above``, ``left`` (above, but so is what it left behind, which depends on the
    order of tests), ``new``, ``renamed``, ``gone``."""
    own: int = 0
    """As in ``CardUsage``; 0 for a test that is gone."""
    left: int = 0
    """``own_left``."""
    budget: int | None = None
    """Bytes that were allowed; None for a test that is new."""
    before: str = ""
    """The name in the file that is probably the same test's, and is gone."""
    written: bool = False
    """Whether the file was changed: a line written, lowered or taken out."""


class RunRecord(NamedTuple):
    """One pytest run."""

    schema: int
    mode: str
    cards: tuple[Card, ...]
    simulated: bool
    workers: int
    tests: tuple[RecordedTest, ...]
    notes: tuple[str, ...] = ()
    """Sentences about the run as a whole, such as what the simulation leaves out."""
    context: int = 0
    """What a process was taken to cost once it uses a card; 0 where nothing was shared."""
    budgets: tuple[BudgetVerdict, ...] = ()
    """How the tests stand to the budgets that are kept for them, if there are any."""
    command: str = ""
    """By which it was started, as for a shell."""
    commit: str = ""
    """Of the repository that it ran in, with ``-dirty`` where files differed from it; empty where
    that is not known."""
    worker_ram: int = 0
    """The most main memory that a process which ran tests kept to itself before or after one,
    without the files that it maps; 0 where it was not measured."""
    lost: tuple[LostWorker, ...] = ()
    """Workers that were replaced because they had grown, or that were killed."""
    collected: int = 0
    """Tests that were to run, 0 where that is not known: a run that stopped early has fewer."""
