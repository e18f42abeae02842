"""Suites that nobody here wrote pass on the simulated card what they pass on the CPU.

Each suite comes from its own source: the source distribution on PyPI, or, for those that are
published without their tests, a checkout that ``--source NAME=DIRECTORY`` names. A sample of its
tests runs without the plugin and then on a simulated card, where the suite chooses its device as it
does wherever CUDA is available. Outcomes are compared test by test:

- what passes on the CPU must pass on the card, or have a cause that ``docs/limits.md`` names, but
  for what the suite itself skips there;
- what runs only where there is CUDA is told in columns of its own;
- a process that dies is started again behind the test that ended it: that test was ``aborted``;
- a test that does not end in ``--seconds`` was ``stuck``.

This file is also the pytest plugin that does so in each run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest_plugins = ("bounded",)

TORCH_TESTS = ("--noconftest", "--rootdir=.")
IN_TORCH = {"PYTORCH_TESTING_DEVICE_ONLY_FOR": "cpu"}, {"PYTORCH_TESTING_DEVICE_ONLY_FOR": "cuda"}
CARD = ("-p", "gpumem", "--gpumem-simulate=4GiB", "--gpumem-json=run.json")
DIED = re.compile(r"Fatal Python error|terminate called|INTERNALERROR.*", re.MULTILINE)


@dataclass(frozen=True)
class Suite:
    """Whose tests they are, which of them run, and how they are told where."""

    project: str
    tests: tuple[str, ...]
    share: float = 1.0
    """The part of the tests that is run."""
    select: str = ""
    """As ``-k`` has it."""
    options: tuple[str, ...] = ()
    env: tuple[Mapping[str, str], Mapping[str, str]] = field(default_factory=lambda: ({}, {}))
    """Variables on the CPU and on the card."""
    device: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """Options on the CPU and on the card."""
    below: str = "."
    """Where in the source pytest is started."""
    needs: tuple[str, ...] = ()
    """What pip must install beside the project and what that needs."""


SUITES = {
    "accelerate": Suite(
        "accelerate",
        tuple(
            f"tests/test_{name}.py"
            for name in ("memory_utils", "hooks", "modeling_utils", "big_modeling", "offload")
        ),
        needs=("parameterized", "transformers"),
    ),
    "transformers": Suite(
        "transformers",
        tuple(
            f"tests/models/{name}/test_modeling_{name}.py"
            for name in ("bert", "llama", "t5", "vit", "gpt2", "whisper")
        ),
        share=0.12,
        needs=("parameterized", "httpx", "huggingface-hub<2", "datasets", "accelerate"),
    ),
    "peft": Suite(
        "peft",
        ("tests/test_custom_models.py", "tests/test_initialization.py", "tests/test_mixed.py"),
        share=0.03,
        needs=("parameterized", "datasets", "diffusers"),
    ),
    "sentence-transformers": Suite(
        "sentence-transformers",
        ("tests",),
        needs=("datasets", "accelerate", "pillow", "requests"),
    ),
    "lightning-fabric": Suite(
        "lightning-fabric", ("tests_fabric",), share=0.25, below="tests", needs=("torchmetrics",)
    ),
    "torch-cuda": Suite(
        "torch",
        ("test_cuda.py",),
        select="memory or alloc or cach or oom or snapshot or stream or event or pin or fraction",
        options=TORCH_TESTS,
        below="test",
    ),
    "torch-tensor": Suite(
        "torch", ("test_torch.py",), 0.25, "", TORCH_TESTS, IN_TORCH, below="test"
    ),
    "torch-nn": Suite("torch", ("test_nn.py",), 0.1, "", TORCH_TESTS, IN_TORCH, below="test"),
    "torch-dataloader": Suite("torch", ("test_dataloader.py",), options=TORCH_TESTS, below="test"),
    "torch-multiprocessing": Suite(
        "torch", ("test_multiprocessing.py",), options=TORCH_TESTS, below="test"
    ),
    "torchmetrics": Suite(
        "torchmetrics",
        ("unittests/bases", "unittests/regression"),
        share=0.04,
        below="tests",
        needs=("cachier", "cloudpickle", "permetrics", "properscoring", "scipy", "scikit-learn"),
    ),
    "kornia": Suite(
        "kornia",
        ("tests/geometry", "tests/color", "tests/filters", "tests/losses"),
        share=0.04,
        device=(("--device=cpu",), ("--device=cuda",)),
    ),
    "einops": Suite(
        "einops",
        ("einops/tests",),
        env=({"EINOPS_TEST_BACKENDS": "torch"}, {"EINOPS_TEST_BACKENDS": "torch"}),
    ),
    "torch_geometric": Suite("torch_geometric", ("test/nn", "test/utils"), share=0.15),
    "torchao": Suite(
        "torchao",
        (
            "test/quantization/test_quant_primitives.py",
            "test/quantization/test_quant_api.py",
            "test/test_low_bit_optim.py",
            "test/dtypes/test_affine_quantized_float.py",
        ),
        needs=("expecttest", "parameterized"),
    ),
}

CAUSES = {
    "kernels of Triton, or compiled extensions": r"triton|[Nn]inja|Inductor|CUDA_HOME|nvrtc"
    r"|jiterator|libcuda|no kernel|_load_global_deps|torchao::",
    "CUDA graphs and pools of memory": r"CUDAGraph|MemPool|torch\.cuda\.graph|captur",
    "streams that run at the same time": r"_cuda_sleep|current_blas|ExternalStream|StreamContext",
    "sparse tensors": r"sparse|SparseCUDA|layout",
    "nested tensors": r"[Nn]ested",
    "memory shared between processes": r"_share_cuda_|rebuild_cuda|IPC|_share_filename",
    "TorchScript, where devices are the host's": r"TorchScript|torch\.jit|RecursiveScript|script",
    "needs the network": r"ConnectionError|LocalEntryNotFound|OfflineMode|couldn't connect"
    r"|connection error|is not a local folder|HfHub|huggingface\.co",
    "more main memory than there is": r"can't allocate memory|DefaultCPUAllocator",
}
"""What a failure's message says of its cause; the first that fits is told."""


