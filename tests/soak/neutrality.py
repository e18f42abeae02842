"""Suites of other packages, and other plugins, end the same with the plugin and without it.

Each suite runs without the plugin and then as it is used: installed only (``track``), asked for
(``on``), on a simulated card, and with two workers under the plugin's scheduler. Outcomes are
compared test by test through JUnit XML. A test that differs is run again without the plugin: one
whose outcome changes there too is not counted.

``--neighbours`` names the directory where the plugins of the dependency group ``neighbours`` are
installed (``pip install --target``); without it only those of the group ``test`` are tried. Some
work on pytest 8 only: ``--pytest8`` names the directory where that is installed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))

from neutral import (
    NEIGHBOURS,
    NO_AUTOLOAD,
    ON_PYTEST8,
    OURS,
    RUNNERS,
    TRACK,
    Difference,
    differences,
    write_habits,
)

CORE = "numpy._core.tests.test_"
SUITES = {
    # Each takes a minute or two. Left out is what takes many seconds and has nothing to do with
    # pytest: archives and strings of GB, and in linalg's test_regression a matter of many threads.
    "numpy lib": (
        "numpy.lib.tests",
        "-k",
        "not large_zip and not large_archive and not big_arrays",
    ),
    "numpy linalg": ("numpy.linalg.tests.test_linalg",),
    "numpy ma": ("numpy.ma.tests",),
    "numpy fft": ("numpy.fft.tests", "numpy.polynomial.tests"),
    "numpy numeric": (CORE + "numeric", CORE + "einsum"),
    "numpy scalarmath": (CORE + "scalarmath", "-k", "not float_modulus_exact"),
    "numpy nditer": (CORE + "nditer", CORE + "indexing", "-m", "not slow"),
    "numpy umath": (CORE + "umath", CORE + "umath_complex", CORE + "half"),
    "numpy ufunc": (CORE + "ufunc", CORE + "overrides", CORE + "casting_unittests"),
    "numpy strings": (CORE + "strings", CORE + "unicode", "-k", "not large_string"),
    "numpy stringdtype": (CORE + "stringdtype",),
    "numpy regression": (CORE + "regression", CORE + "datetime", CORE + "api"),
    "scipy": ("scipy.fft", "scipy.cluster", "scipy.constants", "scipy.io"),
    "networkx": ("networkx.classes", "networkx.utils", "networkx.generators"),
    "torch": ("torch.fx.passes.tests.test_pass_manager",),
}
"""Suites that ship inside packages which the tests install anyway."""


def main() -> int:
    """Run the comparisons and return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=[*SUITES, "plugins"], help="this one")
    parser.add_argument("--neighbours", type=Path, metavar="DIRECTORY", help="more plugins")
    parser.add_argument("--pytest8", type=Path, metavar="DIRECTORY", help="an older pytest")
    chosen = parser.parse_args()
    found = 0
    for name, arguments in SUITES.items():
        if chosen.only in (None, name):
            found += compare(name, ("--pyargs", *arguments), TRACK | OURS)
    if chosen.only in (None, "plugins"):
        found += plugins(chosen.neighbours, chosen.pytest8)
    print(f"{found} differences in all")
    return 1 if found else 0


def plugins(directory: Path | None, pytest8: Path | None) -> int:
    """Compare with other plugins, one by one and many together; return how many tests differ."""
    if directory is not None:
        sys.path.insert(0, str(directory.resolve()))
    installed = {each.name for each in metadata.entry_points(group="pytest11")}

    def there(named):
        return {
            name: ("-p", "xdist", *arguments)
            for name, arguments in named.items()
            if arguments[arguments.index("-p") + 1] in installed
        }

    together, alone = there(NEIGHBOURS), there(RUNNERS)
    together["many at once"] = tuple(argument for each in together.values() for argument in each)
    older = there(ON_PYTEST8) if pytest8 is not None else {}
    print(f"plugins: {', '.join([*together, *alone, *older])}")
    now, before = _beside(directory), _beside(pytest8, directory)
    found = sum(compare(each, how, OURS, now) for each, how in (together | alone).items())
    return found + sum(compare(each, how, OURS, before) for each, how in older.items())


def _beside(*directories: Path | None) -> dict[str, str]:
    """Return the environment in which packages of these directories are found first."""
    paths = [str(each.resolve()) for each in directories if each is not None]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return NO_AUTOLOAD | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})


def compare(name, arguments, ways, env=None) -> int:
    """Print what differs in one suite and return how many tests do."""
    began = time.perf_counter()
    found, compared = 0, 0
    with tempfile.TemporaryDirectory() as text:
        directory = Path(text, "suite")
        directory.mkdir()
        write_habits(directory)
        for difference in differences(directory, arguments, ways, env):
            show(difference)
            found += len(difference.tests)
            compared = difference.compared
    seconds = time.perf_counter() - began
    print(f"{name}: {compared} results, {found} differences, {seconds:.0f} s", flush=True)
    return found


def show(difference: Difference) -> None:
    """Print the tests that differ."""
    for test, (bare, ours) in sorted(difference.tests.items()):
        print(f"  {difference.way}: {test}: {bare} without, {ours} with")
    if difference.tests:
        print("\n".join(f"  | {line}" for line in difference.output.splitlines()[-60:]))


if __name__ == "__main__":
    sys.exit(main())
