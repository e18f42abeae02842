"""The suites of pytest and its plugins end the same with our plugin in every run they make.

These suites run pytest thousands of times, with every option and every bad input that their
authors met: whatever the plugin changes in such a run shows. Each suite comes from the source
distribution of the version that is tried. It runs without the plugin and with it on, on a simulated
card; the outer runs, which only collect the outcomes, never have it. What ended otherwise is run
again, its whole file twice each way in turn:

- a test that does not always end the same without the plugin is unstable: named, not counted;
- one that ended otherwise in one of the three runs with it is named, not counted;
- any other is a difference.

The inner runs find the plugin by its entry point, in a directory that PYTHONPATH adds for the runs
with it; before all else a small suite shows that they do, in one process and with workers. Runs
that switch the loading of plugins off do without it, as they do for their users.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))

from neutral import differing, outcomes, read_outcomes

ROOT = Path(__file__).resolve().parents[2]
PYTESTS = {"8.4": "pytest==8.4.*", "9": "pytest==9.*"}
SUITES = {
    "pytest-xdist": ("testing",),
    "pytest-rerunfailures": ("tests", "--config-file=tox.ini"),  # else pytest would find ours
    "pytest-timeout": ("test_pytest_timeout.py",),
    "pytest": ("testing",),
}
"""By project, where its tests lie, and options. The version is that of our own tests' run."""

ON = {"GPUMEM": "on", "GPUMEM_SIMULATE": "1GiB", "GPUMEM_SIMULATE_CONTEXT": "64MiB"}
REPEATS = 2
LONGEST_RUN = 3600
"""Seconds after which an outer run is stuck."""

CANARY = """
import pytest

pytest_plugins = "pytester"

@pytest.mark.parametrize("workers", [(), ("-n", "1")])
@pytest.mark.parametrize("how", ["inprocess", "subprocess"])
def test_loaded(pytester, how, workers):
    pytester.makepyfile("def test_a(): pass")
    result = getattr(pytester, f"runpytest_{how}")(*workers)
    assert "gpumem: on, Simulated" in result.stdout.str()
"""

Outcomes = Counter[tuple[str, str]]


def ended(command: Sequence[str | Path], where: Path, env: Mapping[str, str]) -> tuple[str, int]:
    """Return what a run wrote and its exit status; nothing of it outlives this call."""
    process = subprocess.Popen(
        command,
        cwd=where,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LONGEST_RUN)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    finally:
        # Also when this campaign is told to end: else the run would go on without it.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return output, process.returncode


@dataclass(frozen=True)
class Place:
    """Where a suite is run: a Python of its own, the source, and what PYTHONPATH adds."""

    python: Path
    source: Path
    path: tuple[Path, ...]
    plugin: Path

    def run(self, way: Mapping[str, str], *arguments: str) -> Outcomes:
        """Run tests with the plugin or, where ``way`` is empty, without it.

        Raises:
            RuntimeError: when the run itself did not come to its end.

        """
        xml = self.source / "junit.xml"
        xml.unlink(missing_ok=True)
        path = (*((self.plugin,) if way else ()), *self.path, Path(__file__).parent)
        left_out = ("GPUMEM", "PYTEST", "PYTHON", "CUDA_", "COLUMNS")
        env = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), **way}
        outer = ("-p", "no:gpumem", "-p", "bounded", "-q", "--tb=short", f"--junitxml={xml}")
        command = [self.python, "-m", "pytest", *outer, *arguments]
        with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
            # A directory of its own: pytest's tests look at what lies beside theirs.
            output, status = ended(command, self.source, env | {"TMPDIR": scratch})
        (self.source / f"output-{'with' if way else 'without'}.txt").write_text(output)
        if status not in (0, 1) or not xml.exists():
            raise RuntimeError(f"the suite did not run:\n{output[-5000:]}")
        return read_outcomes(xml)

    def files(self, tests: Iterable[str]) -> set[str]:
        """Return the files that hold the tests, whose names are JUnit's."""
        found = set()
        for test in tests:
            parts = test.partition("::")[0].split(".")
            files = (Path(*parts[:n]).with_suffix(".py") for n in range(len(parts), 0, -1))
            found |= {str(next(file for file in files if (self.source / file).exists()))}
        return found


@dataclass(frozen=True)
class Verdict:
    """What the runs of one suite showed; for tests, how they ended without the plugin and with.

    What differed ``once`` ended alike when its file ran again: a busy machine's doing, or of what
    other files left in the process. Many of a kind are no accident.
    """

    compared: int
    different: dict[str, tuple[list[str], ...]]
    unstable: dict[str, tuple[list[str], ...]]
    once: dict[str, tuple[list[str], ...]]
    seconds: tuple[float, float]
    """What the whole suite took without the plugin and with it."""


