"""Follows a log line by line: which tests ran where and in what order, and what felled them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_gpumem.forensics import lines, messages
from pytest_gpumem.forensics.attribution import resolve
from pytest_gpumem.forensics.grammars.host import PROBABLE_KILL, SHELL_KILL
from pytest_gpumem.forensics.runs import FAILING, Failure, Kill, Run, Seen, Summary, Test
from pytest_gpumem.forensics.signatures import signature, subject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pytest_gpumem.forensics.lines import Line, Text
    from pytest_gpumem.forensics.messages import Message

_LOGGED_KEPT = 1000
_SURVIVED = {"TRACE", "DEBUG", "INFO", "NOTICE", "WARNING", "WARN"}
"""Levels of log records: who logs a failure as less than an error goes on."""

_SAID = 80
"""How far into a line a program says what it does next; further on are advice and paths."""
_FATAL_LEVELS = {"ERROR", "CRITICAL", "FATAL"}

FILE = r"[^\s:=]\S*?\.(?:py|md|rst|txt|ya?ml|json|ipynb)"
_WORDS = r"PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS|RERUN|SUBPASSED|SUBPASS|SUBFAILED|SUBFAIL"
_SUBTESTS = {"SUBFAIL": "FAILED", "SUBFAILED": "FAILED"}
_PROGRESS = r"\[ *(?:\d+%|\d+/\d+)\]"
_BANNER = re.compile(r"={2,} (.+?) ={2,}$|=+ (.*\bin \d.*?) =+$")
_RULE = re.compile(r"_+ (.+?) _+$")
_CAPTURED = re.compile(r"-+ ?Captured (?:std\w+|log)\b")
_WORKER_LINE = re.compile(r"\[(gw\d+)\] \w+ -- Python ")
_XDIST = re.compile(rf"\[(gw\d+)\] (?:{_PROGRESS} )?({_WORDS}) ({FILE}(?:::.*)?)$")
_BEGUN = re.compile(rf"({FILE}::\w[^\s\[]*(?:\[.*?\](?=\s|$))?)(?: (.*))?$")
_OUTCOME = re.compile(
    rf"(?:^|(?<=[^\w.])|(?<=\w))({_WORDS})(?: \([^()]{{0,200}}\))? *({_PROGRESS})?(?: [\d.]+s)?$"
)
_DOTS = re.compile(rf"(?:({FILE}) )?([.FEsxXRrpuPf,-]+) *({_PROGRESS})?$")
_UNCARRIED = re.compile(r"=|[.FEsxX]+ *\[|\S+\.py(?:::| )|\[gw\d")
_SUMMARY = re.compile(
    r"(FAILED|ERROR|SUBFAILED|SUBFAIL|XFAIL|XPASS|PASSED|RERUN|SKIPPED)"
    r"(?: ?\[[\d.]+s\]|(?:\[[^\]]*\])? ?(?:\([^)]*\))?)? "
    rf"({FILE}(?:::\S(?:[^\[]*?\[.*?\](?=$| [A-Z-]|\[)|[^\[]*?))?)(?: - (.*))?$"
)
_CUT_SUMMARY = re.compile(rf"(FAILED|ERROR) ({FILE}::\S+?)(?:\.\.\.)?()$")
_BEHIND = re.compile(rf"(?<![\w./-])(FAILED|ERROR) ({FILE}::\S.{{0,400}}?) - (\S.*)$")
_DURATION = re.compile(rf"(\d{{1,9}}(?:\.\d+)?)s (?:setup|call|teardown) +({FILE}::.*)$")
_TALLY = re.compile(
    r"\b(\d{1,9}) (passed|failed|skipped|deselected|xfailed|xpassed|errors?|warnings?|rerun)\b"
)
_TOOK = re.compile(r"\bin (\d{1,9}(?:\.\d+)?)s\b")
_NO_TESTS = re.compile(r"no tests (?:ran|collected)")
_LOCATION = re.compile(rf"({FILE}):(\d+):(?: (\S.*))?$")
# --tb=native, and groups of exceptions in any style: the frame that bears the test's name.
_NATIVE = re.compile(r'[ |]*File "([^"]+\.py)", line \d+, in (\w+)$')
_ROOT = re.compile(r"rootdir: ([^,]+)")
_COLLECTED = re.compile(
    r"collected (\d{1,9}) items?(?: / (?:\d+ errors? / )?(\d{1,9}) deselected)?"
)
_WORKERS = re.compile(r"\d+ workers? \[(\d{1,9}) items?\]|gw0 \[(\d{1,9})\]|bringing up nodes")
_LONE_OUTCOME = re.compile(r"(.*?)(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)$")
_SELF = re.compile(r"self = <([\w.]+)\.(\w+) testMethod=(\w+)>")
_UNITTEST = re.compile(r"(?:ERROR|FAIL): (\w+) \(([\w.]+)\)")
_UNITTEST_TOTAL = re.compile(r"Ran (\d{1,9}) tests? in (\d{1,9}(?:\.\d+)?)s")
_REPEAT = re.compile(r"(?:\w+=\S+ )*python3? (\S+\.py) (?:\w+\.)?(\w+)$")
_CRASH = re.compile(r"(?:worker|Slave|slave) '(gw\d+)' crashed while running '(.+?)'?$")
_DOWN = re.compile(r"\[(gw\d+)\] node down: ")
_ERROR_LINE = re.compile(r"E {2,}(.*)")
_WHAT = re.compile(
    r"(?:(.*?)\s*terminate called after throwing an instance of .*|\s*what\(\): +(.*))$"
)
_EXCEPTION = re.compile(
    r"(?:[A-Za-z_]\w{0,80}\.){0,12}\w{0,80}"
    r"(?:Error|Exception|Exit|Failed|Warning|Timeout)\w{0,80}: "
)
# Only a traceback names the exception's module.
_QUALIFIED = re.compile(r"(?:[A-Za-z_]\w{0,80}\.){1,12}\w{0,80}(?:Error|Exception)\w{0,80}: ")
# An error whose words are on the next line, or were cut by a width.
_UNENDED = re.compile(
    r"(?:[A-Za-z_][\w.]{0,200}(?:Error|Exception|Exhausted)\w*: (?!.{0,2000}emory).*"
    r"|.{0,400}(?:(?:Error|Exception|failure|what\(\)|exhausted|EXHAUSTED)[^:]{0,80}|\(\d+\)): ?"
    r"|.{0,400}\b(?:Out|of|memory|CUDA|RESOURCE_EXHAUSTED:|exhausted:)) *$"
)
_FRAME = re.compile(r'\s+(?:File "|\S)|Traceback \(most')
_FAULT = re.compile(
    r"Fatal Python error: (?P<fatal>Segmentation fault|Illegal instruction|Bus error"
    r"|Floating.point exception|Cannot recover from stack overflow)"
    r"|\+{3,} (?P<timeout>Timeout) \+{3,}|^(?P<shell>Segmentation fault|Bus error)\b"
)
"""What ends a process in its own words, which are not memory's."""
_PHASE = re.compile(r"ERROR (?:at (setup|teardown) of|(collecting)) (.+)")
_NAME = re.compile(r"[\w.:<>/\\ ()-]+(?:\[.*)?")
# Where a new thing begins, a message that was wrapped has ended.
_NEW = re.compile(
    rf"(?:[=_-]{{3,}}|{FILE}:[\d:]|FAILED |ERROR |PASSED |SKIPPED |\[gw\d|Traceback |File |"
    r"frame #|>|.{0,80}\bout of memory\b|During handling|The above exception|\d+ passed|\d+ failed)"
)


