"""What a recipe's scales make of a model and of its statistics."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysq.errors import RecipeError
from raysq.inspection import deployable
from raysq.kernels.reference import Engine
from raysq.observation import observe
from raysq.recipe import OpConfig, Precision, Recipe, Transform
from raysq.smoothquant.rescaled import divided, rescaled
from raysq.source import Source
from raysq.stats import TensorStats

INT8 = OpConfig(Precision.INT8)


class Tokens(nn.Module):
    """One group that a norm absorbs, one by way of a gate, one that nothing can."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.head(torch.tanh(self.down(F.silu(self.gate(h)) * self.up(h)) + x))


class Image(nn.Module):
    """A residual stream, read by convolutions of several kinds and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.b, self.up = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.b(self.a(x).relu())).relu()
        return self.last(self.up(x).relu())


MODELS = {"tokens": (Tokens, (3, 5, 8)), "image": (Image, (2, 3, 8, 8))}


def batches(shape: tuple[int, ...], count: int = 3) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)
    return [((torch.randn(shape, generator=generator) * (i + 1),), {}) for i in range(count)]


def prepared(kind: str) -> tuple[nn.Module, Source]:
    torch.manual_seed(0)
    make, shape = MODELS[kind]
    model = make().eval()
    copy, graph = deployable(model, batches(shape)[0][0], {})
    return model, Source(copy, graph, observe(copy, graph, batches(shape)), batches(shape)[0][0])


def scales_of(source: Source) -> dict[str, tuple[float, ...]]:
    rng = np.random.default_rng(0)
    return {n: tuple(np.exp(rng.normal(0, 1, g.channels)).tolist()) for n, g in source.graph.groups.items()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("equalized", [False, True])
def test_statistics_are_those_of_the_transformed_model(kind: str, equalized: bool) -> None:
    _, source = prepared(kind)
    smoothing = scales_of(source)
    absorbed = {n: s for n, s in smoothing.items() if source.graph.groups[n].producers}
    recipe = Recipe({}, absorbed, (Transform.EQUALIZATION,) if equalized else ())
    scaled = source.under(recipe)
    fresh = observe(scaled.model, scaled.graph, batches(MODELS[kind][1]))
    assert scaled.stats is not None
    for name, wanted in fresh.tensors.items():
        assert_alike(scaled.stats.tensors[name], wanted)
    for name, parts in fresh.outputs.items():
        for got, exact in zip(scaled.stats.outputs[name], parts, strict=True):
            np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5 * float(np.abs(exact).max()))


def assert_alike(got: TensorStats, fresh: TensorStats) -> None:
    wide = max(abs(fresh.minimum), abs(fresh.maximum))
    for part in ("channel_min", "channel_max", "channel_mean", "rows"):
        np.testing.assert_allclose(getattr(got, part), getattr(fresh, part), rtol=1e-4, atol=1e-5 * wide)
    # only of the widest channel is a moving average kept, and another one may be the widest now
    assert got.minimum <= got.moving_min <= got.moving_max <= got.maximum
    ours, theirs = (cumulated(s, np.linspace(-wide, wide, 21)) for s in (got, fresh))
    assert ours == pytest.approx(theirs, abs=0.12)  # a sample of about 50 positions


def cumulated(stats: TensorStats, places: Any) -> Any:
    counts = stats.histogram.counts
    return np.interp(places, stats.histogram.edges[1:], np.cumsum(counts) / counts.sum())


def test_an_activation_that_is_multiplied_has_its_statistics_beside_those_of_the_undivided_one() -> None:
    _, source = prepared("tokens")
    source = replace(source, absorb=False)
    scales = scales_of(source)
    scaled = source.under(Recipe({}, scales))
    assert scaled.stats is not None and source.stats is not None
    for name in ("gate", "up"):  # q, k and v alike: one tensor, one vector
        assert scaled.graph[name].tensors == ("gate/0 smoothed",)
        assert scaled.multipliers[name] == pytest.approx(1 / np.float32(scales["gate/0"]))
    assert scaled.stats.tensors["gate/0"] is source.stats.tensors["gate/0"]
    got = scaled.stats.tensors["gate/0 smoothed"].channel_max
    assert got == pytest.approx(source.stats.tensors["gate/0"].channel_max / np.float32(scales["gate/0"]))


@pytest.mark.parametrize("absorb", [True, False])
def test_int8_under_scales_errs_as_the_formulas_say(absorb: bool) -> None:
    """A single layer in float64: round(x / s) against round(w * s)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[1].weight.abs_()  # the largest of a row lies between two integers: a negative one could go either way
    x = torch.randn(6, 8)
    copy, graph = deployable(model, (x,), {})
    source = Source(copy, graph, observe(copy, graph, [((x,), {})]), (x,), absorb=absorb)
    scales = np.exp(np.random.default_rng(1).normal(0, 1, 8))
    built = Engine().build(source, Recipe({"1": INT8}, {"1/0": tuple(scales.tolist())})).model
    h = model[0](x).detach().double().numpy() / scales
    w, bias = (p.detach().double().numpy() for p in model[1].parameters())
    step = (h.max() - h.min()) / 255
    zero = -np.round(h.min() / step)
    h = (np.clip(np.round(h / step) + zero, 0, 255) - zero) * step
    steps = np.abs(w * scales).max(axis=1, keepdims=True) / 127.5
    w = np.clip(np.round(w * scales / steps), -128, 127) * steps
    assert built(x).numpy() == pytest.approx(h @ w.T + bias, abs=2e-5)


