"""The library of the compiled card: found, made, proven, or why not. No real compiler runs here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pytest_gpumem.simulator import Simulation
from pytest_gpumem.simulator.torch_face import compilation

MIB = 2**20


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Let ``CXX`` name a program that does as the test says; nothing is cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program = tmp_path / "compiler"
    monkeypatch.setenv("CXX", str(program))

    def behave(script):
        program.write_text(f"#!/bin/sh\necho call >> {tmp_path}/calls\n{script}\n")
        program.chmod(0o755)

    behave.calls = lambda: (tmp_path / "calls").read_text().count("call")
    return behave


def reason():
    with pytest.raises(compilation.CannotCompileError) as caught:
        compilation.library()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'card.cpp:1:2: fatal error: no such header' >&2; exit 1", "no such header"),
        ("exit 3", "the compiler says: status 3"),
        ("exit 0", "the compiler wrote nothing"),
        ('for last; do :; done; echo nonsense > "$last"', "it did not pass its proof"),
    ],
)
def test_why_there_is_none_is_said_and_kept(compiler, script, words):
    compiler(script)

    assert words in reason()
    assert words in reason()
    assert compiler.calls() == 1


def test_a_reason_is_kept_as_long_as_nothing_that_led_to_it_changes(
    compiler, tmp_path, monkeypatch
):
    compiler("exit 3")
    sources = tmp_path / "sources"
    (sources / "card").mkdir(parents=True)
    monkeypatch.setattr(compilation, "SOURCE", sources / "card")
    for changed in ("card/card.cpp", "proof.py", "proof.py"):
        (sources / changed).write_text("changed")
        reason()
    assert compiler.calls() == 2


def test_without_a_compiler_or_torchs_headers_nothing_is_made(compiler, monkeypatch, tmp_path):
    assert "there is no compiler for C++ here" in reason()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "c++, g++ or clang++" in reason()
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert reason() == f"{tmp_path / 'torch'} has no headers"


def test_a_cache_that_cannot_be_written_is_named(compiler, tmp_path):
    compiler("exit 0")
    (tmp_path / "cache").write_text("a file")

    said = reason()
    assert said.startswith(str(tmp_path / "cache" / "pytest-gpumem"))
    assert said.endswith(": Not a directory")


def test_a_library_for_another_torch_is_not_loaded(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    other = tmp_path / "0123456789abcdef" / "card.so"
    other.parent.mkdir()
    other.touch()
    simulation = Simulation.start([64 * MIB], MIB, library=other)
    script = (
        "from pytest_gpumem.simulator import Simulation;"
        f"it = Simulation.attach({simulation.path!r}); it.install(); import torch;"
        "print(torch.ones(1, device='cuda').device, it.notes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    simulation.close()
    assert done.stdout.startswith("cuda:0 ['the compiled card was made for another torch")


def test_all_processes_of_a_run_are_told_of_the_library(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    library = Path("/somewhere/card.so")
    started = Simulation.start([64 * MIB], MIB, library=library)
    joined = [Simulation.join("abc", [64 * MIB], MIB, library=library) for _ in range(2)]
    told = [started, Simulation.attach(started.path), *joined]
    assert [each.library for each in told] == [library] * 4
    assert "DLPack" not in started.not_simulated
    for each in told:
        each.close()
    assert list(tmp_path.iterdir()) == []
