"""One message behind any head, in each framework's words; and what only speaks of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forensic_corpus import ERROR, torch

from pytest_gpumem.forensics import analysis, grammars, lines
from pytest_gpumem.forensics.causes import HOST
from pytest_gpumem.forensics.grammars.language import size
from pytest_gpumem.forensics.sequence import Follower


def events(text):
    return analysis.findings([("log", Follower().follow(lines.scan([text.encode()])))]).events


HEADS = {
    "blanks": "    {}",
    "a tab": "\t{}",
    "a bullet": "- {}",
    "brackets of another script": "【worker 3】{}",
    "a level and a file": "ERROR  worker.py:31 {}",
    "sentences": "Error: request 7 failed: {}",
    "klog": 'E1129 10:11:12.123456       1 server.go:44] "Predict failed" err="{}"',
    "klog with JSON": 'E1129 10:11:12.123456  1 server.go:44] "x" err="{{\\"message\\":\\"{}\\"}}"',
    "logfmt": 'time=2025-03-04T10:20:30Z level=error source=run.go:9 msg="{}"',
    "loguru": "2025-03-04 10:20:30.123 | ERROR    | app.core:run:45 - {}",
    "loguru's main": "2025-03-04 10:20:30.123 | ERROR    | __main__:<module>:12 - {}",
    "compose": "tests-1  | {}",
    "Buildkite": "[2025-03-04T10:20:30Z] (Worker_TP0 pid=9) ERROR 03-04 10:20:30 [core.py:8] {}",
    "Buildkite's own": "\x1b_bk;t=1741083630123\x07{}",
    "mail": "> {}",
    "mail, twice": "> > {}",
    "Markdown": "`{}`",
    "a JSON list": '["step 3", "{}"]',
    "JSON fields": '{{"timestamp":"t","level":"ERROR","fields":{{"message":"{}"}}}}',
    "Go": 'panic: runner: "{}"',
    "an unknown one": "<7!> ~@ {}",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("message", [ERROR, torch(), f"Worker failed: {torch()}"])
def test_a_message_with_figures_counts_behind_any_head(head, message):
    (event,) = events(f"starting\n{head.format(message)}\nstopped\n")

    assert event.backend == "cuda"
    assert (event.tried_bytes, event.free_bytes) == (46 << 20, int(21.06 * 2**20))


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(
    "message",
    ["RuntimeError: CUDA error: out of memory", "torch.OutOfMemoryError: CUDA out of memory."],
)
def test_an_error_without_figures_counts_behind_any_head(head, message):
    assert [event.backend for event in events(head.format(message))] == ["cuda"]


@pytest.mark.parametrize(
    "head", ["    {}", "\t{}", "- {}", "【ci】 {}", "job/7 >> {}", "[step 2] {}"]
)
def test_a_line_of_the_summary_counts_behind_any_head(head):
    lines = "FAILED tests/test_x.py::test_y[a b] - torch.OutOfMemoryError: CUDA out of mem..."

    (event,) = events(head.format(lines))

    assert (event.nodeid, event.backend) == ("tests/test_x.py::test_y[a b]", "cuda")


WORDS = [
    line.split("\t")
    for name in ("messages", "messages_alone")
    for line in (Path(__file__).parent / f"{name}.tsv").read_text().splitlines()[1:]
]
"""Whose memory, the size that was asked for, and the message, its newlines as ``\\n``.

Those of ``messages.tsv`` are known in every carrier, the others on a line of their own.
"""


@pytest.mark.parametrize(("memory", "tried", "text"), WORDS, ids=range(len(WORDS)))
def test_each_framework_s_words_are_known(memory, tried, text):
    message = text.replace("\\n", "\n")

    (event,) = events(f"starting\n{message}\nstopped\n")

    assert ("host" if event.backend in HOST else "card") == memory
    assert event.tried_bytes == (None if tried == "-" else size(tried))


NOTHING = [
    "If you see CUDA out of memory, reduce the batch size.",
    "to avoid CUDA out of memory errors set max_split_size_mb",
    "  except torch.cuda.OutOfMemoryError:",
    "from torch.cuda import OutOfMemoryError",
    "    if 'CUDA out of memory' in str(error):",
    f'    raise RuntimeError("{torch()}")',
    f'MESSAGE = "{torch()}"',
    f"# {torch()}",
    f"assert '{torch()}' in output",
    f"with pytest.raises(RuntimeError, match='{torch()}'):",
    "tests/test_oom.py::test_cuda_out_of_memory PASSED",
    f"2025-03-04 10:20:30 | WARNING  | app:run:4 - {torch()}",
    f"level=warning msg='{torch()}'",
    json.dumps({"level": "info", "message": torch()}),
    f"UserWarning: {torch()}",
    f"caught: {torch()}",
    f"{torch()} Retrying with batch size 4",
    '    "OOMKilled": false,',
    "oom_score_adj: 0, oom_kill_disable 0",
    "CUDA error: an illegal memory access was encountered",
    "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
    "0 Workers (tasks / actors) killed due to memory pressure (OOM), 1 Workers crashed",
    (
        "[W304 10:20:30.1 CUDACachingAllocator.cpp:3933] memory allocation failed with OOM on "
        "device 0 while trying to allocate 2097152 bytes (free: 1048576, total: 4090956349)."
    ),
    "enum value 'CUDA_ERROR_OUT_OF_MEMORY' not handled in switch",
    "JAVA_OPTS: -XX:+HeapDumpOnOutOfMemoryError -Xmx2g",
    "- Fixed JavaScript heap out of memory in the docs build",
    "Not enough memory left to cache the dataset, reading from disk instead",
    "Pods that use too much may be killed by the OOM killer.",
    "Could not allocate GPU memory for the cache; falling back to CPU",
    "Detected 0 oom-kill events",
    "retry_if_exception_type(torch.OutOfMemoryError)",
    "waiting 10 s before sending SIGKILL",
    "test timed out and was killed by SIGKILL",
    "exit code: -90",
    f'    "{torch()}")',
    f'        RuntimeError("{torch()}"),',
    f'  let message = "{torch()}";',
    f'records = [\n  "step 3",\n  "{torch()}",\n]',
    f'    assert is_memory(\n        "{torch()}")',
    "  match: /out of device memory|ErrorOutOfDeviceMemory|cudaMalloc failed/i,",
    "  ErrorOutOfDeviceMemory = VK_ERROR_OUT_OF_DEVICE_MEMORY,",
    "const CUresult cudaErrorMemoryAllocation = hipErrorMemoryAllocation;",
    "  3: 'CUBLAS_STATUS_ALLOC_FAILED',",
    " * CUDA_ERROR_OUT_OF_MEMORY is returned where nothing is left",
    '        DEBUG(CRIT_FAILURE, "Out of memory allocating request\\n");',
    "It fails with `cudaMalloc failed: out of memory` or\n`failed to allocate ROCm0 buffer`.",
    "| `cudaErrorMemoryAllocation: out of memory` on old cards | needs a newer build |",
    'Users face the **"CUDA_ERROR_OUT_OF_MEMORY: out of memory"** issue.',
    '"OOMKilled": false,\n"ExitCode": 137,',
]


@pytest.mark.parametrize("text", NOTHING, ids=range(len(NOTHING)))
def test_what_speaks_of_a_message_is_none(text):
    assert events(f"starting\n{text}\nstopped\n") == ()


QUOTATIONS = (Path(__file__).parent / "quotations.txt").read_text().strip("\n").split("\n===\n")
"""Code, change logs, manuals, mails and settings that have a message's words and no memory."""


