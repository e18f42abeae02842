"""The run as one page that needs nothing else: timeline, tests, leaks, what ran out of memory.

Plotly draws the timeline; its JavaScript is in the page, so that an archived page still opens.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from pytest_gpumem import files
from pytest_gpumem.records.findings import CAUSES
from pytest_gpumem.reports import forensics, timeline
from pytest_gpumem.units import format_bytes, format_mib

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pytest_gpumem.records import Holder, RecordedTest, RunRecord
    from pytest_gpumem.records.findings import Findings, OomEvent

_COLOURS = {
    "passed": "#3d8b62",
    "failed": "#c8372d",
    "error": "#d9732b",
    "crashed": "#7d1d4f",
    "rerun": "#d6a420",
    "skipped": "#9aa3ad",
    "xfailed": "#7f8fb0",
    "xpassed": "#5b6fb5",
}
_GIB = 2**30


def save(run: RunRecord, found: Findings, path: Path) -> None:
    """Write the page of ``run`` to ``path``, whole or not at all.

    Args:
        run: what happened.
        found: what forensics says of it.
        path: the file.

    Raises:
        OSError: when the file cannot be written; what stood there before is untouched.

    """
    with files.replace(path) as file:
        file.writelines(f"{line}\n" for line in lines(run, found))


def lines(run: RunRecord, found: Findings) -> Iterator[str]:
    """Return the page line by line."""
    yield "<!DOCTYPE html>"
    yield '<html lang="en"><head><meta charset="utf-8"><title>GPU memory</title>'
    yield '<meta name="viewport" content="width=device-width">'
    yield '<link rel="icon" href="data:,">'
    yield f"<style>{_STYLE}</style></head><body>"
    yield "<h1>GPU memory</h1>"
    yield from _head(run, found)
    yield "<h2>Timeline</h2>"
    yield _timeline(run)
    yield from _events(found)
    yield from _leaks(run)
    yield from _tests(run)
    yield from _children(run)
    if run.notes:
        yield "<h2>Notes</h2><ul>"
        yield from (f"<li>{escape(note)}</li>" for note in run.notes)
        yield "</ul>"
    yield f"<script>{_SCRIPT}</script></body></html>"


def _head(run: RunRecord, found: Findings) -> Iterator[str]:
    begin, end = timeline.window(run.tests)
    totals = found.totals
    peak = max((card.peak for test in run.tests for card in test.cards), default=0)
    leaked = sum(map(_leaked, run.tests))
    shown = (
        ("tests", f"{totals.tests:,}", ""),
        ("failed or error", f"{totals.failed + totals.errors:,}", "bad" if totals.failed else ""),
        ("out of memory", f"{totals.oom:,}", "bad" if totals.oom else ""),
        ("highest peak", format_bytes(peak), ""),
        ("leaked", format_bytes(leaked), "bad" if leaked else ""),
        ("workers", str(run.workers or 1), ""),
        ("seconds", f"{end - begin:.1f}", ""),
    )
    yield '<div class="figures">'
    for name, value, kind in shown:
        yield f'<div class="figure {kind}"><b>{value}</b><span>{name}</span></div>'
    yield "</div>"
    for card in run.cards:
        where = f" on {escape(card.host)}" if card.host else ""
        simulated = ", simulated" if run.simulated else ""
        yield (
            f"<p>{escape(card.name)}{where}: {format_bytes(card.total)}{simulated} "
            f"<small>{escape(card.uuid)}</small></p>"
        )


def _timeline(run: RunRecord) -> str:
    """Draw what was held of each card, and below which test each worker ran."""
    tests = [test for test in run.tests if test.start]
    if not tests:
        return "<p>No test has a time.</p>"
    from plotly.graph_objects import Bar, Scatter
    from plotly.subplots import make_subplots

    begin, end = timeline.window(tests)
    levels = timeline.levels(run)
    cards = [card for card in run.cards if levels.get((card.host, card.uuid))]
    lanes = sorted({_lane(test) for test in tests}, key=lambda lane: (len(lane), lane))
    tall = max(90, 34 * len(lanes))
    figure: Any = make_subplots(
        rows=len(cards) + 1,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.06 if len(cards) < 6 else 0.02,
        row_heights=[190] * len(cards) + [tall],
        subplot_titles=[f"{escape(card.name)} {escape(card.uuid[-8:])}" for card in cards]
        + ["Tests by worker"],
    )
    for row, card in enumerate(cards, 1):
        steps = levels[card.host, card.uuid]
        figure.add_trace(
            Scatter(
                x=[step.time - begin for step in steps] + [end - begin],
                y=[step.size / _GIB for step in steps] + [steps[-1].size / _GIB],
                mode="lines",
                line={"shape": "hv", "width": 1.5, "color": "#2f6fb3"},
                fill="tozeroy",
                fillcolor="rgba(47,111,179,.18)",
                name="held",
                showlegend=False,
                hovertemplate="%{y:.2f} GiB at %{x:.2f} s<extra></extra>",
            ),
            row=row,
            col=1,
        )
        if card.total:
            figure.add_hline(
                y=card.total / _GIB,
                line={"dash": "dot", "color": "#888", "width": 1},
                row=row,
                col=1,
            )
            figure.update_yaxes(range=[0, card.total / _GIB * 1.08], row=row, col=1)
        figure.update_yaxes(title_text="GiB", row=row, col=1)
        own = [
            test
            for test in tests
            if test.oom
            and test.host == card.host
            and (not test.cards or any(usage.card == card.uuid for usage in test.cards))
        ]
        if own:
            figure.add_trace(_marks(own, begin, [card.total / _GIB] * len(own)), row=row, col=1)
    last = len(cards) + 1
    for outcome in dict.fromkeys(test.outcome for test in tests):
        some = [test for test in tests if test.outcome == outcome]
        figure.add_trace(
            Bar(
                x=[max(test.duration, (end - begin) / 2000) for test in some],
                base=[test.start - begin for test in some],
                y=[_lane(test) for test in some],
                orientation="h",
                width=0.7,
                name=outcome,
                marker={
                    "color": _COLOURS.get(outcome, "#555"),
                    "line": {"width": 0.5, "color": "#fff"},
                },
                text=[_hover(test) for test in some],
                textposition="none",
                hovertemplate="%{text}<extra></extra>",
            ),
            row=last,
            col=1,
        )
    felled = [test for test in tests if test.oom]
    if felled:
        marks = _marks(felled, begin, [_lane(test) for test in felled])
        marks.showlegend = True
        figure.add_trace(marks, row=last, col=1)
    figure.update_yaxes(
        categoryorder="array", categoryarray=lanes[::-1], type="category", row=last, col=1
    )
    figure.update_xaxes(title_text="seconds", row=last, col=1)
    figure.update_layout(
        template="plotly_white",
        barmode="overlay",
        height=130 + 235 * len(cards) + tall,
        margin={"l": 70, "r": 20, "t": 40, "b": 90},
        legend={"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom"},
        hovermode="closest",
    )
    html: str = figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        div_id="timeline",
        config={"displaylogo": False, "responsive": True},
    )
    return html


def _marks(tests: Sequence[RecordedTest], begin: float, heights: Sequence[Any]) -> Any:
    from plotly.graph_objects import Scatter

    return Scatter(
        x=[test.start + test.duration - begin for test in tests],
        y=heights,
        mode="markers",
        marker={"symbol": "x", "size": 9, "color": "#111", "line": {"width": 1, "color": "#fff"}},
        name="out of memory",
        showlegend=False,
        text=[_hover(test) for test in tests],
        hovertemplate="%{text}<extra></extra>",
    )


def _lane(test: RecordedTest) -> str:
    return escape("/".join(filter(None, (test.host, test.worker))) or "pytest")


def _hover(test: RecordedTest) -> str:
    peak = max((card.peak for card in test.cards), default=0)
    told = [f"<b>{escape(test.nodeid)}</b>", f"{test.outcome}, {test.duration:.2f} s"]
    if peak:
        told.append(f"peak {format_bytes(peak)}")
    if leaked := _leaked(test):
        told.append(f"leaked {format_bytes(leaked)}")
    if test.oom:
        told.append(escape(test.oom[:120]))
    return "<br>".join(told)


def _leaked(test: RecordedTest) -> int:
    return sum(card.leaked for card in test.cards) + sum(each.leaked for each in test.fixtures)


def _events(found: Findings) -> Iterator[str]:
    """Show what ran out of memory: each first event with what followed from it."""
    if not found.events:
        return
    yield "<h2>Out of memory</h2>"
    if len(found.events) > 1:
        yield from _ranked(found)
    yield '<div id="cascade">'
    for number, event in enumerate(found.events):
        if event.cascade_of is not None:
            continue
        followed = [each for each in found.events if each.cascade_of == number]
        felled = event.felled + sum(each.felled for each in followed)
        yield f"<details{' open' if number == 0 else ''}><summary>"
        yield f"<b>{escape(event.nodeid or 'outside of tests')}</b>{_worker(event)}"
        probably = "" if event.confirmed else "probably "
        yield f' <span class="cause">{probably}{CAUSES[event.cause]}</span>'
        if felled > 1:
            yield f' <span class="count">felled {felled} tests</span>'
        yield "</summary>"
        yield from (f"<p>{escape(each)}</p>" for each in event.evidence)
        if event.message:
            yield f"<p><code>{escape(event.message)}</code></p>"
        if event.before:
            names = ", ".join(map(escape, event.before))
            yield f"<p>ran before it on the same worker: {names}</p>"
        if event.advice:
            yield f"<pre>{escape(chr(10).join(event.advice))}</pre>"
        if followed:
            yield "<p>met the very same state:</p><ul>"
            for each in followed:
                yield f"<li>{escape(each.nodeid or 'outside of tests')}{_worker(each)}</li>"
            yield "</ul>"
        yield "</details>"
    yield "</div>"


def _ranked(found: Findings) -> Iterator[str]:
    """Show first what forensics shows first of many."""
    yield '<div id="causes">'
    for section in forensics.ranked(found):
        yield f"<h3>{escape(section.title)}</h3>"
        yield from (f"<p>{escape(each)}</p>" for each in section.sentences)
        if section.code:
            yield f"<pre>{escape(chr(10).join(section.code))}</pre>"
    yield "</div>"


def _worker(event: OomEvent) -> str:
    place = f"test {event.position}" if event.position else ""
    shown = ", ".join(filter(None, (event.worker or "", place)))
    return f" <small>{escape(shown)}</small>" if shown else ""


def _leaks(run: RunRecord) -> Iterator[str]:
    rows = [
        (test, what, leaked, holders)
        for test in run.tests
        for what, leaked, holders in (
            *(("", card.leaked, card.holders) for card in test.cards),
            *((f"fixture {each.name}", each.leaked, each.holders) for each in test.fixtures),
        )
        if leaked
    ]
    if not rows:
        return
    yield '<h2>Leaks</h2><div id="leaks">'
    for test, what, leaked, holders in sorted(rows, key=lambda row: -row[2]):
        by = f" <small>{escape(what)}</small>" if what else ""
        yield f"<details open><summary><b>{format_bytes(leaked)}</b> {escape(test.nodeid)}{by}"
        yield "</summary><ul>"
        yield from (f"<li>{_holder(each)}</li>" for each in holders)
        if not holders:
            yield "<li>nobody in Python refers to it</li>"
        yield "</ul></details>"
    yield "</div>"


def _holder(holder: Holder) -> str:
    shape = "x".join(map(str, holder.shape)) or "scalar"
    tensors = f"{holder.tensors} tensors, largest" if holder.tensors > 1 else "tensor"
    whole = f"of {format_bytes(holder.whole)}" if holder.whole else "in all"
    stack = "".join(f"<br><small>at {escape(frame)}</small>" for frame in holder.stack[:3])
    return (
        f"held by <code>{escape(holder.where)}</code>: {tensors} {escape(holder.dtype)} {shape}, "
        f"{format_bytes(holder.size)} {whole}{stack}"
    )


_COLUMNS = ("test", "worker", "outcome", "seconds", "peak MiB", "own MiB", "leftover MiB",
            "leaked MiB", "lease MiB", "waited s")  # fmt: skip
_TEXTS = 3
"""The first columns hold text, the others numbers."""


def _tests(run: RunRecord) -> Iterator[str]:
    yield '<h2>Tests</h2><p><input id="filter" type="search" placeholder="filter by name, '
    yield 'worker or outcome" aria-label="filter"> <span id="shown"></span></p>'
    yield '<table id="tests"><thead><tr>'
    for at, name in enumerate(_COLUMNS):
        kind = "" if at < _TEXTS else ' class="n"'
        yield f'<th{kind} aria-sort="none"><button type="button">{name}</button></th>'
    yield "</tr></thead><tbody>"
    by_peak = sorted(
        run.tests, key=lambda test: -max((card.peak for card in test.cards), default=0)
    )
    for test in by_peak:
        yield f"<tr>{''.join(_row(test))}</tr>"
    yield "</tbody></table>"


def _row(test: RecordedTest) -> Iterator[str]:
    outcome = "out of memory" if test.oom and test.outcome != "rerun" else test.outcome
    yield f"<td>{escape(test.nodeid)}</td><td>{_lane(test)}</td>"
    yield f'<td><i style="background:{_COLOURS.get(test.outcome, "#555")}"></i>{outcome}</td>'
    yield _number(test.duration, f"{test.duration:.2f}")
    sizes: tuple[int | None, ...] = (None,) * 3
    if test.cards:
        top = max(test.cards, key=lambda card: card.peak)
        sizes = (top.peak, top.peak - top.baseline, sum(card.leftover for card in test.cards))
    for size in (*sizes, _leaked(test) or None, test.lease.size if test.lease else None):
        yield _number(size, "" if size is None else format_mib(size))
    waited = test.lease.waited if test.lease else None
    yield _number(waited, "" if waited is None else f"{waited:.2f}")


def _children(run: RunRecord) -> Iterator[str]:
    """Show the processes that tests and fixtures started, the largest first."""
    rows = sorted(
        timeline.children(run).values(), key=lambda child: -(child.used_peak or child.peak or 0)
    )
    if not rows:
        return
    yield '<h2>Child processes</h2><table id="children"><thead><tr><th>process</th>'
    yield '<th>started by</th><th class="n">peak MiB</th><th class="n">by the driver</th>'
    yield '<th class="n">left</th><th></th></tr></thead><tbody>'
    for child in rows:
        yield f"<tr><td>{child.pid} <small>{escape(child.command)}</small></td>"
        yield f"<td>{escape(child.started_by)}</td>"
        for size in (child.peak, child.used_peak, child.leaked or None):
            yield _number(size, "" if size is None else format_mib(size))
        yield f"<td>{'ended' if child.end else 'still runs'}</td></tr>"
    yield "</tbody></table>"


def _number(value: float | None, text: str) -> str:
    return f'<td class="n" data-v="{-1 if value is None else value}">{text}</td>'


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem;
  padding: 0 1rem; color: #1c2024; background: #fff }
h1 { font-size: 1.5rem; margin: 0 0 .8rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
.figures { display: flex; flex-wrap: wrap; gap: .6rem; margin-bottom: .8rem }
.figure { border: 1px solid #dfe3e8; border-radius: .4rem; padding: .4rem .9rem; min-width: 6rem }
.figure b { display: block; font-size: 1.25rem } .figure span, small { color: #69707a }
.bad b { color: #c8372d } p { margin: .25rem 0 } ul { margin: .3rem 0 }
table { border-collapse: collapse; width: 100%; font-size: .92em }
td, th { padding: .2rem .55rem; text-align: left; border-bottom: 1px solid #e6e9ed;
  vertical-align: top; overflow-wrap: anywhere }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
td:nth-child(2), td:nth-child(3) { white-space: nowrap; overflow-wrap: normal }
th { position: sticky; top: 0; background: #fff }
th button { font: inherit; color: #4a5159; background: none; border: 0; padding: 0; cursor: pointer;
  white-space: nowrap }
th[aria-sort=ascending] button::after { content: " \\25b2" }
th[aria-sort=descending] button::after { content: " \\25bc" }
td i { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .4em }
details { border: 1px solid #dfe3e8; border-radius: .4rem; padding: .4rem .8rem; margin: .4rem 0 }
summary { cursor: pointer; overflow-wrap: anywhere } .cause { color: #c8372d }
.count { background: #fbe9e7; border-radius: .8rem; padding: 0 .5rem; font-size: .9em }
pre { background: #f4f6f8; padding: .6rem; overflow-x: auto } code { overflow-wrap: anywhere }
input { font: inherit; padding: .25rem .5rem; width: 22rem; max-width: 100% }
"""

_SCRIPT = """
const body = document.querySelector("#tests tbody"), shown = document.getElementById("shown");
document.querySelectorAll("#tests th").forEach((head, column) => head.onclick = () => {
  const down = head.ariaSort === "descending" || (head.ariaSort === "none" && !head.className);
  document.querySelectorAll("#tests th").forEach(other => other.ariaSort = "none");
  head.ariaSort = down ? "ascending" : "descending";
  const key = row => { const cell = row.cells[column];
    return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v); };
  const rows = [...body.rows].map(row => [key(row), row]);
  rows.sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0) * (down ? 1 : -1));
  body.append(...rows.map(pair => pair[1]));
});
const filter = document.getElementById("filter");
const count = () => { const words = filter.value.toLowerCase().split(" ").filter(Boolean);
  let kept = 0;
  for (const row of body.rows) { const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word)); kept += !row.hidden; }
  shown.textContent = kept + " of " + body.rows.length + " tests"; };
filter.oninput = count; count();
"""
