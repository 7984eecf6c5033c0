"""A run as one HTML page that needs no network: what was tried, what it gave, what runs how in the best recipe.

Built from the journal alone, so that a finished, a killed and a running search look alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysq.errors import OptionError, StorageError
from raysq.recipe import Recipe
from raysq.result import Status, TrialRecord
from raysq.run import Entry, Header, Run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["FILE", "is_available", "write"]

FILE = "report.html"
NONE = "–"
TEMPLATE = "report.html.j2"
GREY = "#8b949e"  # readable on white and on black
COLOURS = {"holds the goal": "#2da44e", "fails the goal": "#d4812a", "stopped early": "#a371f7"}
RED = "#e5484d"
HEIGHT = 380  # pixels of a figure
MARGIN = 0.05  # of a ratio, beside the points
MOST_CHARACTERS = 60  # of a trial's name beside its point
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
        model=run.header.arguments.get("model") or run.header.fingerprints["model"][:8],
        baseline=run.header.baseline,
        best=best,
        trials=len(run.records),
        counts=_counts(run.records),
        plotly=get_plotlyjs(),
        tradeoff=drawn(_tradeoff(run)),
        progress=[drawn(figure) for figure in _progress(run)],
        calls=list(_calls(run.header, best.recipe)) if best else [],
        lost=[(r, _kind(r)) for r in run.records if r.reason and not r.feasible],
        environments=_environments(run.entries),
        arguments={name.replace("_", " "): _plain(value) for name, value in run.header.arguments.items()},
    )
    try:
        path.write_text(text)
    except OSError as exc:
        raise StorageError(f"can't write {path}: {exc.strerror}. Pass another path.") from exc


def _kind(record: TrialRecord) -> str:
    if record.status is Status.FAILED:
        return "failed"
    if record.feasible:
        return "holds the goal"
    return "stopped early" if record.estimated else "fails the goal"


def _counts(records: Sequence[TrialRecord]) -> dict[str, int]:
    kinds = [_kind(r) for r in records]
    plural = dict(zip(COLOURS, ("hold the goal", "fail it", "stopped early"), strict=True)) | {"failed": "failed"}
    return {text: kinds.count(kind) for kind, text in plural.items()}


def _plain(value: object) -> str:
    """Return what a person reads of an argument: a list or a dict without its punctuation, "–" for none."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items()) or NONE
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return NONE if value is None or value == "None" else str(value)


def _layout(x: str, y: str, **more: Any) -> dict[str, Any]:
    axis = {"gridcolor": "rgba(139,148,158,0.25)", "zerolinecolor": "rgba(139,148,158,0.25)"}
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": GREY},
        "height": HEIGHT,
        "margin": {"l": 60, "r": 15, "t": 25, "b": 50},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        "xaxis": {"title": x, **axis},
        "yaxis": {"title": y, **axis},
        **more,
    }


def _tradeoff(run: Run) -> Figure:
    """Draw accuracy against latency: as measured, or predicted where nothing was timed; the goal; the front."""
    import plotly.graph_objects as go

    scored = [r for r in run.records if r.accuracy is not None and r.latency_ratio is not None]
    ratios = [1.0, *(r.latency_ratio for r in scored if r.latency_ratio is not None)]
    figure = go.Figure(layout=_layout("time / fastest fp32 (less is faster)", "accuracy"))
    figure.update_xaxes(range=[min(ratios) - MARGIN, max(ratios) + MARGIN])  # an interval may be much wider than that
    for kind, colour in COLOURS.items():
        records = [r for r in scored if _kind(r) == kind]
        figure.add_scatter(
            x=[r.latency_ratio for r in records],
            y=[r.accuracy for r in records],
            mode="markers",
            name=kind,
            marker={"color": colour, "size": 9, "symbol": ["circle" if r.ratio else "circle-open" for r in records]},
            error_x=_intervals(records, colour),
            text=[_told(r) for r in records],
            hovertemplate="%{text}<extra></extra>",
        )
    front = _front(scored, _higher_is_better(run))
    figure.add_scatter(
        x=[r.latency_ratio for r in front],
        y=[r.accuracy for r in front],
        mode="lines",
        name="Pareto front",
        line={"color": GREY, "shape": "hv", "dash": "dot"},
        hoverinfo="skip",
    )
    best = run.best
    if best is not None and best.accuracy is not None and best.latency_ratio is not None:
        ring = {"color": COLOURS["holds the goal"], "size": 17, "symbol": "circle-open", "line": {"width": 2}}
        figure.add_scatter(
            x=[best.latency_ratio], y=[best.accuracy], mode="markers", name="best", marker=ring, hoverinfo="skip"
        )
    if run.least is not None:
        text = f"the goal: {'at least' if _higher_is_better(run) else 'at most'} {run.least:.4g}"
        figure.add_hline(y=run.least, line={"color": RED, "dash": "dash"}, annotation_text=text)
    accuracy = run.header.baseline.accuracy
    figure.add_scatter(
        x=[1.0],
        y=[accuracy],
        mode="markers",
        name="fp32",
        marker={"color": GREY, "size": 11, "symbol": "diamond"},
        hovertemplate=f"fp32: {accuracy:.4g} in {run.header.baseline.latency_ms:.3g} ms<extra></extra>",
    )
    return figure


