"""No threshold passes on a side that is empty, cut off, unreadable or something else."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pytest
from forensic_corpus import RECORD, torch

from pytest_gpumem.cli import main as cli

NAMES = [f"tests/test_a.py::test_{number}" for number in range(39)]
HEAD = (
    "============================= test session starts ==============================\n"
    "platform linux -- Python 3.11.7, pytest-9.0.1, pluggy-1.6.0\n"
    "rootdir: /srv/suite\n"
    "collected 40 items\n\n"
)
PASSED = [f"{name} PASSED [{at * 100 // 40:3}%]\n" for at, name in enumerate(NAMES, 1)]
FAILED = "tests/test_b.py::test_large FAILED [100%]\n"
TRACE = (
    "\n=================================== FAILURES ===================================\n"
    "__________________________________ test_large __________________________________\n\n"
    f"E   torch.OutOfMemoryError: {torch()}\n\n"
    "tests/test_b.py:5: OutOfMemoryError\n"
)
SHORT = (
    "=========================== short test summary info ============================\n"
    f"FAILED tests/test_b.py::test_large - torch.OutOfMemoryError: {torch()}\n"
)
END = "======================== 1 failed, 39 passed in 61.20s =========================\n"
LOG = "".join([HEAD, *PASSED, FAILED, TRACE, SHORT, END])
GOOD = "".join([HEAD, *PASSED, FAILED.replace("FAILED", "PASSED"), "=== 40 passed in 61.2s ===\n"])
JUNIT = (
    '<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest" errors="0" '
    'failures="1" skipped="0" tests="40" time="61.2">'
    + "".join(
        f'<testcase classname="tests.test_a" name="test_{at}" time="1.0" />' for at in range(39)
    )
    + '<testcase classname="tests.test_b" name="test_large" time="1.0"><failure '
    f'message="torch.OutOfMemoryError: {torch()}">E   torch.OutOfMemoryError: {torch()}</failure>'
    "</testcase></testsuite></testsuites>"
)
HTML = (
    '<html><head><title>report.html</title></head><body><div id="data-container" data-jsonblob="'
    + json.dumps({
        "tests": {"tests/test_b.py::test_large": [{
            "extras": [], "result": "Failed", "testId": "tests/test_b.py::test_large",
            "duration": "00:00:01", "log": f"E   torch.OutOfMemoryError: {torch()}",
        }]},
    }).replace('"', "&#34;")
    + '"></div></body></html>'
)  # fmt: skip
DUMP = json.dumps(RECORD)


def zipped(**files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(f"{name}.txt", text)
    return stream.getvalue()


def tarred(data):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("run.log")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def before(mark):
    return LOG.partition(mark)[0]


SIDES = {
    "nothing": b"",
    "blanks": b"\n \n\n",
    "a byte order mark": b"\xef\xbb\xbf",
    "NULs": b"\0" * 4096,
    "random bytes": bytes((at * 7919 + at // 3) % 256 for at in range(4096)),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8,
    "a program": b"\x7fELF\x02\x01\x01" + bytes(range(64)) * 64,
    "prose": b"Please find the log attached.\n",
    "an answer of a server": b"<html><body><h1>404 Not Found</h1></body></html>",
    "a server's JSON": b'{"message": "Not Found", "status": "404"}',
    "JSON of another kind": b'{"schema": 1, "packages": []}',
    "a newer schema": b'{"schema": 99, "tests": []}',
    "no test in the record": b'{"schema": 1, "mode": "off", "cards": [], "simulated": true, '
    b'"workers": 1, "tests": []}',
    "a cut record": DUMP[: len(DUMP) // 2].encode(),
    "a record of wrong types": b'{"schema": 1, "mode": 1, "cards": 2, "tests": [3]}',
    "nested JSON": b'{"schema": 1, "tests": ' + b"[" * 100_000,
    "XML of another kind": b"<?xml version='1.0'?><project><test/></project>",
    "a JUnit report without tests": b'<testsuites><testsuite tests="0"></testsuite></testsuites>',
    "a cut JUnit report": JUNIT[: JUNIT.index('<testcase classname="tests.test_b"')].encode(),
    "a JUnit report cut within its failure": JUNIT[: JUNIT.index("E   torch") + 9].encode(),
    "a JUnit report with a DTD": JUNIT.replace(
        "?>", "?><!DOCTYPE a [<!ENTITY b 'c'>]>", 1
    ).encode(),
    "a cut pytest-html": HTML[: len(HTML) // 2].encode(),
    "a damaged pytest-html": HTML.replace("tests&#34;:", "tests", 1).encode(),
    "a log without its banner and end": "".join(PASSED[:20]).encode(),
    "only the banner": HEAD.encode(),
    "a log cut in its progress": before("tests/test_a.py::test_22 ").encode(),
    "a log cut within a name": before("_a.py::test_30 ").encode(),
    "a log cut before the failures": before("\n=================================== F").encode(),
    "a log cut within the failure": before("E   torch").encode(),
    "a log cut before the summary": before("====== short test").encode(),
    "a log cut before its last line": before(END).encode(),
    "a run that stopped": (HEAD + "".join(PASSED[:9]) + "=== 9 passed in 1.00s ===\n").encode(),
    "no tests ran": (HEAD + "=== no tests ran in 0.01s ===\n").encode(),
    "a usage error": b"ERROR: usage: pytest [options]\npytest: error: unrecognized arguments: -Q\n",
    "an internal error": (HEAD + "INTERNALERROR> Traceback (most recent call last):\n").encode(),
    "gzip, cut": gzip.compress(LOG.encode())[:200],
    "gzip of nothing": gzip.compress(b""),
    "bzip2, cut": bz2.compress(LOG.encode())[:200],
    "xz, cut": lzma.compress(LOG.encode())[:200],
    "xz of a failing log": lzma.compress(LOG.encode()),
    "bzip2 of a failing log": bz2.compress(LOG.encode()),
    "a zip of nothing": zipped(),
    "a zip of an empty file": zipped(step=""),
    "a zip of a failing log": zipped(step=LOG),
    "a zip of a cut log": zipped(step=before("\n====")),
    "a zip, cut": zipped(step=LOG)[:-30],
    "a zip of steps without tests": zipped(checkout="Fetching\n", build="make: done\n"),
    "a tar, cut": tarred(LOG.encode())[:900],
    "a tar of a failing log": tarred(LOG.encode()),
    "UTF-16": LOG.encode("utf-16"),
    "UTF-16, cut": before("\n=================================== F").encode("utf-16"),
    "the log with colours, cut": f"\x1b[1m{before('_a.py::test_30 ')}\x1b[0m".encode(),
    "dmesg": b"[1.0] Out of memory: Killed process 11 (python) anon-rss:1kB\n",
    "a failing log": LOG.encode(),
    "a failing log, twice": (LOG + LOG).encode(),
    "a good log, then a cut one": (GOOD + before("_a.py::test_30 ")).encode(),
    "a good log, doubled, and cut": (GOOD + GOOD[: len(GOOD) // 2]).encode(),
    "the last line of a failing log": END.encode(),
    "a failing log without its middle": "".join([HEAD, *PASSED, FAILED, END]).encode(),
    "a collection that failed": (
        HEAD.replace("40 items", "39 items / 1 error")
        + "=== short test summary info ===\nERROR tests/test_b.py\n"
        "!!!!!!! Interrupted: 1 error during collection !!!!!!!\n=== 1 error in 0.50s ===\n"
    ).encode(),
    "a run that was interrupted": (
        HEAD + "".join(PASSED[:20]) + "!!! KeyboardInterrupt !!!\n=== 20 passed in 9.00s ===\n"
    ).encode(),
    "too many crashed workers": (
        HEAD
        + "".join(f"[gw0] [ {at}%] PASSED {name} \n" for at, name in enumerate(NAMES[:9]))
        + "=== xdist: maximum crashed workers reached: 1 ===\n=== 9 passed in 3.00s ===\n"
    ).encode(),
    "all skipped": (HEAD + "=== 40 skipped in 1.00s ===\n").encode(),
    "all deselected": (
        HEAD.replace("40 items", "40 items / 40 deselected / 0 selected")
        + "=== 40 deselected in 0.10s ===\n"
    ).encode(),
    "a zip of a misnamed log": zipped(inner=LOG).replace(b"inner.txt", b"inner.zip"),
    "gzip of gzip": gzip.compress(gzip.compress(LOG.encode())),
    "gzip, then something": gzip.compress(LOG.encode()) + b"something" * 9,
    "lines of JSON, cut": "".join(
        json.dumps({"log": f"{line}\n"}) + "\n" for line in before("_a.py::test_30 ").split("\n")
    ).encode()[:-9],
    "UTF-32": LOG.encode("utf-32"),
    "a bucket's refusal": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "a record of a run that stopped early": json.dumps({**RECORD, "collected": 9}).encode(),
}


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.log"
    path.write_text(GOOD)
    return path


def test_there_are_seventy_ways():
    assert len(SIDES) >= 70


@pytest.mark.parametrize("side", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("place", ["file", "directory"])
def test_no_threshold_passes_on_such_a_side(tmp_path, capsys, good, side, place):
    folder = tmp_path / "after"
    folder.mkdir()
    path = folder / "run"
    path.write_bytes(side)

    status = cli.main(["compare", str(good), str(path if place == "file" else folder),
                       "--max-oom", "0", "--min-pass-rate", "100"])  # fmt: skip

    told = capsys.readouterr()
    assert status in {1, 2}
    assert ("missed:" in told.out) if status == 1 else (told.err.count("\n") == 1)
    assert "Traceback" not in told.err


def test_the_good_side_passes(capsys, good):
    assert cli.main(["compare", str(good), str(good), "--max-oom", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[2].strip() == (
        "the threshold is kept; nothing changed"
    )


@pytest.mark.parametrize("what", ["missing", "an empty directory"])
def test_a_path_that_is_no_file_is_one_sentence(tmp_path, capsys, good, what):
    path = tmp_path / "empty"
    if what == "an empty directory":
        path.mkdir()
    assert cli.main(["compare", str(good), str(path), "--max-oom", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_incomplete_side_is_judged_when_asked(tmp_path, capsys, good):
    cut = tmp_path / "cut.log"
    cut.write_text(before("tests/test_a.py::test_22 "))

    assert cli.main(["compare", str(good), str(cut), "--max-oom", "0"]) == 2
    assert "22 of 40 tests, the log ends before its summary" in capsys.readouterr().err
    assert cli.main(["compare", str(good), str(cut), "--max-oom", "0", "--allow-incomplete"]) == 0


@pytest.mark.parametrize(
    "files",
    [
        {"run.log": LOG, "junit.xml": JUNIT},
        {"junit.xml": JUNIT, "run.log": LOG},
        {"run.log": LOG, "copy.log": LOG},
        {"run.log": LOG, "cut.log": before("short test summary")},
        {"a.xml": JUNIT, "b.xml": JUNIT},
    ],
    ids=" ".join,
)
def test_one_run_in_two_files_counts_once(tmp_path, capsys, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    assert cli.main(["forensics", *(str(tmp_path / name) for name in files), "--format=json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert (told["totals"]["runs"], told["totals"]["tests"], told["totals"]["oom"]) == (1, 40, 1)
    assert any("the same run as" in source["note"] for source in told["sources"])
