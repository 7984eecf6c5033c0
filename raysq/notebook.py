"""What a notebook shows of a result, a model or a graph: small tables in the notebook's own colours, light or dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from raysq.recipe import Precision

if TYPE_CHECKING:
    from raysq.graph import ModelGraph
    from raysq.result import Result

__all__ = ["of_calls", "of_graph", "of_result"]

FRONT = ("label", "accuracy", "accuracy_drop", "latency_ratio", "int8_calls")


def of_result(result: Result) -> str:
    """Return the winner beside the float forms, the Pareto front, and what stayed in float."""
    base, ratio = result.baseline, result.latency_ratio
    verdict = "meets the goal" if result.feasible else "does not meet the goal: the closest recipe"
    if result.feasible and not result.worthwhile:
        verdict += ", but is not faster than float beyond luck"
    header = ["", f"fp32 ({base.form})", f"int8 ({result.backend})"]
    rows = [
        ["accuracy", f"{base.accuracy:.4g}", f"{result.accuracy:.4g} (loss {result.accuracy_drop:.3g})"],
        ["latency", f"{base.latency_ms:.3g} ms", f"{result.latency_ms:.3g} ms"],
        ["time / fp32", "1", f"{ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"],
    ]
    if base.bf16_ratio is not None:
        accuracy = "" if base.bf16_accuracy is None else f"{base.bf16_accuracy:.4g}"
        latency = "" if base.bf16_latency_ms is None else f"{base.bf16_latency_ms:.3g} ms"
        bf16 = ["bf16", accuracy, latency, f"{base.bf16_ratio:.3f}"]
        header, *rows = [[*line[:2], cell, line[2]] for line, cell in zip([header, *rows], bf16, strict=True)]
    front = [[_cell(value) for value in row] for row in result.pareto_front()[list(FRONT)].itertuples(index=False)]
    feasible = sum(trial.feasible for trial in result.trials)
    trials = f"Pareto front of {len(result.trials)} trials, {feasible} of which meet the goal"
    return "".join(
        [
            f"<p>raysq: {escape(verdict)}</p>",
            _table(header, rows),
            _folded(trials, _table(FRONT, front)),
            of_calls(result.executed, result.left_in_float),
        ]
    )


def of_calls(executed: Mapping[str, Precision], left_in_float: Mapping[str, str]) -> str:
    """Return how many calls run in int8, and why the others don't."""
    in_int8 = sum(precision is Precision.INT8 for precision in executed.values())
    said = f"{in_int8} of {len(executed)} calls in int8"
    if not left_in_float:
        return f"<p>{said}</p>"
    return _folded(f"{said}, {len(left_in_float)} left in float", _table(["call", "why"], left_in_float.items()))


def of_graph(graph: ModelGraph) -> str:
    """Return the calls that could run in int8, and those that can't."""
    calls = _folded(f"{len(graph.calls)} calls could run in int8", _table(graph.COLUMNS, graph.rows()))
    if not graph.left_in_float:
        return calls
    count = len(graph.left_in_float)
    return calls + _folded(f"{count} can't", _table(["function", "why"], graph.left_in_float.items()))


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"