def _higher_is_better(run: Run) -> bool:
    return bool(run.header.arguments.get("higher_is_better", True))


def _intervals(records: Sequence[TrialRecord], colour: str) -> dict[str, Any]:
    """Return the bars that show each latency's interval, none where it wasn't measured."""
    ends = [(r.ratio.high - r.ratio, r.ratio - r.ratio.low) if r.ratio else (None, None) for r in records]
    plus, minus = [list(side) for side in zip(*ends, strict=True)] or [[], []]
    look = {"color": colour, "thickness": 1, "width": 0}
    return {"type": "data", "symmetric": False, "array": plus, "arrayminus": minus, **look}


def _front(records: Sequence[TrialRecord], higher_is_better: bool) -> list[TrialRecord]:
    """Return the timed trials that no other beats in both, by latency."""
    sign = 1 if higher_is_better else -1
    found: list[TrialRecord] = []
    for record in sorted((r for r in records if r.ratio), key=lambda r: (r.latency_ratio, -sign * (r.accuracy or 0))):
        if not found or sign * (record.accuracy or 0) > sign * (found[-1].accuracy or 0):
            found.append(record)
    return found


def _told(record: TrialRecord) -> str:
    parts = [f"<b>trial {record.trial}</b> {escape(record.label[:MOST_CHARACTERS])}", f"accuracy {record.accuracy:.4g}"]
    if record.ratio is not None:
        parts.append(f"{record.ratio.with_interval} of fp32")
    else:
        parts.append(f"{record.latency_ratio:.3f} of fp32, predicted")
    return "<br>".join([*parts, f"{record.int8_calls} calls in int8"])


def _progress(run: Run) -> Iterator[Figure]:
    """Draw the best trial that held the goal so far, over trials, and over seconds where the journal knows them."""
    import plotly.graph_objects as go

    ratios = [float(e.record.ratio) if e.record.feasible and e.record.ratio else None for e in run.entries]
    held = [e.record if ratio is not None else None for e, ratio in zip(run.entries, ratios, strict=True)]
    leaders = accumulate(held, lambda a, b: min((r for r in (a, b) if r is not None), key=run.cost, default=None))
    best = [None if leader is None else leader.latency_ratio for leader in leaders]
    over: dict[str, list[Any]] = {"trials": list(range(1, len(best) + 1))}
    if run.ended_s and None not in run.ended_s:
        over["seconds"] = run.ended_s
    for title, x in over.items():
        figure = go.Figure(layout=_layout(title, "time / fastest fp32", height=HEIGHT * 3 // 4))
        line = {"shape": "hv", "color": COLOURS["holds the goal"], "width": 3}
        figure.add_scatter(x=x, y=best, mode="lines", line=line, name="best so far")
        marker = {"color": GREY, "size": 7}
        figure.add_scatter(x=x, y=ratios, mode="markers", marker=marker, name="holds the goal")
        lost = [(when, e.record) for when, e in zip(x, run.entries, strict=True) if not e.record.feasible]
        figure.add_scatter(
            x=[when for when, _ in lost],
            y=[0] * len(lost),
            mode="markers",
            name="fails it, or failed",
            marker={"color": RED, "size": 8, "symbol": "x-thin-open", "line": {"width": 2}},
            cliponaxis=False,
            text=[f"trial {r.trial}: {_kind(r)}" for _, r in lost],
            hovertemplate="%{text}<extra></extra>",
        )
        figure.update_yaxes(rangemode="tozero")
        yield figure


@dataclass(frozen=True)
class _CallRow:
    """One line of the map of calls; shares are of the fp32 model's time, bars are shares of the widest."""

    name: str
    op: str
    precision: str
    how: str
    alpha: str
    rank: str
    sensitivity: str
    macs: str
    share: float | None
    bar: float


def _calls(header: Header, recipe: Recipe) -> Iterator[_CallRow]:
    """Yield how each call runs, in the order of execution where the journal knows it."""
    about = header.calls or {name: {} for name in recipe.ops}
    times = header.op_times
    shares = {
        name: times.share(name, recipe.config(name).precision) if times and name in times.shares else None
        for name in about
    }
    widest = max((share for share in shares.values() if share), default=1.0)
    for name, known in about.items():
        config, share = recipe.config(name), shares[name]
        alpha = recipe.smoothing.get(known.get("group", name))
        yield _CallRow(
            name=name,
            op=str(known.get("op", "")),
            precision=str(config.precision),
            how=str(config) if config.is_int8 else "",
            alpha="scales" if isinstance(alpha, tuple) else "" if alpha is None else f"{alpha:g}",
            rank=str(known["rank"]) if known.get("rank") else "",
            sensitivity=f"{known['sensitivity']:.1e}" if known.get("sensitivity") is not None else "",
            macs=f"{known['macs'] / MILLION:,.1f}" if known.get("macs") else "",
            share=share,
            bar=(share or 0.0) / widest,
        )


def _environments(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return what the trials ran on, each machine once, with the names of its nodes."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        known = found.setdefault(str(sorted(entry.environment.items())), {**entry.environment, "nodes": set()})
        known["nodes"].add(entry.record.node)
    return [{**known, "nodes": ", ".join(sorted(known["nodes"]))} for known in found.values()]
