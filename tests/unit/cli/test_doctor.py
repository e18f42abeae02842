from __future__ import annotations

import sys

import pytest

from pytest_gpumem import devices
from pytest_gpumem.cli import doctor
from pytest_gpumem.cli import main as cli
from pytest_gpumem.devices import nvml
from pytest_gpumem.devices.nvml import DriverReading
from pytest_gpumem.records import Card

CARD = Card("GPU-1", "A card", 2**32)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Ask no real torch, which takes seconds, but whoever a test puts there."""
    for name in (*doctor._VISIBILITY, *doctor._ALLOCATOR):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPUMEM_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(doctor, "_TORCH", "print('2.0|13.0||True')")


def findings():
    return {finding.what: finding for finding in doctor.examine()}


def with_card(monkeypatch, used=0, **processes):
    monkeypatch.setattr(devices, "find_cards", lambda: devices.CardsFound((CARD,)))
    reading = DriverReading(used, CARD.total - used, CARD.total, 0)
    monkeypatch.setattr(devices, "driver_reading", lambda card: reading)
    monkeypatch.setattr(devices, "process_bytes", lambda card: {4711: used})


def test_a_machine_where_all_is_well_has_nothing_to_mend(monkeypatch, capsys):
    with_card(monkeypatch)

    assert cli.main(["doctor", "--strict"]) == 0
    told = capsys.readouterr().out
    assert "A card (GPU-1), 4.00 GiB, 4.00 GiB free" in told
    assert "CUDA 13.0, CUDA usable: true" in told
    assert told.endswith("\nnothing to fix\n")


NO_CARD = [
    # why, CUDA_VISIBLE_DEVICES, how to mend it, and how many things are to be mended
    (nvml._no_library(), None, "--gpumem-simulate 4GiB", "nothing"),
    (nvml._no_library(), "0", "--gpumem-simulate 4GiB", "1"),
    ("the NVIDIA driver answers, but there is no card", None, "nvidia-smi shows", "1"),
    ("the NVML binding nvidia-ml-py is missing: no", None, "pip install nvidia-ml-py", "1"),
    ("CUDA_VISIBLE_DEVICES='7' leaves none", "7", "unset CUDA_VISIBLE_DEVICES", "1"),
]


def test_a_narrow_terminal_shows_what_was_found_in_a_column(monkeypatch, capsys):
    with_card(monkeypatch)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("card "))
    assert lines[at : at + 2] == [
        "card          A card (GPU-1), 4.00 GiB,",
        " " * 14 + "4.00 GiB free",
    ]


@pytest.mark.parametrize("row", NO_CARD)
def test_no_card_is_wrong_where_there_should_be_one(monkeypatch, capsys, row):
    why, visible, mend, number = row
    monkeypatch.setattr(devices, "find_cards", lambda: devices.CardsFound((), why))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert f"card          none: {why}\n{'':<13} -> {mend}" in told
    assert told.endswith(f"\n{number} to fix\n")
    assert cli.main(["doctor", "--strict"]) == 1
    assert capsys.readouterr().out.endswith("\n1 to fix\n")


@pytest.mark.parametrize("name", ["torch", "pytest-xdist"])
def test_a_package_that_not_every_suite_needs_is_wrong_with_strict_alone(monkeypatch, capsys, name):
    with_card(monkeypatch)
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda each: "" if each == name else version(each))

    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert f"pip install {name}\n" in told
    assert told.endswith("\nnothing to fix\n")
    assert cli.main(["doctor", "--strict"]) == 1


def test_a_full_card_is_told_with_who_fills_it(monkeypatch):
    with_card(monkeypatch, used=2**32 - 2**20)

    assert findings()["card"].mend.startswith("almost full; processes on it: 4711 (4.00 GiB")


def test_a_build_of_torch_that_cannot_use_the_card_is_told(monkeypatch, capsys):
    with_card(monkeypatch)
    monkeypatch.setattr(doctor, "_TORCH", "print('2.0|||False')")

    assert "this build of torch cannot use the card" in findings()["torch"].mend
    assert cli.main(["doctor"]) == 0
    assert cli.main(["doctor", "--strict"]) == 1


def test_a_torch_that_cannot_be_imported_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "_TORCH", "raise ImportError('libcudart is missing')")

    assert "cannot be imported: ImportError: libcudart is missing" in findings()["torch"].said


@pytest.mark.parametrize(
    ("name", "value", "mend"),
    [
        ("CUDA_VISIBLE_DEVICES", "", "it hides every card"),
        ("CUDA_VISIBLE_DEVICES", "0", ""),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments=True", "is not a setting"),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:64", ""),
        ("PYTORCH_CUDA_ALLOC_CONF", "roundup_power2_divisions:[256:1,512:2,>:8]", ""),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1", "no peaks are told"),
    ],
)
def test_variables_are_judged(monkeypatch, name, value, mend):
    monkeypatch.setenv(name, value)

    (found,) = [each for each in doctor.examine() if each.said.startswith(f"{name}=")]
    assert mend in found.mend
    assert bool(mend) == bool(found.mend)


def test_a_directory_of_leases_that_is_no_path_is_told(monkeypatch):
    monkeypatch.setenv("GPUMEM_RUN_DIR", "here")

    assert findings()["leases"].mend == "set GPUMEM_RUN_DIR to an absolute path, or unset it"