@pytest.mark.parametrize("text", QUOTATIONS, ids=range(len(QUOTATIONS)))
def test_who_quotes_a_message_reports_none(text):
    assert events(f"{text}\n") == ()


@pytest.mark.parametrize(
    "text",
    [
        'It says "CUDA out of memory. Tried to allocate 2.00 GiB" when I raise the batch size.',
        "_Error: cannot allocate vector of size 401.6 MB._ Do you have an idea?",
        "$ kill -9 4711\n./run.sh: line 3:  4711 Killed                  python train.py",
        "[CRITICAL] WORKER TIMEOUT (pid:8)\n[ERROR] Worker (pid:8) was sent SIGKILL! Perhaps ...",
        "slurmstepd: error: *** JOB 7 DUE TO TIME LIMIT ***\nsrun: error: n1: task 0: Killed",
        "step timed out after 3600 s\n##[error]Process completed with exit code 137.",
    ],
)
def test_a_figure_makes_no_report_of_a_quotation_nor_a_signal_one_of_a_kill(text):
    assert events(f"starting\n{text}\n") == ()


@pytest.mark.parametrize(
    "text",
    [
        f'It says "{torch()}" when I raise the batch size.',
        "2025-01-01 10:00:00 INFO Error running model: CUDA error: out of memory",
        "======== Step 683/3710 ========\nRuntimeError: CUDA out of memory",
        '{"level":"error","msg":"container exited","exitCode":137,"reason":"OOMKilled"}',
        '{"msg":"the job ended","exitCode":137}',
        '{"level":50,"msg":"step 3","err":{"type":"Error","message":"CUDA error: out of memory"}}',
    ],
)
def test_what_a_program_states_is_a_report_wherever_it_stands(text):
    assert len(events(f"starting\n{text}\n")) == 1


def test_each_killed_process_that_is_named_is_one_event():
    lines_of = "ERROR Process 'Worker-{0}' pid:{0} exited with 'signal 9 (SIGKILL)'\n"

    assert len(events("".join(lines_of.format(each) for each in (338, 339, 340)))) == 3


def test_a_test_may_print_banners():
    log = (Path(__file__).parent / "banners.txt").read_text()

    assert [(each.nodeid, each.tried_bytes, each.line) for each in events(log)] == [
        ("tests/test_a.py::test_one", 2 << 30, 14),
        ("tests/test_a.py::test_two", 3 << 30, 24),
        (None, 4 << 30, 32),
    ]


def test_a_suite_adds_its_own_messages(tmp_path, monkeypatch, capsys):
    from pytest_gpumem.cli import main as cli

    (tmp_path / "pyproject.toml").write_text(
        "[tool.gpumem.forensics.messages]\n"
        '"tile pool is empty: wanted <tried> of <total>" = "card"\n'
        '"staging area exhausted" = "host"\n'
    )
    log = (
        "[7] tile pool is empty: wanted 2.00 MiB of 1.00 GiB\n"
        + "\n" * 99
        + "staging area exhausted\n"
    )
    (tmp_path / "run.log").write_text(log)
    monkeypatch.chdir(tmp_path)
    try:
        assert cli.main(["forensics", "run.log", "--format", "json"]) == 0
    finally:
        grammars.learn({})

    card, host = json.loads(capsys.readouterr().out)["events"]
    assert (card["tried_bytes"], card["total_bytes"]) == (2 << 20, 1 << 30)
    assert host["cause"] == "host_ram"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ({"tile pool is empty": "gpu"}, "'gpu' for 'tile pool is empty' is neither 'card' nor"),
        ({"<tryed> wanted, none there": "card"}, "<tryed> in .* is no figure; allowed are <tried>"),
        ({"<tried>": "card"}, "is too short to be told from other lines"),
    ],
)
def test_a_message_that_is_none_is_one_sentence(messages, said):
    with pytest.raises(ValueError, match=said):
        grammars.learn(messages)
