import subprocess

import pytest

from pytest_gpumem.devices import driver_reading, find_cards
from pytest_gpumem.units import format_bytes


def test_peak_is_what_torch_says(usages, tmp_path, figure):
    usage = usages("""
        from pathlib import Path
        import torch

        def test_peak():
            kept = torch.ones(300, 1024, 1024, dtype=torch.uint8, device="cuda")
            (torch.ones(100, 1024, 1024, device="cuda") @ torch.ones(1024, 64, device="cuda"))
            Path("peak").write_text(str(torch.cuda.max_memory_allocated()))
        """)["test_peak"]

    torch_peak = int((tmp_path / "peak").read_text())
    figure("peak of a test", f"{usage.peak} B; torch.cuda.max_memory_allocated: {torch_peak} B")
    assert usage.peak == torch_peak


def test_peak_survives_a_test_that_resets_it(usages):
    usage = usages("""
        import torch

        def test_reset():
            torch.ones(64, 1024, 1024, dtype=torch.uint8, device="cuda")
            torch.cuda.reset_peak_memory_stats()
        """)["test_reset"]

    assert usage.peak == 64 * 2**20


def test_context_is_the_process_without_its_reserved_memory(usages, figure):
    usage = usages("""
        import torch

        def test_first_use():
            torch.ones(1, device="cuda")
        """)["test_first_use"]

    if usage.process is None:
        figure("context of one process", "the driver does not tell (process list hidden)")
        pytest.skip("the driver does not tell what a process holds")
    context = usage.process - usage.reserved
    figure("context of one process", format_bytes(context))
    assert context > 0


def test_leak_has_its_size_and_its_holder(usages, figure):
    usage = usages("""
        import torch

        HELD = []

        def test_leak():
            HELD.append(torch.ones(1000, 1000, device="cuda"))
        """)["test_leak"]

    (holder,) = usage.holders
    figure("leak of 4,000,000 B in a global", f"{usage.leaked} B, held by {holder.where}")
    assert usage.leaked == 4_000_256  # rounded up to 512 bytes
    assert "HELD" in holder.where


def test_library_workspace_is_no_leak(usages, figure):
    found = usages("""
        import torch

        def test_matmul():
            a = torch.ones(512, 512, device="cuda")
            (a @ a).sum().item()

        def test_conv():
            a = torch.ones(1, 3, 64, 64, device="cuda")
            torch.nn.Conv2d(3, 8, 3, device="cuda")(a).sum().item()
        """)

    matmul = found["test_matmul"]
    figure(
        "after a first matmul", f"{matmul.leftover} B left over, {matmul.leaked} B called a leak"
    )
    assert {name: usage.leaked for name, usage in found.items()} == dict.fromkeys(found, 0)


def test_failing_test_gives_its_tensors_back(usages, figure):
    found = usages("""
        import torch

        def test_fails():
            big = torch.ones(256, 1024, 1024, dtype=torch.uint8, device="cuda")
            try:
                raise KeyError("inner")
            except KeyError as error:
                raise ValueError("outer") from error

        def test_next():
            torch.ones(1, device="cuda")
        """)

    figure("failed test with 256 MiB", f"next test begins at {found['test_next'].baseline} B")
    assert found["test_fails"].leaked == 0
    assert found["test_next"].baseline == 0


def test_out_of_memory_is_recorded_and_the_card_is_usable_after(run_suite, figure):
    # Another program on the card would be a reason to try again.
    source = """
        import torch

        def test_too_large():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.empty(total, dtype=torch.uint8, device="cuda")

        def test_after():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.empty(total // 2, dtype=torch.uint8, device="cuda")
        """
    fails, recovers = run_suite(source, "--gpumem-oom=fail").tests

    figure("message of an out-of-memory error", fails.oom)
    assert (fails.outcome, recovers.outcome) == ("failed", "passed")
    assert "out of memory" in fails.oom
    assert fails.cards[0].ooms == 1


def test_workers_share_the_card(run_suite):
    pytest.importorskip("xdist")
    run = run_suite(
        """
        import pytest, torch

        @pytest.mark.parametrize("number", range(8))
        def test_small(number):
            torch.ones(1024, 1024, device="cuda")
        """,
        "-p",
        "xdist",
        "-n2",
    )

    assert {test.outcome for test in run.tests} == {"passed"}
    assert {usage.card for test in run.tests for usage in test.cards} == {run.cards[0].uuid}
    assert {usage.peak for test in run.tests for usage in test.cards} == {4 * 2**20}


def test_cards_are_those_that_nvidia_smi_names(figure, rehearsal):
    if rehearsal:
        pytest.skip("compares with nvidia-smi")
    query = [
        "nvidia-smi",
        "--query-gpu=uuid,memory.total,memory.used",
        "--format=csv,noheader,nounits",
    ]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    smi = {uuid: (int(total), int(used)) for uuid, total, used in (x.split(", ") for x in lines)}

    cards = find_cards().cards
    assert cards
    for card in cards:
        total, used = smi[card.uuid]
        reading = driver_reading(card)
        figure(
            f"used and total of {card.name}",
            f"{reading.used / 2**20:.0f} and {reading.total / 2**20:.0f} MiB; "
            f"nvidia-smi: {used} and {total} MiB",
        )
        assert reading.total // 2**20 == total
        assert abs(reading.used / 2**20 - used) < 64  # other processes come and go
