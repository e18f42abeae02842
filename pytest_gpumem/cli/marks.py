"""``gpumem marks``: which marks ``gpu`` do not hold, by what their tests took; corrects them."""

from __future__ import annotations

import ast
import re
import sys
import tokenize
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem import files, records
from pytest_gpumem.cli.history import ask_where, load_history
from pytest_gpumem.reports.counts import plural
from pytest_gpumem.scheduling.history import MARGIN, PEAKS, History, module, with_margin
from pytest_gpumem.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence

GENEROUS = 1.5
"""Times what its tests took that a mark may ask for."""
SLACK = 64 * 2**20
"""Bytes more that any mark may ask for: less is not worth a change."""

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Mark(NamedTuple):
    """A mark ``gpu`` in the source."""

    line: int
    size: ast.Constant | None
    """The size that it asks for, None where that is said otherwise, or not at all."""
    text: str
    """How it is written, for one that is left alone; "" for one that asks for no size."""


class Finding(NamedTuple):
    """A mark that does not hold; bytes."""

    mark: Mark
    asked: int
    took: int
    runs: int
    tests: tuple[str, ...]
    """Those it is on, the one that took most first."""
    instead: str
    """What it had better ask for."""


class Taken(NamedTuple):
    """What a test took, its wider fixtures included, and in how many runs that was seen."""

    size: int
    runs: int


