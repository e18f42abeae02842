"""What a lease costs, beside ``flock(2)``, ``filelock.FileLock`` and a polled SQLite table.

Uncontended: take and give back, one process. Hand-over: N processes ask again at once for a card
that each holds for 2 ms; the time from one's release to another one's grant, and how often it was
another one's (who polls often takes it again itself). Jain's index over the
leases that each got says how fair it was: 1 is even, 1/N is one process taking all. Burn: CPU of N
processes that wait, in percent of one core, all together.

Then processes that hold or wait are killed (SIGKILL) at random. Each that has a lease of n units
also takes n record locks of its own on a file that stands for the card: if those are not to be had,
a lease was granted twice.
"""

from __future__ import annotations

import argparse
import datetime as dt
import fcntl
import itertools
import multiprocessing
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pytest_gpumem.leases.place import run_directory
from pytest_gpumem.leases.request import Want
from pytest_gpumem.leases.store import LeaseStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

CARD = "GPU-00000000-0000-0000-0000-000000000000"
UNITS = 16
HOLD = 0.002
Take = Callable[[], AbstractContextManager[Any]]
_fork = multiprocessing.get_context("fork")


# The stores: each returns what takes the whole card.


def leases(directory: Path) -> Take:
    """Return ours."""
    store = LeaseStore(directory / "leases")
    return lambda: store.acquire({CARD: Want()}, {CARD: UNITS}, "bench")


def flock(directory: Path) -> Take:
    """Return the floor: the kernel's own blocking lock, without an order, timeout or ledger."""
    file = os.open(directory / "flock", os.O_RDWR | os.O_CREAT)

    @contextmanager
    def take() -> Iterator[None]:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)

    return take


def filelock(directory: Path) -> Take:
    """Return filelock's, with its default of polling every 50 ms."""
    from filelock import FileLock

    return lambda: FileLock(directory / "filelock")


def sqlite(directory: Path) -> Take:
    """Return a first come, first served table, looked at every 10 ms."""
    import sqlite3

    connection = sqlite3.connect(directory / "sqlite", timeout=60, isolation_level=None)
    if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):  # else it waits for nobody
        connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute("CREATE TABLE IF NOT EXISTS queue (number INTEGER PRIMARY KEY)")

    @contextmanager
    def take() -> Iterator[None]:
        number = connection.execute("INSERT INTO queue DEFAULT VALUES").lastrowid
        while connection.execute("SELECT min(number) FROM queue").fetchone() != (number,):
            time.sleep(0.01)
        try:
            yield
        finally:
            connection.execute("DELETE FROM queue WHERE number = ?", (number,))

    return take


STORES: dict[str, Callable[[Path], Take]] = {
    "leases": leases,
    "flock(2)": flock,
    "filelock": filelock,
    "SQLite": sqlite,
}


class Row(NamedTuple):
    """The figures of one store with one number of processes."""

    store: str
    processes: int
    p50_us: float
    p99_us: float
    passed_on: float
    """Share of the leases that went to another process."""
    jain: float
    burn: float


# Processes


