"""What is told to have been alive, set against programs that know it."""

from __future__ import annotations

from collections import Counter

import alive_programs
from card_process import on_card

from pytest_gpumem.tracking.recordings import LOOKS
from pytest_gpumem.tracking.tracker import Tracker


@on_card
def test_each_line_has_what_it_had_alive_at_the_peak():
    alive_programs.check(range(3))


@on_card
def test_what_torch_uses_memory_for_is_seen_in_the_heap_and_in_its_frames():
    import torch

    tracker = Tracker()
    tracker.recordings.record_next("t.py::test_a")
    tracker.begin_test("t.py::test_a")
    model = torch.nn.Linear(64, 64, bias=False).cuda()
    # Its state is allocated by a line of its step that allocates other things as well.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batch = torch.ones(8, 64, device="cuda", requires_grad=True)
    saved = batch.exp()
    model(saved).sum().backward()
    optimizer.step()
    tracker.recordings.look()
    kept = torch.ones(1000, device="cuda")
    tracker.end_test()
    (told,) = tracker.recordings.end(felled=False)
    sizes = Counter()
    for group in told.groups:
        sizes[group.kind] += group.size
    weights = 64 * 64 * 4
    assert sizes["parameter"] == weights
    assert sizes["optimizer state"] == weights
    assert sizes["gradient"] >= weights + batch.nbytes
    assert sizes["other"] >= batch.nbytes
    assert sum(sizes.values()) == told.size
    del saved, kept


@on_card
def test_without_a_record_tensors_are_told_by_shape_and_owner():
    import torch

    tracker = Tracker()
    tracker.begin_test("t.py::test_before")
    gone = tracker.begin_fixture("index", "class")
    kept = torch.ones(2000, device="cuda")
    tracker.end_fixture(gone, None)
    leaked = torch.ones(1000, device="cuda")
    tracker.begin_teardown(gone)
    tracker.end_test()
    tracker.begin_test("t.py::test_a")
    fixture = tracker.begin_fixture("model", "module")
    model = torch.nn.Linear(64, 64, bias=False).cuda()
    tracker.end_fixture(fixture, model)
    mine = [torch.ones(10, 10, device="cuda") for _ in range(3)]
    address = torch.cuda.caching_allocator_alloc(5000)
    (told,) = tracker.recordings.left()
    torch.cuda.caching_allocator_delete(address)

    assert (told.moment, told.recorded) == ("failed", False)
    assert told.size == sum(group.size for group in told.groups)
    found = {(g.owner, g.kind, g.shape, g.allocations, g.size, g.where) for g in told.groups}
    assert found == {
        ("left by t.py::test_before", "other", (1000,), 1, 4000, ""),
        ("left by fixture 'index'", "other", (2000,), 1, 8000, ""),
        ("fixture 'model' (module)", "parameter", (64, 64), 1, 16384, ""),
        ("this test", "other", (10, 10), 3, 1200, ""),
        ("no Python tensor", "unknown", (), 0, 5000, ""),
    }
    del kept, leaked, mine

    # A pass over the heap at each of hundreds would cost the run minutes.
    looks = [bool(tracker.recordings.left()) for _ in range(LOOKS)]
    assert looks == [True] * (LOOKS - 1) + [False]
