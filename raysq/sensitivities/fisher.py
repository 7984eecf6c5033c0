"""What the error that int8 makes at each call's output does to a loss, to first order: one backward pass for all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from raysq.checks import check_whole
from raysq.intercept import Operands, Site
from raysq.layer import TINY
from raysq.sensitivities.base import measurable
from raysq.sensitivities.loss import Loss, check_labels, check_loss, differentiable, gradients, loss_of
from raysq.sensitivities.simulation import SimulatedModel, kept_items
from raysq.structure import output_tensors

if TYPE_CHECKING:
    from raysq.recipe import Recipe
    from raysq.source import Source

__all__ = ["Fisher"]


@dataclass(frozen=True)
class Fisher:
    """The squared gradient at a call's output times int8's squared error there, summed over elements, mean over items.

    With a loss this is the diagonal of the empirical Fisher information at activations, as in FIT (arXiv 2210.08502).
    Without, it is that of a Gaussian likelihood around the model's own outputs, which needs no labels: the
    Gauss-Newton diagonal of their squared error over their squared signal. A gradient of the outputs' sum under random
    signs, one draw per item, estimates it without bias. The error of a call is that on fp32 inputs; errors are taken
    as independent.

    Attributes:
        loss: of (output, target) or (output, target, criterion), as for `HAWQv2`; None: the outputs themselves.
        seed: of the signs, >= 0.

    Raises:
        OptionError: the loss can't be called, or the seed is out of its range.
    """

    name: ClassVar[str] = "fisher"
    one_pass: ClassVar[bool] = True

    loss: Loss | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss is not None:
            check_loss(self.loss)
        check_whole("seed", self.seed, 0)

    def scores(
        self, source: Source, recipe: Recipe, calls: Sequence[str] | None = None, floats: Collection[str] = ()
    ) -> dict[str, float]:
        """Return the cost of each call; see `Sensitivity`. `floats` make no difference.

        Raises:
            CalibrationError: no sample was kept, one has no label for the loss, or the model fails on a single one.
            OptionError: the loss isn't a finite number with a gradient.
            ModelError: something in the model has no derivative.
        """
        items = kept_items(source, self.name)
        if self.loss is not None:
            check_labels(items, self.name)
        costs = dict.fromkeys(measurable(source, recipe, calls), 0.0)
        if not costs:
            return {}
        model = SimulatedModel(source, recipe, items)
        random = torch.Generator().manual_seed(self.seed)
        for item in items:
            errors = _Errors(model, costs)
            with differentiable(model.source.graph):
                output = model.run(item, errors)
                value = _signed_sum(output, random) if self.loss is None else loss_of(self.loss, output, item)
                slopes = gradients(value, list(errors.outputs.values()))
            for (name, error), slope in zip(errors.errors.items(), slopes, strict=True):
                costs[name] += float((slope * error).nan_to_num(0, 0, 0).square().sum()) / len(items)
        return costs


class _Errors:
    """Computes the calls of one forward in fp32, and notes their outputs and what int8 would add to them."""

    def __init__(self, model: SimulatedModel, calls: Collection[str]) -> None:
        self._exact: Callable[..., Any] = model.insertion(model.source.graph.by_name)
        self._int8 = model.insertion()
        self._calls = calls
        self.outputs: dict[str, Tensor] = {}
        self.errors: dict[str, Tensor] = {}

    def __call__(self, site: Site, operands: Operands) -> Any:
        result = self._exact(site, operands)
        if site.name not in self._calls:
            return result
        output, others = _first(result)
        with torch.no_grad():
            self.errors[site.name] = _first(self._int8(site, operands))[0] - output
        output = output if output.requires_grad else output.detach().requires_grad_()
        self.outputs[site.name] = output
        output = output.clone()  # the model may write to it
        return (output, *others) if isinstance(result, tuple) else output


def _first(result: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """Return the output of a call and its other results, the last states of an LSTM."""
    return (result, ()) if isinstance(result, Tensor) else (result[0], result[1:])


def _signed_sum(output: Any, random: torch.Generator) -> Tensor:
    """Return the sum of the finite outputs under random signs, over the root of their squared sum."""
    values = torch.cat([t[t.isfinite()].flatten() for t in output_tensors(output) if t.is_floating_point()])
    signs = torch.randint(0, 2, values.shape, generator=random) * 2.0 - 1.0
    total: Tensor = (values * signs).sum() / values.detach().norm().clamp_min(TINY)
    return total