@contextmanager
def children(count: int, work: Callable[..., None], *args: Any) -> Iterator[list[Connection]]:
    """Run ``work(connection, *args)`` in ``count`` processes; they are killed at the end."""
    started = [start(work, *args) for _ in range(count)]
    try:
        yield [connection for _, connection in started]
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def start(work: Callable[..., None], *args: Any) -> tuple[BaseProcess, Connection]:
    """Run ``work(connection, *args)`` in a new process."""
    ours, theirs = _fork.Pipe()
    process = _fork.Process(target=work, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def contend(connection: Connection, store: str, directory: Path, seconds: float) -> None:
    """Take and hold the card again and again; send the times of grant and release in ns."""
    take = STORES[store](directory)
    with take():
        pass
    connection.send("ready")
    connection.recv()
    end, held = time.monotonic() + seconds, []
    while time.monotonic() < end:
        with take():
            granted = time.monotonic_ns()
            time.sleep(HOLD)
            released = time.monotonic_ns()
        held.append((granted, released))
    connection.send(held)
    connection.recv()


def block(connection: Connection, store: str, directory: Path) -> None:
    """Wait for the card; send the CPU seconds used, whenever asked."""
    import threading

    def answer() -> None:
        while True:
            connection.recv()
            connection.send(time.process_time())

    threading.Thread(target=answer, daemon=True).start()
    with suppress(OSError), STORES[store](directory)():
        pass


def ready_of(connections: Iterable[Connection], timeout: float) -> list[Connection]:
    """Return those that have something to say within ``timeout`` seconds."""
    return cast("list[Connection]", wait(list(connections), timeout=max(0.0, timeout)))


# Figures


def uncontended_us(store: str, directory: Path, repeat: int = 2000) -> float:
    """Return the median microseconds of taking the card and giving it back."""
    take = STORES[store](directory)
    times = []
    for _ in range(repeat):
        begun = time.perf_counter()
        with take():
            pass
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6


def contended(store: str, directory: Path, processes: int, seconds: float) -> Row:
    """Return the hand-over, fairness and burn of ``processes`` that want the same card."""
    # A table keeps what processes that were killed had in it.
    contest, wait_room = (Path(tempfile.mkdtemp(dir=directory)) for _ in range(2))
    STORES[store](contest)  # it is there before all want it
    with children(processes, contend, store, contest, seconds) as connections:
        for connection in connections:
            connection.recv()
        for connection in connections:
            connection.send("go")
        held = [connection.recv() for connection in connections]
    order = sorted((*times, who) for who, each in enumerate(held) for times in each)
    pairs = list(itertools.pairwise(order))
    gaps = [(after[0] - before[1]) / 1e3 for before, after in pairs if before[2] != after[2]]
    counts = [len(each) for each in held]
    return Row(
        store,
        processes,
        statistics.median(gaps),
        statistics.quantiles(gaps, n=100)[98],
        len(gaps) / len(pairs),
        sum(counts) ** 2 / (len(counts) * sum(count**2 for count in counts)),
        burn(store, wait_room, processes, seconds),
    )


def burn(store: str, directory: Path, processes: int, seconds: float) -> float:
    """Return the CPU of ``processes`` that wait, in percent of one core."""
    # Not this process has it: whoever it starts works within its lease.
    with children(1, holder, store, directory) as [first]:
        first.recv(), first.recv()
        return _burn(store, directory, processes, seconds)


def _burn(store: str, directory: Path, processes: int, seconds: float) -> float:
    with children(processes, block, store, directory) as connections:
        time.sleep(1)  # all of them wait by then

        def used() -> float:
            for connection in connections:
                connection.send("")
            return sum(float(connection.recv()) for connection in connections)

        before, begun = used(), time.monotonic()
        time.sleep(seconds)
        return (used() - before) / (time.monotonic() - begun) * 100


# Kills


def holder(connection: Connection, store: str, directory: Path) -> None:
    """Wait for the whole card, tell when it was granted, and keep it."""
    take = STORES[store](directory)
    connection.send(os.getpid())
    with take():
        connection.send(time.monotonic_ns())
        signal.pause()


def recovery_ms(store: str, directory: Path, processes: int, rounds: int) -> list[float]:
    """Return the milliseconds from each SIGKILL of the holder to the next one's grant."""
    found: list[float] = []
    running = {
        connection: process
        for process, connection in (start(holder, store, directory) for _ in range(processes))
    }
    killed = 0
    try:
        while len(found) < rounds:
            for ready in ready_of(running, 30):
                told = ready.recv()
                if told == running[ready].pid:
                    continue
                if killed:
                    found.append((told - killed) / 1e6)
                process, connection = start(holder, store, directory)
                running[connection] = process
                time.sleep(0.1)  # all have settled in the queue
                victim = running.pop(ready)
                killed = time.monotonic_ns()
                victim.kill()
                victim.join()
    finally:
        for process in running.values():
            process.kill()
            process.join()
    return found


def restless(connection: Connection, directory: Path, card: Path, seed: int) -> None:
    """Take leases of random sizes for ever, and send one line for each."""
    chance = random.Random(seed)  # noqa: S311  # no secrets
    store = LeaseStore(directory / "leases")
    with card.open("r+b") as units:
        while True:
            size = chance.choice((1, 2, 4, 8, UNITS))
            exclusive = chance.random() < 0.1
            want = Want(size, exclusive)
            with store.acquire({CARD: want}, {CARD: UNITS}, "restless"):
                # Record locks go at the very first of a process's end, before its lease does.
                taken = []
                for unit in range(UNITS):
                    with suppress(OSError):
                        fcntl.lockf(units, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, unit)
                        taken.append(unit)
                    if len(taken) == (UNITS if exclusive else size):
                        break
                else:
                    connection.send("granted twice")
                time.sleep(chance.random() * HOLD)
                fcntl.lockf(units, fcntl.LOCK_UN)
            connection.send("granted")


class Killed(NamedTuple):
    """What came of killing processes at random."""

    kills: int
    holders: int
    """How many were killed because they held a lease; the others were any, most of them waited."""
    leases: int
    granted_twice: int
    starved: int
    leaked: int
    longest: float
    """Seconds between two grants, whoever's."""

    @property
    def faultless(self) -> bool:
        """Whether nothing was granted twice, starved or leaked."""
        return not (self.granted_twice or self.starved or self.leaked)


def kill_at_random(directory: Path, kills: int, processes: int = 8, seed: int = 0) -> Killed:
    """Kill a random process every few milliseconds, every other time one that has a lease.

    Each is replaced by a new one.
    """
    chance = random.Random(seed)  # noqa: S311  # no secrets
    card = directory / "card"
    card.touch()

    def new() -> tuple[Connection, BaseProcess]:
        process, connection = start(restless, directory, card, chance.randrange(2**32))
        return connection, process

    running = dict(new() for _ in range(processes))
    granted = twice = done = holders = 0
    last = time.monotonic()
    longest, next_kill = 0.0, last + 0.5
    try:
        while done < kills and time.monotonic() - last < 10:
            for ready in ready_of(running, next_kill - time.monotonic()):
                with suppress(EOFError, ConnectionError):
                    twice += ready.recv() == "granted twice"
                    granted += 1
                    longest = max(longest, time.monotonic() - last)
                    last = time.monotonic()
            if time.monotonic() >= next_kill:
                pids = pids_of_holders(directory)
                holding = [each for each in running if running[each].pid in pids]
                holders += (one_of_them := bool(holding) and chance.random() < 0.5)
                victim = chance.choice(holding if one_of_them else list(running))
                running[victim].kill()
                running.pop(victim).join()
                victim.close()
                running |= [new()]
                done += 1
                next_kill = time.monotonic() + chance.random() * 0.02
        starved = count_starved(list(running))
    finally:
        for process in running.values():
            process.kill()
            process.join()
    LeaseStore(directory / "leases").holders(CARD)  # takes out what the last ones left
    leaked = list((directory / "leases" / "queue").iterdir())
    return Killed(done, holders, granted, twice, starved, len(leaked), longest)


def pids_of_holders(directory: Path) -> set[int]:
    """Return the processes that have a lease now."""
    queue = directory / "leases" / "queue"
    names = [each.name for each in queue.iterdir()] if queue.exists() else []
    return {int(name.split("-")[2].partition(".")[0]) for name in names if name.startswith("h")}


def count_starved(connections: Sequence[Connection]) -> int:
    """Return how many processes get no lease within ten seconds, now that nobody is killed."""
    waiting, end = set(connections), time.monotonic() + 10
    while waiting and time.monotonic() < end:
        for ready in ready_of(connections, 1):
            ready.recv()
            waiting.discard(ready)
    return len(waiting)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="*", default=[4, 16, 64])
    parser.add_argument("--seconds", type=float, default=2.0, help="default: %(default)s")
    parser.add_argument("--kills", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--directory", type=Path, help="default: where leases are kept")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and return 0 if nothing was granted twice, starved or leaked."""
    options = parse(argv)
    available = [name for name in STORES if name != "filelock" or _has_filelock()]
    with tempfile.TemporaryDirectory(dir=options.directory or run_directory().parent) as name:
        directory = Path(name)
        print(
            f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d}, {os.cpu_count()} CPUs, "
            f"Python {platform.python_version()}, {directory.parent}\n"
        )
        print("| store | take and give back (us) |\n|---|---:|")
        for store in available:
            print(f"| {store} | {uncontended_us(store, directory):.0f} |")
        print("\n| store | processes | hand-over p50 (us) | p99 (us) | passed on | Jain | burn |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for processes in options.processes:
            for store in available:
                row = contended(store, directory, processes, options.seconds)
                print(
                    f"| {row.store} | {row.processes} | {row.p50_us:.0f} | {row.p99_us:.0f} "
                    f"| {row.passed_on:.0%} | {row.jain:.3f} | {row.burn:.2f} % |",
                    flush=True,
                )
    with tempfile.TemporaryDirectory(dir=options.directory or run_directory().parent) as name:
        print(
            "\n| SIGKILL of the holder to the next grant, 16 processes | p50 (ms) "
            "| longest of 100 |"
        )
        print("|---|---:|---:|")
        for store in ("leases", "flock(2)"):
            times = recovery_ms(store, Path(name), 16, 100)
            print(f"| {store} | {statistics.median(times):.1f} | {max(times):.1f} |")
        killed = kill_at_random(Path(name), options.kills)
    print(
        f"\n{killed.kills} random SIGKILLs, {killed.holders} of them aimed at holders: "
        f"{killed.leases} leases, {killed.granted_twice} granted "
        f"twice, {killed.starved} processes starved, {killed.leaked} entries leaked, longest time "
        f"without a grant {killed.longest * 1e3:.0f} ms."
    )
    return 0 if killed.faultless and killed.kills == options.kills else 1


def _has_filelock() -> bool:
    from importlib.util import find_spec

    return find_spec("filelock") is not None


if __name__ == "__main__":
    sys.exit(main())
