"""What a sensitivity is, and how calls are ranked by it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from raysq.recipe import Recipe
    from raysq.source import Source

__all__ = ["Sensitivity", "measurable", "rank"]


class Sensitivity(Protocol):
    """What int8 costs each call of a model. A frozen value: its fields are its arguments.

    Attributes:
        name: what users call it.
        one_pass: whether all calls together cost what a single one does; others are asked for parts of them, side by
            side and resumed after a crash.
    """

    name: ClassVar[str]
    one_pass: ClassVar[bool]

    def scores(
        self, source: Source, recipe: Recipe, calls: Sequence[str] | None = None, floats: Collection[str] = ()
    ) -> dict[str, float]:
        """Return the cost by call name, in execution order, larger is worse, never NaN.

        The cost of a call is that of its int8 over its float, all others being as the recipe says.

        Args:
            source: the model, its statistics and kept items; it isn't changed.
            recipe: how each call is quantized.
            calls: whose cost is wanted; None: all that the recipe has in int8. Those that it has in float, and those
                that calibration never reached, are left out.
            floats: calls that are left in float meanwhile, but for the one that is looked at; they may be among
                `calls`. Where each call is looked at by itself they make no difference.
        """


def measurable(source: Source, recipe: Recipe, calls: Sequence[str] | None = None) -> list[str]:
    """Return the calls whose cost can be told, in execution order: in int8, reached by calibration, among `calls`."""
    reached = source.stats.tensors if source.stats is not None else {}
    return [
        call.name
        for call in source.graph.calls
        if recipe.config(call.name).is_int8
        and (calls is None or call.name in calls)
        and all(name in reached for name in call.tensors)
    ]


def rank(errors: Mapping[str, float]) -> tuple[str, ...]:
    """Return the calls, the most sensitive first; where costs are equal, in the order given.

    Example:
        >>> rank({"a": 0.1, "b": 0.3, "c": 0.1})
        ('b', 'a', 'c')
    """
    return tuple(sorted(errors, key=lambda name: -errors[name]))
