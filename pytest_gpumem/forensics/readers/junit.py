"""JUnit XML, as pytest writes it."""

from __future__ import annotations

import re
from typing import IO, Any

from pytest_gpumem.forensics.readers.failures import enter
from pytest_gpumem.forensics.readers.streams import CHUNK
from pytest_gpumem.forensics.runs import Run


def read_junit(head: bytes, stream: IO[bytes]) -> tuple[list[Run], str]:
    """Return the report's run, and why it ends early if it does; ``ValueError`` if it is none."""
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
    count = element.get("tests") or ""
    if re.fullmatch(r"\d{1,9}", count):
        run.collected = (run.collected or 0) + int(count)
    run.duration += _seconds(element)


def _seconds(element: Any) -> float:
    text = element.get("time") or ""
    return float(text) if re.fullmatch(r"\d{1,9}(?:\.\d+)?", text) else 0.0


def _testcase(run: Run, element: Any) -> None:
    nodeid = _junit_nodeid(
        element.get("classname") or "", element.get("name") or "", element.get("file")
    )
    again = any(test.nodeid == nodeid for test in run.order[-2:])
    test = run.test(nodeid)
    test.duration += _seconds(element)
    outcome = "PASSED"
    for child in element:
        text, message = child.text or "", child.get("message") or ""
        if child.tag == "failure":
            outcome = "FAILED"
            enter(run, nodeid, "FAILED", "call", text=text, message=message)
        elif child.tag == "error":
            outcome = "ERROR"
            phase = "teardown" if "teardown" in message.partition('"')[0] else "setup"
            if message.startswith("collection failure"):
                phase = "collect"
            shown = message.partition('"')[2] or message
            enter(run, nodeid, "ERROR", phase, text=text, message=shown)
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