@dataclass
class Outcomes:
    """How the tests of one run ended, by their names without the device."""

    how: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    leaks: int = 0
    cut: bool = False
    """Whether the run was ended before its end."""


# In the runs: a plugin of pytest.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--foreign-share", type=float, default=1.0)
    parser.addoption("--foreign-results", type=Path)


def same_on_every_device(test: str) -> str:
    """Return a test's name as it is on the CPU."""
    file, _, name = test.partition("::")
    name = re.sub(r"(?<![a-z])cuda([:_]0)?(?![a-z])", "cpu", name)
    return f"{file}::{re.sub(r'CUDA(?=(::|$))', 'CPU', name)}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share = config.getoption("--foreign-share")
    results: Path = config.getoption("--foreign-results")
    done = read(results).how if results.exists() else {}
    items[:] = [
        item
        for item in items
        if zlib.crc32(same_on_every_device(item.nodeid).encode()) < share * 2**32
        and same_on_every_device(item.nodeid) not in done
    ]


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(nodeid, "aborted", "")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.passed and report.when != "call":
        return
    lines = str(report.longrepr or "").strip().splitlines()
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    message = " ".join(errors or lines[-1:])
    stuck = report.failed and "the test did not end" in message
    _write(report.nodeid, "stuck" if stuck else report.outcome, message[:2000])


_results: Path | None = None


def pytest_configure(config: pytest.Config) -> None:
    global _results  # noqa: PLW0603  # the hooks that report are given no config
    _results = config.getoption("--foreign-results")


def _write(test: str, how: str, why: str) -> None:
    if _results is not None:
        with _results.open("a") as file:
            file.write(json.dumps([same_on_every_device(test), how, why]) + "\n")


def read(results: Path) -> Outcomes:
    """Return what a run has written; the worst of a test's reports counts, unless it began anew."""
    found = Outcomes()
    for line in results.read_text().splitlines():
        test, how, why = json.loads(line)
        if how == "aborted" or found.how.get(test, "aborted") in ("aborted", "passed", "skipped"):
            found.how[test], found.why[test] = how, why
    return found


