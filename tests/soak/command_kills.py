"""Commands and runs of pytest on one simulated card, while processes of theirs are killed.

Sixteen ``gpumem run`` and two runs of pytest share a card and the machine's main memory: of the
commands some lease one of the two, some both. Each of their programs takes what it asked for, and
says whether it was there; of main memory it takes marks that stand for it, one for a sixteenth.
Every few milliseconds one is killed by SIGKILL: a
``gpumem run``, whose command then goes on with the lease, or the command, or all of a group. At
the end nobody is killed any more, and all have to come to theirs.

Run by hand: ``python tests/soak/command_kills.py [--seconds S] [--kills N] [--seed N]``. The exit
status is 0 when nothing that was leased was ever lacking, nobody starved and nothing was left.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from pytest_gpumem.devices import host
from pytest_gpumem.leases.ledger import Ledger
from pytest_gpumem.simulator import Simulation

MIB = 2**20
TOTAL, CONTEXT = 4096 * MIB, 64 * MIB
SIZES = (4, 8, 16, 32)
"""Of commands, in units of 64 MiB, of which the card has 64."""
RAM = host.pools()[0].total // 16
RAM_SIZES = (4, 6, 8)
"""Of commands, in sixteenths of the machine's main memory."""
UNITS = """
import fcntl, os, random, sys, time
from pathlib import Path
from pytest_gpumem.simulator.card import SharedCard

CARD = SharedCard.open(Path(os.environ["GPUMEM_SIMULATE_CARD"]))

def lock(file, units, first, behind):
    taken = 0
    for unit in range(first, behind if units else first):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, unit)
            taken += 1
        except OSError:
            continue
        if taken == units:
            break
    return taken == units

def take(units, seconds, ram):
    # What was leased is this process's own from the first moment, also before it uses it. The
    # kernel frees record locks before it frees a lease.
    with open(os.environ["UNITS"], "r+b") as file:
        there = lock(file, units, 0, 64) & lock(file, ram, 64, 80)
        time.sleep(seconds)
        size = units * (64 << 20) - CARD.context
        if there and units:
            there = CARD.join() and CARD.reserve(size)
        with open(os.environ["TOLD"], "a") as told:
            told.write(os.environ["WHO"] + ("\\n" if there else " LACKED\\n"))
        time.sleep(seconds)
        if there and units:
            CARD.release(size)
            CARD.leave()
"""
PROGRAM = (
    UNITS
    + """
take(int(sys.argv[1]), random.random() * 1.5, int(sys.argv[2]))
"""
)
SUITE = UNITS + (
    """
import pytest

@pytest.mark.parametrize("number", range(2000))
@pytest.mark.gpu(vram="256MiB", ram=RAM)
def test_takes(number, request):
    take(4, 0.005, 1)
""".replace("RAM", str(RAM))
)


