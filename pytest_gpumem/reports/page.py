"""The run as one page: timeline, tests, leaks, what ran out of memory.

Plotly draws the timeline. Its JavaScript, most of the page, is in it, so that an archived page
still opens; or it is linked, and the page is small.
"""

from __future__ import annotations

from datetime import datetime, timezone
from html import escape
from typing import TYPE_CHECKING

from pytest_gpumem import files
from pytest_gpumem.records import short
from pytest_gpumem.records.findings import CAUSES
from pytest_gpumem.reports import alive, forensics, html, timeline
from pytest_gpumem.reports.chart import COLOURS, draw, lane
from pytest_gpumem.reports.chart import leaked as leaked_of
from pytest_gpumem.reports.counts import by_kind, count_up, left_by_scopes, likewise_leaks, own
from pytest_gpumem.reports.sections import Section
from pytest_gpumem.units import format_bytes, format_mib

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pytest_gpumem.records import Holder, RecordedTest, RunRecord
    from pytest_gpumem.records.findings import Findings, OomEvent
    from pytest_gpumem.reports.counts import Leak


def save(run: RunRecord, found: Findings, path: Path, *, linked: bool = False) -> None:
    """Write the page of ``run`` to ``path``, whole or not at all.

    Args:
        run: what happened.
        found: what forensics says of it.
        path: the file.
        linked: whether the page loads what draws the timeline from Plotly's server.

    Raises:
        OSError: when the file cannot be written; what stood there before is untouched.

    """
    with files.replace(path) as file:
        file.writelines(f"{line}\n" for line in lines(run, found, linked=linked))


def lines(run: RunRecord, found: Findings, *, linked: bool = False) -> Iterator[str]:
    """Return the page line by line."""
    yield from html.head("GPU memory", _STYLE)
    yield "<h1>GPU memory</h1>"
    yield from _head(run, found)
    yield "<h2>Timeline</h2>"
    yield draw(run, linked=linked)
    if linked:
        yield _NOT_LOADED
    yield from _events(found)
    yield from _alive(run)
    yield from _leaks(run)
    yield from _left_by_module(run)
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
    peak = max((own(card) for test in run.tests for card in test.cards), default=0)
    leaked = sum(map(leaked_of, run.tests))
    bad, processes = totals.failed + totals.errors, run.workers or 1
    shown = (
        ("tests", f"{totals.tests:,}", ""),
        ("failed or error", f"{bad:,}", "bad" if bad else ""),
        ("out of memory", f"{totals.oom:,}", "bad" if totals.oom else ""),
        ("highest own peak", format_bytes(peak), ""),
        ("leaked", format_bytes(leaked), "bad" if leaked else ""),
        ("worker" if processes == 1 else "workers", str(processes), ""),
        ("seconds", f"{end - begin:.1f}", ""),
    )
    yield '<div class="figures">'
    for name, value, kind in shown:
        yield f'<div class="figure {kind}"><b>{value}</b><span>{name}</span></div>'
    yield "</div>"
    if told := _started(run):
        yield f"<p>{escape(told)}</p>"
    if run.command:
        yield f"<p><code>{escape(run.command)}</code></p>"
    for card in run.cards:
        where = f" on {escape(card.host)}" if card.host else ""
        yield (
            f"<p>{escape(card.name)}{where}: {format_bytes(card.total)} "
            f"<small>{escape(card.uuid)}</small></p>"
        )


