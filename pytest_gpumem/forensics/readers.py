"""Opens what people have: logs of any kind, JUnit XML, pytest-html, our JSON, torch's snapshots."""

from __future__ import annotations

import codecs
import html
import io
import json
import pickle
import re
import sys
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

from pytest_gpumem import records
from pytest_gpumem.forensics import grammars, lines
from pytest_gpumem.forensics.causes import Leftover
from pytest_gpumem.forensics.runs import Failure, Run, Seen
from pytest_gpumem.forensics.sequence import Follower

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CHUNK = 1 << 22
_HEAD = 4096
_ZSTD = b"\x28\xb5\x2f\xfd"
_TREE_LIMIT = 1 << 28
"""JSON, HTML and pickles are read whole; what is larger is no report of a test run."""


def paths(given: Iterable[str]) -> Iterator[str]:
    """Return the files that ``given`` names, those of directories in order of their names.

    Raises:
        OSError: when one is not there.

    """
    for each in given:
        path = Path(each)
        if each != "-" and path.is_dir():
            yield from sorted(
                str(file)
                for file in path.rglob("*")
                if file.is_file() and not any(part.startswith(".") for part in file.parts[1:])
            )
        else:
            yield each


def read(path: str) -> list[Run]:
    """Return the runs that a file tells of; ``-`` is standard input.

    Raises:
        OSError: when it cannot be read.
        ValueError: in one sentence, when it is of no use.

    """
    if path == "-":
        return read_stream(sys.stdin.buffer)
    with Path(path).open("rb") as file:
        return read_stream(file)


def read_stream(file: IO[bytes]) -> list[Run]:
    """Return the runs that the open file tells of, whatever its kind is."""
    head, stream = _peek(file)
    if head[:2] == b"\x1f\x8b":
        return read_stream(cast("IO[bytes]", _Inflated(stream)))
    if head[:4] == _ZSTD:
        import zstandard

        unpacked = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
        return read_stream(cast("IO[bytes]", unpacked))
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:1] == b"<" and re.search(rb"<testsuites?\b", head):
        return _junit(stream)
    if start[:1] == b"<" and re.search(rb"(?i)<html|data-jsonblob", head):
        return _html(stream)
    if start[:1] == b"{" and re.search(rb'"schema"\s*:', head):
        return _json(stream)
    if re.match(rb"\x80[\x02-\x05]", head):
        return _snapshot(stream)
    return Follower().follow(lines.scan(_chunks(head, stream)))


class _Inflated(io.RawIOBase):
    """A gzip file that ends where it is cut off or damaged, with all that stands before."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed = packed
        self._inflate = zlib.decompressobj(wbits=31)
        self._input = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        limit = max(0, size)
        while True:
            if self._inflate.eof:
                # Members follow one another when logs were appended.
                self._input = self._inflate.unused_data
                self._inflate = zlib.decompressobj(wbits=31)
            self._input = self._input or self._packed.read(1 << 18)
            if not self._input:
                return self._inflate.flush()
            try:
                told = self._inflate.decompress(self._input, limit)
            except zlib.error:
                return b""
            self._input = self._inflate.unconsumed_tail
            if told:
                return told


def _peek(file: IO[bytes]) -> tuple[bytes, IO[bytes]]:
    """Return the first bytes, and the file as from its beginning; pipes cannot seek."""
    head = b""
    while len(head) < _HEAD and (more := file.read(_HEAD - len(head))):
        head += more
    return head, cast("IO[bytes]", _Again(head, file))


class _Again(io.RawIOBase):
    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if not self._head:
            return self._rest.read(size)
        if size < 0:
            taken, self._head = self._head + self._rest.read(), b""
        else:
            taken, self._head = self._head[:size], self._head[size:]
        return taken


def _chunks(head: bytes, stream: IO[bytes]) -> Iterator[bytes]:
    """Return the log in pieces, as UTF-8 where a byte order mark says that it is UTF-16."""
    encoding = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}.get(head[:2])
    if b"\0" not in head:
        encoding = None  # two stray bytes, not a mark
    decoder = codecs.getincrementaldecoder(encoding)("replace") if encoding else None
    while chunk := stream.read(CHUNK):
        yield decoder.decode(chunk).encode() if decoder else chunk


def _whole(stream: IO[bytes]) -> bytes:
    pieces = []
    size = 0
    while chunk := stream.read(CHUNK):
        size += len(chunk)
        if size > _TREE_LIMIT:
            raise ValueError(f"is larger than {_TREE_LIMIT >> 20} MiB, too large for its kind")
        pieces.append(chunk)
    return b"".join(pieces)


def _report(run: Run, nodeid: str, kind: str, phase: str, *, text: str, message: str = "") -> None:
    """Enter a failing report that a structured file holds; its line is its test's number."""
    line = len(run.order)
    failure = Failure(line, nodeid, kind, phase)
    failure.nodeid = nodeid
    inner = Follower()
    inner.runs = [Run()]
    section = f"=== FAILURES ===\n___ {nodeid.partition('[')[0]} ___\n"
    found = inner.follow(lines.scan([section.encode(), text.encode("utf-8", "replace"), b"\n"]))
    for each in (each for one in found for each in one.failures):
        failure.seen = failure.seen or (each.seen and Seen(line, each.seen.message))
        failure.aside = failure.aside or (each.aside and Seen(line, each.aside.message))
        failure.error = each.error or failure.error
        failure.died = failure.died or each.died
        failure.worker = failure.worker or each.worker
    known = grammars.parse(message, raised=True)
    if known is not None and known.named and failure.seen is None and not failure.died:
        failure.seen = Seen(line, known)
    failure.error = failure.error or message.partition("\n")[0]
    run.failures.append(failure)


