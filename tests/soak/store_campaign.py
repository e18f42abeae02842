"""Processes put, get, rotate, forget, delete and verify, and are killed in the midst of it.

Run by hand: ``python tests/soak/store_campaign.py [--rounds N] [--seed N]``. In each round 2 to 6
processes work on one or two stores with one key file, some of them are killed (SIGKILL), and the
rest are told to end. The exit status is 0 when after every round each store opened with the keys
of its file, nothing acknowledged was lost, nothing deleted was back, every byte was as written,
nothing stale was left, and nobody was told of a problem that there was not.
"""

import argparse
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "archive"))

from kills import child, ended, names, state
from states import same

from pytest_gpumem.archive import keys
from pytest_gpumem.archive.disk import TEMPORARY
from pytest_gpumem.archive.store import ArchiveStore

SMALL, LARGE = 300, 1_200_000
FRESH = 25
"""Rounds after which stores and keys are new ones: each rotation leaves a key."""


def work(folder, key, chance, number, say):
    """Do what comes to mind until somebody ends it, saying so before and after."""
    own = {}
    opened = {}
    while True:
        number += 1
        name = chance.choice(folder)
        if name not in opened or chance.random() < 0.2:
            opened[name] = ArchiveStore(name, key=key)
        store = opened[name]
        what = chance.choices(
            ["put", "get", "rotate", "delete", "forget", "verify"], [6, 4, 2, 2, 1, 1]
        )[0]
        mine = [each for each, (at, _) in own.items() if at == name]
        if what == "put":
            elements = LARGE if chance.random() < 0.1 else SMALL
            # Some states are put by several processes, and share a file.
            drawn = chance.choice([number, chance.randrange(5)])
            found = store.put(state(drawn, elements), context=f"c{os.getpid()}")
            own[found] = name, (drawn, elements)
            say(f"put {name.name} {found} {drawn} {elements}")
        elif what == "get" and mine:
            each = chance.choice(mine)
            same(store.get(each), state(*own[each][1]))
        elif what == "rotate":
            store.rotate()
        elif what == "delete" and mine:
            each = chance.choice(mine)
            del own[each]
            say(f"deleting {each}")
            store.delete(each)
            say(f"deleted {each}")
        elif what == "forget" and mine:
            for each in mine:
                del own[each]
                say(f"deleting {each}")
            store.forget(keep_last=0, context=f"c{os.getpid()}")
            for each in mine:
                say(f"deleted {each}")
        elif what == "verify":
            found = store.verify(read_data=chance.random() < 0.5)
            assert found == (), found
        say(f"did {what}")


def guarded(say, *arguments):
    """Work, and tell of whatever it raises."""
    try:
        work(*arguments, say)
    except BaseException as error:  # whatever it is, it is a fault
        told = traceback.format_exception(error)
        say(f"fault {''.join(told[-4:])}".replace("\n", " "))


def check(folder, key, said):
    """Return what is wrong after a round, of what was said in it."""
    faults = [line for line in said if line.startswith("fault")]
    words = [line.split() for line in said]
    begun = {each[1] for each in words if each[0] == "deleting"}
    done = {each[1] for each in words if each[0] == "deleted"}
    for name in folder:
        try:
            store = ArchiveStore(name, key=key)
            assert not (found := store.verify(read_data=True)), found
            assert not [each for each in names(name) if TEMPORARY in each], "something is stale"
            there = {entry.id for entry in store.entries()}
            assert not done & there, "a state is back that was deleted"
            for _, _, each, number, elements in (
                line for line in words if line[0] == "put" and line[1] == name.name
            ):
                if each in begun:
                    continue
                assert each in there, f"{each} is lost, which was acknowledged"
                same(store.get(each), state(int(number), int(elements)))
            wanted = {entry.content for entry in store.entries()}
            assert {each.name for each in (name / "states").iterdir()} == wanted
            store.forget(keep_last=0)
        except Exception as error:  # whatever it is, it is a fault
            faults.append(f"after the round, {name.name}: {type(error).__name__}: {error}")
    return faults


def play(folder, key, chance, at):
    """Let some processes work for a moment, kill some of them; return what all said."""
    children = {}
    for each in range(chance.randint(2, 6)):
        seed = random.Random(chance.random())  # noqa: S311  # a seed makes it repeatable
        number = 10 + at * 100_000 + each * 10_000
        process, reading = child(lambda say, s=seed, n=number: guarded(say, folder, key, s, n))
        children[process] = reading
    said = dict.fromkeys(children, b"")
    end = time.monotonic() + chance.uniform(0.1, 0.6)
    kills = {each: time.monotonic() + chance.uniform(0.02, 0.6) for each in children}
    while (now := time.monotonic()) < end:
        ready, _, _ = select.select(list(children.values()), [], [], 0.01)
        for process, reading in children.items():
            if reading in ready:
                said[process] += os.read(reading, 65536)
            if kills[process] < now:
                os.kill(process, signal.SIGKILL)
                kills[process] = end + 1
    for process, reading in children.items():
        os.kill(process, signal.SIGKILL)  # also in the midst of something
        said[process] += "\n".join(ended(process, reading)).encode()
    return [line for each in said.values() for line in each.decode().splitlines() if line]


def begin(place):
    """Make two stores and their key file."""
    place.mkdir()
    keys.generate(place / "key")
    for name in ("a", "b"):
        ArchiveStore(place / name, key=place / "key")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=os.getpid())
    options = parser.parse_args()
    chance = random.Random(options.seed)  # noqa: S311  # a seed makes it repeatable
    did: Counter = Counter()
    faults = []
    with tempfile.TemporaryDirectory() as directory:
        for at in range(options.rounds):
            place = Path(directory) / str(at // FRESH)
            if at % FRESH == 0:
                shutil.rmtree(Path(directory) / str(at // FRESH - 1), ignore_errors=True)
                begin(place)
            folder = [place / "a", place / "b"][: chance.randint(1, 2)]
            said = play(folder, place / "key", chance, at)
            did.update(line.split()[1] for line in said if line.startswith("did"))
            if found := check(folder, place / "key", said):
                faults += [f"round {at}: {each}" for each in found]
                print(*[f"round {at}: {each}" for each in found], sep="\n", flush=True)
                shutil.rmtree(place)
                begin(place)
    print(f"seed {options.seed}, {options.rounds} rounds, {dict(did)}: {len(faults)} faults")
    return 1 if faults or not did else 0


if __name__ == "__main__":
    sys.exit(main())
