"""Stop and kill processes that hold or want leases, the ledger's lock, and workers of pytest.

Run by hand: ``python tests/soak/stopped_holders.py [--count N] [--seed N]``. Prints a line with the
figures; the exit status is 0 when every deadline held, a killed worker's test failed and no other,
nothing hung, and nothing was left in the run directory after the next start.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from pytest_gpumem.errors import LeaseTimeout
from pytest_gpumem.leases.locks import FileLock
from pytest_gpumem.leases.request import Want
from pytest_gpumem.leases.store import LeaseStore
from pytest_gpumem.simulator.card import SharedCard

CARD = "GPU-00000000-0000-0000-0000-000000000000"
TOTALS = {CARD: 1000}
LATE = 0.05
"""Seconds by which a deadline may be missed."""
PATIENCE = 120

# Does what it is told on the lines of its standard input; its parent has left, so that it is of
# nobody's family.
ACTOR = """
import os, signal, sys, time
from pathlib import Path
if os.fork():
    os._exit(0)
from pytest_gpumem.errors import LeaseError
from pytest_gpumem.leases.request import Want
from pytest_gpumem.leases.store import LeaseStore
from pytest_gpumem.leases.locks import FileLock

directory, card = Path(sys.argv[1]), sys.argv[2]
store = LeaseStore(directory)
held = []

def hold(size):
    held.append(store.acquire({card: Want(size)}, {card: 1000}, "held"))

def keep(size):
    store.set_resident(card, size)

def lock():
    store.holders(card)
    held.append(FileLock(directory / "lock"))
    held[-1].acquire()

def wait(timeout):
    begun = time.monotonic()
    try:
        store.acquire({card: Want(900)}, {card: 1000}, "waits", timeout)
    except LeaseError as error:
        return time.monotonic() - begun - timeout, str(error)

print(os.getpid(), flush=True)
for line in sys.stdin:
    print(repr(eval(line)), flush=True)
"""
SUITE = """
import os, time
import pytest

@pytest.mark.gpu(vram="500MiB")
@pytest.mark.parametrize("i", range(6))
def test_it(i):
    with open("log", "a") as log:
        log.write(f"{os.getpid()} {i}\\n")
    time.sleep(0.15)
