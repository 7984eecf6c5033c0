"""Two runs side by side: what each found, and which calls their best recipes run differently."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from raysq.result import Status
from raysq.run import Run

__all__ = ["tables"]

NONE = "–"


def tables(one: Run, other: Run, names: Sequence[str]) -> Iterator[Table]:
    """Yield a table of what the runs found, and one of the calls that differ, if both found something.

    Args:
        one: the first run.
        other: the second.
        names: what they are called in the headings.
    """
    found = Table("", *names)
    for title, values in zip(_facts(one), zip(_facts(one).values(), _facts(other).values(), strict=True), strict=True):
        found.add_row(title, *values)
    yield found
    best = one.best, other.best
    if best[0] is None or best[1] is None:
        return
    first, second = best[0].recipe, best[1].recipe
    differ = Table("call", *names, title="calls that run differently in the best recipes")
    for call in dict.fromkeys([*first.ops, *second.ops]):
        if first.config(call) != second.config(call):
            differ.add_row(call, *(str(recipe.config(call)) for recipe in (first, second)))
    for group in sorted({*first.smoothing, *second.smoothing}):
        alphas = [recipe.smoothing.get(group) for recipe in (first, second)]
        if alphas[0] != alphas[1]:
            differ.add_row(group, *(NONE if alpha is None else f"alpha {alpha}" for alpha in alphas))
    if first.transforms != second.transforms:
        differ.add_row("whole model", *(", ".join(recipe.transforms) or NONE for recipe in (first, second)))
    if differ.row_count:
        yield differ


def _facts(run: Run) -> dict[str, str]:
    header, best = run.header, run.best
    seconds = [s for s in run.ended_s if s is not None]
    failed = sum(r.status is Status.FAILED for r in run.records)
    facts = {
        "model": f"{header.arguments.get('model', '')} {header.fingerprints.get('model', '')[:8]}".strip(),
        "backend": header.backend,
        "strategy": str(header.arguments.get("strategy", "")),
        "goal": str(header.arguments.get("goal", "")),
        "fp32": f"{header.baseline.accuracy:.4g} in {header.baseline.latency_ms:.3g} ms ({header.baseline.form})",
        "trials": f"{len(run.records)}, {failed} failed",
        "seconds of search": f"{seconds[-1]:.0f}" if seconds else NONE,
        "hold the goal": str(sum(r.feasible for r in run.records)),
    }
    if best is None:
        return {**facts, "accuracy": NONE, "time / fastest fp32": NONE, "in int8": NONE, "found by trial": NONE}
    return {
        **facts,
        "accuracy": f"{best.accuracy:.4g} (loses {best.accuracy_drop:.3g})",
        "time / fastest fp32": best.ratio.with_interval if best.ratio else NONE,
        "in int8": f"{best.int8_calls} calls",
        "found by trial": f"{best.trial}, {best.label}",
    }