class Follower:
    """Reads the lines of one log in order and keeps its runs."""

    def __init__(self, watch: Callable[[Seen, str | None], None] | None = None) -> None:
        self.runs = [Run()]
        self._watch = watch
        """Told of each message when it is read, with its test as far as it is known by then."""
        self._watched = 0
        self._section = ""
        """``progress``, ``failures``, ``errors``, ``short`` (the summary), ``other``, or none."""
        self._failure: Failure | None = None
        self._captured = False
        self._fault = ""
        """What ended a process since the last worker went down."""
        self._carrier: re.Pattern[str] | None = None
        """What stands before each line, where a banner has shown it."""
        # Each takes the line, or leaves it to the next.
        self._steps: tuple[Callable[[Line, Text], bool], ...] = (
            self._banner,
            self._progress,
            self._summary,
            self._header,
            self._detail,
            self._death,
            self._memory,
            self._logged,
        )

    @property
    def _run(self) -> Run:
        return self.runs[-1]

    def follow(self, found: Iterable[Line]) -> list[Run]:
        """Read the lines and return the runs."""
        for line in found:
            texts = lines.read_all(line.raw, self._carrier)
            first = texts[0]
            if first.body.endswith(("===", "%]")) and not (
                self._run.pytest or _UNCARRIED.match(first.body)
            ):
                self._carrier = lines.carrier(first.whole) or self._carrier
                texts = lines.read_all(line.raw, self._carrier)
            for text in texts:
                any(step(line, text) for step in self._steps)
            if self._watch is not None:
                self._report(self._watch)
        for run in self.runs:
            resolve(run)
        return self.runs

    def _report(self, watch: Callable[[Seen, str | None], None]) -> None:
        """Tell of the messages that came with the last line."""
        run, failure = self._run, self._failure
        told = [(seen, test.nodeid if test else None) for seen, test in run.loose[-1:]]
        if failure is not None and failure.seen is not None:
            told.append((failure.seen, failure.nodeid or failure.name))
        for seen, test in told:
            if seen.line > self._watched:
                self._watched = seen.line
                watch(seen, test)

    def _banner(self, line: Line, text: Text) -> bool:
        """Read a line that begins or ends a section or a run."""
        body = text.body
        if (self._section == "progress" or not self._run.pytest) and self._prologue(body):
            return True
        if not body.startswith("="):
            # -q prints the last line bare.
            last = _TOOK.search(body) and (_TALLY.match(body) or _NO_TESTS.match(body))
            if last:
                self._end(line, body)
            return last is not None
        match = _BANNER.match(body)
        if match is None:
            return False
        title = match[1] or match[2]
        self._failure, self._captured = None, False
        if title.startswith("test session starts"):
            if self._run.pytest or self._run.loose or self._run.kills:
                self.runs.append(Run())
            self._run.pytest = True
            self._section = "progress"
        elif _TOOK.search(title) and (_TALLY.search(title) or _NO_TESTS.search(title)):
            self._end(line, title)
        elif title in {"FAILURES", "ERRORS", "short test summary info"}:
            self._resume()
            self._section = title.split()[0].lower()
        else:
            # PASSES, XFAILURES, warnings, slowest durations, our own section ...
            self._section = "other"
        return True

    def _prologue(self, body: str) -> bool:
        """Read what pytest says before the first test."""
        run = self._run
        if match := _ROOT.match(body):
            run.root = match[1].strip()
        elif match := _COLLECTED.match(body):
            run.collected = int(match[1]) - int(match[2] or 0)
        elif match := _WORKERS.match(body):
            run.workers = True
            run.collected = int(match[1] or match[2] or 0) or run.collected
        else:
            return False
        return True

    def _resume(self) -> None:
        """Make sure that what comes belongs to a pytest run that has not ended."""
        if self._run.ended:
            self.runs.append(Run())
        self._run.pytest = True

    def _end(self, line: Line, text: str) -> None:
        run = self._run
        for number, word in _TALLY.findall(text):
            run.tally["error" if word == "errors" else word] += int(number)
        took = _TOOK.search(text)
        run.duration += float(took[1]) if took else 0.0
        run.ended = run.pytest = True
        run.end_line = line.number
        run.current = None
        self._section, self._failure = "", None

    def _progress(self, line: Line, text: Text) -> bool:
        """Read a line that tells that a test began or ended."""
        body = text.body
        if "::" not in body and "]" not in body and self._run.current is None:
            return self._dots(body)
        if match := _XDIST.match(body):
            self._resume()
            self._section = "progress"
            if "::" in match[3]:
                self._outcome(self._run.test(match[3], match[1]), match[2])
            return True
        if match := _DURATION.match(body.lstrip()):
            if test := self._run.find(match[2]):
                test.duration += float(match[1])
            return True
        if self._section in {"failures", "errors", "short", "other"}:
            return False
        # With -s a test's output stands between its name and its outcome.
        at = max(0, len(body) - 300)
        ended = _OUTCOME.search(body, at)
        begun = _BEGUN.match(body[: ended.start()].rstrip() if ended else body)
        if ended and begun:
            self._resume()
            self._section = "progress"
            self._outcome(self._run.test(begun[1]), ended[1])
            self._run.current = None
            return True
        if self._run.current is not None and (word := self._lone(line, body, ended)):
            self._outcome(self._run.current, word)
            self._run.current = None
            # What the test printed before it on the same line was survived, or is its failure's.
            return True
        return self._dots(body) or (begun is not None and self._begin(line, begun))

    def _lone(self, line: Line, body: str, ended: re.Match[str] | None) -> str | None:
        """Return the outcome that -s leaves at the end of what a test printed."""
        if ended and ended[2]:
            return ended[1]
        match = _LONE_OUTCOME.match(body)
        if match is None:
            return None
        # A program may print such a word itself: then its test has not ended.
        after = next((text.body for text in _following(line, 1, self._carrier)), "")
        alone = not match[1] or not after.strip() or _BEGUN.match(after) or after.startswith("=")
        return match[2] if alone else None

    def _begin(self, line: Line, begun: re.Match[str]) -> bool:
        """Enter a test whose nodeid stands alone, or before what it prints."""
        if self._section != "progress":
            return False
        if not self._run.distributed:
            self._run.current = self._run.test(begun[1])
            if begun[2] and not (crashed := _WHAT.match(begun[2])):
                _ = self._loose(line, begun[2]) or self._kill(line, begun[2])
            elif begun[2] and crashed:
                return True
        return True

    def _outcome(self, test: Test, word: str) -> None:
        # A teardown may fail after the test passed; nothing that comes later makes it pass.
        word = _SUBTESTS.get(word, word)
        test.torn = test.torn or (test.outcome == "PASSED" and word == "ERROR")
        if test.outcome not in FAILING or word == "FAILED":
            test.outcome = word

    def _dots(self, body: str) -> bool:
        run = self._run
        if self._section not in {"", "progress"}:
            return False
        match = _DOTS.match(body)
        if match is None or not (match[1] or match[3]):
            return False
        self._resume()
        run = self._run
        file = match[1] or next(reversed(run.letters), ("", ""))[0]
        for number, letter in enumerate(match[2], run.letters.total() + 1):
            run.letters[file, letter] += 1
            if letter in run.marked:
                run.marked[letter].append((number, file))
        return True

    def _summary(self, line: Line, text: Text) -> bool:
        body = text.body
        match = body[:1].isupper() and (_SUMMARY.match(body) or _CUT_SUMMARY.match(body))
        if not match:
            # Behind a head that nobody knows, what it says of memory shows that it is one.
            match = not self._captured and _BEHIND.search(body)
            if not match or messages.parse(match[3], raised=True) is None:
                return False
        kind = _SUBTESTS.get(match[1], match[1])
        if kind in FAILING:
            self._run.pytest = True
            subtest = match[1] in _SUBTESTS
            self._run.summary.append(Summary(kind, match[2], match[3] or "", line.number, subtest))
            if self._section not in {"failures", "errors"}:
                self._failure = None
        return True

    def _header(self, line: Line, text: Text) -> bool:
        """Read the line that names the test of a section."""
        match = text.body.startswith("_") and _RULE.match(text.body)
        if not match or not match[1].strip("_ "):
            return False
        if self._section in {"other", "short"}:
            return True
        name, phase = match[1], "call"
        kind = "ERROR" if self._section == "errors" else "FAILED"
        if where := _PHASE.match(name):
            kind, phase, name = "ERROR", where[1] or "collect", where[3]
        if self._section not in {"failures", "errors"}:
            # The log begins within a section, or it is no header at all.
            if not _NAME.fullmatch(name):
                return True
            self._section = "errors" if where else "failures"
        self._fail(line, name, kind, phase)
        return True

    def _fail(self, line: Line, name: str, kind: str = "FAILED", phase: str = "call") -> Failure:
        self._failure = Failure(line.number, name, kind, phase)
        self._captured = False
        self._run.failures.append(self._failure)
        return self._failure

    def _detail(self, line: Line, text: Text) -> bool:
        """Read what a failing test's section says about the test itself."""
        body = text.body
        if match := _UNITTEST.match(body):
            # Python 3.11 on: "test_step (mod.Class.test_step)".
            owner = match[2].removesuffix(f".{match[1]}")
            self._section = "failures"
            self._fail(line, f"{owner}.{match[1]}")
            return True
        if match := _UNITTEST_TOTAL.match(body):
            self._run.tally["tests"] += int(match[1])
            self._run.duration += float(match[2])
            self._failure, self._section = None, ""
            return True
        failure = self._failure
        if failure is not None and (match := _NATIVE.match(text.whole)):
            base = failure.name.partition("[")[0].rpartition(".")[2]
            if match[2] == base and not self._captured:
                failure.file = match[1].removeprefix(f"{self._run.root}/")
            return True
        location = _LOCATION.match(body) if not self._captured else None
        if location and self._section == "failures" and not (failure and failure.name):
            # --tb=line has no headers: a line with the place ends each failure.
            if location[3] and not location[3].startswith("in "):
                failure = failure or self._fail(line, "")
                failure.file = location[1].replace("\\", "/")
                self._raised(line, location[3])
                self._failure = None
            return True
        if failure is None:
            return False
        if match := _WORKER_LINE.match(body):
            failure.worker = match[1]
        elif _CAPTURED.match(body):
            self._captured = True
        elif match := _REPEAT.match(body.lstrip()):
            failure.file = match[1]
        elif self._captured:
            return False
        elif match := _SELF.search(body):
            failure.name = failure.name or f"{match[2]}.{match[3]}"
            failure.file = failure.file or f"{match[1].replace('.', '/')}.py"
        elif location:
            failure.compares = False
            if failure.file is None and "site-packages" not in location[1]:
                failure.file = location[1].replace("\\", "/")
        else:
            return False
        return True

    def _death(self, line: Line, text: Text) -> bool:
        """Read a line that tells of the end of a worker or of a process."""
        run = self._run
        if match := _CRASH.search(text.body):
            worker, nodeid = match[1], match[2].rstrip("'")
            if nodeid in run.crashed:
                return True
            run.crashed.add(nodeid)
            failure = self._failure
            if failure is None or self._section != "failures":
                failure = self._fail(line, nodeid)
            failure.name = failure.nodeid = nodeid
            failure.worker, failure.died = worker, True
            return True
        if match := _DOWN.match(text.body):
            run.down.setdefault(match[1], line.number)
            run.faults.setdefault(match[1], self._fault)
            run.pytest, self._fault = True, ""
            return True
        if match := _FAULT.search(text.body):
            self._fault = match["fatal"] or match["timeout"] or match["shell"]
            run.faults[None] = self._fault
            return "Fatal" in text.body
        return False

    def _memory(self, line: Line, text: Text) -> bool:
        """Read a line that may tell that memory ran out."""
        if self._section == "other":
            return True
        body = text.body
        failure = self._failure
        if (match := _ERROR_LINE.match(body)) and not self._captured:
            return self._raised(line, match[1].removeprefix("| "))
        if match := _WHAT.match(body):
            # An abort: "what()" tells why, and nobody catches it.
            if match[1] and (begun := _BEGUN.match(match[1])):
                self._resume()
                self._run.current = self._run.test(begun[1])
            return self._loose(line, match[2] or "", rank=text.rank, raised=True)
        if not self._captured and (
            self._section == "failures" or (failure is not None and self._section == "errors")
        ):
            # Source lines are indented; --tb=native prints the error at the margin.
            found = None if body[:1].isspace() else self._message(line, body, raised=True)
            if found and found.named and found.kind != "kill":
                failure = failure or self._fail(line, "")
                failure.note(Seen(line.number, found))
                failure.error = body
                return True
            return self._kill(line, body)
        return self._loose(line, body, text.level, text.rank) or self._kill(line, body)

    def _raised(self, line: Line, message: str) -> bool:
        """Take the error of the failing test from a line that shows it."""
        failure = self._failure
        if failure is None and self._section == "failures":
            failure = self._fail(line, "")
        stripped = message.strip()
        if failure is not None and (failure.compares or messages.QUOTING.search(stripped)):
            failure.error = failure.error if failure.compares else stripped
            failure.compares = True
            return True
        found = self._message(line, stripped, raised=True)
        if found and found.kind != "kill" and (found.named or found.sizes or stripped != message):
            failure = failure or self._fail(line, "")
            failure.note(Seen(line.number, found))
            failure.error = stripped
            return True
        if failure is not None and (_EXCEPTION.match(stripped) or stripped.startswith("assert ")):
            failure.error = stripped
            return True
        return False

    def _loose(
        self, line: Line, body: str, level: str = "", rank: str = "", *, raised: bool = False
    ) -> bool:
        """Keep a message outside of failures; how the test ends decides what it meant."""
        found = self._message(line, body, raised=raised)
        if found is None and not raised and self._traced(line):
            found = self._message(line, body, raised=True)
            level = ""
        if found is None:
            return False
        if found.kind == "kill":
            self._run.kills.append(Kill(line.number, found, found.pid))
            return True
        if level in _SURVIVED and (_QUALIFIED.match(body) or self._traced(line)):
            # The last line of a traceback is an error, at whatever level a carrier logs it.
            level = ""
        if level in _SURVIVED or (not raised and messages.HANDLED.search(self._soon(line))):
            return True
        seen = Seen(line.number, found, rank or None)
        if self._failure is not None and self._captured:
            if found.named or raised:
                self._failure.aside = self._failure.aside or seen
        elif found.named or raised or found.sizes or level in _FATAL_LEVELS:
            self._run.loose.append((seen, self._run.current))
        return True

    def _kill(self, line: Line, body: str) -> bool:
        if self._captured:
            return False
        match = SHELL_KILL.search(body) or PROBABLE_KILL.fullmatch(body)
        if match is None:
            return False
        pid = match["pid"] if "pid" in match.groupdict() else None
        self._run.kills.append(Kill(line.number, None, int(pid) if pid else None))
        return True

    def _logged(self, line: Line, text: Text) -> bool:
        """Count the errors in lines of logs."""
        del line
        body = text.body
        what = subject(body)
        if text.level not in {"ERROR", "CRITICAL", "FATAL"} and what is None:
            return False
        if body and not body.startswith(("E ", ">", "FAILED", "ERROR ")):
            run = self._run
            name = signature(body[:400])
            if name in run.logged or len(run.logged) < _LOGGED_KEPT:
                run.logged[name] += 1
                run.subjects[name] |= {what} if what else set()
        return True

    def _soon(self, line: Line) -> str:
        """Return the two lines that follow, where a program says that it tries again."""
        return "\n".join(text.body[:_SAID] for text in _following(line, 2, self._carrier))

    def _traced(self, line: Line) -> bool:
        """Tell whether the line above is a frame of a traceback."""
        start = line.end - len(line.raw)
        above = line.buffer[max(0, start - 4096) : start].rstrip(b"\r\n").rpartition(b"\n")[2]
        return _FRAME.match(lines.read(above, self._carrier).body) is not None

    def _message(self, line: Line, body: str, *, raised: bool) -> Message | None:
        """Parse a message, with the lines that it was wrapped onto."""
        body = body.strip()
        found = messages.parse(body, raised=raised)
        broken = found is None and _UNENDED.match(body) is not None
        if not broken and (
            found is None or found.complete or body.endswith(("...", "\N{HORIZONTAL ELLIPSIS}"))
        ):
            return found or self._escaped(body, raised=raised)
        for text in _joined(line, body, self._carrier):
            other = messages.parse(text, raised=raised or found is not None)
            if other is not None and other.figures > (found.figures if found else -1):
                found = other
        return found

    def _escaped(self, body: str, *, raised: bool) -> Message | None:
        """Parse the lines of a text that a record has in one, with its newlines escaped."""
        if "\\n" not in body:
            return None
        parts = re.split(r"\\+n", body)
        found = (messages.parse(part.strip(), raised=raised) for part in parts)
        return next((each for each in found if each is not None and each.named), None)


