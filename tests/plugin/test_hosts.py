"""Workers on several machines, by xdist's gateways.

A machine is a pair of namespaces of its own (see namespaces(7)): a host name and a /dev/shm, so
that neither leases nor simulated cards are shared.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import run_pytest

from pytest_gpumem.simulator.card import SharedCard
from pytest_gpumem.units import parse_bytes

MIB = 2**20
WITHOUT_TORCH = Path(__file__).parents[2] / "scripts" / "bench" / "without_torch.py"
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


def can_unshare():
    tried = ["unshare", "--uts", "--mount", "true"]
    return bool(shutil.which("nsenter")) and subprocess.run(tried, check=False).returncode == 0


@pytest.fixture
def machines(tmp_path):
    """Return for each of two machines the path of its Python."""
    # The same card file on both: the same UUID, as simulated cards and MIG slices may have it.
    SharedCard.create(tmp_path / "card", total=parse_bytes("3.81GiB"), context=384 * MIB).close()
    pythons, running = [], []
    for name in ("one", "two"):
        prepare = (
            f"hostname {name} && mount -t tmpfs tmpfs /dev/shm && "
            f"cp {tmp_path}/card {tmp_path}/card.lock /dev/shm/ && echo ready && exec cat"
        )
        machine = subprocess.Popen(
            [shutil.which("unshare") or "", "--uts", "--mount", "sh", "-c", prepare],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(machine)
        assert machine.stdout.readline() == "ready\n"
        python = tmp_path / f"python-{name}"
        python.write_text(
            f"#!/bin/sh\nGPUMEM_SIMULATE_CARD=/dev/shm/card exec "
            f'nsenter --target {machine.pid} --uts --mount --wd="$PWD" {sys.executable} "$@"\n'
        )
        python.chmod(0o700)
        pythons.append(python)
    yield pythons
    for machine in running:
        machine.communicate()


@pytest.mark.skipif(not can_unshare(), reason="namespaces cannot be made here")
@pytest.mark.parametrize("schedule", ["careful", "off"])
def test_each_machine_packs_its_own_card(tmp_path, machines, schedule):
    (tmp_path / "test_it.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    shutil.copy(WITHOUT_TORCH, tmp_path)
    gateways = [f"--tx=2*popen//python={python}" for python in machines]
    finished = run_pytest(
        tmp_path,
        *("-p", "xdist", "-p", "gpumem", "--gpumem-json=run.json"),
        *gateways,
        *("--dist=load", f"--gpumem-schedule={schedule}"),
        env={
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        },
    )

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
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(own))
    overlap = any(a < d and c < b for a, b in spans["one"] for c, d in spans["two"])
    assert overlap, spans
