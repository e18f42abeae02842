"""Kills processes that write to a store, at random or at a system call, and looks what is left."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from states import same

from pytest_gpumem.archive.disk import TEMPORARY
from pytest_gpumem.archive.store import ArchiveStore
from pytest_gpumem.errors import NotFoundError

KEY = b"k" * 32
LARGE = 1_500_000
STRACE = shutil.which("strace")


def state(number, elements=LARGE):
    generator = torch.Generator().manual_seed(number)
    return {"w": torch.randn(elements, generator=generator), "number": number}


def names(folder):
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


@dataclass
class Killed:
    """What came of killing."""

    kills: int = 0
    unfinished: int = 0
    """Kills that left a file of which nothing must remain."""
    puts: int = 0
    """States whose put had returned."""
    faults: list[str] = field(default_factory=list)


def write(folder, number, say):
    """Put and delete until somebody ends it, saying so before and after."""
    store = ArchiveStore(folder, key=KEY)
    while True:
        number += 1
        large, small = state(number), state(-number, 300)
        say(f"put {store.put(large)} {number}")
        say(f"put {store.put(small)} {-number}")
        entry = store.entries()[-1].id
        say(f"deleting {entry}")
        store.delete(entry)
        say(f"deleted {entry}")


def child(work):
    """Fork, let the child do ``work`` with a function that reports; return its id and reports."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(reading)
            torch.set_num_threads(1)
            work(lambda line: os.write(writing, f"{line}\n".encode()))
        finally:
            os._exit(1)
    os.close(writing)
    return process, reading


def ended(process, reading):
    """Return what a killed child reported."""
    os.waitpid(process, 0)
    said = b""
    while part := os.read(reading, 65536):
        said += part
    os.close(reading)
    return said.decode().splitlines()


def check(folder, old, said, killed):
    """Look at a store after a kill: all that was acknowledged, nothing that is broken or stale."""
    killed.kills += 1
    killed.unfinished += any(TEMPORARY in each for each in names(folder))
    store = ArchiveStore(folder, key=KEY)
    numbers = {words[1]: int(words[2]) for words in map(str.split, said) if words[0] == "put"}
    killed.puts += len(numbers)
    begun = {line.split()[1] for line in said if line.startswith("deleting")}
    done = {line.split()[1] for line in said if line.startswith("deleted")}
    there = {entry.id for entry in store.entries()}
    try:
        assert store.verify(read_data=True) == ()
        same(store.get(old), state(0, 300))
        assert set(numbers) - begun <= there, "a state is lost that was acknowledged"
        assert not done & there, "a state is back that was deleted"
        for name in there - {old}:
            found = store.get(name)
            number = found["number"]
            assert numbers.get(name, number) == number
            same(found, state(number, LARGE if number > 0 else 300))
        assert not [each for each in names(folder) if TEMPORARY in each], "something is stale"
        states = {entry.content for entry in store.entries()}
        assert {each.name for each in (folder / "states").iterdir()} == states
    except (AssertionError, OSError, LookupError) as error:
        killed.faults.append(f"after {said}: {error!r}")
    for name in there - {old}:
        with contextlib.suppress(NotFoundError):
            store.delete(name)


def kill_at_random(folder, kills, seed):
    """Kill a writer so many times at a random instant of its work."""
    chance = random.Random(seed)  # noqa: S311  # a seed makes it repeatable
    killed = Killed()
    old = ArchiveStore(folder, key=KEY).put(state(0, 300))
    for number in range(kills):
        process, reading = child(lambda say, at=number: write(folder, at * 1000, say))
        time.sleep(chance.uniform(0, 0.15))
        os.kill(process, signal.SIGKILL)
        check(folder, old, ended(process, reading), killed)
    return killed


def traced(prepare, *options):
    """Do what ``prepare`` returns in a child under strace; return what it said, once it ended."""
    ready, go = os.pipe()

    def work(say):
        prepared = prepare(say)
        os.read(ready, 1)
        prepared()
        os.kill(os.getpid(), signal.SIGKILL)

    process, reading = child(work)
    tracer = subprocess.Popen(
        [STRACE, "-f", "-p", str(process), *options], stderr=subprocess.PIPE, text=True
    )
    tracer.stderr.readline()  # it is attached
    os.write(go, b"x")
    said = ended(process, reading)
    tracer.communicate()
    os.close(ready)
    os.close(go)
    return said


def _a_put(folder, number):
    def prepare(say):
        store, data = ArchiveStore(folder, key=KEY), state(number)
        return lambda: say(f"put {store.put(data)} {number}")

    return prepare


def calls_of(prepare, log):
    """Return how often each system call is made, in the thread that makes it most."""
    traced(prepare, "-o", str(log))
    counts = Counter(re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE))
    log.unlink()
    found = {}
    for (_, call), count in counts.items():
        found[call] = max(found.get(call, 0), count)
    return found


def kill_at(prepare, call, at):
    """Do it, killed at the ``at``-th call of that name of a thread; return what it said."""
    inject = f"inject={call}:signal=SIGKILL:when={at}"
    return traced(prepare, "-e", f"trace={call}", "-e", inject, "-o", os.devnull)


def calls_of_a_put(folder):
    """Return how often a put makes each system call, in the thread that makes it most."""
    old = ArchiveStore(folder, key=KEY).put(state(0, 300))
    found = calls_of(_a_put(folder, 1), folder.with_name(f"{folder.name}.strace"))
    store = ArchiveStore(folder, key=KEY)
    for entry in store.entries():
        store.delete(entry.id)
    assert old
    return found


def kill_at_calls(folder, calls):
    """Kill a writer at each (name, number) of the system calls of a put."""
    killed = Killed()
    old = ArchiveStore(folder, key=KEY).put(state(0, 300))
    for number, (call, at) in enumerate(calls, 1):
        check(folder, old, kill_at(_a_put(folder, number), call, at), killed)
    return killed
