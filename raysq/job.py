"""What all trials of a run share; it is sent to each worker once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raysq.evaluation import EvalFn
    from raysq.goal import Goal
    from raysq.latency import Latency
    from raysq.prepared import Prepared
    from raysq.result import Baseline

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """What all trials of a run share.

    Attributes:
        prepared: the model with its statistics and search space.
        eval_fn: the evaluation.
        goal: how much may be lost.
        latency: the budget of a timing.
        baseline: what int8 is measured against.
    """

    prepared: Prepared
    eval_fn: EvalFn
    goal: Goal
    latency: Latency
    baseline: Baseline
