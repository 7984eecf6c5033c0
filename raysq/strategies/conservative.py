"""INC's quant_level 0 ("O0"): from float, one type of call at a time into int8, kept only if it passes."""

from __future__ import annotations

import logging
from typing import ClassVar

from raysq.features import group_of
from raysq.strategies.base import History, Proposal, Steps, Strategy
from raysq.strategies.moves import float_precisions, in_float, in_int8
from raysq.strategies.stages import together

__all__ = ["Conservative"]

log = logging.getLogger("raysq")

TYPES = ("conv", "matmul", "linear")  # "conv" with depthwise and transposed ones, "matmul" with bmm


class Conservative(Strategy):
    """Convolutions, then matmuls, then linears are put into int8, on top of those that were kept before.

    All other types stay in float; a model that has none of the three is taken through its own types. What each type
    loses is logged, and stands in the result's trials.

    INC begins at bf16 where it can, as this does, but asks for strictly less than the tolerance; here equality
    passes, as everywhere. INC goes on beyond `max_trials`; raysq doesn't.
    """

    name: ClassVar[str] = "conservative"

    def next_recipe(self, history: History) -> Steps:
        """Yield one recipe per type, each after the last one ended."""
        space, default = self.space, self.space.default()
        members: dict[str, list[str]] = {}
        for call in space.flippable:
            members.setdefault(group_of(space.graph[call]), []).append(call)
        kept = default
        for precision in float_precisions(space)[:1]:
            kept = in_float(space, space.flippable, precision, default)
        yield from together([Proposal(kept, "in float")], history, self.max_trials)
        for name in [name for name in TYPES if name in members] or list(members):
            recipe = in_int8(space, members[name], default, kept)
            yield from together([Proposal(recipe, f"{name} in int8")], history, self.max_trials)
            record = history.of(recipe)
            if record is None:
                return
            log.info("%s in int8: loses %.4g, %s", name, record.loss, "kept" if record.feasible else "back in float")
            kept = recipe if record.feasible else kept