# Beside the runs.


def main() -> int:
    """Run the suites and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="where all that it needs is kept")
    parser.add_argument("--only", choices=SUITES, action="append", help="these; default: all")
    parser.add_argument(
        "--source", action="append", default=[], metavar="PROJECT=DIRECTORY", help="a checkout"
    )
    parser.add_argument("--compiled", action="store_true", help="on the compiled card")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="of pytest, for every suite")
    parser.add_argument("--share", type=float, help="part of the tests; default: as listed here")
    parser.add_argument("--seconds", type=float, default=60, help="for a test, at most")
    parser.add_argument("--minutes", type=float, default=10, help="for a run, at most")
    chosen = parser.parse_args()
    home: Path = chosen.cache.resolve()
    checkouts = dict(each.split("=", 1) for each in chosen.source)
    rows = []
    for name in chosen.only or SUITES:
        suite = SUITES[name]
        source = fetched(home, suite, checkouts)
        if source is None:
            print(f"{name}: published without its tests; name a checkout with --source", flush=True)
            continue
        cpu, card = (
            run(home / f"{name}-{('cpu', 'card')[place]}.jsonl", suite, source, place, chosen)
            for place in (0, 1)
        )
        rows.append(row(name, cpu, card))
        show(name, cpu, card)
    print(
        "\n| suite | tests | pass on the CPU | of those pass on the card | only with CUDA"
        " | of those pass | leaks told | differences |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    print("\n".join(rows))
    return 0


def python(home: Path, project: str) -> Path:
    """Return a Python for a project, which finds all that this one has and more."""
    venv = home / "venvs" / project
    made = venv / "bin" / "python"
    if not made.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        (site,) = (venv / "lib").glob("python*/site-packages")
        ours = [entry for entry in sys.path if entry.endswith("site-packages")]
        lines = [f"import site; site.addsitedir({entry!r})" for entry in ours]
        (site / "beneath.pth").write_text("\n".join(lines) + "\n")
    return made


def fetched(home: Path, suite: Suite, checkouts: Mapping[str, str]) -> Path | None:
    """Return the suite's source, with what it imports installed; None where it has no tests."""
    home.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "-qq", "--python", python(home, suite.project)]
    own = () if suite.project == "torch" else (suite.project,)
    if wanted := (*own, *suite.needs):
        subprocess.run([*pip, "install", *wanted], check=True)
    if suite.project in checkouts:
        source = Path(checkouts[suite.project]).resolve()
    else:
        stem = suite.project.replace("-", "_")
        if not list(home.glob(f"{stem}-*.tar.gz")):
            only = ("download", "--no-binary", ":all:", "--no-deps", "--dest", home, suite.project)
            if subprocess.run([*pip, *only], check=False).returncode:
                return None
        (archive,) = home.glob(f"{stem}-*.tar.gz")
        source = home / archive.name.removesuffix(".tar.gz")
        if not source.exists():
            with tarfile.open(archive) as packed:
                packed.extractall(home, filter="data")
    return source if all((source / suite.below / each).exists() for each in suite.tests) else None


