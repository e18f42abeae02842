"""Where tests run: the device they are told, and what is tried after running out of memory."""

from __future__ import annotations

import pytest

SUITE = """
@pytest.mark.gpu(fallback="cpu")
def test_big(gpu_device):
    assert torch.zeros(5 * 2**30, dtype=torch.uint8, device=gpu_device if gpu_device == "cuda"
                       else "meta").numel() == 5 * 2**30
"""


@pytest.mark.parametrize(("answer", "outcome"), [("fail", "failed"), ("cpu", "passed")])
def test_a_test_that_ran_out_of_memory_takes_the_cpu_if_it_may(run, answer, outcome):
    done = run(SUITE, f"--gpumem-oom={answer}")
    last = done.record.tests[-1]
    assert last.outcome == outcome
    assert last.step == ("cpu" if answer == "cpu" else "")


def test_a_test_that_asked_for_more_than_the_card_has_is_not_tried_alone_there(run):
    suite = SUITE.replace("gpu(", 'gpu(vram="1GiB", ')
    done = run(suite, "-p", "xdist", "-n2")
    attempts = [(test.outcome, test.step) for test in done.record.tests]
    assert attempts == [("rerun", ""), ("passed", "cpu")]