def _following(line: Line, limit: int, carrier: re.Pattern[str] | None) -> Iterator[Text]:
    """Return the next ``limit`` lines, one by one: most who ask need the first only."""
    at = line.end
    for _ in range(limit):
        start = line.buffer.find(b"\n", at, line.window) + 1
        if not start:
            # Carriage returns alone, or the end.
            start = line.buffer.find(b"\r", at, line.window) + 1
            if not start:
                return
        end = line.buffer.find(b"\n", start, line.window)
        at = end if end >= 0 else line.window
        yield lines.read(line.buffer[start : min(at, start + 4096)].rstrip(b"\r"), carrier)


def _joined(line: Line, body: str, carrier: re.Pattern[str] | None) -> tuple[str, ...]:
    """Return ``body`` with the lines that go on with it, joined in each way they may have been cut.

    At a width, where spaces may have gone at the end of a line; at spaces; anywhere.
    """
    parts = [body]
    widths = [len(lines.read(line.raw, carrier).whole)]
    for text in _following(line, 10, carrier):
        part = text.body
        if match := _ERROR_LINE.match(part):
            part = match[1]
        # What a first line lacks altogether may be all that the second has.
        new = _NEW.match(part) or _NEW.match(text.body)
        if not part.strip() or (new and ("emory" in body or len(parts) > 1)):
            break
        parts.append(part)
        widths.append(len(text.whole))
        if messages.ENDS.search(" ".join(parts)):
            break
    if len(parts) == 1:
        return ()
    width = max(widths[:-1])
    padded = "".join(
        part + " " * (width - own) for part, own in zip(parts, [*widths[:-1], width], strict=True)
    )
    cut = (padded,) if min(widths[:-1]) >= width - 2 else ()
    return *cut, " ".join(each.strip() for each in parts), "".join(parts)
