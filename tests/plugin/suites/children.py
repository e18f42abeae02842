"""Ways to start a process that uses a card; each takes so many MiB and ends in some way."""

import asyncio
import contextlib
import multiprocessing
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

CHILD = """
import os, signal, sys, time
import torch
kept = torch.zeros(int(sys.argv[1]) * 2**20, dtype=torch.uint8, device="cuda")
how = sys.argv[2]
if len(sys.argv) > 3:
    open(sys.argv[3] + "-", "w").write(str(os.getpid()))
    os.rename(sys.argv[3] + "-", sys.argv[3])
if how == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif how == "term":
    os.kill(os.getpid(), signal.SIGTERM)
elif how == "_exit":
    os._exit(3)
elif how == "raise":
    raise SystemExit(4)
elif how == "stay":
    time.sleep(60)
"""
DRIVER = """
import os, sys, time
from pathlib import Path
from pytest_gpumem.simulator.card import SharedCard
card = SharedCard.open(Path(os.environ["GPUMEM_SIMULATE_CARD"]))
card.join()
card.reserve(int(sys.argv[1]) * 2**20)
time.sleep(0.3)
"""
"""Uses the card as a program without torch does: the driver alone knows of it."""


def command(mib, how):
    return [sys.executable, "-c", CHILD, str(mib), how]


def take(mib, how="end"):
    import torch

    kept = torch.zeros(mib * 2**20, dtype=torch.uint8, device="cuda")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "_exit":
        os._exit(3)
    return kept.numel()


def plain(mib, how, _place):
    subprocess.run(command(mib, how), check=False)


def shell(mib, how, place):
    script = place / "child.py"
    script.write_text(CHILD)
    line = f"cd / && {sys.executable} {script} {mib} {how} | cat"
    subprocess.run(line, shell=True, check=False)  # noqa: S602  # a shell in between is the case


def environment(mib, how, _place):
    subprocess.run(command(mib, how), env={**os.environ, "MINE": "1"}, check=False)


def nested(mib, how, _place):
    code = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, *command(mib, how)], check=False)


def daemon(mib, how, place):
    """Fork twice, with a session of its own; the parent is gone before the child begins."""
    code = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
    flag = place / "there"
    subprocess.run([sys.executable, "-c", code, *command(mib, how), str(flag)], check=False)
    wait_for(flag)
    ended = Path("/proc", flag.read_text())
    while runs(ended):
        time.sleep(0.01)


def runs(place):
    try:
        return " Z " not in (place / "stat").read_text()
    except OSError:
        return False


def asynchronous(mib, how, _place):
    async def run():
        await (await asyncio.create_subprocess_exec(*command(mib, how))).wait()

    asyncio.run(run())


def thread(mib, how, place):
    worker = threading.Thread(target=plain, args=(mib, how, place))
    worker.start()
    worker.join()


def posix_spawn(mib, how, _place):
    os.waitpid(os.posix_spawn(sys.executable, command(mib, how), os.environ), 0)


def raw_fork(mib, how, _place):
    pid = os.fork()
    if not pid:
        try:
            take(mib, how)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def process(kind):
    def start(mib, how, _place):
        child = multiprocessing.get_context(kind).Process(target=take, args=(mib, how))
        child.start()
        child.join()

    start.__name__ = kind
    return start


def pool(mib, _how, _place):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        assert executor.submit(take, mib).result() == mib * 2**20


def torch_spawn(mib, _how, _place):
    import torch.multiprocessing

    torch.multiprocessing.spawn(_rank, args=(mib,), nprocs=1)


def _rank(_rank, mib):
    take(mib)


def pytest_within(mib, how, place):
    (place / "test_inner.py").write_text(
        f"import subprocess\ndef test_inner():\n    subprocess.run({command(mib, how)!r})\n"
    )
    inner = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(place)]
    subprocess.run(inner, check=True, cwd=place)


def copied(mib, how, _place):
    subprocess.run(command(mib, how), env=AT_IMPORT, check=False)


AT_IMPORT = dict(os.environ)


def launcher(mib, how, place):
    script = place / "launch"
    script.write_text('#!/bin/sh\nexec nohup "$@"\n')
    script.chmod(0o700)
    subprocess.run([script, *command(mib, how)], check=False)


def execs(mib, how, _place):
    """Use the card, and become another program."""
    code = (
        "import os, sys, torch; torch.zeros(4, device='cuda'); os.execv(sys.argv[1], sys.argv[1:])"
    )
    subprocess.run([sys.executable, "-c", code, *command(mib, how)], check=False)


