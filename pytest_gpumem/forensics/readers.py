"""Opens what people have: logs of any kind, JUnit XML, pytest-html, our JSON, torch's snapshots."""

from __future__ import annotations

import codecs
import contextlib
import html
import io
import json
import os
import pickle
import re
import select
import stat
import sys
import tempfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

from pytest_gpumem import records
from pytest_gpumem.forensics import lines, messages
from pytest_gpumem.forensics.causes import Leftover
from pytest_gpumem.forensics.runs import Failure, Run, Seen
from pytest_gpumem.forensics.sequence import Follower

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Watch = Callable[[Seen, str | None], None]

CHUNK = 1 << 22
_HEAD = 4096
_PATIENCE = 0.3
"""Seconds after which a pipe that gives nothing is taken to be written still."""
_TREE_LIMIT = 1 << 28
"""JSON, HTML and pickles are read whole; what is larger is no report of a test run."""
_SPOOLED = 1 << 26
_NESTED = 3
"""Archives within archives that are opened."""
_PSEUDO = {"/proc", "/sys", "/dev"}
"""Their files are the kernel's: some never end, some wait for a reader's partner."""
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f\b\x1b")) + b"\x7f"
_BINARY = 20
"""One control character in so many bytes, and it is no text. Random bytes have one in ten."""


class Reading(NamedTuple):
    """What one file holds, or one entry of an archive."""

    path: str
    kind: str
    size: int
    """Bytes, unpacked."""
    runs: list[Run]
    cut: str = ""
    """Why the input ends before its end, if it does."""


class Inputs(NamedTuple):
    """What was read, and sentences on what could not be."""

    readings: list[Reading]
    notes: list[str]


def gather(given: Iterable[str], watch: Watch | None = None) -> Inputs:
    """Return what the files hold; ``-`` is standard input, directories and archives are walked.

    Args:
        given: their paths.
        watch: told of each message of a standard input that has not ended, when it comes.

    Raises:
        OSError: when a file that was named cannot be read.
        ValueError: in one sentence, when it is of no use.

    """
    inputs = Inputs([], [])
    for each in given:
        if each == "-":
            inputs.readings.extend(_stdin(inputs.notes, watch))
        elif Path(each).is_dir():
            _walk(each, inputs)
        else:
            try:
                with Path(each).open("rb") as file:
                    inputs.readings.extend(read_stream(file, each, inputs.notes))
            except ValueError as error:
                raise ValueError(f"{each!r} {error}") from None
    return inputs


def _stdin(notes: list[str], watch: Watch | None) -> list[Reading]:
    # A process may be started without one.
    file = getattr(sys.stdin, "buffer", None)
    if file is None:
        raise ValueError("'-': standard input is closed")
    try:
        return read_stream(_live(file), "-", notes, watch=watch)
    except ValueError as error:
        raise ValueError(f"'-' {error}") from None


def _walk(root: str, inputs: Inputs) -> None:
    """Read the files of a directory in order of their names; what cannot be read is a note."""

    def unreadable(error: OSError) -> None:
        inputs.notes.append(f"{error.filename!r}: {error.strerror}")

    for directory, names, files in os.walk(root, onerror=unreadable):
        names[:] = sorted(
            name
            for name in names
            if not name.startswith(".") and os.path.join(directory, name) not in _PSEUDO  # noqa: PTH118 - as os.walk tells it
        )
        for name in sorted(files):
            path = Path(directory, name)
            try:
                if name.startswith(".") or not stat.S_ISREG(path.stat().st_mode):
                    continue
                with path.open("rb") as file:
                    inputs.readings.extend(read_stream(file, str(path), inputs.notes))
            except ValueError as error:
                inputs.notes.append(f"{str(path)!r} {error}")
            except OSError as error:
                unreadable(error)


def read(path: str) -> list[Run]:
    """Return the runs that a file tells of; ``-`` is standard input.

    Raises:
        OSError: when it cannot be read.
        ValueError: in one sentence, when it is of no use.

    """
    return [run for reading in gather([path]).readings for run in reading.runs]


