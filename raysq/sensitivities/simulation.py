"""A model in simulated int8, run on kept calibration items with one set of float calls or another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from raysq.arithmetic import QParams
from raysq.errors import CalibrationError
from raysq.insertion import Insertion
from raysq.intercept import Interceptor, Operands, Site
from raysq.layer import TINY
from raysq.recipe import FP32, TensorConfig
from raysq.simulated import Simulated
from raysq.structure import output_tensors

if TYPE_CHECKING:
    from raysq.plan import CallPlan
    from raysq.recipe import Recipe
    from raysq.source import Source
    from raysq.stats import Item

__all__ = ["SimulatedModel", "kept_items", "to_tensors"]


def kept_items(source: Source, sensitivity: str) -> tuple[Item, ...]:
    """Return the kept calibration samples.

    Raises:
        CalibrationError: there are none, as there was no calibration.
    """
    if source.stats is None or not source.stats.items:
        raise CalibrationError(
            f"sensitivity {sensitivity!r} runs the model on calibration data, got none: pass `calib`."
        )
    return source.stats.items


class SimulatedModel:
    """What int8 does to the outputs of a model, all calls being as a recipe says but for those left in float.

    Where the fp32 output isn't finite nothing is compared; where that of int8 isn't, or has another shape, it counts
    as zeros: all signal is lost.

    Args:
        source: the model; it isn't changed.
        recipe: how each call is quantized.
        items: the samples that it is run on, one by one.
    """

    def __init__(self, source: Source, recipe: Recipe, items: Sequence[Item]) -> None:
        self.source = source.under(recipe)
        self.items = items
        self._recipe = recipe
        self._numerics = _RoundsOnce()

    @cached_property
    def signals(self) -> NDArray[np.float64]:
        """Squared fp32 outputs of each item, (items,)."""
        return np.array([_energy(exact, exact) for exact in self._exact])

    @cached_property
    def _exact(self) -> list[list[Tensor]]:
        return [self._outputs(item, self.source.graph.by_name) for item in self.items]

    def noises(self, floats: Collection[str] = ()) -> NDArray[np.float64]:
        """Return the squared error of the outputs for each item, (items,), with these calls in float."""
        noisy = [self._outputs(item, floats) for item in self.items]
        return np.array([_energy(e, map(_difference, e, n)) for e, n in zip(self._exact, noisy, strict=True)])

    def error(self, floats: Collection[str] = ()) -> float:
        """Return the squared error of all outputs over their squared signal, with these calls in float."""
        return float(self.noises(floats).sum() / max(self.signals.sum(), TINY))

    def costs(self, calls: Sequence[str], floats: Collection[str] = ()) -> dict[str, float]:
        """Return by how much the error is larger with each call in int8 than with it in float.

        Args:
            calls: looked at one by one.
            floats: calls that are in float but for the one that is looked at.
        """
        base = self.error(floats) if calls else 0.0
        others = set(floats)
        return {
            call: self.error(others - {call}) - base if call in others else base - self.error(others | {call})
            for call in calls
        }

    def plans(self, floats: Collection[str] = ()) -> dict[str, CallPlan]:
        """Return the plan of every call as the recipe says, but for these, in float."""
        return self.source.planner.plan(self._recipe.with_ops({call: FP32 for call in floats}))

    def insertion(self, floats: Collection[str] = ()) -> Insertion:
        """Return what computes each call as the recipe says, but for these, in float; for one forward."""
        return Insertion(self.plans(floats), self._numerics)

    def run(self, item: Item, on_call: Callable[[Site, Operands], Any]) -> Any:
        """Return what the model makes of an item, its calls computed by `on_call`.

        Raises:
            CalibrationError: the model fails on a single sample.
        """
        args, kwargs = to_tensors(item.args), to_tensors(dict(item.kwargs))
        with Interceptor(self.source.model, on_call, out_of_place=self.source.graph.out_of_place):
            try:
                return self.source.model(*args, **kwargs)
            except Exception as exc:
                raise CalibrationError(
                    f"the model fails on a single calibration sample, a batch of one: {exc}. Sensitivity 'mse' needs "
                    "no forward pass."
                ) from exc

    def _outputs(self, item: Item, floats: Collection[str]) -> list[Tensor]:
        with torch.no_grad():
            outputs = output_tensors(self.run(item, self.insertion(floats)))
        return [t for t in outputs if t.is_floating_point()]


class _RoundsOnce:
    """The simulation's numerics, that remembers weights: they are the same whatever the other calls run in."""

    def __init__(self) -> None:
        self._numerics = Simulated()
        self._weights: dict[tuple[int, int], tuple[Tensor, QParams, Tensor]] = {}

    def activation(self, x: Tensor, params: QParams) -> Tensor:
        return self._numerics.activation(x, params)

    def dynamic(self, x: Tensor, config: TensorConfig) -> Tensor:
        return self._numerics.dynamic(x, config)

    def weight(self, w: Tensor, params: QParams) -> Tensor:
        key = (w.data_ptr(), id(params))
        if key not in self._weights:
            self._weights[key] = (w, params, self._numerics.weight(w, params))  # kept, so that ids stay theirs
        return self._weights[key][2]


def to_tensors(tree: Any) -> Any:
    """Return kept values as the model gets them; it may write to them."""
    return tree_map(lambda value: torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value, tree)


def _difference(exact: Tensor, noisy: Tensor) -> Tensor:
    return exact.double() - noisy.double().nan_to_num(0, 0, 0) if noisy.shape == exact.shape else exact


def _energy(exact: Iterable[Tensor], values: Iterable[Tensor]) -> float:
    """Return the sum of squares of the values where the exact output is finite."""
    return sum(float(v[e.isfinite()].double().square().sum()) for e, v in zip(exact, values, strict=True))
