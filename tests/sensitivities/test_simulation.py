"""Costs at the outputs: against torch's fake-quantize, and against the reference backend's own builds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sensitivities.models import INT8, PER_TENSOR, Residual, prepared, recipe_of
from torch import Tensor, nn

from raysq.errors import CalibrationError, OptionError
from raysq.kernels.reference import Engine
from raysq.recipe import FP32, Recipe
from raysq.sensitivities import MSEv2, Probe
from raysq.sensitivities.simulation import SimulatedModel
from raysq.source import Source


@pytest.fixture(scope="module")
def source() -> Source:
    torch.manual_seed(0)
    return prepared(Residual(), [x * (i + 1) for i, x in enumerate(torch.randn(4, 8, 16))])


def items_of(source: Source, count: int = 32) -> Tensor:
    assert source.stats is not None
    return torch.cat([torch.from_numpy(item.args[0]) for item in source.stats.items[:count]])


def relative(noisy: Tensor, exact: Tensor) -> float:
    return float((noisy - exact).double().square().sum() / exact.double().square().sum())


@torch.no_grad()
def test_equals_fake_quantize_of_a_plain_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    batches = list(torch.randn(4, 8, 16))
    source = prepared(model, batches)

    def layer(x: Tensor, layer: nn.Linear, seen: Tensor) -> Tensor:
        low, high = min(float(seen.min()), 0.0), max(float(seen.max()), 0.0)
        scale = (high - low) / 255
        x = torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 255)
        scales = layer.weight.abs().amax(1) / 127.5
        weight = (layer.weight / scales[:, None]).round().clamp(-128, 127) * scales[:, None]  # torch's breaks ties anew
        return nn.functional.linear(x, weight, layer.bias)

    seen = torch.cat(batches)
    hidden = model[0](seen).relu()
    x = items_of(source, 8)
    exact = model(x)
    both = relative(layer(layer(x, model[0], seen).relu(), model[2], hidden), exact)
    costs = MSEv2().scores(source, recipe_of(source))
    assert costs == pytest.approx(
        {
            "0": both - relative(layer(model[0](x).relu(), model[2], hidden), exact),
            "2": both - relative(model[2](layer(x, model[0], seen).relu()), exact),
        },
        rel=1e-3,  # costs are differences of float32 results
    )


@torch.no_grad()
@pytest.mark.parametrize("floats", [(), ("left",), ("first", "right")], ids=str)
def test_equals_what_the_backend_builds(source: Source, floats: tuple[str, ...]) -> None:
    """Built anew for each recipe: a sum reads one operand unrounded only while that comes from an int8 call."""
    x = items_of(source, 8)
    exact = source.model(x)

    def error(in_float: set[str]) -> float:
        recipe = recipe_of(source).with_ops({name: FP32 for name in in_float})
        return relative(Engine().build(source, recipe).model(x), exact)

    costs = MSEv2().scores(source, recipe_of(source), floats=floats)
    wanted = {name: error({*floats} - {name}) - error({*floats, name}) for name in costs}
    assert costs == pytest.approx(wanted, rel=1e-3, abs=1e-9)


def test_a_smoothed_recipe_is_measured_as_smoothed() -> None:
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        model.first.weight[7] *= 300
        for reader in (model.left, model.right):
            reader.weight[:, 7] /= 300
    plain = prepared(model, list(torch.randn(4, 8, 16)))
    recipe = recipe_of(plain)
    (group,) = [name for name, g in plain.graph.groups.items() if "left" in g.calls]
    smoothed = MSEv2().scores(plain, recipe.with_smoothing({group: 0.5}))
    assert smoothed["left"] < MSEv2().scores(plain, recipe)["left"] / 10


def test_confidence_batches_are_of_four_items(source: Source) -> None:
    x = items_of(source, 4)
    recipe = Recipe({"last": INT8})
    with torch.no_grad():
        wanted = relative(Engine().build(source, recipe).model(x), source.model(x))
    assert MSEv2(confidence_batches=1).scores(source, recipe) == pytest.approx({"last": wanted}, rel=1e-4)


def test_probe_looks_at_the_items_that_err_most(source: Source) -> None:
    assert source.stats is not None
    recipe = recipe_of(source, PER_TENSOR)
    errors = [(SimulatedModel(source, recipe, [item]).error(), index) for index, item in enumerate(source.stats.items)]
    worst = [source.stats.items[index] for _, index in sorted(errors, reverse=True)[:3]]
    wanted = SimulatedModel(source, recipe, worst)
    costs = Probe(items=3).scores(source, recipe)
    assert costs["left"] == pytest.approx(wanted.error() - wanted.error(["left"]))
    assert costs != Probe(items=32).scores(source, recipe)


class Odd(nn.Module):
    """Returns what isn't finite, and as much as it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(x)
        return torch.where(y > 0, y, -torch.inf), y[y.abs() > y.abs().mean()]


def test_costs_stay_finite_where_outputs_are_not() -> None:
    torch.manual_seed(0)
    source = prepared(Odd(), list(torch.randn(4, 8, 8)))
    cost = MSEv2().scores(source, recipe_of(source))["fc"]
    assert 0 < cost < 2


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_counts_are_whole_and_positive(value: object) -> None:
    with pytest.raises(OptionError, match="`confidence_batches` must be a whole number of at least 1"):
        MSEv2(confidence_batches=value)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="`items` must be a whole number of at least 1"):
        Probe(items=value)  # type: ignore[arg-type]


def test_no_calibration_is_an_error(source: Source) -> None:
    with pytest.raises(CalibrationError, match="'probe' runs the model on calibration data, got none: pass `calib`"):
        Probe().scores(replace(source, stats=None), recipe_of(source))


class OfFive(nn.Linear):
    """Takes batches of five only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(5, 8))


def test_a_model_that_needs_a_larger_batch_is_an_error() -> None:
    source = prepared(OfFive(8, 2), [torch.randn(5, 8)])
    with pytest.raises(CalibrationError, match="a batch of one: .*'mse' needs no forward pass"):
        MSEv2().scores(source, recipe_of(source))
