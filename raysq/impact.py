"""What a call gains by being float instead of int8, from trials that differ in nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

from raysq.recipe import Precision

if TYPE_CHECKING:
    from raysq.result import TrialRecord

__all__ = ["Impact", "impacts"]


@dataclass(frozen=True)
class Impact:
    """What was seen of one call.

    Attributes:
        call: its name.
        precision: the float type.
        accuracy_drop: what the recipe loses that has it in float.
        gain: what the recipe loses more that has it in int8.
    """

    call: str
    precision: Precision
    accuracy_drop: float
    gain: float


def impacts(trials: Sequence[TrialRecord]) -> tuple[Impact, ...]:
    """Return an impact per call and float type, the largest gain first.

    Where several pairs of trials tell of one, that with most calls in int8 counts, of equals the earliest. Trials that
    failed tell nothing, nor do those that ended early: what they lose is an estimate.
    """
    whole_ones = (trial for trial in trials if math.isfinite(trial.loss) and not trial.estimated)
    scored = [(trial, frozenset(trial.recipe.int8_calls)) for trial in whole_ones]
    found: dict[tuple[str, Precision], tuple[int, Impact]] = {}
    for (before, whole), (after, rest) in permutations(scored, 2):
        if len(whole) != len(rest) + 1 or not rest < whole:
            continue
        (call,) = whole - rest
        config = after.recipe.config(call)
        known = found.get((call, config.precision))
        if (known is None or known[0] < len(whole)) and before.recipe.with_ops({call: config}) == after.recipe:
            impact = Impact(call, config.precision, after.loss, before.loss - after.loss)
            found[call, config.precision] = len(whole), impact
    return tuple(sorted((impact for _, impact in found.values()), key=lambda impact: -impact.gain))
