"""The fp32 model that recipes are about, with all that is known of it: what backends and sensitivities start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from raysq.copies import channels_last
from raysq.recipe import Transform

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from raysq.graph import ModelGraph
    from raysq.plan import Planner
    from raysq.recipe import Recipe
    from raysq.stats import CalibrationStats

__all__ = ["Source"]


@dataclass(frozen=True)
class Source:
    """What a backend builds from; it changes none of it.

    Attributes:
        model: the fp32 model, batch norms folded, in-place ops out of place, in eval mode.
        graph: its calls.
        stats: its calibration statistics; None suffices for float forms and for recipes without static calls.
        args: positional example inputs.
        kwargs: keyword example inputs.
        absorb: whether smoothing scales go into whatever makes an activation, where that is exact; False keeps
            them as multiplications, the only form that a qconf has.
        multipliers: call to what its first activation is multiplied by, (channels,), whatever precision it runs in.
    """

    model: torch.nn.Module
    graph: ModelGraph
    stats: CalibrationStats | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    absorb: bool = True
    multipliers: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # what is derived is derived again

    @cached_property
    def planner(self) -> Planner:
        """What turns recipes into scales for this model."""
        from raysq.plan import Planner

        return Planner(self)

    def under(self, recipe: Recipe) -> Source:
        """Return the model with a recipe's scales worked into its weights: in fp32 it computes the same.

        The last one is kept: recipes that are tried one after the other mostly differ elsewhere.

        Raises:
            RecipeError: the recipe scales what this model can't.
        """
        from raysq.smoothquant.rescaled import under

        key = (tuple(recipe.smoothing.items()), Transform.EQUALIZATION in recipe.transforms)
        if key not in self._rescaled:
            self._rescaled.clear()
            self._rescaled[key] = under(self, recipe)
        return self._rescaled[key]

    @cached_property
    def _rescaled(self) -> dict[object, Source]:
        return {}

    @cached_property
    def derived(self) -> dict[object, Any]:
        """What backends keep of this model between builds, each under a key of its own."""
        return {}

    @cached_property
    def channels_last(self) -> torch.nn.Module:
        """The model with convolution weights in the layout that float kernels are fastest in.

        It is the model itself where there are none, and where its forward needs the other layout (it calls `view`).
        """
        return channels_last(self.model, self.args, self.kwargs)