class Campaign:
    def __init__(self, directory, chance):
        self.directory, self.chance = directory, chance
        self.told = directory / "told"
        self.told.touch()
        self.commands, self.suites = [], []
        (directory / "units").touch()
        (directory / "test_takes.py").write_text(SUITE)
        os.environ |= {"TOLD": str(self.told), "UNITS": str(directory / "units"), "WHO": "command"}

    def command(self):
        size = self.chance.choice(SIZES)
        low = ["--priority=low"] if self.chance.random() < 0.2 else []
        ram, which = self.chance.choice(RAM_SIZES), self.chance.choice(("card", "ram", "both"))
        size, ram = size * (which != "ram"), ram * (which != "card")
        asked = [f"--vram={64 * size}MiB"] * bool(size) + [f"--ram={ram * RAM}B"] * bool(ram)
        words = [sys.executable, "-c", PROGRAM, str(size), str(ram)]
        return subprocess.Popen(
            [sys.executable, "-m", "pytest_gpumem.cli.main", "run", *asked, *low, "--", *words],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def suite(self):
        words = ["-q", "-p", "gpumem", "-p", "no:cacheprovider", "--gpumem-headroom=0B"]
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", *words, "test_takes.py"],
            cwd=self.directory, start_new_session=True,
            env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "WHO": "test"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def fill(self, commands, suites):
        self.commands = [each for each in self.commands if each.poll() is None]
        self.suites = [each for each in self.suites if each.poll() is None]
        self.commands += [self.command() for _ in range(commands - len(self.commands))]
        self.suites += [self.suite() for _ in range(suites - len(self.suites))]

    def kill(self):
        """Kill one: mostly of the commands, and what of it, by chance."""
        # Of the older half, which are past their start.
        older = self.commands[: len(self.commands) // 2]
        victim = self.chance.choice([*older, *self.chance.sample(self.suites, 1)])
        what = self.chance.choice(("itself", "child", "group"))
        with suppress(ProcessLookupError):
            if what == "group":
                os.killpg(victim.pid, signal.SIGKILL)
                return what
            children = Path(f"/proc/{victim.pid}/task/{victim.pid}/children")
            pids = children.read_text().split() if children.exists() else []
            if what == "child" and not pids:
                return ""
            os.kill(int(pids[0]) if what == "child" else victim.pid, signal.SIGKILL)
            if what == "itself" and pids:
                return "itself, beside its command"
            return what
        return ""

    def lines(self):
        return self.told.read_text().splitlines()


def looked():
    """Return whether ``gpumem ps`` tells of what is going on."""
    words = [sys.executable, "-m", "pytest_gpumem.cli.main", "ps", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode == 0 and bool(json.loads(done.stdout))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=os.getpid())
    options = parser.parse_args()
    chance = random.Random(options.seed)  # noqa: S311  # no secrets
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        os.environ |= {"GPUMEM_RUN_DIR": name, "XDG_RUNTIME_DIR": name}
        simulation = Simulation.start([TOTAL], CONTEXT)
        os.environ["GPUMEM_SIMULATE_CARD"] = simulation.path
        campaign = Campaign(directory, chance)
        end, kills, looks = time.monotonic() + options.seconds, {}, []
        begun = time.monotonic()
        while time.monotonic() < end and sum(kills.values()) < options.kills:
            campaign.fill(16, 2)
            time.sleep(chance.random() * 0.4)
            if chance.random() < 0.05:
                looks.append(looked())
            if what := campaign.kill():
                kills[what] = kills.get(what, 0) + 1
        seconds = time.monotonic() - begun
        for each in campaign.suites:
            with suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGKILL)
        # Nobody is killed any more: all that wait come to theirs.
        starved, patient = 0, time.monotonic() + 90
        for each in campaign.commands:
            try:
                each.wait(timeout=max(0.1, patient - time.monotonic()))
            except subprocess.TimeoutExpired:
                starved += 1
                os.killpg(each.pid, signal.SIGKILL)
        lines = campaign.lines()
        time.sleep(1)  # for commands whose gpumem run was killed
        ledger = Ledger(directory / f"gpumem-{os.getuid()}")
        ledger.join()  # whoever starts next takes out what the killed left
        leaked = [*(ledger.directory / "queue").iterdir()]
        used = TOTAL - simulation.cards[0].free()
        ledger.close()
        simulation.close()
    lacked = sum(line.endswith("LACKED") for line in lines)
    print(
        f"seed {options.seed}: {sum(kills.values())} SIGKILLs in {seconds:.0f} s {kills}; "
        f"{lines.count('command')} commands and {lines.count('test')} tests had theirs, {lacked} "
        f"lacked what they had leased, {starved} starved, {len(leaked)} entries and {used} bytes "
        f"were left; {sum(looks)} of {len(looks)} looks by gpumem ps told something"
    )
    return 1 if lacked or starved or leaked or used or not all(looks) else 0


if __name__ == "__main__":
    sys.exit(main())
