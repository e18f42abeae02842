"""Main memory by Linux's own files, made-up ones and this process's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pytest_gpumem.devices import host

MIB, GIB = 2**20, 2**30
GROUP = "proc/self/cgroup"
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@pytest.fixture
def machine(tmp_path):
    """Write files of a made-up machine and return its root."""

    def _machine(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return _machine


@pytest.mark.parametrize(
    ("files", "killed", "limit"),
    [
        ({}, (0, 0), None),
        ({"proc/vmstat": "pgpgin 1\noom_kill 7\n"}, (0, 7), None),
        (
            {GROUP: "0::/a/b\n", f"{V2}/a/b/memory.events": "low 0\noom 3\noom_kill 2\n"}
            | {f"{V2}/a/memory.events": "oom_kill 5\noom_group_kill 0\n"}
            | {f"{V2}/a/memory.max": f"{64 * MIB}\n", f"{V2}/a/b/memory.max": "max\n"},
            (5, 0),
            64 * MIB,
        ),
        (
            {GROUP: "4:memory:/box\n"}
            | {f"{V1}/box/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"}
            | {f"{V1}/box/memory.limit_in_bytes": f"{32 * MIB}"}
            | {f"{V1}/memory.limit_in_bytes": "9223372036854771712"},
            (1, 0),
            32 * MIB,
        ),
        # An old kernel's, and files that say nothing: neither is an error.
        ({GROUP: "4:memory:/\n", f"{V1}/memory.oom_control": "under_oom 0\n"}, (0, 0), None),
        ({GROUP: "0::/\nnonsense\n", f"{V2}/memory.events": "oom_kill\n\nx"}, (0, 0), None),
        ({GROUP: "0::/../..\n", f"{V2}/memory.events": "oom_kill many\n"}, (0, 0), None),
    ],
)
def test_what_control_groups_say_of_limits_and_kills(machine, files, killed, limit):
    root = machine(files)

    assert host.killed(root) == killed
    assert host.limit(root) == limit


MEMINFO = {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n"}


def test_without_control_groups_the_system_tells(machine):
    found = host.host(machine(MEMINFO))

    assert found.ram == 8 * GIB
    assert found.cpus == len(os.sched_getaffinity(0))


def test_nothing_told_is_no_limit(tmp_path):
    assert host.host(tmp_path).ram is None


def test_the_tightest_control_group_above_the_process_holds(machine):
    base = "sys/fs/cgroup"
    root = machine(
        MEMINFO
        | {"proc/self/cgroup": "0::/outer/inner\n"}
        | {f"{base}/outer/memory.max": str(6 * GIB), f"{base}/outer/memory.current": str(5 * GIB)}
        | {f"{base}/outer/memory.stat": f"anon 1\ninactive_file {GIB}\n"}
        | {f"{base}/outer/inner/memory.max": "max", f"{base}/outer/inner/memory.current": "7"}
        | {f"{base}/outer/cpu.max": "max 100000", f"{base}/outer/inner/cpu.max": "50000 100000"}
    )

    # What the group only caches, it can have again.
    assert host.host(root) == host.Host(cpus=1, ram=2 * GIB)


def test_version_one_control_groups_are_understood(machine):
    base = "sys/fs/cgroup"
    read = "total_inactive_file 7\ntotal_active_file"
    stat = f"active_file 9\n{read} {GIB + MIB - 7}\ntotal_mapped_file {MIB}\n"
    root = machine(
        MEMINFO
        | {"proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n"}
        | {f"{base}/memory/box/memory.limit_in_bytes": str(3 * GIB)}
        | {f"{base}/memory/box/memory.usage_in_bytes": str(2 * GIB)}
        | {f"{base}/memory/box/memory.stat": stat}
        | {f"{base}/cpu,cpuacct/box/cpu.cfs_quota_us": "100000"}
        | {f"{base}/cpu,cpuacct/box/cpu.cfs_period_us": "100000"}
    )

    # A file that was read twice is cached as well, but for what programs have mapped.
    assert host.host(root) == host.Host(cpus=1, ram=2 * GIB)


def test_a_version_one_group_without_a_quota_sets_no_limit(machine):
    root = machine(
        {"proc/self/cgroup": "3:cpu:/\n"}
        | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"}
        | {"sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}
    )

    assert host.host(root).cpus == len(os.sched_getaffinity(0))


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_resident_and_peak_follow_what_the_process_takes():
    if not host.reset_peak():
        pytest.skip("nobody may reset the high-water mark here")
    before = host.resident()
    taken = bytearray(64 * MIB)
    during = host.resident()
    del taken
    after, peak = host.resident(), host.status().peak

    assert during - before == pytest.approx(64 * MIB, abs=4 * MIB)
    assert abs(after - before) < 4 * MIB
    assert peak > during - 4 * MIB  # the counters of several processors are summed up late
    assert host.reset_peak()
    assert host.status().peak < peak - 48 * MIB
    now = host.status()
    assert 0 < now.of_files < now.resident
    assert abs(now.resident - host.resident()) < 4 * MIB
    assert host.own() == pytest.approx(now.resident - now.of_files, abs=4 * MIB)


@linux
def test_children_are_found_while_they_live_and_their_share_is_theirs():
    assert host.share_of(2**22 + 1) == host.Share(0, 0)
    script = "b = bytearray(48 << 20); del b; c = bytearray(8 << 20); print(1, flush=True); input()"
    with subprocess.Popen(
        ["/bin/sh", "-c", f'{sys.executable} -c "{script}"; :'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as shell:
        shell.stdout.readline()
        assert host.has_children()
        family = list(host.descendants(os.getpid()))
        (python,) = host.descendants(shell.pid)
        share = host.share_of(python)
        shell.communicate(b"\n")

    assert {shell.pid, python} <= set(family)
    assert share.now > 8 * MIB
    # What it had at its most and gave back is known, though nobody looked then.
    assert share.peak - share.now > 30 * MIB
    assert shell.pid not in set(host.descendants(os.getpid()))