class Source:
    """A file with tests.

    Args:
        path: the file.

    Raises:
        OSError: when it cannot be read.
        SyntaxError, ValueError, RecursionError, MemoryError: when it is not Python, as its parser
            says that.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = path.read_bytes()
        lines = iter(self._data.splitlines(keepends=True))
        self._encoding, _ = tokenize.detect_encoding(lines.__next__)
        self.text = self._data.decode(self._encoding)
        self.tree = ast.parse(self.text)
        self._pytest, self._mark = _imported(self.tree)
        self._named: dict[str, ast.expr] = {}
        """Marks that have a name of their own in this file."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and self._is_gpu(node.value):
                names = (each.id for each in node.targets if isinstance(each, ast.Name))
                self._named |= {name: node.value for name in names if name != "pytestmark"}

    def mark_of(self, names: Sequence[str]) -> Mark | None:
        """Return the closest mark of a test, known by the names of its classes and its own.

        None where it has none, or is not defined here: a class may inherit it.
        """
        around: list[ast.Module | _Definition] = [self.tree]
        for name in names:
            found = [each for each in _definitions(around[-1]) if each.name == name]
            if not found:
                return None
            around.append(found[-1])  # of two of one name the last one holds
        if hidden := self._in_parameters(around[-1]):
            return hidden
        for node in reversed(around):
            for expression in self._expressions(node):
                if self._is_gpu(expression):
                    return self._read(expression)
        return None

    def _expressions(self, node: ast.AST) -> Iterator[ast.expr]:
        """Yield the marks of a node, the closest first."""
        if isinstance(node, _Definition):
            yield from reversed(node.decorator_list)
        if isinstance(node, ast.Module | ast.ClassDef):
            for each in node.body:
                targets = each.targets if isinstance(each, ast.Assign) else []
                if isinstance(each, ast.AnnAssign | ast.AugAssign) and each.value is not None:
                    targets = [each.target]
                if not any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in targets):
                    continue
                value = each.value  # type: ignore[attr-defined]  # it is an assignment
                yield from value.elts if isinstance(value, ast.List | ast.Tuple) else [value]

    def _in_parameters(self, node: ast.AST) -> Mark | None:
        """Return a mark on some parameters of a test, of which is not known which test has it."""
        for decorator in getattr(node, "decorator_list", ()):
            if self._is_gpu(decorator):
                continue
            for each in ast.walk(decorator):
                if isinstance(each, ast.expr) and self._is_gpu(each):
                    return Mark(each.lineno, None, f"{self._written(each)}, on some parameters")
        return None

    def _is_gpu(self, node: ast.expr) -> bool:
        function = node.func if isinstance(node, ast.Call) else node
        if isinstance(function, ast.Name):
            return function.id in self._named
        return (
            isinstance(function, ast.Attribute)
            and function.attr == "gpu"
            and self._is_mark(function.value)
        )

    def _is_mark(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self._mark
        return (
            isinstance(node, ast.Attribute)
            and node.attr == "mark"
            and isinstance(node.value, ast.Name)
            and node.value.id in self._pytest
        )

    def _read(self, node: ast.expr) -> Mark:
        function = node.func if isinstance(node, ast.Call) else node
        named = self._named[function.id] if isinstance(function, ast.Name) else None
        if isinstance(named, ast.Call):
            # Others may use it under this name, here or elsewhere.
            return Mark(node.lineno, None, self._written(named))
        if not isinstance(node, ast.Call):
            return Mark(node.lineno, None, "")
        sizes = [*node.args[:1], *(each.value for each in node.keywords if each.arg == "vram")]
        if any(each.arg is None for each in node.keywords):
            return Mark(node.lineno, None, self._written(node))
        if not sizes or (isinstance(sizes[0], ast.Constant) and sizes[0].value is None):
            return Mark(node.lineno, None, "")
        size = sizes[0]
        if isinstance(size, ast.Constant) and isinstance(size.value, int | str):
            return Mark(size.lineno, size, "")
        return Mark(node.lineno, None, self._written(node))

    def _written(self, node: ast.expr) -> str:
        return " ".join((ast.get_source_segment(self.text, node) or "").split())

    def corrected(self, findings: Iterable[Finding]) -> bytes:
        """Return the file with the sizes of marks as they had better be, and nothing else changed.

        Raises:
            ValueError: in one sentence, when more than that would change.

        """
        lines = re.split(r"(?<=\n)|(?<=\r)(?!\n)", self.text)
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line))

        def place(line: int, column: int) -> int:
            # Columns count bytes of UTF-8, whatever the file's encoding is.
            before = lines[line - 1].encode()[:column].decode()
            return starts[line - 1] + len(before)

        text = self.text
        changes = []
        for finding in findings:
            size = finding.mark.size
            if size is not None and size.end_lineno and size.end_col_offset is not None:
                begin = place(size.lineno, size.col_offset)
                end = place(size.end_lineno, size.end_col_offset)
                changes.append((begin, end, finding.instead))
                size.value, size.kind = finding.instead, None
        for begin, end, instead in sorted(changes, reverse=True):
            quote = text[begin] if text[begin] in "'\"" else '"'
            text = f"{text[:begin]}{quote}{instead}{quote}{text[end:]}"
        data = text.encode(self._encoding)
        # Some encodings have several ways to write a text, or do not write all of it.
        same = (
            self.text.encode(self._encoding) == self._data and data.decode(self._encoding) == text
        )
        if not same or ast.dump(ast.parse(text)) != ast.dump(self.tree):
            raise ValueError(f"{str(self.path)!r} cannot be corrected without changing more in it")
        return data


def _definitions(node: ast.AST) -> Iterator[_Definition]:
    """Yield the classes and functions in a node, without those within these."""
    for each in ast.iter_child_nodes(node):
        if isinstance(each, _Definition):
            yield each
        else:
            yield from _definitions(each)


