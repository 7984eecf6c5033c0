"""What every sensitivity promises: finite costs of int8 calls, in execution order, the culprit's largest."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sensitivities.models import PER_TENSOR, Residual, prepared, recipe_of
from torch import nn

from raysq.recipe import BF16, FP32, Recipe
from raysq.sensitivities import ALL, Fisher, HAWQv2, Sensitivity, rank
from raysq.source import Source

NEEDED = {HAWQv2: {"loss": F.cross_entropy}}
SENSITIVITIES: list[Sensitivity] = [*(kind(**NEEDED.get(kind, {})) for kind in ALL), Fisher(F.cross_entropy)]

pytestmark = pytest.mark.parametrize(
    "sensitivity", SENSITIVITIES, ids=lambda s: f"{s.name}{' with a loss' if getattr(s, 'loss', None) else ''}"
)


@pytest.fixture(scope="module")
def source() -> Source:
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        model.left.weight[3, 4] = 30.0  # with one scale for the whole weight, nothing is left of the others
    x = torch.randn(8, 5, 16)
    return prepared(model, list(x), list(torch.randint(3, (8, 5))))


@pytest.fixture(scope="module")
def recipe(source: Source) -> Recipe:
    return recipe_of(source, PER_TENSOR)


def test_costs_are_finite_and_in_execution_order(sensitivity: Sensitivity, source: Source, recipe: Recipe) -> None:
    costs = sensitivity.scores(source, recipe)
    assert list(costs) == [call.name for call in source.graph.calls if call.name in costs]
    assert {"first", "left", "right", "last"} <= set(costs)
    assert all(math.isfinite(cost) for cost in costs.values())


def test_a_planted_culprit_comes_first(sensitivity: Sensitivity, source: Source, recipe: Recipe) -> None:
    assert rank(sensitivity.scores(source, recipe))[0] == "left"


def test_the_same_is_said_twice(sensitivity: Sensitivity, source: Source, recipe: Recipe) -> None:
    assert sensitivity.scores(source, recipe) == sensitivity.scores(source, recipe)


def test_only_what_is_asked_for_is_told(sensitivity: Sensitivity, source: Source, recipe: Recipe) -> None:
    costs = sensitivity.scores(source, recipe)
    some = sensitivity.scores(source, recipe, ["right", "first"])
    assert list(some) == ["first", "right"]
    assert some == {name: costs[name] for name in some}  # and no other call changes what it is
    assert sensitivity.scores(source, recipe, []) == {}


def test_calls_in_float_are_left_out(sensitivity: Sensitivity, source: Source, recipe: Recipe) -> None:
    partial = recipe.with_ops({"first": FP32, "left": BF16})
    assert not {"first", "left"} & set(sensitivity.scores(source, partial))
    assert sensitivity.scores(source, partial, ["first"]) == {}


def test_calls_that_calibration_never_reached_are_left_out(
    sensitivity: Sensitivity, source: Source, recipe: Recipe
) -> None:
    assert source.stats is not None
    missing = source.graph["last"].tensors
    tensors = {name: t for name, t in source.stats.tensors.items() if name not in missing}
    short = replace(source, stats=replace(source.stats, tensors=tensors))
    costs = sensitivity.scores(short, recipe)
    assert "last" not in costs
    assert "left" in costs


def test_a_call_left_in_float_meanwhile_is_looked_at_all_the_same(
    sensitivity: Sensitivity, source: Source, recipe: Recipe
) -> None:
    costs = sensitivity.scores(source, recipe, floats=["left", "right"])
    assert list(costs) == list(sensitivity.scores(source, recipe))
    assert all(math.isfinite(cost) for cost in costs.values())
    assert costs["left"] > costs["first"]


def test_nothing_of_the_model_changes(sensitivity: Sensitivity, source: Source, recipe: Recipe) -> None:
    def state(model: nn.Module) -> dict[str, object]:
        return {
            "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "gradients": [(p.requires_grad, p.grad) for p in model.parameters()],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()],
        }

    before = state(source.model)
    sensitivity.scores(source, recipe)
    after = state(source.model)
    torch.testing.assert_close(after.pop("tensors"), before.pop("tensors"), rtol=0, atol=0)
    assert after == before
