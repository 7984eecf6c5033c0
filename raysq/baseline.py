"""Measures what int8 is compared with: the model's own score, and the fastest of its fp32 and bf16 forms."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raysq import evaluation, memory
from raysq.errors import BackendError, EvaluationError, ModelError
from raysq.goal import Goal, Objective
from raysq.inspection import same_outputs
from raysq.kernels import base
from raysq.latency import Latency, Timing
from raysq.result import Baseline
from raysq.structure import describe

if TYPE_CHECKING:
    from raysq.kernels.base import Backend, BuiltModel
    from raysq.prepared import Prepared

__all__ = ["BF16", "measure", "outputs"]

BF16 = "bf16"  # a float form whose name holds this computes in bf16, any other in fp32
CHANNELS_LAST = "channels_last"  # so does that of a form that differs by the layout of convolutions' weights only
RTOL = 1e-3  # of the largest output: fp32 kernels differ in the order of their sums, not in what they compute


def measure(
    prepared: Prepared, engine: Backend, model: Any, eval_fn: evaluation.EvalFn, goal: Goal, latency: Latency
) -> Baseline:
    """Score the model as it was given, and find the fastest float forms that the backend and its rivals have of it.

    Forms are built one at a time; at most two are alive, the fastest so far and its challenger. An fp32 form
    must compute what the model computes; bf16 forms are scored with `eval_fn`.

    Args:
        prepared: the prepared model, with the inputs and the threads to time it with.
        engine: its backend.
        model: the model as it was given.
        eval_fn: the evaluation.
        goal: says which metrics count, and on which split the winner is confirmed: the model is scored there too.
        latency: the budget of each timing.

    Raises:
        ModelError: the model gives other outputs whenever it is called.
        EvaluationError: `eval_fn` or `goal.confirm` fails on the model, or its score allows no relative loss.
        BackendError: no fp32 form could be built.
        OptionError: memory is an objective, and can't be measured here.
    """
    begun = time.perf_counter()
    score = evaluation.evaluate(eval_fn, model, goal)
    eval_s = time.perf_counter() - begun
    evaluation.warn_if_whole(eval_fn, score, goal)
    confirm = evaluation.confirm(model, goal) if goal.confirm else None
    for found in filter(None, (score, confirm)):
        evaluation.loss(found, found.value, found.metrics, goal)  # a 0 allows no relative loss: say so before any work
    contest = _Contest(prepared, engine, latency)
    rivals = map(base.get, prepared.rivals)
    forms = list(dict.fromkeys(form for each in (engine, *rivals) for form in each.float_forms()))
    if prepared.source.channels_last is prepared.source.model:
        forms = [form for form in forms if CHANNELS_LAST not in form]  # no convolution: it would be timed twice
    champion = contest.fastest_fp32([form for form in forms if BF16 not in form])
    if Objective.MEMORY in goal.objectives:
        prepared.memory_growth(champion)  # a system that can't tell says so before any trial
    in_bf16 = [contest.bf16(form, champion, eval_fn, goal) for form in forms if BF16 in form]
    best = min((r for r in in_bf16 if r is not None), key=lambda r: r[0].ratio, default=None)
    return Baseline(
        accuracy=score.value,
        metrics=score.metrics,
        latency_ms=contest.forms_ms[contest.winner],
        form=contest.winner,
        forms_ms=contest.forms_ms,
        bf16_accuracy=best[1] if best else None,
        bf16_latency_ms=best[0].candidate_ms if best else None,
        bf16_ratio=best[0].ratio if best else None,
        dropped=contest.dropped,
        eval_s=eval_s,
        size_bytes=champion.size_bytes,
        confirm_accuracy=confirm.value if confirm else None,
        confirm_metrics=confirm.metrics if confirm else None,
        reference=score.units if isinstance(eval_fn, evaluation.InParts) else None,
    )


def outputs(model: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors of a model's output, in order, whatever its class."""
    with torch.no_grad():
        return describe(model(*args, **kwargs), "the model's output", {}, omit=True)[0]


class _Contest:
    """Builds and times float forms, and remembers what came of them."""

    def __init__(self, prepared: Prepared, engine: Backend, latency: Latency) -> None:
        self.prepared = prepared
        self.engine = engine
        self.latency = latency
        self.winner = ""
        self.forms_ms: dict[str, float] = {}
        self.dropped: dict[str, str] = {}

    def fastest_fp32(self, forms: list[str]) -> BuiltModel:
        """Return the fastest form; a tie goes to the earlier one."""
        source = self.prepared.source
        expected = outputs(source.model, source.args, source.kwargs)
        champion: BuiltModel | None = None
        for form in forms:
            champion = self._winner(form, champion, expected)
        if champion is not None:
            return champion
        if not same_outputs(outputs(source.model, source.args, source.kwargs), expected, RTOL):
            raise ModelError(
                "the model gives other outputs when it is called again with the same inputs, so no copy can be "
                "compared with it. If it draws random numbers, such as dropout at inference, seed them inside of its "
                "forward or leave them out; if it keeps a state between calls, make that an input."
            )
        reasons = "; ".join(f"{form}: {reason}" for form, reason in self.dropped.items())
        raise BackendError(
            f"backend {self.engine.name!r} could build no fp32 form of the model ({reasons}). Pass another `backend`."
        )

    def bf16(
        self, form: str, champion: BuiltModel, eval_fn: evaluation.EvalFn, goal: Goal
    ) -> tuple[Timing, float] | None:
        """Return how fast a form is against the fastest fp32, and its score."""
        built = self.build(form)
        if built is None:
            return None
        try:
            accuracy = evaluation.evaluate(eval_fn, built.model, goal).value
        except EvaluationError as exc:
            self.dropped[form] = str(exc)
            return None
        timing = self.prepared.time(built.model, champion.model, self.latency)
        self.forms_ms[form] = timing.candidate_ms
        return timing, accuracy

    def _winner(self, form: str, champion: BuiltModel | None, expected: list[Tensor]) -> BuiltModel | None:
        built = self.build(form)
        if built is None:
            return champion
        source = self.prepared.source
        if not same_outputs(outputs(built.model, source.args, source.kwargs), expected, RTOL):
            self.dropped[form] = f"its output differs from the model's by more than {RTOL:g} of the largest value"
            return champion
        if champion is None:
            self.forms_ms[form] = self.prepared.latency_ms(built.model)
        else:
            timing = self.prepared.time(built.model, champion.model, self.latency, deciding=True)
            self.forms_ms |= {form: timing.candidate_ms, self.winner: timing.reference_ms}
            if timing.ratio >= 1:
                return champion
        self.winner = form
        return built

    def build(self, form: str) -> BuiltModel | None:
        """Return a form, or None where it can't be built."""
        memory.trim()
        try:
            return base.offering(form, self.engine).build_float(self.prepared.source, form)
        except Exception as exc:  # noqa: BLE001  # a compiler may raise anything; the other forms remain
            self.dropped[form] = f"{type(exc).__name__}: {exc}"
            return None
