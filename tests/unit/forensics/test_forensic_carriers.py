"""Every message of every framework, through everything that may stand around it."""

from __future__ import annotations

import html
import io
import json
import re
import textwrap
from pathlib import Path

import pytest
from forensic_corpus import ERROR, torch

from pytest_gpumem.forensics import analysis, readers

STAMP = "2025-03-04T10:20:30.1234567Z"
ROWS = (Path(__file__).parent / "messages.tsv").read_text(encoding="utf-8").splitlines()[1:]
# Of several lines, and pytest's own gutter, which needs pytest around it.
MESSAGES = [
    *(text for text in (row.split("\t")[2] for row in ROWS) if "\\n" not in text),
    torch(),
    ERROR,
    "RuntimeError: CUDA error: out of memory",
    "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "[1234.567890] Out of memory: Killed process 4711 (python) total-vm:1000kB, anon-rss:900kB",
    "slurmstepd: error: Detected 1 oom_kill event in StepId=1.batch.",
]
MESSAGES.remove("E   MemoryError")

CARRIERS = {
    "GitHub, an error": lambda text: f"{STAMP} ##[error]{text}",
    "GitHub's archive": lambda text: f"gpu tests\tRun pytest\t{STAMP} {text}",
    "GitLab": lambda text: f"{STAMP} 01E {text}",
    "Azure": lambda text: f"{STAMP} ##[section]{text}",
    "compose": lambda text: f"web_1  | {STAMP} {text}",
    "containerd": lambda text: f"2025-11-07T16:05:22.123456789Z stderr F {text}",
    "Docker": lambda text: json.dumps({"log": f"{text}\n", "stream": "stderr", "time": STAMP}),
    "JSON": lambda text: json.dumps({"level": "error", "message": text}),
    "JSON in JSON": lambda text: json.dumps({"log": json.dumps({"level": "error", "msg": text})}),
    "JSON over lines": lambda text: json.dumps({"error": {"code": 5, "message": text}}, indent=2),
    "a notebook": lambda text: json.dumps({"ename": "X", "traceback": [text]}, indent=1),
    "logfmt": lambda text: f"time={STAMP} level=error msg={json.dumps(text)}",
    "klog": lambda text: f'E1129 10:11:12.123456  1 server.go:44] "failed" err={json.dumps(text)}',
    "zap": lambda text: f"{STAMP}\tERROR\tserver/run.go:31\t{text}",
    "loguru": lambda text: f"2025-03-04 10:20:30.123 | ERROR    | app.core:run:45 - {text}",
    "Celery": lambda text: f"[2025-03-04 10:20:30,123: ERROR/ForkPoolWorker-1] {text}",
    "uvicorn": lambda text: f"ERROR:    {text}",
    "syslog": lambda text: f"<11>1 {STAMP} host-1 app 4711 - - {text}",
    "a rank": lambda text: f"[rank0]: {text}",
    "MPI": lambda text: f"[1,0]<stderr>:{text}",
    "Ray": lambda text: f"(Actor pid=4711, ip=10.0.0.1) {text}",
    "mail": lambda text: f"> > {text}",
    "a table": lambda text: f"| step 3 | {text} | failed |",
    "a box": lambda text: f"\u2502 {text:<90} \u2502",
    "CSV": lambda text: f'3,failed,"{text.replace(chr(34), chr(34) * 2)}",1.2',
    "a web page": lambda text: f"<pre>{html.escape(text)}</pre>",
    "YAML": lambda text: f"  message: {json.dumps(text)}",
    "colours": lambda text: f"\x1b[38;5;196m{text}\x1b[0;39m",
    "colours, spelled out": lambda text: f"\\033[31m{text}\\033[0m",
    "colours, within": lambda text: re.sub(r" (\w+)", "\x1b[31m \\1\x1b[0m", text),
    "blanks that do not break": lambda text: text.replace(" ", "\u00a0"),
    "blanks, doubled": lambda text: text.replace(" ", "  "),
    "progress before it": lambda text: f" 13%|#   | 4/30 [00:03<00:20,  1.26it/s]{text}",
    "carriage returns": lambda text: f" 13%|#   | 4/30 [00:03<00:20]\r{text}\r",
    "wrapped at words": lambda text: "\n".join(textwrap.wrap(text, 90, break_long_words=False)),
    "wrapped in a box": lambda text: "\n".join(
        f"\u2502 {part:<90} \u2502" for part in textwrap.wrap(text, 90)
    ),
}


def told(data):
    readings = readers.read_stream(io.BytesIO(data))
    found = analysis.findings([(each.path, each.runs) for each in readings]).events
    return [(event.backend, event.tried_bytes) for event in found]


BARE = {text: told(f"starting\n{text}\nstopped\n".encode()) for text in MESSAGES}
# They are errors only where they are the whole of what a line says, or where an error is meant.
ALONE = {"wgpu error: Not enough memory left": {"a table", "CSV", "a web page"}}


@pytest.mark.parametrize("carrier", CARRIERS, ids=CARRIERS)
def test_a_message_is_the_same_in_every_carrier(carrier):
    lost = {
        text: found
        for text in MESSAGES
        if carrier not in ALONE.get(text, ())
        and (found := told(f"starting\n{CARRIERS[carrier](text)}\nstopped\n".encode()))
        != BARE[text]
    }

    assert lost == {}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig"])
def test_a_message_is_the_same_in_every_encoding(encoding):
    for text in MESSAGES:
        assert told(f"starting\n{text}\nstopped\n".encode(encoding)) == BARE[text]


def test_each_message_is_one_event():
    assert {text: len(found) for text, found in BARE.items() if len(found) != 1} == {}
