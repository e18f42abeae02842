"""Consolidation and routing on a real card; sorted to run before the tests that only measure."""

import json

import pytest

from pytest_gpumem.units import format_bytes

CONSOLIDATES = """
    import json, resource, time
    from pathlib import Path
    import torch
    from pytest_gpumem import get_gpu_consolidator

    @torch.no_grad()  # a graph would keep the weights
    def test_there_and_back():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(4096, 4096, dtype=torch.bfloat16) for _ in range(16)]
        model = torch.nn.Sequential(*layers).cuda()
        before = {name: value.cpu() for name, value in model.state_dict().items()}
        x = torch.ones(1, 4096, device="cuda", dtype=torch.bfloat16)
        y = model(x)
        consolidator = get_gpu_consolidator()
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.perf_counter()
        done = consolidator.consolidate_gpu_memory(
            [{"data": model, "type": "linear", "metadata": {}}])
        put = time.perf_counter() - begun
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss) * 1024
        begun = time.perf_counter()
        consolidator.restore(model)
        torch.cuda.synchronize()
        back = time.perf_counter() - begun
        same = all(torch.equal(value.cpu(), before[name])
                   for name, value in model.state_dict().items())
        Path("found.json").write_text(json.dumps({
            "refused": done.refused, "before": done.bytes_before, "ratio": done.ratio,
            "allocator": done.freed_allocator, "driver": done.freed_driver, "put": put,
            "back": back, "more": more, "same": same and torch.equal(model(x), y)}))
"""


def test_state_goes_to_the_archive_and_comes_back_bit_for_bit(run_suite, tmp_path, figure):
    run = run_suite(CONSOLIDATES, "--gpumem-archive", str(tmp_path / "store"))
    found = json.loads((tmp_path / "found.json").read_text())

    figure(
        f"{format_bytes(found['before'])} of weights to the archive",
        f"{found['ratio']:.1%} of the size, {found['put']:.2f} s with read-back, freed "
        f"{format_bytes(found['allocator'])} by the allocator and "
        f"{format_bytes(found['driver'])} by the driver; {format_bytes(found['more'])} more host "
        f"memory at most; back in {found['back']:.2f} s",
    )
    assert run.tests[0].outcome == "passed"
    assert not found["refused"]
    assert found["same"]
    assert found["allocator"] > 0.99 * found["before"]
    assert found["driver"] > 0.99 * found["before"]


def test_test_that_runs_out_goes_to_the_cpu(run_suite, figure, rehearsal):
    if rehearsal:
        pytest.skip("takes the size of the card from main memory")
    run = run_suite(
        """
        import torch

        def test_too_much(gpu_device):
            total = torch.cuda.get_device_properties(0).total_memory
            kept = []
            for _ in range(3):
                size = total // 2 if gpu_device == "cuda" else 2**20
                kept.append(torch.empty(size, dtype=torch.uint8, device=gpu_device))
            assert all(each.device.type == gpu_device for each in kept)

        def test_next(gpu_device):
            assert gpu_device == "cuda"
        """
    )

    steps = [(test.outcome, test.step) for test in run.tests]
    figure("the ladder after an OOM", str(steps))
    assert steps[-2:] == [("passed", "cpu"), ("passed", "")]


def test_large_tasks_leave_a_busy_card(run_suite, figure):
    run = run_suite(
        """
        import torch
        from pytest_gpumem import HybridResourceManager

        def test_tasks():
            manager = HybridResourceManager()
            assert manager.allocate_task("tensor", 300) == "cuda"
            total = torch.cuda.mem_get_info()[1]
            kept = torch.empty(int(total * 0.75), dtype=torch.uint8, device="cuda")
            assert manager.allocate_task("tensor", 300) == "cpu"
            assert manager.allocate_task("tensor", 100) == "cuda"
            more = torch.empty(int(total * 0.12), dtype=torch.uint8, device="cuda")
            assert manager.allocate_task("tensor", 10) == "cpu"
        """
    )

    figure("tasks on a card that fills up", ", ".join(each.reason for each in run.tests[0].routes))
    assert run.tests[0].outcome == "passed"
