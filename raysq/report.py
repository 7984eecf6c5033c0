"""A run as one HTML page that needs no network: what was tried, what it gave, what runs how in the best recipe.

Built from the journal alone, so that a finished, a killed and a running search look alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysq.errors import OptionError, StorageError
from raysq.journal import Entry, Header
from raysq.recipe import Recipe
from raysq.result import Status, TrialRecord
from raysq.run import Run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["FILE", "is_available", "write"]

FILE = "report.html"
TEMPLATE = "report.html.j2"
GREY = "#8b949e"  # readable on white and on black
COLOURS = {"holds the goal": "#2da44e", "fails the goal": "#d4812a", "stopped early": "#a371f7"}
HEIGHT = 380  # pixels of a figure
MILLION = 1e6


def is_available() -> bool:
    """Whether what draws the page is installed."""
    try:
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ImportError:
        return False
    return True


def write(run: Run, path: Path) -> None:
    """Write the page.

    Raises:
        OptionError: plotly is missing; the message says what to install.
        StorageError: the path can't be written.
    """
    if not is_available():
        raise OptionError("the report needs plotly. Run: pip install 'raysq[report]'")
    from jinja2 import Environment, FileSystemLoader
    from plotly.io import to_html
    from plotly.offline import get_plotlyjs

    def drawn(figure: Figure) -> str:
        return str(
            to_html(
                figure, full_html=False, include_plotlyjs=False, config={"responsive": True, "displayModeBar": False}
            )
        )

    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template(TEMPLATE)
    best = run.best
    text = page.render(
        header=run.header,
        baseline=run.header.baseline,
        best=best,
        trials=len(run.records),
        counts=_counts(run.records),
        plotly=get_plotlyjs(),
        tradeoff=drawn(_tradeoff(run)),
        progress=drawn(_progress(run)),
        calls=list(_calls(run.header, best.recipe)) if best else [],
        lost=[r for r in run.records if r.reason and not r.feasible],
        environments=_environments(run.entries),
    )
    try:
        path.write_text(text)
    except OSError as exc:
        raise StorageError(f"can't write {path}: {exc.strerror}. Pass another path.") from exc


def _kind(record: TrialRecord) -> str:
    if record.feasible:
        return "holds the goal"
    return "stopped early" if record.estimated else "fails the goal"


def _counts(records: Sequence[TrialRecord]) -> dict[str, int]:
    found = {kind: sum(_kind(r) == kind for r in records if r.status is not Status.FAILED) for kind in COLOURS}
    return {**found, "failed": sum(r.status is Status.FAILED for r in records)}


def _layout(x: str, y: str, **more: Any) -> dict[str, Any]:
    axis = {"gridcolor": "rgba(139,148,158,0.25)", "zerolinecolor": "rgba(139,148,158,0.25)"}
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": GREY},
        "height": HEIGHT,
        "margin": {"l": 60, "r": 15, "t": 10, "b": 50},
        "legend": {"orientation": "h", "y": 1.08},
        "xaxis": {"title": x, **axis},
        "yaxis": {"title": y, **axis},
        **more,
    }


def _tradeoff(run: Run) -> Figure:
    """Draw accuracy against latency: as measured, or predicted where nothing was timed; the goal; the front."""
    import plotly.graph_objects as go

    figure = go.Figure(layout=_layout("time / fastest fp32", "accuracy"))
    scored = [r for r in run.records if r.accuracy is not None and r.latency_ratio is not None]
    for kind, colour in COLOURS.items():
        records = [r for r in scored if _kind(r) == kind]
        figure.add_scatter(
            x=[r.latency_ratio for r in records],
            y=[r.accuracy for r in records],
            mode="markers",
            name=kind,
            marker={"color": colour, "size": 9, "symbol": ["circle" if r.ratio else "circle-open" for r in records]},
            text=[_told(r) for r in records],
            hovertemplate="%{text}<extra></extra>",
        )
    front = _front(scored, run.header.arguments.get("higher_is_better", True))
    figure.add_scatter(
        x=[r.latency_ratio for r in front],
        y=[r.accuracy for r in front],
        mode="lines",
        name="Pareto front",
        line={"color": GREY, "shape": "hv", "dash": "dot"},
        hoverinfo="skip",
    )
    if run.least is not None:
        figure.add_hline(y=run.least, line={"color": "#cf222e", "dash": "dash"}, annotation_text="the goal")
    figure.add_vline(x=1, line={"color": GREY, "width": 1}, annotation_text="fp32")
    return figure


def _front(records: Sequence[TrialRecord], higher_is_better: bool) -> list[TrialRecord]:
    """Return the timed trials that no other beats in both, by latency."""
    sign = 1 if higher_is_better else -1
    found: list[TrialRecord] = []
    for record in sorted((r for r in records if r.ratio), key=lambda r: (r.latency_ratio, -sign * (r.accuracy or 0))):
        if not found or sign * (record.accuracy or 0) > sign * (found[-1].accuracy or 0):
            found.append(record)
    return found


def _told(record: TrialRecord) -> str:
    parts = [f"<b>trial {record.trial}</b> {record.label}", f"accuracy {record.accuracy:.4g}"]
    if record.ratio is not None:
        parts.append(f"{record.ratio:.3f} [{record.ratio.low:.3f}, {record.ratio.high:.3f}] of fp32")
    else:
        parts.append(f"{record.latency_ratio:.3f} of fp32, predicted")
    return "<br>".join([*parts, f"{record.int8_calls} calls in int8"])


def _progress(run: Run) -> Figure:
    """Draw the best time that held the goal so far, over trials and over seconds."""
    import plotly.graph_objects as go

    ratios = [float(e.record.ratio) if e.record.feasible and e.record.ratio else None for e in run.entries]
    best = list(accumulate(ratios, lambda a, b: min((v for v in (a, b) if v is not None), default=None)))
    numbers, seconds = list(range(1, len(best) + 1)), run.ended_s
    timed = all(s is not None for s in seconds)
    figure = go.Figure(layout=_layout("trials", "best time / fastest fp32"))
    line = {"shape": "hv", "color": COLOURS["holds the goal"], "width": 3}
    figure.add_scatter(x=numbers, y=best, mode="lines", line=line, name="best so far")
    marker = {"color": GREY, "size": 7}
    figure.add_scatter(x=numbers, y=ratios, mode="markers", marker=marker, name="trials that hold the goal")
    if timed and seconds:
        over = {"trials": numbers, "seconds": seconds}
        buttons = [
            {"label": f"over {name}", "method": "update", "args": [{"x": [x, x]}, {"xaxis.title.text": name}]}
            for name, x in over.items()
        ]
        menu = {"buttons": buttons, "type": "buttons", "direction": "left", "x": 1, "xanchor": "right", "y": 1.16}
        figure.update_layout(updatemenus=[menu])
    return figure


@dataclass(frozen=True)
class _CallRow:
    """One line of the map of calls; shares are of the fp32 model's time."""

    name: str
    op: str
    precision: str
    how: str
    alpha: str
    rank: str
    macs: str
    share: float | None


def _calls(header: Header, recipe: Recipe) -> Iterator[_CallRow]:
    """Yield how each call runs, in the order of execution where the journal knows it."""
    about = header.calls or {name: {} for name in recipe.ops}
    for name, known in about.items():
        config = recipe.config(name)
        share = header.op_times.share(name, config.precision) if header.op_times else None
        alpha = recipe.smoothing.get(known.get("group", name))
        yield _CallRow(
            name=name,
            op=str(known.get("op", "")),
            precision=str(config.precision),
            how=str(config) if config.is_int8 else "",
            alpha="scales" if isinstance(alpha, tuple) else "" if alpha is None else f"{alpha:g}",
            rank=str(known["rank"]) if known.get("rank") else "",
            macs=f"{known['macs'] / MILLION:,.1f}" if known.get("macs") else "",
            share=share,
        )


def _environments(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return what the trials ran on, each machine once, with the names of its nodes."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        known = found.setdefault(str(sorted(entry.environment.items())), {**entry.environment, "nodes": set()})
        known["nodes"].add(entry.record.node)
    return [{**known, "nodes": ", ".join(sorted(known["nodes"]))} for known in found.values()]
