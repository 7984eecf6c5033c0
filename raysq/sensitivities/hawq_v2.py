"""How sharply a loss curves along each call's weight, times how far int8 moves that weight: HAWQ-V2."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from raysq.checks import check_whole
from raysq.errors import OptionError
from raysq.insertion import Insertion
from raysq.intercept import Operands, Site
from raysq.sensitivities.base import measurable
from raysq.sensitivities.loss import Loss, check_labels, check_loss, differentiable, gradients, loss_of
from raysq.sensitivities.simulation import SimulatedModel, kept_items

if TYPE_CHECKING:
    from raysq.recipe import Recipe
    from raysq.source import Source
    from raysq.stats import Item

__all__ = ["HAWQv2"]

PASS = 8  # vectors


@dataclass(frozen=True)
class HAWQv2:
    """The mean of the Hessian's diagonal of each weight times the squared error of its int8 (arXiv 1911.03852, eq. 8).

    The trace is Hutchinson's estimate: the mean of v·Hv over vectors v of random signs, each with the next of the kept
    samples. Each takes a backward pass per call: no other sensitivity takes as long. Costs of weights along which the
    loss is concave are negative. Calls without a weight are left out: the Hessian is that of weights. INC's `hawq_v2`
    ranks by the trace alone, of cross-entropy whatever loss it gets.

    Attributes:
        loss: of (output, target), a sample's label as calibration has it, batch axis 1; or of (output, target,
            criterion), as in INC, which gets a `torch.nn.CrossEntropyLoss`.
        max_passes: of 8 vectors each at most, >= 1.
        tolerance: a call is done when a pass changes its trace by less than this share of it, in [0, 1).
        seed: of the vectors, >= 0.

    Raises:
        OptionError: there is no loss, or it can't be called; a number out of its range.
    """

    name: ClassVar[str] = "hawq_v2"
    one_pass: ClassVar[bool] = False

    loss: Loss | None = None
    max_passes: int = 4
    tolerance: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss is None:
            raise OptionError(
                "sensitivity 'hawq_v2' needs the loss that the model was trained with: "
                "`method_kwargs={'loss': torch.nn.functional.cross_entropy}`."
            )
        check_loss(self.loss)
        check_whole("max_passes", self.max_passes, 1)
        check_whole("seed", self.seed, 0)
        if isinstance(self.tolerance, bool | str) or not 0 <= self.tolerance < 1:
            raise OptionError(f"`tolerance` must lie in [0, 1), got {self.tolerance!r}.")

    def scores(
        self, source: Source, recipe: Recipe, calls: Sequence[str] | None = None, floats: Collection[str] = ()
    ) -> dict[str, float]:
        """Return the cost of each call that has a weight; see `Sensitivity`. `floats` make no difference.

        Raises:
            CalibrationError: no sample was kept, one has no label, or the model fails on a single one.
            OptionError: the loss isn't a finite number with a gradient.
            ModelError: something in the model has no second derivative.
        """
        assert self.loss is not None
        items = kept_items(source, self.name)
        check_labels(items, self.name)
        model = SimulatedModel(source, recipe, items)
        plans = model.plans()
        weights = {call: tuple(plans[call].weights or ()) for call in measurable(source, recipe, calls)}
        curvature = _Curvature(model, {call: positions for call, positions in weights.items() if positions})
        random = {call: torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {call}".encode())) for call in weights}
        found: dict[str, list[float]] = {call: [] for call, positions in weights.items() if positions}
        samples = itertools.cycle(items)
        for _ in range(self.max_passes):
            left = [call for call, values in found.items() if not self._stands(values)]
            for item in itertools.islice(samples, PASS if left else 0):
                diagonals = curvature.diagonals(item, self.loss, {call: random[call] for call in left})
                for call in left:
                    found[call].append(diagonals.get(call, 0.0))
        return {call: float(np.mean(values)) * curvature.moved.get(call, 0.0) for call, values in found.items()}

    def _stands(self, values: Sequence[float]) -> bool:
        """Whether the last pass left the mean where it was."""
        if len(values) < 2 * PASS:
            return False
        mean = float(np.mean(values))
        return abs(mean - float(np.mean(values[:-PASS]))) <= self.tolerance * abs(mean)


class _Curvature:
    """The Hessian of a loss by the weights of each call, and how far int8 moves those weights.

    Each call reads its weights under a name of its own, so that what several calls share is looked at for each.

    Args:
        model: whose calls they are.
        positions: of the weights that int8 rounds, among those of each call.
    """

    def __init__(self, model: SimulatedModel, positions: Mapping[str, Sequence[int]]) -> None:
        self._model = model
        self._positions = positions
        self.moved: dict[str, float] = {}  # squared distance of a call's weights to their int8

    def diagonals(self, item: Item, loss: Loss, random: Mapping[str, torch.Generator]) -> dict[str, float]:
        """Return an estimate of the mean of the Hessian's diagonal from one vector, for the calls that have a random.

        A vector for each: with one for all, a small trace would drown in the blocks beside the diagonal.
        """
        leaves: dict[str, list[Tensor]] = {}
        found: dict[str, float] = {}
        with differentiable(self._model.source.graph):
            value = loss_of(loss, self._model.run(item, self._reading(random, leaves)), item)
            slopes = iter(gradients(value, [leaf for parts in leaves.values() for leaf in parts], again=True))
            for call, parts in leaves.items():
                signs = [torch.randint(0, 2, leaf.shape, generator=random[call]) * 2.0 - 1.0 for leaf in parts]
                along = torch.stack([(next(slopes) * sign).sum() for sign in signs]).sum()
                products = [(sign * c).sum() for sign, c in zip(signs, gradients(along, parts), strict=True)]
                found[call] = float(torch.stack(products).sum()) / sum(leaf.numel() for leaf in parts)
        return found

    def _reading(self, calls: Collection[str], leaves: dict[str, list[Tensor]]) -> Callable[[Site, Operands], Any]:
        """Return what computes each call in fp32, with weights of their own for some, that are put into `leaves`."""
        exact = self._model.insertion(self._model.source.graph.by_name)
        int8 = self._model.insertion()

        def on_call(site: Site, operands: Operands) -> Any:
            if site.name not in calls:
                return exact(site, operands)
            if site.name not in self.moved:
                self.moved[site.name] = _squared_error(int8, site, operands)
            positions = self._positions[site.name]
            weights = [w.detach().requires_grad_() if i in positions else w for i, w in enumerate(operands.weights)]
            leaves[site.name] = [weights[i] for i in positions]
            return exact(site, replace(operands, weights=tuple(weights)))

        return on_call


@torch.no_grad()
def _squared_error(int8: Insertion, site: Site, operands: Operands) -> float:
    """Return the squared distance between the weights of a call and those that it computes with in int8."""
    rounded: list[Tensor] = []

    def spy(activations: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None) -> Any:
        rounded.extend(weights)
        return operands.function(activations, weights, bias)

    int8(site, replace(operands, function=spy))
    return sum(float((r - w).double().square().sum()) for r, w in zip(rounded, operands.weights, strict=True))