def read_stream(
    file: IO[bytes],
    path: str = "",
    notes: list[str] | None = None,
    depth: int = 0,
    watch: Watch | None = None,
) -> list[Reading]:
    """Return what the open file holds, whatever its kind is: several readings of an archive.

    Args:
        file: the open file.
        path: what to call it.
        notes: where to say which entries of an archive cannot be read.
        depth: how many archives it lies in.
        watch: told of each message that is read before the end is there.

    Raises:
        ValueError: in one sentence, when it is of no use.

    """
    head, stream = _peek(file)
    for magic, unpacked in _PACKED.items():
        if head.startswith(magic):
            inner = unpacked(stream)
            found = read_stream(inner, path, notes, depth)
            cut = "the archive is cut off" if getattr(inner, "cut", False) else ""
            return [each._replace(cut=each.cut or cut) for each in found]
    if head.startswith(b"PK\x03\x04") or head[257:262] == b"ustar":
        if depth >= _NESTED:
            raise ValueError("lies too deep in archives")
        entries = _zipped if head.startswith(b"PK") else _tarred
        return entries(stream, path, notes if notes is not None else [], depth + 1)
    counted = _Counted(stream)
    idle = getattr(file, "idle", None)

    def heard(seen: Seen, test: str | None) -> None:
        if watch is not None and idle is not None and idle.met:
            watch(seen, test)

    kind, runs, cut = _told(head, cast("IO[bytes]", counted), idle, heard)
    return [Reading(path, kind, counted.size, runs, cut)]


def _told(
    head: bytes, stream: IO[bytes], idle: _Idle | None, watch: Watch
) -> tuple[str, list[Run], str]:
    """Return a file's kind, its runs, and why it ends early if it does."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:1] == b"<" and re.search(rb"(?i)<html|<!doctype html|data-jsonblob", head):
        return "pytest-html", *_html(stream)
    if re.match(rb"<\?xml|<!DOCTYPE|<testsuites?\b", start):
        return "JUnit XML", *_junit(head, stream)
    if start[:1] == b"{" and re.search(rb'"schema"\s*:', head):
        return "--gpumem-json", _json(stream), ""
    if re.match(rb"\x80[\x02-\x05]", head):
        return "torch snapshot", _snapshot(stream), ""
    _refuse_binary(head)
    runs = Follower(watch).follow(lines.scan(_chunks(head, stream, idle)))
    return ("pytest log" if any(run.pytest for run in runs) else "log"), runs, ""


def _refuse_binary(head: bytes) -> None:
    """Raise for bytes that are no text of any encoding: nothing found there would be a finding."""
    nulls = head.count(0)
    # UTF-16 has every other byte 0, whether or not a mark says so.
    wide = nulls and max(head[::2].count(0), head[1::2].count(0)) * 10 >= nulls * 9
    controls = len(head) - len(head.translate(None, _CONTROL)) - (nulls if wide else 0)
    if controls * _BINARY > len(head):
        raise ValueError("is neither text nor a report that is known")


class _Idle:
    """Tells whether a pipe has nothing to read for a while, though it has not ended."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.met = False
        """Whether it ever had not."""

    def __call__(self) -> bool:
        ready, _, _ = select.select([self._descriptor], [], [], _PATIENCE)
        self.met = self.met or not ready
        return not ready


