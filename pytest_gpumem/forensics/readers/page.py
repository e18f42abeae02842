"""The pages that pytest-html writes, before its version 4 and since."""

from __future__ import annotations

import html
import json
import re
from typing import IO, TYPE_CHECKING

from pytest_gpumem.forensics.readers.failures import enter
from pytest_gpumem.forensics.readers.streams import whole
from pytest_gpumem.forensics.runs import Run

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROW = re.compile(
    r'<td class="col-result">([^<]*)</td>.*?<td class="col-name">([^<]*)</td>(.*?)</tbody>',
    re.DOTALL,
)

_LOG = re.compile(r'<div class="(?:empty )?log">(.*?)</div>', re.DOTALL)


def read_page(stream: IO[bytes]) -> tuple[list[Run], str]:
    """Return the page's run, and why it ends early if it does; ``ValueError`` if it is none."""
    text = whole(stream).decode("utf-8", "replace")
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
        enter(
            run,
            name,
            kind,
            "call" if kind == "FAILED" else where,
            text=re.sub(r"</?span[^>]*>", "", plain),
        )


def _old_html(text: str) -> Iterator[tuple[str, str, str]]:
    """Return the rows of a report written before pytest-html 4."""
    for piece in text.split("<tbody")[1:]:
        match = _ROW.search(piece if "</tbody>" in piece else f"{piece}</tbody>")
        if match is not None:
            log = _LOG.search(match[3])
            yield html.unescape(match[2]), match[1], log[1] if log else ""
