"""Let each system call of each change of a store fail, by strace, once and from then on.

Run by hand: ``python tests/soak/archive_faults.py [--changes NAMES] [--every N]``. A process puts
(a small state, and one that takes several writes), rotates, forgets or deletes; each file call
that it makes in the kernel gives ENOSPC, EIO, EROFS or EMFILE. The exit status is 0 when after
each of them nothing acknowledged was lost, the store was whole, and the process was told of it in
one sentence of ours, or not at all where it did no harm.
"""

import argparse
import itertools
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "archive"))

from kills import STRACE, child, ended, state
from states import same

from pytest_gpumem.archive import keys
from pytest_gpumem.archive.disk import TEMPORARY
from pytest_gpumem.archive.store import ArchiveStore
from pytest_gpumem.errors import DiskError, KeyRefusedError

CALLS = {"openat", "flock", "fcntl", "pwrite64", "ftruncate", "fsync", "preadv", "preadv2", "read"}
CALLS |= {"rename", "unlink", "mkdir", "close", "fstat", "newfstatat", "lstat", "getdents64"}
ERRORS = ("ENOSPC", "EIO", "EROFS", "EMFILE")
CHANGES = {
    "put": lambda store, _: store.put(state(2, 300)),
    "large": lambda store, _: store.put(state(3)),
    "rotate": lambda store, _: store.rotate(),
    "forget": lambda store, _: store.forget(keep_last=0, context="other"),
    "delete": lambda store, name: store.delete(name),
}


def change(place, doing, name, *options):
    """Make a change under strace; return what its process said of it."""
    ready, go = os.pipe()

    def work(say):
        store = ArchiveStore(place / "store", key=place / "key")
        store.put(state(9, 300), context="warm")  # what is imported late is there now
        say("ready")
        select.select([ready], [], [])  # no call that is made to fail
        try:
            found = CHANGES[doing](store, name)
            say(f"done {found}")
        except (DiskError, KeyRefusedError) as error:
            say(f"refused {error}")
        except BaseException as error:  # whatever it is, it is a fault
            say(f"fault {error!r}")
        os.kill(os.getpid(), signal.SIGKILL)

    process, reading = child(work)
    assert os.read(reading, 99) == b"ready\n"
    tracer = subprocess.Popen(
        [STRACE, "-f", "-p", str(process), *options], stderr=subprocess.PIPE, text=True
    )
    tracer.stderr.readline()  # it is attached
    os.write(go, b"x")
    said = ended(process, reading)
    tracer.communicate()
    os.close(ready)
    os.close(go)
    return "\n".join(said)


def calls_of(place, doing):
    """Return how often a change makes each call, in the thread that makes it most."""
    name = ArchiveStore(place / "store", key=place / "key").put(state(1, 300), context="other")
    log = place / "log"
    change(place, doing, name, "-o", str(log))
    counts = Counter(re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE))
    found = {}
    for (_, call), count in counts.items():
        if call in CALLS:
            found[call] = max(found.get(call, 0), count)
    return found


def check(place, doing, kept, name, said):
    """Return what is wrong after a change of which something failed."""
    try:
        kind, _, told = said.partition(" ")
        assert kind in {"done", "refused"}, said
        assert "\n" not in told, said
        store = ArchiveStore(place / "store", key=place / "key")
        assert not (found := store.verify(read_data=True)), found
        there = {entry.id for entry in store.entries()}
        same(store.get(kept), state(0, 300))
        if doing in {"forget", "delete"}:
            # An entry that could not be read just then does not decay; it is counted.
            counted = kind == "done" and "decayed=0" not in told
            assert not counted or name not in there, "what was removed is there"
        else:
            same(store.get(name), state(1, 300))
        if doing in {"put", "large"} and kind == "done":
            same(store.get(told), state(2, 300) if doing == "put" else state(3))
        stale = list((place / "store").rglob(f"{TEMPORARY}*"))
        assert not stale, stale
        for each in there - {kept}:
            store.delete(each)
    except Exception as error:  # whatever it is, it is a fault
        return f"{type(error).__name__}: {error}"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", default=",".join(CHANGES))
    parser.add_argument("--every", type=int, default=1, help="try every Nth case only")
    options = parser.parse_args()
    if STRACE is None:
        sys.exit("there is no strace")
    faults, cases, refused = [], 0, Counter()
    errors = itertools.cycle(ERRORS)
    with tempfile.TemporaryDirectory() as directory:
        for doing in options.changes.split(","):
            place = Path(directory) / doing
            place.mkdir()
            keys.generate(place / "key")
            kept = ArchiveStore(place / "store", key=place / "key").put(state(0, 300))
            todo = [
                (call, at, lasting)
                for call, count in sorted(calls_of(place, doing).items())
                for at in range(1, count + 1)
                for lasting in ("", "+")
            ]
            for call, at, lasting in todo[:: options.every]:
                name = ArchiveStore(place / "store", key=place / "key").put(
                    state(1, 300), context="other"
                )
                how = f"inject={call}:error={next(errors)}:when={at}{lasting}"
                trace = ("-e", f"trace={call}", "-e", how, "-o", os.devnull)
                said = change(place, doing, name, *trace)
                cases += 1
                refused[doing] += said.startswith("refused")
                if wrong := check(place, doing, kept, name, said):
                    faults.append(f"{doing}, {how}: {wrong}")
                    print(faults[-1], flush=True)
                    shutil.rmtree(place)
                    place.mkdir()
                    keys.generate(place / "key")
                    kept = ArchiveStore(place / "store", key=place / "key").put(state(0, 300))
    print(f"{cases} cases, refused {dict(refused)}: {len(faults)} faults")
    return 1 if faults or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
