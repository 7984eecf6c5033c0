"""INC's "mse": calls back in float in the order of the error that int8 makes at each of their outputs."""

from __future__ import annotations

from typing import ClassVar

from raysq.sensitivities import MSE, rank
from raysq.strategies.base import History, Steps, Strategy
from raysq.strategies.fallback import in_order
from raysq.strategies.stages import model_wise

__all__ = ["MSEOrder"]

FEW = 5  # as in INC


class MSEOrder(Strategy):
    """Five ways to quantize the whole model, dynamic too where the approach is "auto"; then fallback by error.

    The error is that between each call's fp32 and int8 output, under the one of the five that lost least. Ever more
    calls become float in that order, in bf16, then in fp32, one per trial; by bisection where trials are short.

    INC tries each call by itself before it accumulates them, and stops at the first recipe that passes; raysq spends
    its budget on more ways if one of the first passes. INC's error is taken after stretching both outputs to [0, 1],
    which hides by how much they differ; raysq's is relative to the signal.
    """

    name: ClassVar[str] = "mse"

    def next_recipe(self, history: History) -> Steps:
        """Yield the ways, then the fallback."""
        base = yield from model_wise(self.space, history, FEW, self.max_trials)
        if history.best is None:
            order = rank(self.costs(MSE(), base))
            yield from in_order(self.space, history, base, order, self.max_trials, self.name)
