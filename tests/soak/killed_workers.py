"""A suite whose workers the kernel kills under plain xdist, in a control group of its own.

One of its tests keeps a cache, eight take a good quarter of what the group allows, and there are
four workers. Plain xdist has to lose some; with marks, and with what a first run learned, all pass;
and where nothing is scheduled, or the test that keeps the cache has no mark, a worker that was
killed is told as such, with who kept the memory. At the end two runs and commands of
``gpumem run --ram`` share the group by their leases alone.

    python tests/soak/killed_workers.py [--limit 4GiB]

Needs to make control groups, of version 2 or 1; skips where it cannot.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pytest_gpumem.units import format_bytes, parse_bytes

SUITE = """
import time
import pytest

UNIT = {unit}
CACHE = []

{cache_mark}
def test_caches():
    CACHE.append(bytearray(UNIT * 6 // 10))

{mark}
@pytest.mark.parametrize("number", range(8))
def test_peaks(number):
    began = time.monotonic()
    taken = bytearray(UNIT)
    # On a busy machine it takes long to fill: they are to be there at the same time.
    time.sleep(max(0.6, 2 * (time.monotonic() - began)))
"""
MARK = "@pytest.mark.ram(UNIT)"
CACHE_MARK = "@pytest.mark.ram(UNIT * 6 // 10)"
KILLED = "SIGKILL ended it, and because main memory of"
WITHIN = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[2:]])
"""

COMMANDS = 4
COMMAND = """
import os, subprocess, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
program = f"import time; taken = bytearray({sys.argv[2]}); time.sleep(1)"
ram = f"--ram={int(sys.argv[2]) * 11 // 10}B"
words = [sys.executable, "-m", "pytest_gpumem.cli.main", "run", ram]
for _ in range(COMMANDS):
    subprocess.run([*words, "--", sys.executable, "-c", program], check=True)
""".replace("COMMANDS", str(COMMANDS))


def group(limit: int) -> Path:
    """Make a control group of so many bytes; return its directory.

    Raises:
        OSError: when that cannot be.

    """
    problem = FileNotFoundError(2, "no hierarchy with a memory controller")
    name = f"gpumem-soak-{os.getpid()}"
    root = Path("/sys/fs/cgroup")
    controllers = root / "cgroup.controllers"
    if controllers.exists() and "memory" in controllers.read_text().split():
        (root / "cgroup.subtree_control").write_text("+memory")
        made = root / name
        made.mkdir()
        (made / "memory.max").write_text(str(limit))
        return made
    if not (root / "memory/memory.limit_in_bytes").exists():
        raise problem
    made = root / "memory" / name
    made.mkdir()
    (made / "memory.limit_in_bytes").write_text(str(limit))
    return made


def version_of(made: Path) -> str:
    """Return the version of a control group."""
    return "2" if (made / "memory.max").exists() else "1"


def remove(made: Path) -> None:
    """Remove a control group once those have ended that were killed in it."""
    for _ in range(50):
        with suppress(OSError):
            made.rmdir()
            return
        time.sleep(0.1)


def run(
    directory: Path, made: Path, *arguments: str, script: str = "within.py"
) -> tuple[str, float]:
    """Run pytest in the group; return what it said, and the seconds it took."""
    began = time.monotonic()
    xdist = ("-p", "xdist") if script == "within.py" else ()
    done = subprocess.run(
        [sys.executable, str(directory / script), str(made), *xdist, *arguments],
        cwd=directory,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "GPUMEM_RUN_DIR": str(directory)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr + done.stdout, time.monotonic() - began


def summary(said: str, seconds: float) -> str:
    """Return the last line of a run, and how many workers it lost."""
    last = said.strip().splitlines()[-1].strip("= ")
    crashed = set(re.findall(r"worker .(gw[0-9]+). crashed", said))
    return f"{last}; {len(crashed)} workers crashed ({seconds:.0f} s)"


def at_once(
    directory: Path, made: Path, unit: int, ours: Sequence[str], tell: Callable[..., None]
) -> None:
    """Run two suites and commands at once, which know of one another by their leases alone."""
    (directory / "command.py").write_text(COMMAND)
    for how, ended in (("on", 9), ("track", 0)):
        with ThreadPoolExecutor() as pool:
            runs = [
                pool.submit(
                    run, directory, made, *ours, f"--gpumem={how}", "-n", "2",
                    "-p", "no:cacheprovider",
                )
                for _ in range(2)
            ]  # fmt: skip
            if how == "on":
                commands = pool.submit(run, directory, made, str(unit), script="command.py")
        for number, each in enumerate(runs, start=1):
            result = each.result()
            right = f" {ended} passed in" in result[0] if ended else True
            tell(f"two runs at once, leases {how}, run {number}", result, right=right)
        if how == "on":
            said = commands.result()[0]
            tell("commands beside them", commands.result(), right=said.count("took") == COMMANDS)


def main() -> int:
    """Run the suite in several ways; return 1 if one of them ended otherwise than it should."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", type=parse_bytes, default=4 * 2**30)
    limit = parser.parse_args().limit
    try:
        made = group(limit)
    except OSError as error:
        print(f"skipped: no control group can be made here: {error.strerror}")
        return 0
    print(f"control group of version {version_of(made)}, {format_bytes(limit)}")
    wrong = []

    def tell(what: str, result: tuple[str, float], *, right: bool) -> None:
        print(f"{what}: {summary(*result)}{'' if right else '  WRONG'}", flush=True)
        if not right:
            wrong.append(what)
            print(result[0])

    try:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            (directory / "within.py").write_text(WITHIN)
            suite = directory / "test_it.py"
            ours = ("-p", "gpumem", "--gpumem-ram")
            unit = limit * 28 // 100

            suite.write_text(SUITE.format(unit=unit, mark="", cache_mark=""))
            plain = run(directory, made, "-n", "4")
            tell("plain xdist", plain, right="crashed" in plain[0])
            told = run(directory, made, *ours, "--gpumem=track", "-n", "4")
            why = KILLED in told[0]
            # In the table in any case; with the worker where it was that one's.
            keeper = re.search(
                r"[MG]iB  test_it.py::test_caches", told[0].partition("main memory\n")[2]
            )
            tell("measured", told, right=why and keeper is not None)
            if "kept by test_it.py::test_caches" in told[0]:
                print("  the worker that keeps the cache was killed, which is said")
            run(directory, made, *ours, "-n", "1")
            learned = run(directory, made, *ours, "-n", "4")
            tell("learned", learned, right=" 9 passed in" in learned[0])
            auto = run(directory, made, *ours, "-n", "auto")
            tell("learned, -n auto", auto, right=" 9 passed in" in auto[0])
            print("  " + "".join(re.findall(r"gpumem: (\d+ workers?: .*)", auto[0])))

            fresh = ("-p", "no:cacheprovider", "-n", "4")
            suite.write_text(SUITE.format(unit=unit, mark=MARK, cache_mark=""))
            some = run(directory, made, *ours, *fresh)
            lost = set(re.findall(r"worker .(gw[0-9]+). crashed", some[0]))
            told_all = all(re.search(rf"  {each} at .*{KILLED}", some[0]) for each in lost)
            tell("marked, but for the cache", some, right=told_all)
            suite.write_text(SUITE.format(unit=unit, mark=MARK, cache_mark=CACHE_MARK))
            marked = run(directory, made, *ours, *fresh)
            tell("marked", marked, right=" 9 passed in" in marked[0])
            at_once(directory, made, unit, ours, tell)
    finally:
        remove(made)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
