"""INC's quant_level "auto": the default, then level 0 (`conservative`), then `basic`."""

from __future__ import annotations

from typing import ClassVar

from raysq.strategies.base import History, Proposal, Steps, Strategy
from raysq.strategies.basic import Basic
from raysq.strategies.conservative import Conservative
from raysq.strategies.fallback import Blocks
from raysq.strategies.stages import together

__all__ = ["IncAuto"]


class IncAuto(Strategy):
    """The default recipe, then the trials of `conservative`, then those of `basic`, as one search.

    INC ends at the first recipe that passes; this goes on looking for faster ones, up to where `basic` would put calls
    in float. INC starts `basic` without knowing what the default lost; here all share one history.

    Args:
        blocks: see `Basic`.

    Raises:
        OptionError: `blocks` is no list of lists of regular expressions.
    """

    name: ClassVar[str] = "inc_auto"

    def __init__(self, blocks: Blocks | None = None) -> None:
        super().__init__()
        self._parts: tuple[Strategy, ...] = (Conservative(), Basic(blocks))

    def next_recipe(self, history: History) -> Steps:
        """Yield the default, then what each strategy proposes that knows what came before."""
        yield from together([Proposal(self.space.default(), "default")], history, self.max_trials)
        for part in self._parts:
            part.bind(self.space, self.goal, self.max_trials, self.seed, self.source, self._costs)
            yield from part.next_recipe(history)
