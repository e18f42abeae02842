"""Workers on several machines, by xdist's gateways.

A machine is a set of namespaces of its own (see namespaces(7)): a host name, shared memory and a
/run, so that neither leases nor simulated cards are shared.
"""

from __future__ import annotations

import getpass
import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from harness import WITHOUT_TORCH, run_pytest

from pytest_gpumem.simulator.card import SharedCard
from pytest_gpumem.units import parse_bytes

MIB = 2**20
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
CARD = "/dev/shm/card"  # noqa: S108  # a machine's own, which the test makes
NAMESPACES = ("--uts", "--ipc", "--mount")
SUITE = """
import time
import pytest
from without_torch import ALLOCATOR

@pytest.mark.gpu(vram="2GiB")
@pytest.mark.parametrize("i", range(6))
def test_heavy(i):
    ALLOCATOR.take(2**31)
    time.sleep(0.3)
    ALLOCATOR.give(2**31)

@pytest.mark.gpu(count=2)
def test_wide(): raise SystemError("ran")
"""


class Machine(NamedTuple):
    """A machine and the command that runs another one on it."""

    name: str
    enter: tuple[str, ...]


def can_unshare() -> bool:
    tried = ["unshare", *NAMESPACES, "true"]
    return bool(shutil.which("nsenter")) and subprocess.run(tried, check=False).returncode == 0


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    """Start two machines, each with a card."""
    # The same card file on both: the same UUID, as simulated cards and MIG slices may have it.
    SharedCard.create(tmp_path / "card", total=parse_bytes("3.81GiB"), context=384 * MIB).close()
    found, running = [], []
    for name in ("one", "two"):
        prepare = (
            f"hostname {name} && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /run && "
            f"mkdir /run/sshd && cp {tmp_path}/card {tmp_path}/card.lock /dev/shm/ && "
            "echo ready && exec cat"
        )
        machine = subprocess.Popen(
            [shutil.which("unshare") or "", *NAMESPACES, "sh", "-c", prepare],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(machine)
        assert machine.stdout.readline() == "ready\n"
        found.append(Machine(name, ("nsenter", f"--target={machine.pid}", *NAMESPACES)))
    yield found
    for machine in running:
        machine.communicate()


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Write the suite into a directory of its own."""
    directory = tmp_path / "suite"
    directory.mkdir()
    (directory / "test_it.py").write_text(SUITE)
    (directory / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    shutil.copy(WITHOUT_TORCH, directory)
    return directory


def environment(directory: Path) -> dict[str, str]:
    """Return what runs and their workers need to load our plugin and xdist alone."""
    paths = filter(None, (str(directory), os.environ.get("PYTHONPATH")))
    return {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": os.pathsep.join(paths)}


def check(finished) -> None:
    """Check that all ran as they should, on both machines, and on each one after the other."""
    assert finished.outcomes == {"passed": 6, "error": 1}, finished.output
    assert "SystemError" not in finished.output
    run = finished.record
    assert {(card.host, card.total) for card in run.cards} == {
        ("one", parse_bytes("3.81GiB")),
        ("two", parse_bytes("3.81GiB")),
    }
    heavy = [test for test in run.tests if "heavy" in test.nodeid]
    spans = {
        host: sorted((t.start, t.start + t.duration) for t in heavy if t.host == host)
        for host in ("one", "two")
    }
    assert all(spans.values())
    for own in spans.values():
        # What the plugin does before it waits is the test's time: a few milliseconds.
        assert all(end <= start + 0.05 for (_, end), (start, _) in itertools.pairwise(own))
    overlap = any(a < d and c < b for a, b in spans["one"] for c, d in spans["two"])
    assert overlap, spans


@pytest.mark.skipif(not can_unshare(), reason="namespaces cannot be made here")
@pytest.mark.parametrize("schedule", ["on", "off"])
def test_each_machine_packs_its_own_card(tmp_path, suite, machines, schedule):
    gateways = []
    for machine in machines:
        python = tmp_path / f"python-{machine.name}"
        python.write_text(
            f"#!/bin/sh\nGPUMEM_SIMULATE_CARD={CARD} exec "
            f'{" ".join(machine.enter)} --wd="$PWD" {sys.executable} "$@"\n'
        )
        python.chmod(0o700)
        gateways.append(f"--tx=2*popen//python={python}")
    finished = run_pytest(
        suite,
        *("-p", "gpumem", "--gpumem-json=run.json"),
        *gateways,
        *("--dist=load", f"--gpumem-schedule={schedule}"),
        env=environment(suite),
    )
    check(finished)


class Server(NamedTuple):
    """An sshd that runs, and the option by which xdist starts workers through it."""

    process: psutil.Popen
    gateways: str


@pytest.fixture
def servers(tmp_path: Path, suite: Path, machines: Sequence[Machine]) -> Iterator[list[Server]]:
    """Start an sshd on each machine: keys, configurations and ports of its own, a checkout each."""
    for key in ("host", "user"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key]
        subprocess.run(make, check=True)
    running = []
    for machine in machines:
        port = free_port()
        here = environment(suite) | {"GPUMEM_SIMULATE_CARD": CARD}
        server = write(
            tmp_path / f"sshd-{machine.name}",
            f"Port {port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {tmp_path}/host",
            f"AuthorizedKeysFile {tmp_path}/user.pub",
            "AuthenticationMethods publickey",
            "PermitRootLogin prohibit-password",
            "PermitUserRC no",
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            f"SetEnv {' '.join(f'{name}={value}' for name, value in here.items())}",
        )
        client = write(
            tmp_path / f"ssh-{machine.name}",
            "HostName 127.0.0.1",
            f"Port {port}",
            f"User {getpass.getuser()}",
            f"IdentityFile {tmp_path}/user",
            "IdentitiesOnly yes",
            "IdentityAgent none",
            f"UserKnownHostsFile {tmp_path}/known",
            "GlobalKnownHostsFile /dev/null",
            "BatchMode yes",
            "LogLevel ERROR",
        )
        with (tmp_path / "known").open("a") as known:
            known.write(f"[127.0.0.1]:{port} {(tmp_path / 'host.pub').read_text()}")
        log = tmp_path / f"{server.name}.log"
        process = psutil.Popen([*machine.enter, SSHD, "-D", "-f", server, "-E", log])
        until(lambda port=port: listens(port))
        checkout = shutil.copytree(suite, tmp_path / f"checkout-{machine.name}")
        spec = f"ssh={machine.name}//ssh_config={client}//python={sys.executable}"
        running.append(Server(process, f"--tx=2*{spec}//chdir={checkout}"))
    yield running
    for each in running:
        each.process.terminate()
        each.process.wait()


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join([*lines, ""]))
    return path


def free_port() -> int:
    with socket.socket() as trying:
        trying.bind(("127.0.0.1", 0))
        port: int = trying.getsockname()[1]
        return port


def listens(port: int) -> bool:
    with socket.socket() as trying:
        return trying.connect_ex(("127.0.0.1", port)) == 0


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.skipif(SSHD is None, reason="no sshd here (package openssh-server)")
@pytest.mark.skipif(not can_unshare(), reason="namespaces cannot be made here")
def test_workers_are_reached_by_ssh(suite, servers):
    finished = run_pytest(
        suite,
        *("-p", "gpumem", "--gpumem-json=run.json", "--dist=load"),
        *(server.gateways for server in servers),
        env=environment(suite),
    )

    check(finished)
    for server in servers:
        until(lambda process=server.process: not process.children(recursive=True))
