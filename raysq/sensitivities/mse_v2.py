"""What each call's int8 does to the outputs of the whole model, in simulation: a forward pass per call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from raysq.checks import check_whole
from raysq.sensitivities.base import measurable
from raysq.sensitivities.simulation import SimulatedModel, kept_items

if TYPE_CHECKING:
    from raysq.recipe import Recipe
    from raysq.source import Source

__all__ = ["MSEv2"]

BATCH = 4  # kept items


@dataclass(frozen=True)
class MSEv2:
    """The squared error of the model's float outputs over their squared signal, with a call in int8 over without.

    All other calls are as the recipe says, or in float where they are in `floats`. The cost is negative where the
    call's error makes up for that of others.

    Attributes:
        confidence_batches: how many batches the model is run on, >= 1. A batch is 4 of the samples that calibration
            kept, at most 32 in all; where there are fewer, all of them are taken.

    Raises:
        OptionError: `confidence_batches` is out of its range.
    """

    name: ClassVar[str] = "mse_v2"
    one_pass: ClassVar[bool] = False

    confidence_batches: int = 2

    def __post_init__(self) -> None:
        check_whole("confidence_batches", self.confidence_batches, 1)

    def scores(
        self, source: Source, recipe: Recipe, calls: Sequence[str] | None = None, floats: Collection[str] = ()
    ) -> dict[str, float]:
        """Return the cost of each call; see `Sensitivity`.

        Raises:
            CalibrationError: no sample was kept, or the model fails on a single one.
        """
        items = kept_items(source, self.name)[: self.confidence_batches * BATCH]
        return SimulatedModel(source, recipe, items).costs(measurable(source, recipe, calls), floats)