def main() -> int:
    """Run the comparisons and return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="where all that it needs is kept")
    parser.add_argument("--wheel", type=Path, help="of the plugin; default: the one in dist/")
    parser.add_argument("--pytest", choices=PYTESTS, action="append", help="on these; default: all")
    parser.add_argument("--only", choices=SUITES, action="append", help="these; default: all")
    parser.add_argument("-k", metavar="EXPRESSION", help="of pytest, for every suite")
    parser.add_argument("-n", metavar="WORKERS", default="2", help="of each outer run")
    parser.add_argument("--sample", type=int, default=1, metavar="N", help="one test of N")
    parser.add_argument("--seconds", type=float, default=60, help="for a test, at most")
    chosen = parser.parse_args()
    (wheel,) = [chosen.wheel] if chosen.wheel else (ROOT / "dist").glob("*.whl")
    options = [f"-n{chosen.n}", f"--bounded-seconds={chosen.seconds}"]
    options += ["-k", chosen.k] if chosen.k else []
    # Who is started in the background ignores interrupts, and so would the runs that test them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rows, found = [], 0
    for on in chosen.pytest or PYTESTS:
        python, plugin = prepare(chosen.cache.resolve() / f"pytest-{on}", PYTESTS[on], wheel)
        for project in chosen.only or SUITES:
            place = suite(python, plugin, project)
            tests, *more = SUITES[project]
            verdict = judge(place, tests, [*options, *more], chosen.sample)
            show(f"{place.source.name} on pytest {on}", verdict)
            found += len(verdict.different)
            rows.append(row(place.source.name, installed(python, "pytest"), verdict))
    print("\n| suite | pytest | results | differ | once | unstable | seconds without | with |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    print("\n".join(rows))
    return 1 if found else 0


def pip(python: Path, *arguments: str | Path) -> None:
    """Run our pip for another Python, whose own may be old; silent unless it fails."""
    command = [sys.executable, "-m", "pip", "-qq", "--python", python, *arguments]
    subprocess.run(command, check=True)


def prepare(home: Path, requirement: str, wheel: Path) -> tuple[Path, Path]:
    """Return a Python that has a pytest and what the suites import, and where the plugin lies.

    Raises:
        RuntimeError: when inner runs do not load the plugin as they should.

    """
    python, plugin = home / "venv" / "bin" / "python", home / "plugin"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
    # With the plugin come its dependencies, which stay.
    group = f"{ROOT / 'pyproject.toml'}:suites"
    pip(python, "install", requirement, "--group", group, wheel)
    pip(python, "uninstall", "--yes", "pytest-gpumem")
    pip(python, "install", "--no-deps", "--upgrade", "--target", plugin, wheel)
    canary = Place(python, home / "canary", (), plugin)
    canary.source.mkdir(exist_ok=True)
    (canary.source / "test_canary.py").write_text(CANARY)
    (canary.source / "pytest.ini").touch()
    for way, right in (({}, "failure"), (ON, "passed")):
        ended = [how for _, how in canary.run(way, "test_canary.py").elements()]
        if ended != [right] * 4:
            raise RuntimeError(f"inner runs load the plugin otherwise than they should: {ended}")
    return python, plugin


def installed(python: Path, project: str) -> str:
    """Return the version of a project that a Python has."""
    code = f"from importlib.metadata import version; print(version({project!r}))"
    return subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def suite(python: Path, plugin: Path, project: str) -> Place:
    """Return where the project's own tests can be run: its source, and it installed from there."""
    home = plugin.parent
    version = installed(python, project) if project == "pytest" else metadata.version(project)
    name = f"{project.replace('-', '_')}-{version}"
    target, archive = home / f"{name}-installed", home / f"{name}.tar.gz"
    if not target.exists():
        only_source = ("--no-binary", ":all:", "--no-deps")
        pip(python, "download", *only_source, "--dest", home, f"{project}=={version}")
        with tarfile.open(archive) as packed:
            packed.extractall(home, filter="data")
        pip(python, "install", "--no-deps", "--target", target, archive)
    return Place(python, home / name, (target,), plugin)


def judge(place: Place, tests: str, options: Sequence[str], sample: int) -> Verdict:
    """Run one test of ``sample`` without the plugin and with it, and tell what differs."""
    bare: list[Outcomes] = []
    ours: list[Outcomes] = []

    def turn(*arguments: str) -> tuple[float, float]:
        began = time.perf_counter()
        bare.append(place.run({}, *options, *arguments))
        between = time.perf_counter()
        ours.append(place.run(ON, *options, *arguments))
        return between - began, time.perf_counter() - between

    seconds = turn(f"--bounded-every={sample}", tests)
    suspects = sorted(differing(bare[0], ours[0]))
    for test in suspects:
        print(f"  {place.source.name}: again, the file of {test}", flush=True)
    for _ in range(REPEATS if suspects else 0):
        turn(*sorted(place.files(suspects)))
    verdict = Verdict(sum(bare[0].values()), {}, {}, {}, seconds)
    for test in suspects:
        ended = tuple([outcomes(run, test) for run in runs] for runs in (bare, ours))
        if len(set(ended[0])) > 1:
            verdict.unstable[test] = ended
        elif sum(how not in ended[0] for how in ended[1]) == 1:
            verdict.once[test] = ended
        else:
            verdict.different[test] = ended
    return verdict


def show(name: str, verdict: Verdict) -> None:
    """Print what one suite showed."""
    counts = f"{len(verdict.different)} differ, {len(verdict.unstable)} unstable"
    print(f"{name}: {verdict.compared} results, {counts}", flush=True)
    for what in ("different", "unstable", "once"):
        for test, (bare, ours) in getattr(verdict, what).items():
            print(f"  {what}: {test}")
            print(f"    without: {'; '.join(bare)}\n    with:    {'; '.join(ours)}", flush=True)


def row(suite: str, pytest: str, verdict: Verdict) -> str:
    """Return a row of the table of figures."""
    counts = (verdict.compared, *map(len, (verdict.different, verdict.once, verdict.unstable)))
    cells = (suite, pytest, *counts, *(f"{each:.0f}" for each in verdict.seconds))
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(main())