def run(
    results: Path, suite: Suite, source: Path, place: int, chosen: argparse.Namespace
) -> Outcomes:
    """Run a suite on the CPU (``place`` 0) or on the card, as often as its process dies."""
    results.unlink(missing_ok=True)
    select = " and ".join(f"({each})" for each in (suite.select, chosen.k) if each)
    command = [
        *(
            python(results.parent, suite.project),
            "-m",
            "pytest",
            "-q",
            "-c",
            os.devnull,
            "--tb=short",
        ),
        *("-p", "no:cacheprovider", "-p", "no:randomly", "-p", "foreign_suites"),
        f"--foreign-share={chosen.share or suite.share}",
        f"--foreign-results={results}",
        f"--bounded-seconds={chosen.seconds}",
        *(("-k", select) if select else ()),
        *(CARD if place else ("-p", "no:gpumem")),
        *(("--gpumem-simulate-compiled",) if place and chosen.compiled else ()),
        *suite.options,
        *suite.device[place],
        *suite.tests,
    ]
    left_out = ("GPUMEM_", "PYTEST", "PYTHON", "CUDA_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    # The source's own package and not the installed one, but for torch, which has to be built.
    below = () if suite.project == "torch" else ("src", ".")
    path = (*(str(source / each) for each in below), str(Path(__file__).parent))
    env |= {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", **suite.env[place]}
    where, log = source / suite.below, results.with_suffix(".log")
    (where / "run.json").unlink(missing_ok=True)
    status: int | None = None
    for attempt in range(20):
        with log.open("a" if attempt else "w") as output:
            status = ended(command, where, env, output, chosen.minutes * 60)
        if status in (0, 1, 5, None) or not results.exists():
            break
        print(f"  {results.stem}: the process ended with {status}", flush=True)
    found = read(results) if results.exists() else Outcomes()
    if status is None:
        print(f"  {results.stem}: cut after {chosen.minutes:g} minutes", flush=True)
        found.how.popitem()  # it was under way
        found.cut = True
    if (where / "run.json").exists():
        tests = json.loads((where / "run.json").read_text()).get("tests", [])
        found.leaks = sum(any(card.get("leaked") for card in test["cards"]) for test in tests)
    return found


def ended(
    command: Sequence[object], where: Path, env: Mapping[str, str], output: object, seconds: float
) -> int | None:
    """Return the exit status of a process, None where its time was over; nothing outlives it."""
    process = subprocess.Popen(
        [str(each) for each in command],
        cwd=where,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,  # type: ignore[call-overload]  # an open file
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def cause(why: str) -> str:
    """Return the cause that a failure's message tells."""
    return next((name for name, words in CAUSES.items() if re.search(words, why)), "other")


def differing(cpu: Outcomes, card: Outcomes) -> Iterator[str]:
    """Yield the tests that pass on the CPU and not on the card, unless the suite skips them."""
    for test, how in cpu.how.items():
        if how == "passed" and card.how.get(test, "missing") not in (
            "passed",
            "skipped",
            "missing",
        ):
            yield test


def only_on_card(cpu: Outcomes, card: Outcomes) -> Iterator[str]:
    """Yield the tests that do not run on the CPU and do on the card."""
    for test, how in card.how.items():
        # Of what a run that was cut has not reached nothing is known.
        beside = cpu.how.get(test, "not reached" if cpu.cut else "skipped")
        if how != "skipped" and beside == "skipped":
            yield test


def show(name: str, cpu: Outcomes, card: Outcomes) -> None:
    """Print each difference of a suite."""
    failed = [test for test in only_on_card(cpu, card) if card.how[test] != "passed"]
    for what, tests in (("passes on the CPU", differing(cpu, card)), ("only with CUDA", failed)):
        for test in tests:
            why = card.why[test]
            print(f"  {name}, {what}: {card.how[test]} ({cause(why)}) {test}\n    {why[:300]}")
    sys.stdout.flush()


def row(name: str, cpu: Outcomes, card: Outcomes) -> str:
    """Return the suite's row of the table."""
    run = {test for test, how in card.how.items() if how != "skipped"}
    passed = [test for test, how in cpu.how.items() if how == "passed" and test in run]
    different = list(differing(cpu, card))
    only = list(only_on_card(cpu, card))
    failed = [test for test in only if card.how[test] != "passed"]
    why = Counter(
        cause(card.why[test]) if card.how[test] == "failed" else card.how[test]
        for test in (*different, *failed)
    )
    causes = ", ".join(f"{count} {what}" for what, count in why.most_common())
    share = f"{len(passed) - len(different)}"
    if passed:
        share += f" ({100 * (1 - len(different) / len(passed)):.1f} %)"
    cells = (name, len(card.how), len(passed), share, len(only), len(only) - len(failed))
    return f"| {' | '.join(map(str, (*cells, card.leaks, causes)))} |"


if __name__ == "__main__":
    sys.exit(main())