def _junit(stream: IO[bytes]) -> list[Run]:
    from xml.etree import ElementTree as ET

    run = Run()
    run.pytest = run.ended = True
    parser: Any = ET.XMLPullParser(("start", "end"))
    suite: Any = None
    broken = False
    while not broken and (chunk := stream.read(CHUNK)):
        try:
            parser.feed(chunk)
        except ET.ParseError:
            broken = True
        try:
            for what, element in parser.read_events():
                if what == "start":
                    suite = element if element.tag == "testsuite" else suite
                elif element.tag == "testcase":
                    _testcase(run, element)
                    if suite is not None:
                        suite.clear()
        except ET.ParseError:
            broken = True
    return [run]


def _testcase(run: Run, element: Any) -> None:
    nodeid = _junit_nodeid(
        element.get("classname") or "", element.get("name") or "", element.get("file")
    )
    again = any(test.nodeid == nodeid for test in run.order[-2:])
    test = run.test(nodeid)
    try:
        test.duration += float(element.get("time") or 0)
    except ValueError:
        test.duration += 0.0
    outcome = "PASSED"
    for child in element:
        text, message = child.text or "", child.get("message") or ""
        if child.tag == "failure":
            outcome = "FAILED"
            _report(run, nodeid, "FAILED", "call", text=text, message=message)
        elif child.tag == "error":
            outcome = "ERROR"
            phase = "teardown" if "teardown" in message.partition('"')[0] else "setup"
            if message.startswith("collection failure"):
                phase = "collect"
            shown = message.partition('"')[2] or message
            _report(run, nodeid, "ERROR", phase, text=text, message=shown)
        elif child.tag == "skipped":
            outcome = "XFAIL" if child.get("type") == "pytest.xfail" else "SKIPPED"
    if not (again and outcome == "PASSED"):
        test.outcome = outcome


def _junit_nodeid(classname: str, name: str, file: str | None) -> str:
    parts = classname.split(".")
    # Classes begin with a capital; what stands before is the module.
    split = next((i for i, part in enumerate(parts) if i and part[:1].isupper()), len(parts))
    path = (file or "/".join(parts[:split]) + ".py") if classname else (file or "")
    return "::".join(filter(None, [path.replace("\\", "/"), *parts[split:], name]))


def _html(stream: IO[bytes]) -> list[Run]:
    text = _whole(stream).decode("utf-8", "replace")
    run = Run()
    run.pytest = run.ended = True
    blob = re.search(r"data-jsonblob=(\"[^\"]*\"|'[^']*')", text)
    if blob is not None:
        try:
            tests = json.loads(html.unescape(blob[1][1:-1]))["tests"]
            rows = [
                (each.get("testId") or name, str(each.get("result")), str(each.get("log") or ""))
                for name, group in tests.items()
                for each in group
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError("is a damaged report of pytest-html") from None
    else:
        rows = list(_old_html(text))
    for nodeid, result, log in rows:
        name, _, _ = nodeid.partition("::setup")
        name, _, late = name.partition("::teardown")
        kind = {
            "passed": "PASSED",
            "failed": "FAILED",
            "error": "ERROR",
            "skipped": "SKIPPED",
            "xfailed": "XFAIL",
            "xpassed": "XPASS",
            "rerun": "RERUN",
        }.get(result.lower())
        test = run.test(name)
        test.outcome = kind if test.outcome in {None, "PASSED", "RERUN"} else test.outcome
        if kind in {"FAILED", "ERROR"}:
            plain = html.unescape(re.sub(r"<br ?/?>", "\n", log))
            where = "teardown" if late or nodeid.endswith("::teardown") else "setup"
            _report(
                run,
                name,
                kind,
                "call" if kind == "FAILED" else where,
                text=re.sub(r"</?span[^>]*>", "", plain),
            )
    return [run]


_ROW = re.compile(
    r'<td class="col-result">([^<]*)</td>.*?<td class="col-name">([^<]*)</td>(.*?)</tbody>',
    re.DOTALL,
)
_LOG = re.compile(r'<div class="(?:empty )?log">(.*?)</div>', re.DOTALL)


def _old_html(text: str) -> Iterator[tuple[str, str, str]]:
    """Return the rows of a report written before pytest-html 4."""
    for piece in text.split("<tbody")[1:]:
        match = _ROW.search(piece if "</tbody>" in piece else f"{piece}</tbody>")
        if match is not None:
            log = _LOG.search(match[3])
            yield html.unescape(match[2]), match[1], log[1] if log else ""


def _json(stream: IO[bytes]) -> list[Run]:
    try:
        plain = json.loads(_whole(stream))
    except ValueError as error:
        raise ValueError(f"is damaged JSON: {error}") from None
    if not isinstance(plain, dict) or "tests" not in plain or plain["schema"] != records.SCHEMA:
        raise ValueError(f"is not a run of schema {records.SCHEMA} (--gpumem-json)")
    try:
        recorded = records.from_plain(records.RunRecord, plain)
        return [of_record(recorded)]
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"is a damaged run: {error}") from None


