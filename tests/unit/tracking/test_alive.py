"""What was alive, from events and blocks: the moment, its lines, its kinds."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.tracking import alive
from pytest_gpumem.tracking.alive import Block, Turn, grouped, kind_of, line_of, replay
from pytest_gpumem.tracking.recorder import file_name

ROOT = Path("/home/me/project")
TORCH = "/venv/lib/python3.11/site-packages/torch"


def event(action, address, size, time, frames=None):
    told = {"action": action, "addr": address, "size": size, "time_us": time}
    return told if frames is None else told | {"frames": frames}


def played(seed, steps):
    """Return events, what lives at the end, turns, and by a ledger what lived at the peak."""
    chance = random.Random(seed)  # noqa: S311  # no secret
    living, trace, turns, time, owner = {}, [], [], 1000, alive.THIS_TEST
    most, at_peak, refused = -1, {}, None

    def look():
        nonlocal most, at_peak
        size = sum(size for size, _ in living.values())
        if owner == alive.THIS_TEST and size > most:
            most, at_peak = size, dict(living)

    def allocate(born):
        address = chance.choice([each for each in range(60) if each not in living])
        living[address] = chance.randrange(1, 99), born
        return address

    for _ in range(chance.randrange(5)):
        allocate(0)
    turns.append(Turn(time, owner))
    look()
    for _ in range(steps):
        time += chance.randrange(1, 4)
        if chance.random() < 0.55 and len(living) < 50:
            address = allocate(time)
            trace.append(event("alloc", address, living[address][0], time))
            look()
        elif living and chance.random() < 0.8:
            address = chance.choice(list(living))
            size, _ = living.pop(address)
            trace.append(event("free_requested", address, size, time))
            trace.append(event("free_completed", address, size, time))
        elif chance.random() < 0.5:
            owner = chance.choice([alive.THIS_TEST, "fixture 'model' (module)"])
            turns.append(Turn(time, owner))
            look()
        else:
            trace.append({"action": "oom", "device_free": 0, "size": 5, "time_us": time})
            refused = dict(living)
    blocks = [{"address": at, "requested_size": size} for at, (size, _) in living.items()]
    return trace, [each | {"size": 512} for each in blocks], turns, at_peak, refused


def as_told(moment):
    return {block.address: (block.size, block.born) for block in moment.blocks}


@given(st.integers(0, 2**32), st.integers(0, 120))
def test_the_moment_is_the_one_that_a_ledger_knows(seed, steps):
    trace, living, turns, at_peak, refused = played(seed, steps)

    assert as_told(replay(trace, living, turns)) == at_peak
    felled = replay(trace, living, turns, felled=True)
    assert as_told(felled) == (at_peak if refused is None else refused)
    assert (felled.refused is None) == (refused is None)
    # Of a record whose beginning is lost: the peak of what is left, none of it unknown.
    cut = trace[len(trace) // 2 :]
    assert replay(cut, living).size == max(replay(cut[:n], back(cut[n:], living)).size
                                           for n in range(len(cut) + 1))  # fmt: skip


def back(trace, living):
    """Return the blocks that lived before ``trace``, one event at a time."""
    found = {each["address"]: each["requested_size"] for each in living}
    for each in reversed(trace):
        if each["action"] == "alloc":
            del found[each["addr"]]
        elif each["action"] == "free_completed":
            found[each["addr"]] = each["size"]
    return [{"address": at, "size": 512, "requested_size": size} for at, size in found.items()]


def test_a_block_waits_for_another_stream_until_its_memory_may_be_used_again():
    trace = [event("alloc", 1, 10, 1), event("free_requested", 1, 10, 2), event("alloc", 2, 5, 3)]
    trace += [event("free_completed", 1, 10, 4), event("alloc", 3, 1, 5)]
    moment = replay(
        trace, [{"address": 2, "size": 5}, {"address": 3, "size": 512, "requested_size": 1}]
    )
    assert as_told(moment) == {1: (10, 1), 2: (5, 3)}
    assert {block.address: block.died for block in moment.blocks} == {1: 4, 2: sys.maxsize}


def frame(path, line=1, name="f"):
    return {"filename": path, "line": line, "name": name}


@pytest.fixture
def torch_at(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__file__=f"{TORCH}/__init__.py"))
    alive._package.cache_clear()
    yield
    alive._package.cache_clear()


@pytest.mark.parametrize(
    ("paths", "line"),
    [
        ([f"{TORCH}/nn/modules/linear.py", "/home/me/project/src/index.py"], "src/index.py:1 f"),
        (["/home/me/other/util.py", "/home/me/project/test_a.py"], "/home/me/other/util.py:1 f"),
        (["/venv/lib/python3.11/site-packages/peft/x.py", f"{TORCH}/y.py"], "in peft"),
        ([f"{TORCH}/autograd/graph.py", "/venv/lib/site-packages/peft/x.py"], "in torch"),
        (["/usr/lib/python3/dist-packages/six.py"], "in six"),
        (["<eval_with_key>.12", f"{TORCH}/fx/graph.py"], "in <eval_with_key>.12"),
        ([alive._LIBRARY + "threading.py"], "in Python's library"),
        ([alive._OURS + "plugin/measure.py", "/home/me/project/t.py"], "t.py:1 f"),
        (["/home/me/project/.venv/lib/python3.11/site-packages/a/b.py"], "in a"),
        ([], alive.NO_FRAME),
    ],
)
def test_a_line_is_the_innermost_of_the_users_own(torch_at, paths, line):
    assert line_of([frame(path) for path in paths], ROOT) == line


def test_a_project_may_lie_where_packages_are_installed(torch_at):
    root = Path("/opt/site-packages/mine")
    assert line_of([frame("/opt/site-packages/mine/test_a.py", 7, "g")], root) == "test_a.py:7 g"


@pytest.mark.parametrize(
    ("frames", "kind"),
    [
        ([("nn/modules/module.py", "convert"), ("nn/modules/module.py", "_apply")], "parameter"),
        ([("nn/modules/linear.py", "__init__")], "parameter"),
        ([("nn/parameter.py", "materialize"), ("nn/modules/module.py", "_call_impl")], "parameter"),
        ([("nn/functional.py", "linear"), ("nn/modules/module.py", "_call_impl")], "activation"),
        ([("autograd/graph.py", "_engine_run_backward"), ("_tensor.py", "backward")], "gradient"),
        ([("nn/modules/module.py", "_call_impl"), ("_tensor.py", "backward")], "activation"),
        ([("optim/adam.py", "_init_group"), ("optim/adam.py", "step")], "optimizer state"),
        ([("optim/adam.py", "_multi_tensor_adam"), ("optim/adam.py", "step")], "unknown"),
        ([("functional.py", "einsum")], "unknown"),
        ([], "unknown"),
    ],
)
def test_a_kind_is_told_by_the_innermost_frame_that_decides(torch_at, frames, kind):
    assert kind_of([frame(f"{TORCH}/{path}", 1, name) for path, name in frames]) == kind


def test_groups_sum_to_everything_however_many_lines_there_are(torch_at):
    mine = [frame("/home/me/project/t.py", n, "f") for n in range(300)]
    blocks = [Block(n, n + 1, [each], born=1) for n, each in enumerate(mine)]
    blocks += [Block(900, 7, ()), Block(901, 9, (), born=1)]
    told = grouped(blocks, lambda _: "this test", lambda block: "other" * (block.size > 5), ROOT)

    assert sum(group.size for group in told) == sum(block.size for block in blocks)
    assert sum(group.allocations for group in told) == len(blocks)
    assert len(told) == alive.MOST_GROUPS + 1
    assert told[0] == (300, "this test", "other", "t.py:299 f", 1, (), "")
    assert told[-1].owner == "202 smaller entries"
    several = grouped(blocks[-2:], lambda _: "this test", lambda _: "", ROOT)
    assert [(group.where, group.size) for group in several] == [(alive.NO_FRAME, 9), ("", 7)]


@pytest.mark.parametrize(
    "nodeid",
    ["a.py::test_x", "a.py::test x", "a.py::test/x", "a.py::test_x[" + "ü" * 300 + "]", ""],
)
def test_files_of_snapshots_have_names_of_their_own(nodeid):
    name = file_name(nodeid)
    assert "/" not in name
    assert len(name.encode()) < 255
    assert name != file_name(f"{nodeid}2")
