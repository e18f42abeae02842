"""Words that no grammar has: in which orders they count, whose memory they mean, and where not."""

from __future__ import annotations

import csv
import itertools
import time
from pathlib import Path

import pytest

from pytest_gpumem.forensics import analysis, grammars, lines, messages
from pytest_gpumem.forensics.causes import HOST
from pytest_gpumem.forensics.sequence import Follower
from pytest_gpumem.forensics.vocabulary import classify

THREADS = Path(__file__).parent / "threads"


def events(text):
    return analysis.findings([("log", Follower().follow(lines.scan([text.encode()])))]).events


LACKING = [
    f"{lack} {whose}memory"
    for lack, whose in itertools.product(
        ("Insufficient", "not enough", "Too little", "out of"), ("", "GPU ", "free device ")
    )
]
REFUSED = [
    f"{refused} {verb} {what}"
    for refused, verb, what in itertools.product(
        ("Failed to", "unable to", "Could not", "cannot"),
        ("allocate", "re-allocate"),
        ("memory for the pool", "a buffer of 4096 bytes", "the texture"),
    )
]
FAILED = [
    f"{what} {failed}"
    for what, failed in itertools.product(
        ("Memory allocation", "arenaMalloc(&ptr, 512)", "alloc_gmem", "Allocation of 64 bytes"),
        ("failed", "FAILED with code 3", "failure"),
    )
]
EXCESS = [
    "tile requires more memory than is available",
    "Requested workspace exceeds the device memory limit",
    "job needs more GPU memory than the card has",
]
OTHERS = ["GPU memory full", "CUDA memory allocation error", "OOM on GPU 0 while loading"]
SAID = [*LACKING, *REFUSED, *FAILED, *EXCESS, *OTHERS]
HEADS = ["{}", "ERROR: {}", "[engine] {}!", "worker 3: {}.", "RuntimeError: {} (code 7)"]


@pytest.mark.parametrize("head", HEADS)
def test_words_in_any_order_count_where_a_program_states_them(head):
    lost = [text for text in SAID if len(events(f"start\n{head.format(text)}\nstop\n")) != 1]

    assert lost == []


CODE = [
    'printf("{}\\n");',
    '    throw Failure("{}")',
    '        "{}",',
    "# {}",
    "/* {} */",
    " * {}",
    '    log.error("{} of %d", n)',
    "assert '{}' in out",
    "raise Refused(f'{} for {{name}}')",
    "    size = 4;  % {}",
    "grow(pool, 2); // {}",
    '    [Row("{}")]',
    '    "{}";',
]
PROSE = [
    "If the tool says {}, lower the batch size.",
    "- You may see that the second run has {}",
    "This happens when {}",
    "to avoid {} set the limit",
    "### {}",
    "The note says that a {} is no bug here",
    "In the older release we saw that the {}",
    "- The card loops, {}, or stops",
]


@pytest.mark.parametrize("around", [*CODE, *PROSE])
def test_the_same_words_in_code_and_in_prose_are_none(around):
    plain = [text for text in SAID if "512)" not in text]
    told = [text for text in plain if events(f"start\n{around.format(text)}\nstop\n")]

    assert told == []


@pytest.mark.parametrize(
    "text",
    [
        "ImportError: libgomp.so.1: cannot allocate memory in static TLS block",
        "Error: maximum shared memory exceeded",
        "bind: failed to allocate port 8080",
        "Failed to allocate a file descriptor for the log buffer",
        "error: not enough disk space; memory is fine",
        "CUDA driver version is insufficient for CUDA runtime version",
        "Buffer pool: out of memory pages",
        "Killed processes: 0, out of memory: 0",
        "Failed to allocate GPU memory, falling back to the CPU",
        "Unable to allocate a device buffer, use unified memory instead",
        "memory: 0, processing: 1",
        "0 allocations failed",
        "tests/test_x.py::test_failed_to_allocate_memory PASSED [ 50%]",
        "SKIPPED [3] tests/test_big.py:12: needs more GPU memory than 8 GiB",
        "XFAIL tests/test_big.py::test_huge - allocation of 80 GiB fails",
        "Memory usage exceeds 80% of GPU memory",
        "WARNING: low GPU memory: 200 MiB free",
        "Failed to allocate resources for job: quota",
        "commit 3f2: handle failed allocation of device buffers",
        "Fixes a crash where malloc failed silently",
        "* feat: report insufficient VRAM earlier",
        "Q: why does it say not enough memory?",
    ],
)
def test_what_lacks_something_else_or_goes_on_is_none(text):
    assert events(f"start\n{text}\nstop\n") == ()


@pytest.mark.parametrize(
    ("text", "memory", "tried"),
    [
        ("Failed to allocate device memory for d_A (12.00 MB) - code 2", "card", 12 << 20),
        ("insufficient VRAM: need ~2.50GiB but only 1.00GiB free", "card", 5 << 29),
        ("RBXCRASH: OutOfMemoryGraphics (Failed to allocate. size = 3979776)", "card", 3979776),
        ("Call rtMalloc fail, purpose: cache, size:4096, device_id:0", "card", 4096),
        ("Error: model requires more system memory (3.0 GiB) than is there", "host", 3 << 30),
        ("ERROR: Failed to allocate 512 bytes for array x (memory.cpp:64)", "host", 512),
        ("opening the card\nERROR: tile 7: out of memory\nclosing /dev/nvidia0", "card", None),
        ("ERROR: tile 7: out of memory", "host", None),
    ],
)
def test_whose_memory_and_how_much_is_read_where_it_is_said(text, memory, tried):
    (event,) = events(f"{text}\n")

    assert ("host" if event.backend in HOST else "card") == memory
    assert event.tried_bytes == tried