class _Live(io.RawIOBase):
    """A pipe that is read as far as it goes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.idle = _Idle(descriptor)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return os.read(self._descriptor, size if size > 0 else CHUNK)


def _live(file: IO[bytes]) -> IO[bytes]:
    """Return standard input so that what comes can be told while it comes."""
    try:
        live = _Live(file.fileno())
        live.idle()
    except (OSError, ValueError):  # no pipe, or a system that cannot wait for one
        return file
    live.idle.met = False
    return cast("IO[bytes]", live)


class _Unpacked(io.RawIOBase):
    """A packed file that ends where it is cut off or damaged, with all that stands before."""

    def __init__(self, packed: IO[bytes], make: Callable[[], Any], errors: type[Exception]) -> None:
        self._packed = packed
        self._make = make
        self._errors = errors
        self._unpack = make()
        self._input = b""
        self.cut = False
        """Whether it ended before its end."""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        limit = size if size > 0 else CHUNK
        while not self.cut:
            if self._unpack.eof:
                # Members follow one another when logs were appended.
                self._input = self._unpack.unused_data or self._packed.read(1 << 18)
                if not self._input.strip(b"\0"):
                    return b""
                self._unpack = self._make()
            elif not self._input and getattr(self._unpack, "needs_input", True):
                self._input = self._packed.read(1 << 18)
                self.cut = not self._input
            try:
                told = cast("bytes", self._unpack.decompress(self._input, limit))
            except self._errors:
                self.cut = True
                return b""
            self._input = getattr(self._unpack, "unconsumed_tail", b"")
            if told:
                return told
        return b""


def _gzip(packed: IO[bytes]) -> IO[bytes]:
    unpacked = _Unpacked(packed, lambda: zlib.decompressobj(wbits=31), zlib.error)
    return cast("IO[bytes]", unpacked)


def _bzip2(packed: IO[bytes]) -> IO[bytes]:
    import bz2

    return cast("IO[bytes]", _Unpacked(packed, bz2.BZ2Decompressor, OSError))


def _xz(packed: IO[bytes]) -> IO[bytes]:
    import lzma

    return cast("IO[bytes]", _Unpacked(packed, lzma.LZMADecompressor, lzma.LZMAError))


def _zstd(packed: IO[bytes]) -> IO[bytes]:
    import zstandard

    unpacked = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
    return cast("IO[bytes]", unpacked)


_PACKED: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": _gzip,
    b"BZh": _bzip2,
    b"\xfd7zXZ\0": _xz,
    b"\x28\xb5\x2f\xfd": _zstd,
}


def _zipped(stream: IO[bytes], path: str, notes: list[str], depth: int) -> list[Reading]:
    """Read the entries of a zip archive, such as GitHub serves the logs of a run."""
    import zipfile

    found: list[Reading] = []
    with tempfile.SpooledTemporaryFile(_SPOOLED) as whole:
        for chunk in iter(lambda: stream.read(CHUNK), b""):
            whole.write(chunk)
        try:
            archive = zipfile.ZipFile(whole)
        except (zipfile.BadZipFile, ValueError, OverflowError):
            raise ValueError("is a zip archive that is cut off or damaged") from None
        for entry in sorted(archive.infolist(), key=lambda each: each.filename):
            if entry.is_dir():
                continue
            name = f"{path}/{entry.filename}"
            try:
                with archive.open(entry) as file:
                    found += read_stream(file, name, notes, depth)
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError):
                notes.append(f"{name!r} is damaged")
            except (RuntimeError, NotImplementedError) as error:
                notes.append(f"{name!r}: {error}")
            except ValueError as error:
                notes.append(f"{name!r} {error}")
    return found


def _tarred(stream: IO[bytes], path: str, notes: list[str], depth: int) -> list[Reading]:
    """Read the entries of a tar archive."""
    import tarfile

    found: list[Reading] = []
    with contextlib.suppress(tarfile.ReadError, EOFError):
        archive = tarfile.open(fileobj=stream, mode="r|")  # noqa: SIM115 - it holds nothing
        for entry in archive:
            file = archive.extractfile(entry) if entry.isfile() else None
            if file is None:
                continue
            name = f"{path}/{entry.name}"
            try:
                found += read_stream(file, name, notes, depth)
            except (ValueError, tarfile.ReadError) as error:
                notes.append(f"{name!r} {error}")
        return found
    notes.append(f"{path!r} is an archive that is cut off or damaged")
    return found


class _Counted(io.RawIOBase):
    """Counts what is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        told = self._file.read(size)
        self.size += len(told)
        return told


def _peek(file: IO[bytes]) -> tuple[bytes, IO[bytes]]:
    """Return the first bytes, and the file as from its beginning; pipes cannot seek."""
    head = b""
    idle = getattr(file, "idle", None)
    while len(head) < _HEAD and (more := file.read(_HEAD - len(head))):
        head += more
        if idle is not None and idle():
            break
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


def _chunks(head: bytes, stream: IO[bytes], idle: _Idle | None) -> Iterator[bytes]:
    """Return the log in pieces, as UTF-8 where a byte order mark says that it is UTF-16.

    An empty piece says that more is not there yet.
    """
    encoding = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}.get(head[:2])
    if b"\0" not in head:
        encoding = None  # two stray bytes, not a mark
    decoder = codecs.getincrementaldecoder(encoding)("replace") if encoding else None
    while chunk := stream.read(CHUNK):
        if text := decoder.decode(chunk).encode() if decoder else chunk:
            yield text
        if idle is not None and idle():
            yield b""


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
    known = messages.parse(message, raised=True)
    if known is not None and known.named and failure.seen is None and not failure.died:
        failure.seen = Seen(line, known)
    failure.error = failure.error or message.partition("\n")[0]
    run.failures.append(failure)


def _junit(head: bytes, stream: IO[bytes]) -> tuple[list[Run], str]:
    from xml.etree import ElementTree as ET

    if b"<!DOCTYPE" in head or b"<!ENTITY" in head:
        raise ValueError("has a document type definition, which no JUnit report needs")
    run = Run()
    run.pytest = run.ended = True
    run.ordered = False  # its rows are in the order in which workers reported
    run.end = "the report is cut off"
    parser: Any = ET.XMLPullParser(("start", "end"))
    suites: list[Any] = []
    root = cut = False
    rows = 0
    while not cut and (chunk := stream.read(CHUNK)):
        try:
            parser.feed(chunk)
        except ET.ParseError:
            cut = True
        try:
            for what, element in parser.read_events():
                if not root and element.tag not in {"testsuites", "testsuite"}:
                    raise ValueError("is XML, but no JUnit report")
                root = True
                if what == "start" and element.tag == "testsuite":
                    suites.append(element)
                    _suite(run, element)
                elif what == "end" and element.tag == "testcase":
                    rows += 1
                    _testcase(run, element)
                    if suites:
                        suites[-1].clear()
        except ET.ParseError:
            cut = True
    try:
        parser.close()
    except ET.ParseError:
        cut = True
    if not root:
        raise ValueError("is XML, but no JUnit report")
    # A test whose teardown failed has two rows.
    run.collected = run.collected if rows < (run.collected or 0) else None
    run.ended = not cut
    return [run], "the report is cut off" if cut else ""


