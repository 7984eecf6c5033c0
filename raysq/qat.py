"""Quantization-aware training: a recipe's int8 calls round in forward, and gradients pass as if they did not.

The straight-through estimator of Bengio et al. 2013, https://arxiv.org/abs/1308.3432, as Jacob et al. 2018 train with
it, https://arxiv.org/abs/1712.05877, section 3. Batch norms are folded before, so there are no statistics to freeze.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raysq.errors import ModelError, OptionError, unknown
from raysq.insertion import Insertion
from raysq.intercept import Interceptor
from raysq.recipe import Recipe, Rounding
from raysq.simulated import Simulated
from raysq.space import APPROACHES

if TYPE_CHECKING:
    from raysq.arithmetic import QParams
    from raysq.recipe import TensorConfig
    from raysq.source import Source

__all__ = ["QAT", "FakeQuantized", "TrainFn", "check", "deployed", "plain", "post_training", "train"]

TrainFn = Callable[["FakeQuantized"], "FakeQuantized | None"]

QAT = "qat"
EXACT = Simulated()


class FakeQuantized(nn.Module):
    """A model that computes what a recipe will compute in int8, with parameters that can be trained.

    It takes the original's arguments and returns the original's output class. All its parameters are float and
    require gradients; scales of weights follow them at every forward, ranges of activations stay as they were
    calibrated. `train` and `eval` switch dropout; batch norms are folded away already, where they follow a layer.

    Args:
        source: the model; it is copied.
        recipe: what runs how, without scales of its own: see `plain`.
    """

    def __init__(self, source: Source, recipe: Recipe) -> None:
        super().__init__()
        self.model = copy.deepcopy(source.model).requires_grad_(True)
        self._planner = source.planner
        self._recipe = recipe
        self._out_of_place = source.graph.out_of_place

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, rounded.

        Raises:
            ModelError: training has diverged: weights are not finite.
        """
        try:
            plans = self._planner.with_weights(self.model).plan(self._recipe)
        except ValueError:  # such weights have no scale
            _check_finite(self.model)
            raise
        insertion = Insertion(plans, StraightThrough())
        with Interceptor(self.model, insertion, out_of_place=self._out_of_place):
            return self.model(*args, **kwargs)


class StraightThrough:
    """The simulation's rounding; gradients pass unchanged, but for activations outside of their fixed range."""

    def activation(self, x: Tensor, params: QParams) -> Tensor:
        scale, zero, grid = float(params.scale), int(params.zero_point), params.grid
        inside = x.clamp((grid.qmin - zero) * scale, (grid.qmax - zero) * scale)
        return _straight(EXACT.activation(x.detach(), params), inside)

    def dynamic(self, x: Tensor, config: TensorConfig) -> Tensor:
        return _straight(EXACT.dynamic(x.detach(), config), x)

    def weight(self, w: Tensor, params: QParams) -> Tensor:
        return _straight(EXACT.weight(w.detach(), params), w)


def _straight(value: Tensor, through: Tensor) -> Tensor:
    """Return the value to the bit, with the gradients of another tensor."""
    return value + (through - through.detach())


def check(approach: str, train_fn: object, *, searching: bool) -> None:
    """Make sure, before any work, that the approach is known, and a training loop there where it has a use.

    Args:
        approach: as the user spells it.
        train_fn: what the user gave.
        searching: whether there will be a search, whose last resort it is.

    Raises:
        OptionError: an unknown approach; no loop though it needs one; one that can't be called, or never would be.
    """
    if approach not in APPROACHES and approach != QAT:
        raise OptionError(unknown("approach", approach, (*APPROACHES, QAT)))
    if train_fn is None and approach == QAT:
        raise OptionError(
            'approach="qat" needs your training loop: `train_fn=fn`, where `fn(model)` trains the fake-quantized model '
            "that it gets in place."
        )
    if train_fn is not None and not callable(train_fn):
        raise OptionError(f"`train_fn` must be a function of one argument, the model to train; got {train_fn!r}.")
    if train_fn is not None and approach != QAT and not searching:
        raise OptionError(f'`train_fn` would not be called with approach={approach!r}. Pass `approach="qat"`.')


def post_training(approach: str) -> str:
    """Return the approach whose recipes are trained and lowered: static for "qat", any other itself."""
    return "static" if approach == QAT else approach


def plain(recipe: Recipe) -> Recipe:
    """Return a recipe for a model that has its scales worked in; training replaces what else looks at data."""
    return Recipe({name: replace(config, rounding=Rounding.NEAREST) for name, config in recipe.ops.items()})


def train(source: Source, recipe: Recipe, train_fn: TrainFn) -> Source:
    """Return the model after training under a recipe, its scales worked in; `plain(recipe)` builds what was trained.

    The statistics stay those of before, as weights learn for their ranges. Observed anew after training, a digits CNN
    with uneven channels scored worse after 3 epochs (0.838, not 0.886), and better after 1 (0.945, not 0.931).

    Args:
        source: the model; it isn't changed.
        recipe: which calls are rounded and how; what it says of weights by data (AdaRound, bias correction) is left
            to the training.
        train_fn: trains the module that it gets in place; may return it, or a copy of it that is better.

    Raises:
        OptionError: it returned anything else.
        ModelError: it left weights that are not finite.
    """
    scaled = source.under(recipe)
    module = FakeQuantized(scaled, plain(recipe)).train()
    with torch.enable_grad():
        returned = train_fn(module)
    if returned is not None and not isinstance(returned, FakeQuantized):
        raise OptionError(
            f"`train_fn` must train the module that it gets in place and return nothing, that module or a copy of it; "
            f"it returned {type(returned).__name__}."
        )
    trained = (returned or module).model
    _check_finite(trained)
    return deployed(scaled, trained)


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ModelError(f"training left values in {name!r} that are not finite. Lower its learning rate.")


def deployed(scaled: Source, model: nn.Module) -> Source:
    """Return the source with another model of the same structure, which is no longer trained."""
    for parameter in model.parameters():
        parameter.grad = None
    return replace(scaled, model=model.requires_grad_(False).eval())