def terminal(mib, how, _place):
    pid, ours = pty.fork()
    if not pid:
        os.execv(sys.executable, command(mib, how))  # noqa: S606  # no shell, which is the case
    with contextlib.suppress(OSError):  # so a terminal ends
        while os.read(ours, 1000):
            pass
    os.close(ours)
    os.waitpid(pid, 0)


def namespace(mib, how, _place):
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], check=False).returncode:
        pytest.skip("pid namespaces cannot be made here")
    subprocess.run([*apart, *command(mib, how)], check=False)


def isolated(mib, how, _place):
    """Without what the environment says of Python, and with the interpreter's own paths."""
    python, *rest = command(mib, how)
    subprocess.run([python, "-I", *rest], check=False)


def one_task_each(mib, _how, _place):
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as workers:
        assert workers.map(take, [mib - 4, mib], chunksize=1)[1] == mib * 2**20


def manager(mib, _how, _place):
    context = multiprocessing.get_context("spawn")
    with context.Manager() as shared:
        child = context.Process(target=take_and_note, args=(mib, shared.list()))
        child.start()
        child.join()


def take_and_note(mib, noted):
    noted.append(take(mib))


MORE = [copied, launcher, execs, terminal, namespace, isolated, one_task_each, manager]
"""Those that only the whole suite tries."""
TORCH_WAYS = [
    plain, shell, environment, nested, daemon, asynchronous, thread, posix_spawn, raw_fork,
    process("fork"), process("spawn"), process("forkserver"), pool, torch_spawn, pytest_within,
]  # fmt: skip
ENDS = ["end", "kill", "_exit", "term", "raise"]
FEW = os.environ.get("CASES") != "all"
UNLIKE = {"shell", "environment", "daemon", "posix_spawn", "fork", "forkserver", "pytest_within"}
"""Of few cases: ways in which a process begins each in its own; the others begin as one of these
do, as do the children of the tests below."""
NO_SIGNALS = {"pool", "torch_spawn", "one_task_each", "manager"}
IN_PYTHON = {"raw_fork", "fork", "spawn", "forkserver"}


def cases():
    """Each way with each end; or those that are unlike, with one."""
    for number, way in enumerate(TORCH_WAYS if FEW else TORCH_WAYS + MORE):
        name, ends = way.__name__, ENDS
        if FEW and name not in UNLIKE:
            continue
        if name in NO_SIGNALS:
            ends = ["end"]
        elif name in IN_PYTHON:
            ends = ["end", "kill", "_exit"]
        for how in [ends[number % len(ends)]] if FEW else ends:
            mib = 20 + 4 * number + 2 * ENDS.index(how)  # even: the allocator's large blocks are
            yield pytest.param(way, how, mib, id=f"{name}-{how}-{mib}")


def wait_for(path):
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(("way", "how", "mib"), list(cases()))
def test_torch(way, how, mib, tmp_path):
    way(mib, how, tmp_path)


@pytest.mark.parametrize("cleared", [False, True], ids=["inherited", "cleared"])
def test_driver(cleared):
    card = {"GPUMEM_SIMULATE_CARD": os.environ["GPUMEM_SIMULATE_CARD"]}
    subprocess.run([sys.executable, "-c", DRIVER, "77"], check=True, env=card if cleared else None)


def test_two_at_once(tmp_path):
    """40 MiB and 30 MiB at the same time, after 50 MiB alone."""
    subprocess.run(command(50, "end"), check=True)
    flags = [tmp_path / "a", tmp_path / "b"]
    running = [
        subprocess.Popen([*command(mib, "stay"), str(flag)])
        for mib, flag in zip((40, 30), flags, strict=True)
    ]
    for flag in flags:
        wait_for(flag)
    for each in running:
        each.kill()  # and nobody waits, as yet
    KEPT.extend(running)


KEPT = []
"""What Python would complain of if it was dropped before it was waited for."""


def test_orphan(tmp_path):
    flag = tmp_path / "there"
    KEPT.append(subprocess.Popen([*command(34, "stay"), str(flag)]))
    wait_for(flag)


def test_after_the_orphan():
    while KEPT:
        KEPT[-1].kill()
        KEPT.pop().wait()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    flag = tmp_path_factory.mktemp("engine") / "there"
    running = subprocess.Popen([*command(120, "stay"), str(flag)])
    wait_for(flag)
    yield
    running.kill()
    KEPT.append(running)


@pytest.mark.parametrize("number", range(2))
def test_engine(engine, number):
    pass


def test_no_child():
    while KEPT:
        KEPT.pop().wait()