def _imported(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Return the names under which a file knows ``pytest`` and ``pytest.mark``."""
    modules, marks = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {each.asname or each.name for each in node.names if each.name == "pytest"}
        elif isinstance(node, ast.ImportFrom) and node.module == "pytest":
            marks |= {each.asname or each.name for each in node.names if each.name == "mark"}
    return modules, marks


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Enter ``gpumem marks``."""
    parser = commands.add_parser(
        "marks",
        help="Say which marks gpu(vram=...) do not hold, by what their tests took; correct them.",
        epilog="Exit status: 0; 1 when marks do not hold and were not corrected; 2 for bad input.",
    )
    ask_where(parser)
    parser.add_argument(
        "--root", type=Path, default=Path(), metavar="DIR",
        help="Where the paths of node ids begin: pytest's rootdir. Default: here.",
    )  # fmt: skip
    parser.add_argument("--write", action="store_true", help="Correct the sizes in the source.")
    parser.set_defaults(run_command=_marks)


def _marks(chosen: argparse.Namespace) -> int:
    if chosen.run is not None:
        history = History()
        history.learn(records.load_run(chosen.run).tests)
    else:
        history = load_history(chosen.history)
    found = held = corrected = written = 0
    alone: list[str] = []
    unread: list[str] = []
    for name, taken in sorted(_by_file(history).items()):
        path = chosen.root / name
        if not path.is_file():
            continue
        try:
            source = Source(path)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            unread.append(f"{name}: {error or 'too deeply nested'}")
            continue
        findings, others, good = judge(source, taken)
        alone += (f"{name}:{mark.line}: {mark.text}" for mark in others)
        for finding in findings:
            sys.stdout.write(f"{name}:{finding.mark.line}: {_text(finding)}\n")
        found, held = found + len(findings), held + good
        if findings and chosen.write:
            try:
                data = source.corrected(findings)
            except ValueError as error:
                unread.append(str(error))
                continue
            # Latin-1 has a character for each byte.
            with files.replace(path.resolve(), encoding="latin-1") as file:
                file.write(data.decode("latin-1"))
            corrected += len(findings)
            written += 1
    _list("left alone, for their sizes do not stand there in words", alone)
    _list("files left alone", unread)
    if written:
        marks = plural(corrected, "mark")
        sys.stdout.write(f"corrected: {marks} in {plural(written, 'file')}\n")
    if held or not (found or alone or unread):
        sys.stdout.write(_HELD.get(held, f"{held:,} marks hold") + "\n")
    return 1 if found > corrected else 0


_HELD = {0: "no mark gpu with a size was found on tests that took VRAM", 1: "1 mark holds"}


def _list(title: str, lines: Sequence[str]) -> None:
    if lines:
        sys.stdout.write(f"{title}\n")
        sys.stdout.writelines(f"  {each}\n" for each in lines)


def _by_file(history: History) -> dict[str, dict[str, Taken]]:
    """Return by file what its tests took, of which anything was seen."""
    found: dict[str, dict[str, Taken]] = defaultdict(dict)
    for nodeid, known in history:
        size = history.highest(nodeid) + known.fixtures
        if size:
            found[module(nodeid)][nodeid] = Taken(size, min(known.runs, PEAKS))
    return found


def judge(source: Source, taken: dict[str, Taken]) -> tuple[list[Finding], list[Mark], int]:
    """Return the marks that do not hold, those of which that is not known, and how many hold."""
    on: dict[Mark, list[str]] = defaultdict(list)
    for nodeid in taken:
        plain = nodeid.partition("::")[2].partition("[")[0]
        mark = source.mark_of(plain.split("::"))
        if mark is not None:
            on[mark].append(nodeid)
    findings, held = [], 0
    for mark, tests in on.items():
        if mark.size is None:
            continue
        try:
            asked = parse_bytes(mark.size.value)  # type: ignore[arg-type]  # an int or a text
        except ValueError:
            continue  # pytest says so
        tests.sort(key=lambda nodeid: -taken[nodeid].size)
        took, runs = taken[tests[0]].size, max(taken[each].runs for each in tests)
        if not took <= asked <= max(GENEROUS * took, took + SLACK):
            findings.append(Finding(mark, asked, took, runs, tuple(tests), enough(took)))
        else:
            held += 1
    others = sorted({mark for mark in on if mark.text}, key=lambda mark: mark.line)
    return sorted(findings, key=lambda finding: finding.mark.line), others, held


def enough(took: int) -> str:
    """Return what a mark should ask for: a tenth more than its tests took, rounded up."""
    size = with_margin(took, MARGIN)
    if size >= 2**30:
        tenths = -(-size * 10 // 2**30)
        return f"{tenths // 10}.{tenths % 10}GiB"
    return f"{-(-size // 2**20)}MiB"


def _text(finding: Finding) -> str:
    tests = len(finding.tests)
    runs = "1 run" if finding.runs == 1 else f"{finding.runs} runs"
    more = f" and {tests - 1} more" if tests > 1 else ""
    name = finding.tests[0].rpartition("::")[2]
    return (
        f"asked {format_bytes(finding.asked)}, took {format_bytes(finding.took)} in {runs} "
        f"({name}{more}); {finding.instead} would do"
    )
