"""``gpumem doctor``: what pytest would find here, what is wrong with it and how to mend it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem import devices
from pytest_gpumem.reports.fold import columns, fold
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

_VISIBILITY = (
    "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER",
    "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK",
)  # fmt: skip
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF",
              "PYTORCH_NO_CUDA_MEMORY_CACHING", "CUDA_LAUNCH_BLOCKING")  # fmt: skip
_HIDING = {"", "-1"}
"""Values of ``CUDA_VISIBLE_DEVICES`` that name no card."""
_SIMULATED = "--gpumem-simulate 4GiB gives a suite a simulated card"
_TORCH = """
import torch
version = torch.version
print(torch.__version__, version.cuda or "", getattr(version, "hip", "") or "",
      torch.cuda.is_available(), sep="|")
"""


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    said: str
    mend: str = ""
    """What to do about it; empty where nothing is wrong."""
    optional: bool = False
    """Whether many machines do without, which is wrong only where it is said to be needed."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Enter ``gpumem doctor``."""
    parser = commands.add_parser(
        "doctor",
        help="Say what pytest would find here, what is wrong and how to fix it.",
        epilog="Exit status: 0, also where something is wrong; 1 with --strict then.",
    )
    parser.add_argument(
        "--strict", action="store_true",
        help="End with 1 where something is wrong, or a card, torch or pytest-xdist is missing.",
    )  # fmt: skip
    parser.set_defaults(run_command=_doctor)


def _doctor(chosen: argparse.Namespace) -> int:
    wrong = 0
    for finding in examine():
        _show(f"{finding.what:<13} {finding.said}")
        if finding.mend:
            wrong += chosen.strict or not finding.optional
            _show(f"{'':<13} -> {finding.mend}")
    sys.stdout.write(f"\n{wrong} to fix\n" if wrong else "\nnothing to fix\n")
    return 1 if wrong and chosen.strict else 0


def _show(line: str) -> None:
    sys.stdout.writelines(f"{part}\n" for part in fold(line, columns(), 14))


def examine() -> Iterator[Finding]:
    """Return what there is; nothing is changed, and no CUDA context is created here."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for name in ("pytest-gpumem", "pytest", "nvidia-ml-py"):
        yield Finding(name, _version(name) or "not installed")
    yield _xdist()
    found = devices.find_cards()
    yield from _cards(found)
    yield from _torch(bool(found.cards))
    yield from _variables()
    yield from _leases()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _xdist() -> Finding:
    version = _version("pytest-xdist")
    if not version:
        mend = "for tests on several workers: pip install pytest-xdist"
        return Finding("pytest-xdist", "not installed: tests run one by one", mend, optional=True)
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (3, 7):
        return Finding("pytest-xdist", version, "too old: pip install 'pytest-xdist>=3.7'")
    return Finding("pytest-xdist", version)


def _cards(found: devices.CardsFound) -> Iterator[Finding]:
    if not found.cards:
        text = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        mend, without_driver = _SIMULATED, "no NVIDIA driver library" in found.why_none
        if "CUDA_VISIBLE_DEVICES" in found.why_none:
            mend = "unset CUDA_VISIBLE_DEVICES, or name a card that is there"
        elif "nvidia-ml-py" in found.why_none:
            mend = "pip install nvidia-ml-py"
        elif not without_driver:
            mend = f"nvidia-smi shows whether the driver works; {_SIMULATED}"
        asked = text.strip() not in _HIDING
        yield Finding("card", f"none: {found.why_none}", mend, without_driver and not asked)
    for card in found.cards:
        reading = devices.driver_reading(card)
        free = f", {format_bytes(reading.free)} free" if reading else ", the driver tells no use"
        told = f"{card.name} ({card.uuid}), {format_bytes(card.total)}{free}"
        users = {pid: size for pid, size in devices.process_bytes(card).items() if size}
        if reading and reading.free < card.total // 10 and users:
            names = ", ".join(f"{pid} ({format_bytes(size or 0)})" for pid, size in users.items())
            yield Finding("card", told, f"almost full; processes on it: {names}")
        else:
            yield Finding("card", told)
    if found.note:
        yield Finding("note", found.note, "export CUDA_DEVICE_ORDER=PCI_BUS_ID")


def _torch(card: bool) -> Iterator[Finding]:
    """Ask torch in a process of its own: importing it takes seconds, and it may end its process."""
    version = _version("torch")
    if not version:
        mend = "for tests that use it: pip install torch"
        yield Finding("torch", "not installed", mend, optional=True)
        return
    try:
        done = subprocess.run(  # noqa: S603  # our own few lines
            [sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding("torch", f"{version}, which did not answer: {type(error).__name__}",
                      "python -c 'import torch' shows why")  # fmt: skip
        return
    told = done.stdout.strip().rpartition("\n")[2].split("|")
    if done.returncode or len(told) != 4:
        last = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        yield Finding("torch", f"{version}, which cannot be imported: {last}", "install it anew")
        return
    _, cuda, hip, available = told
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU only"
    mend = ""
    if card and build == "CPU only":
        mend = "this build of torch cannot use the card; https://pytorch.org/get-started names one"
    elif card and available != "True":
        mend = "torch does not see the card that the driver has: nvidia-smi shows the driver's CUDA"
    yield Finding("torch", f"{version}, {build}, CUDA usable: {available.lower()}", mend)


def _variables() -> Iterator[Finding]:
    for name in (*_VISIBILITY, *_ALLOCATOR):
        value = os.environ.get(name)
        if value is not None:
            yield Finding("variable", f"{name}={value}", _why_bad(name, value))
    for name in sorted(name for name in os.environ if name.startswith("GPUMEM")):
        yield Finding("variable", f"{name}={os.environ[name]}")


def _why_bad(name: str, value: str) -> str:
    if name == "PYTORCH_NO_CUDA_MEMORY_CACHING":
        return "without torch's cache allocator no peaks are told: unset it"
    if name == "CUDA_LAUNCH_BLOCKING" and value == "1":
        return "every kernel is waited for, so tests are slower: unset it when done debugging"
    if name == "CUDA_VISIBLE_DEVICES" and value.strip() in _HIDING:
        return "it hides every card: unset it, or name one"
    if name in _ALLOCATOR[:3]:
        for part in filter(None, value.split(",")):
            if ":" not in part and "[" not in part and "]" not in part:
                return f"{part!r} is not a setting; allowed are NAME:VALUE, separated by commas"
    return ""


def _leases() -> Iterator[Finding]:
    from pytest_gpumem.errors import LeaseError
    from pytest_gpumem.leases.entries import HELD
    from pytest_gpumem.leases.ledger import Ledger
    from pytest_gpumem.leases.place import run_directory

    try:
        directory = run_directory()
    except LeaseError as error:
        yield Finding("leases", str(error), "set GPUMEM_RUN_DIR to an absolute path, or unset it")
        return
    if not directory.exists():
        parent = next(each for each in directory.parents if each.exists())
        mend = "" if os.access(parent, os.W_OK) else (
            f"{parent} is not writable; GPUMEM_RUN_DIR can name another directory"
        )  # fmt: skip
        yield Finding("leases", f"{directory}, which the first run makes", mend)
        return
    try:
        page = Ledger(directory).page()
    except OSError as error:
        mend = "GPUMEM_RUN_DIR can name another directory on this machine"
        yield Finding("leases", f"{directory} cannot be read: {error.strerror}", mend)
        return
    held = sum(entry.state == HELD for entry in page.entries)
    yield Finding("leases", f"{directory}: {held} held, {len(page.waiting)} waiting")