"""


class Found(NamedTuple):
    """What one blow came to."""

    late: float = 0.0
    """Seconds by which a deadline was missed."""
    fault: str = ""


class Actor:
    """A process that takes leases."""

    def __init__(self, directory):
        self.pipes = subprocess.Popen(
            [sys.executable, "-c", ACTOR, str(directory), CARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = int(self.pipes.stdout.readline())
        self.pipes.wait()

    def tell(self, expression):
        print(expression, file=self.pipes.stdin, flush=True)

    def answer(self):
        return eval(self.pipes.stdout.readline())  # noqa: S307  # our own process's words

    def ask(self, expression):
        self.tell(expression)
        return self.answer()

    def send(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self):
        self.send(signal.SIGKILL)
        self.pipes.stdin.close()
        self.pipes.stdout.read()  # until it is gone
        self.pipes.stdout.close()


def blow_at_leases(directory, chance):
    """Stop or kill a holder, one who has the lock, or one who waits; return what others saw."""
    what = chance.choice(("holds", "locks", "waits", "keeps"))
    blow = chance.choice((signal.SIGSTOP, signal.SIGKILL))
    timeout = chance.choice((0.0, 0.1, 0.3))
    with contextlib.ExitStack() as stack:
        victim, other = Actor(directory), Actor(directory)
        stack.callback(victim.end)
        stack.callback(other.end)
        if what == "waits":
            other.ask("hold(800)")
            victim.tell("wait(60)")
        else:
            victim.ask({"holds": "hold(800)", "locks": "lock()", "keeps": "keep(800)"}[what])
        time.sleep(chance.random() * 0.02)
        victim.send(blow)
        while blow == signal.SIGSTOP and _state(victim.pid) not in "Tt":
            time.sleep(0.001)
        store = LeaseStore(directory)
        stack.callback(store.close)
        begun, queued = time.monotonic(), _seconds_without_a_cpu()
        try:
            store.acquire({CARD: Want(900)}, TOTALS, "late", timeout).release()
            said = ""
        except LeaseTimeout as error:
            said = str(error)
        taken = time.monotonic() - begun - (_seconds_without_a_cpu() - queued)
        late = max(0.0, taken - timeout)
        stopped = blow == signal.SIGSTOP
        if stopped and what in ("holds", "locks") and f"pid {victim.pid}" not in said:
            return Found(late, f"{what}, stopped: does not name it: {said or 'granted'}")
        if not stopped and what != "waits" and timeout and said:
            return Found(late, f"{what}, killed: {said}")
        # One who is stopped as it comes may have the lock itself.
        locked = stopped and f"lock of the leases in {directory}, held by probably pid {victim.pid}"
        if what == "waits" and f"pid {other.pid}" not in said and not (locked and locked in said):
            return Found(late, f"waits: does not name who holds it: {said or 'granted'}")
        return Found(late)


def blow_at_run(directory, chance):
    """Kill or stop a worker or the controller of a run while a test of it holds the card."""
    place = Path(tempfile.mkdtemp(dir=directory))
    (place / "test_it.py").write_text(SUITE)
    (place / "pytest.ini").write_text("[pytest]\n")
    card = SharedCard.create(place / "card", total=2**30, context=64 * 2**20)
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "gpumem", "-n2"]
    command += ["-p", "no:cacheprovider", f"--gpumem-simulate-card={place / 'card'}"]
    if chance.random() < 0.5:
        command.append("--gpumem-schedule=off")
    environment = os.environ | {
        "GPUMEM_RUN_DIR": str(directory / "runs"),
        "GPUMEM_SIMULATE_CARD": str(place / "card"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    process = subprocess.Popen(
        command,
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        log, wanted = place / "log", chance.randrange(1, 5)
        end = time.monotonic() + PATIENCE
        while not log.exists() or len(log.read_text().splitlines()) < wanted:
            if process.poll() is not None or time.monotonic() > end:
                return Found(fault=f"a run did not begin: {process.stdout.read()[-500:]}")
            time.sleep(0.005)
        worker = int(log.read_text().splitlines()[-1].split()[0])
        what = chance.choice(("worker killed", "worker stopped", "controller killed"))
        if what == "controller killed":
            process.kill()
        else:
            blow = signal.SIGKILL if what == "worker killed" else signal.SIGSTOP
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, blow)
        if what == "worker stopped":
            time.sleep(0.3)
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)
        try:
            said, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            return Found(fault=f"{what}: the run hangs")
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", said)}
        expected = {
            # Between two tests it is killed without one.
            "worker killed": ({"passed": 5, "failed": 1}, {"passed": 6}),
            "worker stopped": ({"passed": 6},),
            "controller killed": (counts,),
        }[what]
        return Found(fault="" if counts in expected else f"{what}: {counts}: {said[-1500:]}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        card.close()


def _seconds_without_a_cpu():
    """Return how long this process was ready to run and did not: the machine is busy, not we.

    See proc(5), schedstat.
    """
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "T"


def left_behind(directory):
    """Return what the dead left in a run directory once somebody has started there."""
    store = LeaseStore(directory)
    store.acquire({CARD: Want(1)}, TOTALS, "next", 5).release()
    store.close()
    return [path for part in ("queue", "alive") for path in (directory / part).iterdir()]


def wait_for_the_end(directory):
    """Give what was killed last the time to end: one who has not ended has a lock yet."""
    end = time.monotonic() + 10
    while time.monotonic() < end and any(map(_is_locked, (directory / "alive").glob("*"))):
        time.sleep(0.05)


def _is_locked(path):
    with contextlib.suppress(OSError):
        lock = FileLock(path)
        try:
            lock.acquire(0)
        except Exception:
            return True
        finally:
            lock.close()
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=os.getpid())
    options = parser.parse_args()
    chance = random.Random(options.seed)  # noqa: S311  # no secrets
    found, begun = [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "runs").mkdir()
        for number in range(options.count):
            # A run of pytest takes many times as long.
            blow = blow_at_run if number % 10 == 9 else blow_at_leases
            place = directory if blow is blow_at_run else directory / "leases"
            found.append(blow(place, chance))
        places = [directory / "leases", *(directory / "runs").iterdir()]
        for place in places:
            wait_for_the_end(place)
        left = [path for place in places for path in left_behind(place)]
    faults = [each.fault for each in found if each.fault]
    late = sorted(each.late for each in found)
    missed = sum(each > LATE for each in late)
    print(
        f"seed {options.seed}: {len(found)} stops and kills in {time.monotonic() - begun:.0f} s, "
        f"{len(faults)} faults, {missed} deadlines missed by more than {LATE * 1000:.0f} ms "
        f"(median {statistics.median(late) * 1000:.1f}, longest {late[-1] * 1000:.1f}), "
        f"{len(left)} files left"
    )
    for each in (*faults, *map(str, left)):
        print(each)
    return 1 if faults or missed or left else 0


if __name__ == "__main__":
    sys.exit(main())
