"""Starting, attaching and closing a simulation; installing it before and after torch."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_gpumem.simulator import Simulation

MIB = 2**20


def run(script):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


@pytest.fixture
def simulation(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    simulation = Simulation.start([1024 * MIB], 100 * MIB)
    yield simulation
    simulation.close()


def test_the_card_lies_in_a_directory_only_for_this_user(simulation, tmp_path):
    directory = Path(simulation.path).parent
    assert directory.parent == tmp_path
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_closing_removes_the_directory_and_attached_ones_do_not(simulation):
    Simulation.attach(simulation.path).close()
    assert Path(simulation.path).exists()
    simulation.close()
    assert not Path(simulation.path).parent.exists()


def test_sizes_that_make_no_sense_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="context"):
        Simulation.start([100], 200)
    assert list(tmp_path.iterdir()) == []


def test_without_a_runtime_directory_the_systems_own_serves(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    simulation = Simulation.start([100], 20)
    simulation.close()
    assert simulation.cards[0].total == 100


def test_attaching_to_nothing_says_so(tmp_path):
    with pytest.raises(ValueError, match="there is no simulated card"):
        Simulation.attach(str(tmp_path / "card"))


def test_what_is_not_simulated_is_one_line(simulation):
    assert simulation.not_simulated.startswith("not simulated: ")
    assert "\n" not in simulation.not_simulated


ATTACH = "from pytest_gpumem.simulator import Simulation; simulation = Simulation.attach({!r});"


def test_installing_imports_neither_torch_nor_pynvml(simulation):
    script = ATTACH.format(simulation.path) + (
        "import sys; simulation.install();"
        "print([name for name in ('torch', 'pynvml') if name in sys.modules])"
    )
    assert run(script) == ["[]"]


@pytest.mark.parametrize(
    "order", ["import torch; simulation.install()", "simulation.install(); import torch"]
)
def test_torch_may_be_imported_before_or_after(simulation, order):
    script = ATTACH.format(simulation.path) + (
        f"{order}; kept = torch.ones(262144, device='cuda'); print(kept.device);"
        "torch.set_default_device('cuda'); print(torch.cuda.memory_allocated())"
    )
    # Also: nothing is said and nothing crashes at exit with a tensor and modes alive.
    assert run(script) == ["cuda:0", str(MIB)]


def test_torch_and_nvml_tell_the_same(simulation):
    script = ATTACH.format(simulation.path) + (
        "simulation.install(); import torch, pynvml, os; kept = torch.ones(MIB, device='cuda');"
        "pynvml.nvmlInit(); handle = pynvml.nvmlDeviceGetHandleByIndex(0);"
        "free, total = torch.cuda.mem_get_info(); memory = pynvml.nvmlDeviceGetMemoryInfo(handle);"
        "print(memory.free == free, memory.total == total,"
        "pynvml.nvmlDeviceGetUUID(handle).endswith(torch.cuda.get_device_properties().uuid))"
    ).replace("MIB", str(MIB))
    assert run(script) == ["True", "True", "True"]


def test_torchscript_still_compiles_and_runs(simulation):
    script = ATTACH.format(simulation.path) + (
        "simulation.install(); import torch, warnings; warnings.simplefilter('ignore');"
        "m = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()));"
        "print(m.cuda()(torch.ones(1, 2, device='cuda')).is_cuda)"
    )
    assert run(script) == ["True"]


def test_processes_without_a_common_parent_join_one_card_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    first = Simulation.join("abc", [2**30], 2**20)
    second = Simulation.join("abc", [2**30], 2**20)

    assert first.cards[0].uuid == second.cards[0].uuid
    assert [each.name for each in tmp_path.iterdir()] == ["gpumem-abc"]
    first.close()
    assert list(tmp_path.iterdir()) == []