def of_record(recorded: records.RunRecord) -> Run:
    """Return what a log of the recorded run would tell."""
    run = Run()
    run.pytest = run.ended = True
    totals = {card.uuid: card.total for card in recorded.cards}
    words = {
        "failed": "FAILED",
        "error": "ERROR",
        "passed": "PASSED",
        "skipped": "SKIPPED",
        "xfailed": "XFAIL",
        "xpassed": "XPASS",
        "crashed": "FAILED",
    }
    for number, each in enumerate(recorded.tests, 1):
        if each.outcome == "rerun":
            continue  # it was made again alone, and that attempt counts
        worker = "/".join(filter(None, (each.host, each.worker))) or None
        test = run.test(each.nodeid, worker)
        test.outcome = words.get(each.outcome, "FAILED")
        test.duration += each.duration
        if each.cards:
            run.peaks[each.nodeid] = max(card.peak for card in each.cards)
        leaked = sum(card.leaked for card in each.cards) + sum(f.leaked for f in each.fixtures)
        if leaked:
            run.leftovers.append((worker, Leftover(each.nodeid, leaked)))
        if not (each.oom or each.outcome == "crashed"):
            continue
        kind = "ERROR" if each.outcome == "error" else "FAILED"
        failure = Failure(number, each.nodeid, kind, "call" if kind == "FAILED" else "setup")
        failure.nodeid, failure.worker = each.nodeid, worker
        failure.died = each.outcome == "crashed"
        found = grammars.parse(each.oom, raised=True) if each.oom else None
        if found is not None:
            sizes = dict(found.sizes)
            if each.cards:
                usage = max(each.cards, key=lambda card: card.peak)
                sizes.setdefault("allocated", usage.peak)
                sizes.setdefault("total", totals.get(usage.card, 0))
            failure.seen = Seen(number, found._replace(sizes=sizes))
        run.failures.append(failure)
    return run


class _Inert(pickle.Unpickler):
    """Reads numbers, texts, lists and dicts; whatever would run code is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"holds {module}.{name}, which is not read")


def _snapshot(stream: IO[bytes]) -> list[Run]:
    """Read what ``torch.cuda.memory._dump_snapshot`` wrote."""
    try:
        state = _Inert(io.BytesIO(_whole(stream))).load()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"is no memory snapshot: {error}") from None
    run = Run()
    try:
        for device, trace in enumerate(state["device_traces"]):
            mine = [each for each in state["segments"] if each.get("device", 0) == device]
            for number, entry in enumerate(trace, 1):
                if entry.get("action") == "oom":
                    run.failures.append(_snapshot_oom(device, mine, number, entry))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"is no memory snapshot of torch: {error!r}") from None
    return [run]


def _snapshot_oom(
    device: int, segments: list[dict[str, Any]], number: int, entry: dict[str, Any]
) -> Failure:
    allocated = sum(int(each.get("allocated_size", 0)) for each in segments)
    reserved = sum(int(each.get("total_size", 0)) for each in segments)
    sizes = {
        "tried": int(entry["size"]),
        "free": int(entry.get("device_free", entry.get("addr", 0))),
        "allocated": allocated,
        "reserved_unallocated": max(0, reserved - allocated),
    }
    test = next(
        (
            f"{frame['filename']}::{frame['name']}"
            for frame in entry.get("frames", ())
            if str(frame.get("name", "")).startswith("test")
        ),
        "",
    )
    failure = Failure(number, test, "FAILED", "call" if test else "")
    failure.nodeid = test or None
    text = f"CUDA out of memory. Tried to allocate {sizes['tried']} bytes"
    found = grammars.parse(text, raised=True)
    if found is None:
        raise ValueError("the table of messages lacks PyTorch's")
    failure.seen = Seen(number, found._replace(sizes=sizes, printed={}, device=device))
    return failure