@pytest.mark.parametrize(
    "text",
    [
        "transfer failed -> ZX_OUT_OF_MEMORY",
        "backend failed with error: 39 [ZR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY]",
        "FooError: [2] Call to fooAlloc results in NPX_ERROR_OUT_OF_MEMORY",
        "could not create a handle: NVX_STATUS_ALLOC_FAILED",
        "Error: zxCreateBuffer, -4, ZX_MEM_OBJECT_ALLOCATION_FAILURE",
        'Unexpected API error "ErrorOutOfDeviceMemory".',
        "RuntimeError: No available memory for the tiles of the device",
        "pool error: bad allocation",
        "Error: the tile is larger than the available GPU memory",
        "ERROR: job 12 was terminated due to memory pressure",
        "fatal: step 3 exceeded 95% memory budget",
        "terminating: OOM when allocating the tile",
        'Error: Warmup(Pool("not enough memory for the tiles"))',
        "Status: D:\\a\\_work\\1\\s\\arena.cc:33 Failed to allocate memory for a buffer",
        "Out of memory error on card 0. Cannot allocate 144.46MB memory on card 0.",
        'C++ exception with description "the pool is out of memory" thrown in SetUp().',
    ],
)
def test_a_status_a_kill_and_what_stands_behind_other_words_say_it(text):
    assert len(events(f"start\n{text}\nstop\n")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "    case ZX_OUT_OF_MEMORY:",
        "    if (err == ZX_OUT_OF_MEMORY) {",
        "#define ZX_ERROR_OUT_OF_MEMORY 12",
        "    return ZX_ERROR_OUT_OF_MEMORY;",
        "errors: ZX_OUT_OF_MEMORY, ZX_BUSY, ZX_LOST",
        "0 Workers (tasks) killed due to memory pressure, 0 crashed",
        "ERROR SUMMARY: no memory leak found",
        "This happens when workers are killed due to memory usage",
    ],
)
def test_a_status_in_code_or_a_list_and_what_did_not_happen_are_none(text):
    assert events(f"start\n{text}\nstop\n") == ()


def test_most_messages_are_found_without_any_grammar(monkeypatch):
    # Whose words nobody foresaw must not need a grammar first.
    kills = tuple(each for each in grammars.GRAMMARS if each.kind == "kill")
    monkeypatch.setattr(grammars, "GRAMMARS", kills)
    monkeypatch.setattr(grammars, "_index", grammars._indexed())
    with (THREADS / "expected.tsv").open(encoding="utf-8") as file:
        cases = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))

    told = {True: [0, 0], False: [0, 0]}
    for each in cases:
        found = analysis.analyse([str(THREADS / f"{each['case']}.log")]).events
        told[each["expected"] != "none"][bool(found)] += 1

    (lost, found), (silent, false) = told[True], told[False]
    assert found >= 0.9 * (found + lost)
    assert false <= 0.015 * (false + silent)


def test_the_error_of_a_failing_test_counts_in_words_of_its_own_and_its_assertion_does_not():
    text = (
        "============================= test session starts ==============================\n"
        "collected 2 items\n\ntests/test_a.py FF [100%]\n\n"
        "=================================== FAILURES ===================================\n"
        "____________________________________ test_a ____________________________________\n\n"
        ">       load()\nE       MyError: the pool could not allocate 2.00 GiB on cuda:0\n\n"
        "tests/test_a.py:3: MyError\n"
        "____________________________________ test_b ____________________________________\n\n"
        "E       AssertionError: assert 'full' in 'failed to allocate memory'\n\n"
        "tests/test_a.py:9: AssertionError\n"
        "============================== 2 failed in 1.00s ===============================\n"
    )

    (event,) = events(text)

    assert (event.nodeid, event.tried_bytes) == ("tests/test_a.py::test_a", 2 << 30)


def test_a_message_of_a_framework_is_not_told_twice_by_the_words_after_it():
    text = (
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 64.00 MiB on device 0: cudaMalloc "
        "failed: out of memory\nmake_context: failed to allocate compute buffers\n"
    )

    (event,) = events(text)

    assert (event.backend, event.tried_bytes) == ("ggml", 64 << 20)


def test_nobody_vouches_for_such_words_when_a_test_is_judged_by_them():
    said = classify("RuntimeError: allocation of the texture failed")
    assert said is not None
    assert said.weak


@pytest.mark.parametrize(
    "noise",
    [
        "allocation of ",
        "memory ",
        "cannot ",
        "out of a b ",
        '"',
        "killed by ",
        "killed a b c ",
        "a_",
        "X_OUT_OF_MEMORY ",
        "error: X_OUT_OF_MEMORY ",
        "more than the available ",
    ],
)
def test_a_long_line_takes_little_time(noise):
    before = time.process_time()
    found = messages.parse(noise * (16_000 // len(noise)))
    assert (found is not None) == noise.startswith("error")
    assert time.process_time() - before < 1
