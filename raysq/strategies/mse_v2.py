"""INC's "mse_v2": the call that hurts the model's output most into float, ranked anew each time; then reverted."""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar

from raysq.recipe import Precision, Recipe
from raysq.sensitivities import rank
from raysq.sensitivities.mse_v2 import MSEv2
from raysq.strategies.base import Barrier, History, Proposal, Steps, Strategy
from raysq.strategies.fallback import candidates, turns
from raysq.strategies.moves import in_float
from raysq.strategies.stages import model_wise, together

__all__ = ["MSEv2Order"]

FEW = 2  # as in INC


class MSEv2Order(Strategy):
    """Two ways to quantize the whole model, dynamic too where the approach is "auto"; then fallback, then revert.

    Until a recipe passes, the int8 calls are ranked by the error of the model's output, with those float that fell
    back already, and the worst becomes float, in bf16, then, if all of that fails, in fp32. Then the least
    sensitive of them goes back to int8, ranked anew each time, until that fails.

    It ends when no call is left, where INC may propose the same for ever; INC's second ranking uses the last batch
    only, and its two stages pass over `max_trials`.

    Args:
        confidence_batches: batches that each ranking looks at, >= 1.

    Raises:
        OptionError: a value out of its range.
    """

    name: ClassVar[str] = "mse_v2"

    def __init__(self, confidence_batches: int = 2) -> None:
        self._sensitivity = MSEv2(confidence_batches)
        super().__init__()

    def next_recipe(self, history: History) -> Steps:
        """Yield the ways, the fallback, and the reverts."""
        base = yield from model_wise(self.space, history, FEW, self.max_trials)
        if history.best is not None:
            return
        may = candidates(self.space, base)
        for precision, until in turns(self.space, history, len(may), self.max_trials):
            floats = yield from self._fall_back(history, base, precision, until)
            if history.best is not None:
                yield from self._revert(history, base, precision, floats)
                return

    def _fall_back(
        self, history: History, base: Recipe, precision: Precision, until: int
    ) -> Generator[Proposal | Barrier, None, list[str]]:
        """Put the worst call in float, again and again; return those that are."""
        floats: list[str] = []
        left = candidates(self.space, base)
        while history.best is None and history.proposed < until:
            order = rank(self.costs(self._sensitivity, base, left, floats))
            if not order:
                break
            floats.append(order[0])
            left.remove(order[0])
            recipe = in_float(self.space, floats, precision, base)
            yield from together([Proposal(recipe, f"{order[0]} in {precision} too")], history, until)
        return floats

    def _revert(self, history: History, base: Recipe, precision: Precision, floats: list[str]) -> Steps:
        """Put the least sensitive call back in int8, again and again, until that fails."""
        while history.proposed < self.max_trials:
            order = rank(self.costs(self._sensitivity, base, floats, floats))
            if not order:
                return
            floats = [call for call in floats if call != order[-1]]
            recipe = in_float(self.space, floats, precision, base)
            yield from together([Proposal(recipe, f"{order[-1]} back in int8")], history, self.max_trials)
            if not history.feasible(recipe):
                return
