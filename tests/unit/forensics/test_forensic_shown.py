"""Lines that a person shows, names of exceptions, and processes that no number tells apart."""

from __future__ import annotations

import pytest

from pytest_gpumem.forensics import analysis, lines
from pytest_gpumem.forensics.causes import HOST
from pytest_gpumem.forensics.sequence import Follower


def events(text):
    return analysis.findings([("log", Follower().follow(lines.scan([text.encode()])))]).events


# A person shows a program's line: as a page's heading, or to the end of a sentence of his own.
SHOWN = [
    ("# panic: mmap: cannot allocate memory", "host", None),
    (
        "# Resource exhausted: OOM when allocating tensor with shape[8,8] and type float",
        "card",
        256,
    ),
    ("# octreeAlloc failed: out of memory on GPU 0", "card", None),
    ("# [E:engine:Default, context.cc:120] device error(2): Out of memory", "card", None),
    ("# CUDA error in func 'grow' at line 245 : out of memory.", "card", None),
    ("I keep getting this error : RuntimeError: CUDA out of memory.", "card", None),
    ("\u6211\u5f97\u5230 error\uff1aRuntimeError: CUDA out of memory.", "card", None),
]
SUPPOSED = [
    "# Error handling when out of memory",
    "# Out of memory when the grid grows",
    "If it says this error : RuntimeError: CUDA out of memory.",
    "How to fix the error: RuntimeError: CUDA out of memory.",
]


@pytest.mark.parametrize(("line", "memory", "tried"), SHOWN)
def test_a_line_that_a_person_shows_is_a_program_s(line, memory, tried):
    (event,) = events(f"{line}\n\nIt began with the new release.\n")

    assert ("host" if event.backend in HOST else "card", event.tried_bytes) == (memory, tried)


@pytest.mark.parametrize("line", SUPPOSED)
def test_a_line_that_supposes_an_error_is_none(line):
    assert events(f"{line}\n\nIt began with the new release.\n") == ()


@pytest.mark.parametrize(
    ("line", "memory"),
    [
        ("engine.GpuOOMError: could not grow the pool", "card"),
        ("ray.exceptions.RayTaskError(OutOfMemoryError): ray::main_task() (pid=5)", "card"),
        ("mylib::HostOutOfMemoryException: the tile did not fit", "host"),
        ("MemoryError: the table did not fit", "host"),
        ("Lost task 8.0 in stage 2.0: com.nvidia.jni.GpuRetryOOM: task should retry", "card"),
    ],
)
def test_the_name_of_an_exception_says_it_whatever_follows(line, memory):
    (event,) = events(f"start\n{line}\nstop\n")

    assert ("host" if event.backend in HOST else "card") == memory


@pytest.mark.parametrize(
    "line",
    [
        "class GpuOOMError: pass",
        "raise_for(GpuOOMError: type)",
        "Catches GpuOOMError: see the manual",
        "IntMemoryErrors: 4",
        "SE_ERR_OOM: int",
        "HTZOOM: Final = HTMAXBUTTON",
        "    MemoryError: If the table does not fit.",
        "DNS_ERROR_NO_MEMORY: Final = ERROR_OUTOFMEMORY",
        "  ALLOCATION_FAILED // buffer allocation failed",
        "Failed to allocate X GiB on the GPU: RuntimeError: CUDA out of memory. Tried X GiB",
        "REGEX=RuntimeError: CUDA out of memory\\. Tried to allocate \\d+ GiB",
        'The text "RuntimeError: CUDA out of memory." was printed in the logs.',
        '"Error messages beginning cannot allocate vector of size say that memory is short."',
        "slurmstepd: error: Exceeded step memory limit at some point.",
    ],
)
def test_a_name_in_code_a_pattern_and_a_figure_left_open_are_none(line):
    assert events(f"start\n{line}\nstop\n") == ()


def test_what_a_card_refuses_after_it_broke_is_no_want_of_memory():
    refused = "[Error] Unable to allocate memory of size 12 for positionsDev"

    assert len(events(f"{refused}\n")) == 1
    assert events(f"CUDA error: an illegal memory access was encountered\n{refused}\n") == ()


def test_two_processes_that_are_killed_without_a_number_are_two_events():
    kernel = "[{}.2] {} invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0"
    first, second = kernel.format(10, "node"), kernel.format(99, "redis")

    assert len(events(f"{first}\n{second}\n")) == 2
    assert len(events(f"{first}\n{first}\n")) == 1
    killed = "{}: internal compiler error: Killed (program cc1plus)"
    assert len(events(f"{killed.format('g++')}\n{killed.format('g++-5')}\n")) == 2


def test_slurm_tells_of_a_killed_step_in_two_lines():
    text = (
        "slurmstepd-n1: error: Step 11.0 exceeded memory limit (529 > 209), being killed\n"
        "srun: Exceeded job memory limit\n"
    )
    (event,) = events(text)

    assert event.backend == "host"


def test_sizes_as_exact_as_a_program_s_make_its_line_one():
    text = "device 0 has insufficient GPU memory. 2096168 bytes found < 2659188 bytes required"

    assert len(events(f"{text}\n")) == 1
    assert events("the device has insufficient GPU memory. I have 4 GB of 8 GB\n") == ()


def test_a_size_on_the_next_line_is_the_one_asked_for():
    text = (
        "PHP Fatal error:  Allowed memory size of 209715200 bytes exhausted (tried\n"
        "to allocate 8388608 bytes) in Logger.php on line 253\n"
    )
    (event,) = events(text)

    assert event.tried_bytes == 8388608


def test_a_line_that_says_who_speaks_goes_on_with_no_sentence():
    text = (
        "info:  Engine read zero valid state cache entries\n"
        "err:   TileAllocator: Memory allocation failed\n"
    )

    assert len(events(text)) == 1


def test_lines_that_a_diff_adds_are_none_without_its_head():
    lines = ["The message will appear:", "", "```", "worker exited with code 137", "```", "Then"]

    assert events("\n".join(f"+{line}" for line in lines)) == ()
    assert len(events("worker exited with code 137\n")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Look into the log of the kernel. It looks like this:\n\n{}\nCall Trace:\n",
        "The output will look like the following:\n```\n{}\n",
        "In the log of a node that usually appears as:\n\n{}\n\nThen act.\n",
        "{}\n\nWhat this error means\nThe kernel chose a process.\n",
        "{}\n\n## Why this happens\nThe kernel chose a process.\n",
    ],
)
def test_what_a_manual_shows_or_explains_is_none(text):
    line = "[12.5] java invoked oom-killer: gfp_mask=0xd0, order=0"

    assert events(text.format(line)) == ()
    assert len(events(f"My log looks like this:\n\n{line}\n")) == 1


@pytest.mark.parametrize(
    ("line", "memory", "tried"),
    [
        ("FrameError: b'GDF_MEMORYMANAGER_ERROR'", "card", None),
        ("RuntimeError: Not enough memory. Need: 1.5GB free, Have:0.1GB free", "host", 3 << 29),
        ("Instance::Image(): Failed to allocate memory (1.5 Gio) for the image", "host", 3 << 29),
        ("it's unlikely to have enough memory. Requires 34.7G, has 14.4G available.", "card", None),
    ],
)
def test_a_need_and_a_code_say_it(line, memory, tried):
    (event,) = events(f"{line}\n")

    assert ("host" if event.backend in HOST else "card", event.tried_bytes) == (memory, tried)
