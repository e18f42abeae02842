"""The timeline of a run, drawn by Plotly: what was held of each card, and which tests ran."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from pytest_gpumem.records import short
from pytest_gpumem.reports import timeline
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_gpumem.records import Card, RecordedTest, RunRecord

COLOURS = {
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


def draw(run: RunRecord, *, linked: bool) -> str:
    """Return the markup of what was held of each card, and below it which test each worker ran.

    Args:
        run: what happened.
        linked: whether the page loads Plotly's JavaScript from its server.

    """
    tests = [test for test in run.tests if test.start]
    if not tests:
        return "<p>No test has a time.</p>"
    from plotly.subplots import make_subplots

    levels = timeline.levels(run)
    cards = [card for card in run.cards if levels.get((card.host, card.uuid))]
    lanes = sorted({lane(test) for test in tests}, key=lambda lane: (len(lane), lane))
    tall = max(90, 34 * len(lanes))
    figure: Any = make_subplots(
        rows=len(cards) + 1,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.06 if len(cards) < 6 else 0.02,
        row_heights=[190] * len(cards) + [tall],
        subplot_titles=[f"{escape(card.name)} {escape(short(card.uuid))}" for card in cards]
        + ["Tests by worker"],
    )
    for row, card in enumerate(cards, 1):
        _draw_card(figure, row, card, levels[card.host, card.uuid], tests)
    _draw_lanes(figure, len(cards) + 1, lanes, tests)
    figure.update_layout(
        template="plotly_white",
        # The colours of the text and the lines are the page's: see the script.
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#9aa3ad", "activecolor": "#656c76"},
        barmode="overlay",
        height=130 + 235 * len(cards) + tall,
        margin={"l": 70, "r": 20, "t": 40, "b": 90},
        legend={"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom"},
        hovermode="closest",
    )
    drawn: str = figure.to_html(
        full_html=False,
        include_plotlyjs="cdn" if linked else True,
        div_id="timeline",
        config={"displaylogo": False, "responsive": True},
    )
    return drawn


def _draw_card(
    figure: Any,
    row: int,
    card: Card,
    steps: Sequence[timeline.Level],
    tests: Sequence[RecordedTest],
) -> None:
    """Draw what was held of a card, its size, and where tests ran out of it."""
    from plotly.graph_objects import Scatter

    begin, end = timeline.window(tests)
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


def _draw_lanes(
    figure: Any,
    row: int,
    lanes: Sequence[str],
    tests: Sequence[RecordedTest],
) -> None:
    """Draw which test each worker ran, coloured by outcome."""
    from plotly.graph_objects import Bar

    begin, end = timeline.window(tests)
    whole = end - begin
    for outcome in dict.fromkeys(test.outcome for test in tests):
        some = [test for test in tests if test.outcome == outcome]
        figure.add_trace(
            Bar(
                x=[max(test.duration, whole / 2000) for test in some],
                base=[test.start - begin for test in some],
                y=[lane(test) for test in some],
                orientation="h",
                width=0.7,
                name=outcome,
                marker={
                    "color": COLOURS.get(outcome, "#555"),
                    # A test of few pixels would be all outline.
                    "line": {
                        "width": [0.5 * (test.duration > whole / 300) for test in some],
                        "color": "#fff",
                    },
                },
                text=[_hover(test) for test in some],
                textposition="none",
                hovertemplate="%{text}<extra></extra>",
            ),
            row=row,
            col=1,
        )
    felled = [test for test in tests if test.oom]
    if felled:
        marks = _marks(felled, begin, [lane(test) for test in felled])
        marks.showlegend = True
        figure.add_trace(marks, row=row, col=1)
    figure.update_yaxes(
        categoryorder="array", categoryarray=lanes[::-1], type="category", row=row, col=1
    )
    figure.update_xaxes(title_text="seconds", row=row, col=1)


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


def lane(test: RecordedTest) -> str:
    """Return in which line of the timeline a test stands, as markup."""
    return escape("/".join(filter(None, (test.host, test.worker))) or "pytest")


def _hover(test: RecordedTest) -> str:
    peak = max((card.peak for card in test.cards), default=0)
    told = [f"<b>{escape(test.nodeid)}</b>", f"{test.outcome}, {test.duration:.2f} s"]
    if peak:
        told.append(f"peak {format_bytes(peak)}")
    if size := leaked(test):
        told.append(f"leaked {format_bytes(size)}")
    if test.oom:
        told.append(escape(test.oom[:120]))
    return "<br>".join(told)


def leaked(test: RecordedTest) -> int:
    """Return what a test, and fixtures torn down after it, leaked, in bytes over all cards."""
    return sum(card.leaked for card in test.cards) + sum(each.leaked for each in test.fixtures)