def _suite(run: Run, element: Any) -> None:
    """Take the suite's own word on how many tests it has, and how long it took."""
    count, seconds = element.get("tests") or "", element.get("time") or ""
    if re.fullmatch(r"\d{1,9}", count):
        run.collected = (run.collected or 0) + int(count)
    if re.fullmatch(r"\d{1,9}(?:\.\d+)?", seconds):
        run.duration += float(seconds)


def _testcase(run: Run, element: Any) -> None:
    nodeid = _junit_nodeid(
        element.get("classname") or "", element.get("name") or "", element.get("file")
    )
    again = any(test.nodeid == nodeid for test in run.order[-2:])
    test = run.test(nodeid)
    seconds = element.get("time") or ""
    test.duration += float(seconds) if re.fullmatch(r"\d{1,9}(?:\.\d+)?", seconds) else 0.0
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


def _html(stream: IO[bytes]) -> tuple[list[Run], str]:
    text = _whole(stream).decode("utf-8", "replace")
    run = Run()
    run.pytest = run.ended = True
    run.ordered = False
    run.end = "the page is cut off"
    cut = not text.rstrip().lower().endswith("</html>")
    blob = re.search(r"data-jsonblob=(\"[^\"]*\"|'[^']*')", text)
    if blob is not None:
        try:
            tests = json.loads(html.unescape(blob[1][1:-1]))["tests"]
            rows = [
                (each.get("testId") or name, str(each.get("result")), str(each.get("log") or ""))
                for name, group in tests.items()
                for each in group
            ]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError("is a damaged report of pytest-html") from None
    elif "data-jsonblob" in text:
        raise ValueError("is a report of pytest-html that is cut off before its results")
    else:
        rows = list(_old_html(text))
        if not rows:
            raise ValueError("is a page, but no report of pytest-html that has results")
    for nodeid, result, log in rows:
        _row(run, nodeid, result, log)
    run.ended = not cut
    return [run], "the page is cut off" if cut else ""


def _row(run: Run, nodeid: str, result: str, log: str) -> None:
    """Enter a row of pytest-html's table."""
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
    return [of_record(records.parse(_whole(stream)))]


_ENDED_WELL = {"passed", "skipped", "xfailed", "xpassed"}


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
    again: set[str] = set()
    for number, each in enumerate(recorded.tests, 1):
        if each.outcome == "rerun":
            again.update([each.nodeid] if each.oom else [])
            continue  # it was made again alone, and that attempt counts
        worker = "/".join(filter(None, (each.host, each.worker))) or None
        test = run.test(each.nodeid, worker)
        test.outcome = words.get(each.outcome, "FAILED")
        test.duration += each.duration
        if each.cards:
            run.peaks[each.nodeid] = max(card.peak for card in each.cards)
            # What others left there before it, or a wider fixture holds, is not its own.
            own = max(card.peak - card.baseline for card in each.cards)
            run.own_peaks[each.nodeid] = max(own, run.own_peaks.get(each.nodeid, 0))
        leaked = sum(card.leaked for card in each.cards) + sum(f.leaked for f in each.fixtures)
        if leaked:
            run.leftovers[worker].append(Leftover(each.nodeid, leaked))
            run.leaks[each.nodeid] = leaked
        if each.nodeid in again and each.outcome == "passed":
            run.recovered.append(each.nodeid)
        if not (each.oom or each.outcome == "crashed") or each.outcome in _ENDED_WELL:
            continue
        kind = "ERROR" if each.outcome == "error" else "FAILED"
        failure = Failure(number, each.nodeid, kind, "call" if kind == "FAILED" else "setup")
        failure.nodeid, failure.worker = each.nodeid, worker
        failure.died = each.outcome == "crashed"
        found = messages.parse(each.oom, raised=True) if each.oom else None
        if found is not None:
            sizes = dict(found.sizes)
            if each.cards:
                usage = max(each.cards, key=lambda card: card.peak)
                sizes.setdefault("allocated", usage.peak)
                sizes.setdefault("total", totals.get(usage.card, 0))
            failure.seen = Seen(number, found._replace(sizes=sizes))
        run.failures.append(failure)
    for left in run.leftovers.values():
        left.sort(key=lambda each: -each.size)
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
    found = messages.parse(text, raised=True)
    if found is None:
        raise ValueError("the table of messages lacks PyTorch's")
    failure.seen = Seen(number, found._replace(sizes=sizes, printed={}, device=device))
    return failure