def _started(run: RunRecord) -> str:
    """Return when the run began, its command and its commit, as far as they are known."""
    begin, _ = timeline.window(run.tests)
    when = datetime.fromtimestamp(begin, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    commit = f"commit {run.commit}" if run.commit else ""
    return ", ".join(filter(None, (when if begin else "", commit)))


def _events(found: Findings) -> Iterator[str]:
    """Show what ran out of memory: each first event with what followed from it."""
    if not found.events:
        return
    yield "<h2>Out of memory</h2>"
    if len(found.events) > 1:
        yield from _ranked(found)
        yield "<h3>One by one</h3>"
    followed: dict[int, list[OomEvent]] = {}
    for each in found.events:
        if each.cascade_of is not None:
            followed.setdefault(each.cascade_of, []).append(each)
    first = [at for at, each in enumerate(found.events) if each.cascade_of is None]
    yield '<div id="cascade">'
    for number, at in enumerate(first):
        if number == _UNFOLDED:
            yield f"<details><summary>{len(first) - number} more</summary>"
        yield from _event(found.events[at], followed.get(at, ()), shown=number == 0)
    if len(first) > _UNFOLDED:
        yield "</details>"
    yield "</div>"


_UNFOLDED = 10
"""Events of a list that is not to be scrolled through on the way to what stands below it."""


def _event(event: OomEvent, followed: Sequence[OomEvent], *, shown: bool) -> Iterator[str]:
    """Show an event, with what followed from it."""
    felled = event.felled + sum(each.felled for each in followed)
    yield f"<details{' open' if shown else ''}><summary>"
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


def _ranked(found: Findings) -> Iterator[str]:
    """Show first what forensics shows first of many."""
    yield '<div id="causes">'
    for section in forensics.ranked(found):
        yield from html.markup(section, "h3")
    yield "</div>"


def _worker(event: OomEvent) -> str:
    place = f"test {event.position}" if event.position else ""
    shown = ", ".join(filter(None, (event.worker or "", place)))
    return f" <small>{escape(shown)}</small>" if shown else ""


_NOT_LOADED = (
    '<script>window.Plotly || document.write("<p>The timeline needs a library from cdn.plot.ly, '
    'which was not loaded.</p>")</script>'
)
"""Scripts run in the order of the page: where the one before did not come, this one says so."""


def _alive(run: RunRecord) -> Iterator[str]:
    """Show what was alive in the tests of which that is known, each by itself."""
    every = alive.told(run)
    if not every:
        return
    yield '<h2>What filled the card</h2><div id="alive">'
    for test, told in every:
        head = f"<b>{escape(test.nodeid)}</b> <small>{escape(alive.head(told))}</small>"
        yield f"<details><summary>{head}</summary>"
        rows = tuple(
            (format_bytes(row.size), row.what, row.kinds, row.owner) for row in alive.rows(told)
        )
        notes = tuple(filter(None, (told.note, told.snapshot and f"snapshot: {told.snapshot}")))
        yield from html.markup(
            Section(alive.head(told), notes, (">size", "line", "kind", "of"), rows), "h3"
        )
        yield "</details>"
    yield "</div>"


def _leaks(run: RunRecord) -> Iterator[str]:
    """Show the largest leak of each kind, and fold away the others of that kind."""
    kinds = by_kind(count_up(run).leaks)
    if not kinds:
        return
    yield '<h2>Leaks</h2><div id="leaks">'
    for first, *others in kinds:
        yield f"<details open><summary>{_leak(first)}</summary><ul>"
        yield from (f"<li>{_holder(each)}</li>" for each in first.holders)
        yield from (f"<li>{escape(sentence)}</li>" for sentence in first.orphans)
        if not first.holders and not first.orphans:
            yield "<li>no Python object refers to it</li>"
        yield "</ul>"
        if others:
            yield f"<details><summary>likewise {likewise_leaks(others)}</summary>"
            yield "<ul>"
            yield from (f"<li>{_leak(each)}</li>" for each in others)
            yield "</ul></details>"
        yield "</details>"
    yield "</div>"


def _leak(leak: Leak) -> str:
    return f"<b>{format_bytes(leak.size)}</b> by {escape(leak.by)}"


def _left_by_module(run: RunRecord) -> Iterator[str]:
    rows = tuple((format_bytes(row.size), row.name, row.where) for row in left_by_scopes(run))
    if rows:
        section = Section("Left by module", (), (">left", "by", "held by"), rows)
        yield from html.markup(section, "h2")


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
    begin, _ = timeline.window(run.tests)
    by_peak = sorted(
        run.tests, key=lambda test: -max((card.peak for card in test.cards), default=0)
    )
    for test in by_peak:
        yield f"<tr>{''.join(_row(test, begin, several=len(run.cards) > 1))}</tr>"
    yield "</tbody></table>"


def _row(test: RecordedTest, begin: float, *, several: bool) -> Iterator[str]:
    outcome = "out of memory" if test.oom and test.outcome != "rerun" else test.outcome
    name = escape(test.nodeid)
    if test.start:
        place = f'data-from="{test.start - begin:.3f}" data-took="{test.duration:.3f}"'
        name = f'<a href="#timeline" {place} title="show it in the timeline">{name}</a>'
    cards = ", ".join(short(card.card) for card in test.cards) if several else ""
    yield f"<td>{name}</td><td>{lane(test)}{f' <small>{cards}</small>' if cards else ''}</td>"
    yield f'<td><i style="background:{COLOURS.get(test.outcome, "#555")}"></i>{outcome}</td>'
    yield _number(test.duration, f"{test.duration:.2f}")
    sizes: tuple[int | None, ...] = (None,) * 3
    if test.cards:
        top = max(test.cards, key=lambda card: card.peak)
        sizes = (top.peak, top.peak - top.baseline, sum(card.leftover for card in test.cards))
    for size in (*sizes, leaked_of(test) or None, test.lease.size if test.lease else None):
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
.figures { display: flex; flex-wrap: wrap; gap: .6rem; margin-bottom: .8rem }
.figure { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .9rem;
  min-width: 6rem }
.figure b { display: block; font-size: 1.25rem } .figure span { color: var(--faint) }
.bad b { color: var(--bad) }
#tests td:nth-child(2), #tests td:nth-child(3) { white-space: nowrap; overflow-wrap: normal }
#tests a { text-decoration: none } #tests a:hover { text-decoration: underline }
th { position: sticky; top: 0 }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; white-space: nowrap }
th[aria-sort=ascending] button::after { content: " \\25b2" }
th[aria-sort=descending] button::after { content: " \\25bc" }
td i { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .4em }
details { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .8rem;
  margin: .4rem 0 }
summary { cursor: pointer; overflow-wrap: anywhere }
.count { background: var(--badge); border-radius: .8rem; padding: 0 .5rem; font-size: .9em }
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
const drawn = document.getElementById("timeline");
const dark = matchMedia("(prefers-color-scheme: dark)");
const axes = () => Object.keys(drawn.layout).filter(key => key.startsWith("xaxis"));
const paint = () => { const line = dark.matches ? "#353b42" : "#e3e6ea", change = {
    "font.color": dark.matches ? "#e4e6ea" : "#1c2024" };
  for (const key of Object.keys(drawn.layout).filter(key => /^[xy]axis/.test(key)))
    Object.assign(change, {[key + ".gridcolor"]: line, [key + ".zerolinecolor"]: line});
  Plotly.relayout(drawn, change); };
if (window.Plotly && drawn) { paint(); dark.onchange = paint; }
document.querySelectorAll("#tests a").forEach(link => link.onclick = () => {
  const from = Number(link.dataset.from), took = Number(link.dataset.took);
  const around = Math.max(took, .05) * 2, change = {};
  for (const key of axes()) change[key + ".range"] = [from - around, from + took + around];
  Plotly.relayout(drawn, change); });
"""
