"""What a call gained by being float, as trials tell that differ in nothing else."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from raysq.impact import Impact, impacts
from raysq.recipe import Approach, OpConfig, Precision, Recipe
from raysq.result import Result, Stage, Status, TrialRecord

INT8, BF16, FP32 = (OpConfig(precision) for precision in Precision)
DYNAMIC = OpConfig(Precision.INT8, Approach.DYNAMIC)


def trial(drop: float | None, a: OpConfig = INT8, b: OpConfig = INT8, c: OpConfig = INT8) -> TrialRecord:
    recipe = Recipe({"a": a, "b": b, "c": c})
    return TrialRecord(0, recipe, {}, Status.FINISHED, Stage.EVALUATED, accuracy_drop=drop)


def test_the_largest_gain_is_first() -> None:
    trials = [trial(0.5), trial(0.25, a=BF16), trial(0.125, b=BF16), trial(0.0625, b=FP32)]
    assert impacts(trials) == (
        Impact("b", Precision.FP32, 0.0625, 0.4375),
        Impact("b", Precision.BF16, 0.125, 0.375),
        Impact("a", Precision.BF16, 0.25, 0.25),
    )


def test_trials_that_differ_in_more_tell_nothing() -> None:
    assert impacts([trial(0.5), trial(0.25, a=BF16, b=BF16)]) == ()
    assert impacts([trial(0.5), trial(0.25, a=BF16, b=DYNAMIC)]) == ()
    assert impacts([trial(0.5, a=BF16), trial(0.25, a=FP32)]) == ()


def test_the_pair_with_most_calls_in_int8_counts() -> None:
    after = [trial(0.25, a=BF16), trial(0.125, a=BF16, b=BF16)]
    gains = {impact.call: impact.gain for impact in impacts([trial(0.5, b=BF16), trial(0.75), *after])}
    assert gains == {"a": 0.5, "b": 0.25}


def test_failed_trials_tell_nothing() -> None:
    assert impacts([trial(None), trial(0.25, a=BF16)]) == ()


def test_the_result_has_them_as_a_table() -> None:
    nothing: dict[str, Any] = dict.fromkeys(field.name for field in fields(Result))
    frame = Result(**nothing | {"trials": (trial(0.5), trial(0.25, a=BF16))}).impacts()
    assert frame.to_dict("records") == [{"call": "a", "precision": "bf16", "accuracy_drop": 0.25, "gain": 0.25}]
    empty = Result(**nothing | {"trials": ()}).impacts()
    assert list(empty.columns) == ["call", "precision", "accuracy_drop", "gain"] and empty.empty


def test_trials_that_ended_early_tell_nothing() -> None:
    early = replace(trial(0.5), items_scored=100, items=1000)
    assert impacts([early, trial(0.25, a=BF16)]) == ()
