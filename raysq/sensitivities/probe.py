"""How much each call does for the samples that int8 hurts most, when it alone is put back to float."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from raysq.checks import check_whole
from raysq.layer import TINY
from raysq.sensitivities.base import measurable
from raysq.sensitivities.simulation import SimulatedModel, kept_items

if TYPE_CHECKING:
    from raysq.recipe import Recipe
    from raysq.source import Source

__all__ = ["Probe"]


@dataclass(frozen=True)
class Probe:
    """By how much the error of the outputs shrinks with one call in float, on the samples that err most in int8.

    This is how NNCF's accuracy-aware quantization ranks, but by the outputs' error instead of a metric, so that no
    labels are needed. The error is that of `MSEv2`; samples are compared by their own.

    Attributes:
        items: how many samples, >= 1, of those that calibration kept, at most 32.

    Raises:
        OptionError: `items` is out of its range.
    """

    name: ClassVar[str] = "probe"
    one_pass: ClassVar[bool] = False

    items: int = 8

    def __post_init__(self) -> None:
        check_whole("items", self.items, 1)

    def scores(
        self, source: Source, recipe: Recipe, calls: Sequence[str] | None = None, floats: Collection[str] = ()
    ) -> dict[str, float]:
        """Return the cost of each call; see `Sensitivity`.

        Raises:
            CalibrationError: no sample was kept, or the model fails on a single one.
        """
        kept = kept_items(source, self.name)
        whole = SimulatedModel(source, recipe, kept)
        errors = whole.noises(floats) / np.maximum(whole.signals, TINY)
        worst = [kept[i] for i in np.argsort(-errors, kind="stable")[: self.items]]
        return SimulatedModel(source, recipe, worst).costs(measurable(source, recipe, calls), floats)
