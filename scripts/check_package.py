"""Build wheel and sdist, judge what is in them, and try the wheel in empty environments.

The wheel is built from the sdist. Each environment has nothing but the wheel, pytest and what its
line names; there the command and a tiny suite run. Extras of several GB are only resolved. Needs
an index of packages.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Mapping
from email import message_from_bytes
from email.message import Message
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "pytest_gpumem"
AGENT = f"{PACKAGE}.pth"
"""Lies beside the package, where an interpreter that starts looks for it."""
LARGE = {"torch", "models"}
"""Extras that are resolved and not installed."""
IN_SDIST = {
    *(PACKAGE, AGENT, "tests", "docs", "scripts", "mkdocs.yml", "Makefile", "pyproject.toml"),
    *("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("LICENSE", "PKG-INFO", ".gitignore"),
}
MOST = 3 * 2**20
"""Bytes; an archive that is larger has something in it that was not meant to be there."""
SUITE = """
import sys
import pytest

@pytest.mark.vram_limit("1GiB")
def test_passes(gpumem):
    assert gpumem.peak == 0

def test_torch_is_not_imported():
    assert "torch" not in sys.modules
"""


class Unfit(Exception):  # noqa: N818  # it is the package that is wrong
    """The package is not fit to be published; says why in one sentence."""


def main() -> int:
    """Return 0 when everything is as it should be, else 1."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as text:
        directory = Path(text)
        try:
            wheel, sdist = build(directory / "dist")
            metadata = judge_wheel(wheel)
            judge_sdist(sdist)
            try_everywhere(wheel, metadata, directory)
        except Unfit as problem:
            print(f"not fit: {problem}", flush=True)
            return 1
    print("the package is fit to be published")
    return 0


def build(dist: Path) -> tuple[Path, Path]:
    """Build both archives and let twine check them."""
    python("-m", "build", "--outdir", str(dist), str(ROOT))
    archives = sorted(dist.iterdir())
    python("-m", "twine", "check", "--strict", *map(str, archives))
    sdist, wheel = sorted(archives, key=lambda path: path.suffix == ".whl")
    for archive in (sdist, wheel):
        size = archive.stat().st_size
        expect(size <= MOST, f"{archive.name} has {size:,} bytes, more than {MOST:,}")
    return wheel, sdist


def judge_wheel(wheel: Path) -> Message:
    """Judge what the wheel has and says; return its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        show(wheel, names)
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    sources = {name for name in names if not name.startswith(f"{info}/")}
    # What is in the tree and neither committed nor ignored would be packed too, so git is asked.
    expect_same(sources, set(tracked(PACKAGE, AGENT)), wheel)
    expect(f"{PACKAGE}/py.typed" in sources, "the wheel does not say that it is typed")
    expect(f"{info}/licenses/LICENSE" in names, "the wheel has no licence")
    for line in (f"gpumem = {PACKAGE}.plugin", f"gpumem = {PACKAGE}.cli.main:main"):
        expect(line in entry_points, f"the wheel has no entry point {line!r}")
    return metadata


def judge_sdist(sdist: Path) -> None:
    """Judge what the sdist has: all that the tests and the documents need, and nothing else."""
    with tarfile.open(sdist) as archive:
        names = [
            str(PurePosixPath(*PurePosixPath(member.name).parts[1:]))
            for member in archive.getmembers()
            if member.isfile()
        ]
    show(sdist, names)
    others = {PurePosixPath(name).parts[0] for name in names} - IN_SDIST
    expect(not others, f"{sdist.name} has {', '.join(sorted(others))}")
    expect_same(set(names) - {"PKG-INFO"}, set(tracked(*(IN_SDIST - {"PKG-INFO"}))), sdist)


def try_everywhere(wheel: Path, metadata: Message, directory: Path) -> None:
    """Use the wheel without torch and without xdist, and with each extra."""
    suite = directory / "suite"
    suite.mkdir()
    (suite / "test_tiny.py").write_text(SUITE)
    version = metadata["Version"]
    extras = metadata.get_all("Provides-Extra", [])
    for extra in [None, *extras]:
        if extra in LARGE:
            python("-m", "pip", "install", "--dry-run", "--ignore-installed", f"{wheel}[{extra}]")
            print(f"with {extra}: can be resolved", flush=True)
            continue
        place = directory / f"with-{extra}"
        venv.create(place, with_pip=True)
        wanted = f"{wheel}[{extra}]" if extra else str(wheel)
        programs = place / ("Scripts" if os.name == "nt" else "bin")
        run([programs / "python", "-m", "pip", "install", "--quiet", wanted], cwd=directory)
        there = run([programs / "python", "-m", "pip", "list", "--format=freeze"], cwd=suite)
        print(f"with {extra or 'no extra'}: {' '.join(there.split())}", flush=True)
        for name, brought_by in (("torch", "torch"), ("pytest-xdist", "xdist")):
            expect((f"{name}==" in there) == (extra == brought_by), f"{extra} and {name}: {there}")
        try_out(programs, version, suite, ("-n", "2") if extra == "xdist" else ())


def try_out(programs: Path, version: str, suite: Path, options: tuple[str, ...]) -> None:
    """Run the command and the suite in an environment."""
    said = run([programs / "gpumem", "--version"], cwd=suite)
    expect(version in said, f"gpumem --version says {said!r}, not {version}")
    expect("doctor" in run([programs / "gpumem", "--help"], cwd=suite), "gpumem --help: no doctor")
    run([programs / "gpumem", "doctor"], cwd=suite)
    for asked in ((), ("-p", "gpumem")):  # installed only, and asked for
        said = run([programs / "pytest", "-W", "error", *asked, *options], cwd=suite)
        expect("2 passed" in said, f"the suite did not pass:\n{said}")


def tracked(*paths: str) -> Iterator[str]:
    """Yield the names of the files under ``paths`` that belong to the project."""
    listed = run(["git", "ls-files", "--", *paths], cwd=ROOT)
    yield from (name for name in listed.splitlines() if (ROOT / name).exists())


def show(archive: Path, names: list[str]) -> None:
    """List what an archive has."""
    print(f"{archive.name}: {len(names)} files, {archive.stat().st_size:,} bytes")
    print("".join(f"  {name}\n" for name in sorted(names)), end="", flush=True)


def expect_same(found: set[str], wanted: set[str], archive: Path) -> None:
    """Raise ``Unfit`` where an archive has other files than it should."""
    for names, what in ((wanted - found, "lacks"), (found - wanted, "has, and should not,")):
        expect(not names, f"{archive.name} {what} {', '.join(sorted(names))}")


def expect(condition: bool, otherwise: str) -> None:
    """Raise ``Unfit`` unless the condition holds."""
    if not condition:
        raise Unfit(otherwise)


def python(*arguments: str) -> None:
    """Run this Python, from a directory where it finds no source tree."""
    run([sys.executable, *arguments], cwd=Path(tempfile.gettempdir()))


def run(command: list[str | Path], *, cwd: Path) -> str:
    """Return what a command prints; raise ``Unfit`` where it fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    words = " ".join(map(str, command))
    expect(done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what would change how Python, pytest and we behave."""
    ours = re.compile(r"PYTHON|PYTEST|GPUMEM|CUDA_")
    return {name: value for name, value in environment.items() if not ours.match(name)}


if __name__ == "__main__":
    sys.exit(main())