def test_dead_channels_keep_scale_1_and_later_values_do_not_explode() -> None:
    # INC's exporter gives them 1e-5: a later 1.0 becomes 1e5 in int8
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[1].weight[:, 5] = 0
    x = torch.rand(16, 8)
    x[:, [2, 5]] = 0
    x[:, 7] *= 50
    copy, graph = deployable(model, (x,), {})
    source = Source(copy, graph, observe(copy, graph, [((x,), {})]), (x,))
    for alpha in (0, 0.5, 1):
        scaled = source.under(Recipe({}, {"1/0": alpha}))
        assert scaled.multipliers["1"][[2, 5]].tolist() == [1, 1]
        assert scaled.multipliers["1"][7] == pytest.approx(
            float(model[1].weight[:, 7].detach().abs().max()) ** (1 - alpha) / float(x[:, 7].max()) ** alpha, rel=1e-5
        )
        built = Engine().build(source, Recipe({"1": INT8}, {"1/0": alpha})).model
        later = torch.rand(4, 8)
        with torch.no_grad():
            assert float((built(later) - model(later)).abs().max()) < 1


def test_weights_that_do_not_change_are_shared_and_the_model_is_not_changed() -> None:
    model, source = prepared("tokens")
    before = {name: p.clone() for name, p in source.model.state_dict().items()}
    scaled = source.under(Recipe({}, {"gate/0": 0.5})).model
    changed = {n for n, p in scaled.named_parameters() if p.data_ptr() != source.model.get_parameter(n).data_ptr()}
    assert changed == {"norm.weight", "norm.bias", "gate.weight", "up.weight"}
    for whole in (model, source.model):
        assert all(torch.equal(p, before[name]) for name, p in whole.state_dict().items())


def test_smoothing_starts_from_the_equalized_model() -> None:
    _, source = prepared("image")
    recipe = Recipe({}, {"a/0": 0.5}, (Transform.EQUALIZATION,))
    equalized = source.under(Recipe({}, transforms=(Transform.EQUALIZATION,)))
    twice = equalized.under(Recipe({}, {"a/0": 0.5}))
    once = source.under(recipe)
    for name, parameter in once.model.named_parameters():
        assert torch.equal(parameter, twice.model.get_parameter(name))


@pytest.mark.parametrize("kind", MODELS)
def test_equalization_is_absorbed_where_smoothing_is_not(kind: str) -> None:
    model, source = prepared(kind)
    recipe = Recipe({}, dict.fromkeys(source.graph.groups, 0.5), (Transform.EQUALIZATION,))
    scaled = replace(source, absorb=False).under(recipe)
    assert set(scaled.multipliers) == {call for g in source.graph.groups.values() for call in g.calls}
    built = Engine().build(replace(source, absorb=False), recipe).model
    (x,) = source.args
    with torch.no_grad():
        torch.testing.assert_close(built(x), model(x), rtol=1e-4, atol=1e-5)


def test_fixed_scales_need_no_statistics() -> None:
    _, source = prepared("tokens")
    bare = replace(source, stats=None)
    assert bare.under(Recipe({}, scales_of(source))).stats is None
    with pytest.raises(RecipeError, match="needs calibration statistics"):
        bare.under(Recipe({}, {"gate/0": 0.5}))


@pytest.mark.parametrize(
    ("smoothing", "message"),
    [({"gat/0": 0.5}, "Did you mean 'gate/0'"), ({"gate/0": (1.0, 2.0)}, "needs 8 scales, got 2")],
)
def test_what_does_not_fit_the_model_raises(smoothing: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        prepared("tokens")[1].under(Recipe({}, smoothing))


def test_the_last_scaled_source_is_kept_and_does_not_travel() -> None:
    _, source = prepared("tokens")
    first = source.under(Recipe({}, {"gate/0": 0.5}))
    assert source.under(Recipe({"gate": INT8}, {"gate/0": 0.5})) is first  # only what runs in int8 differs
    assert source.under(Recipe({}, {"gate/0": 0.6})) is not first
    assert "_rescaled" not in pickle.loads(pickle.dumps(source)).__dict__


def test_a_division_is_exact_per_channel_even_where_nothing_was_seen() -> None:
    _, source = prepared("image")
    assert source.stats is not None
    stats = source.stats.tensors["a/0"]
    empty = replace(stats, channel_min=np.full(8, np.inf, np.float32), channel_max=np.full(8, -np.inf, np.float32))
    vector = np.float32(2) ** np.arange(8, dtype=np.float32)
    assert divided(stats, vector).channel_max.tolist() == (stats.channel_max / vector).tolist()
    assert divided(stats, vector).rows.shape == stats.rows.shape == (len(stats.rows), 8, 3, 3)
    alike = divided(stats, np.full(8, 4, np.float32))
    assert (alike.moving_min, alike.moving_max) == (stats.moving_min / 4, stats.moving_max / 4)
    assert (divided(empty, vector).minimum, divided(empty, vector).maximum) == (0, 0)


def test_rescaling_back_gives_the_model_again() -> None:
    _, source = prepared("image")
    vectors = {n: np.float32(2) ** (np.arange(len(s)) % 5 - 2) for n, s in scales_of(source).items()}
    vectors = {n: v.astype(np.float32) for n, v in vectors.items() if source.graph.groups[n].producers}
    back = rescaled(rescaled(source, vectors), {n: 1 / v for n, v in vectors.items()})  # powers of two are exact
    for name, parameter in back.model.named_parameters():
        assert torch.equal(parameter, source.model.get_parameter(name))
