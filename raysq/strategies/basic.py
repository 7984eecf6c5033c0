"""INC's "basic" (quant_level 1): ways to quantize the whole model first, then ever more of it back in float."""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar

from raysq.recipe import Recipe
from raysq.strategies import stages
from raysq.strategies.base import Barrier, History, Proposal, Steps, Strategy
from raysq.strategies.fallback import (
    Blocks,
    accumulated,
    bisecting,
    by_impact,
    candidates,
    check_blocks,
    each_block,
    each_call,
    turns,
)
from raysq.strategies.moves import framework_default, rankings
from raysq.strategies.stages import together
from raysq.switches import free_switches

__all__ = ["Basic"]


class Basic(Strategy):
    """The stages of INC's default strategy, in its order; the trials of a stage run in parallel.

    1. Each alpha of a list that was given, for all groups.
    2. The framework's default: ranges from minimum to maximum, nothing smoothed or transformed.
    3. All switches on; skipped where all are fixed.
    4. Ways to quantize each type of call, ever further from the default.
    5. All calls dynamic that can be; where the approach is "auto" and nothing passed.
    6. Each switch by itself, on the best so far, those that are fixed apart.

    If nothing passed, calls go back to float, in bf16, then in fp32, from the recipe that lost least:

    7. All calls of a block, for each block.
    8. Each call by itself: its impact, see `Result.impacts`.
    9. Ever more calls together, those of the largest impact first.

    INC ends at the first recipe that passes. This ends a fallback so, but spends what is left on stages 4 and 6 where
    one of those before 7 passes. Where nothing passes, the first six have half of `max_trials`, so that fallback is
    always reached. 7 and 8 leave enough for 9; where they can't try all they try the most sensitive, by the space's
    first ranking, and 9 bisects the list instead of going through it one by one.

    Args:
        blocks: per block, expressions that match the whole name of a call, or of a module around it; None: the
            repeated blocks that were found in the model.

    Raises:
        OptionError: `blocks` is no list of lists of regular expressions.
    """

    name: ClassVar[str] = "basic"

    def __init__(self, blocks: Blocks | None = None) -> None:
        check_blocks(blocks)
        super().__init__()
        self.blocks = blocks

    def next_recipe(self, history: History) -> Steps:
        """Yield the stages."""
        base = yield from self._model_wise(history)
        if history.best is None:
            yield from self._fall_back(history, base)

    def _model_wise(self, history: History) -> Generator[Proposal | Barrier, None, Recipe]:
        """Yield stages 1 to 6; return what lost least."""
        space = self.space
        half = -(-self.max_trials // 2)
        last = len(free_switches(space))
        tried = (yield from stages.alphas(space, history, half)) or [space.default()]
        start = stages.least(history, tried)
        tried += yield from together([Proposal(framework_default(space), "framework default")], history, half)
        tried += yield from together(stages.all_switches(space, start), history, half)
        ways = stages.op_types(space, start)
        tried += yield from together(ways, history, min(half, max(half - last - 1, history.proposed + 1)))
        if history.best is None:
            tried += yield from together(stages.dynamic(space, stages.least(history, tried)), history, half)
        else:
            tried += yield from together(ways, history, self.max_trials - last)
        best = history.best.recipe if history.best else stages.least(history, tried)
        until = self.max_trials if history.best else half
        tried += yield from together(stages.every_switch(space, best), history, until)
        return stages.least(history, tried)

    def _fall_back(self, history: History, base: Recipe) -> Steps:
        """Yield stages 7 to 9 for each float type, until something passes."""
        space = self.space
        calls = candidates(space, base)
        ranked = [call for call in next(iter(rankings(space).values())) if call in calls]
        for precision, until in turns(space, history, len(calls), self.max_trials):
            spare = until - bisecting(len(calls))
            blocks = each_block(space, base, precision, self.blocks, ranked)
            yield from together(blocks, history, (history.proposed + spare) // 2)
            if history.best is None:
                yield from together(each_call(space, base, precision, ranked), history, spare)
            if history.best is None:
                order = by_impact(space, history, base, ranked)
                yield from accumulated(space, history, base, precision, order, until, "impact")
            if history.best is not None:
                return
