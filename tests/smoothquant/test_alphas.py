"""Alphas by the error of layers, against a plain loop in float64 over everything that they compare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysq.calibration.minmax import MinMax
from raysq.calibration.mse import MSE
from raysq.calibration.percentile import Percentile
from raysq.errors import RecipeError
from raysq.inspection import deployable
from raysq.observation import observe
from raysq.recipe import (
    Approach,
    Granularity,
    OpConfig,
    Precision,
    QuantDType,
    Recipe,
    Scheme,
    TensorConfig,
    Transform,
)
from raysq.smoothing import SharedCriterion, Smoothing
from raysq.smoothquant import alphas
from raysq.smoothquant.alphas import COMBINE, advised_alphas, smoothable, tuned_alphas
from raysq.source import Source

INT8 = OpConfig(Precision.INT8)
SYMMETRIC = TensorConfig(QuantDType.S8, Scheme.SYMMETRIC)
CONFIGS = {
    "default": INT8,
    "per tensor": replace(INT8, weight=replace(SYMMETRIC, granularity=Granularity.PER_TENSOR)),
    "symmetric, 7 bits": replace(INT8, activation=replace(SYMMETRIC, reduce_range=True)),
}


def outlying(*shape: int, seed: int = 0) -> Tensor:
    """Activations in which two channels of axis 1 are 30 times as wide."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[:, 1::5] *= 30
    return x


def prepared(model: nn.Module, *batches: Tensor) -> Source:
    copy, graph = deployable(model.eval(), (batches[0],), {})
    return Source(copy, graph, observe(copy, graph, [((x,), {}) for x in batches]), (batches[0],))


def all_int8(source: Source, config: OpConfig = INT8) -> Recipe:
    return Recipe({call.name: config for call in source.graph.calls})


class Absorbing(nn.Module):
    """A layer with something before it that takes a division along axis 1."""

    def __init__(self, layer: nn.Module, channels: int, image: bool) -> None:
        super().__init__()
        self.first: nn.Module = nn.GroupNorm(1, channels) if image else nn.LayerNorm(channels)
        self.layer = layer
        with torch.no_grad():
            self.first.weight[1::5] *= 30  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.first(x))


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(10, 6), (12, 10)),
    "conv": (lambda: nn.Conv2d(10, 6, 3, padding=1), (4, 10, 5, 5)),
    "strided 1x1": (lambda: nn.Conv2d(10, 6, 1, stride=2), (4, 10, 5, 5)),
    "grouped": (lambda: nn.Conv2d(10, 6, 3, groups=2), (4, 10, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(10, 10, 3, groups=10), (4, 10, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(10, 6, 3), (4, 10, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(10, 6, 2), (4, 10, 5, 5)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(10, 6, 2, groups=2), (4, 10, 5, 5)),
}


def quantized(values: Any, low: Any, high: Any, config: TensorConfig) -> Any:
    """The formulas at the head of `raysq.arithmetic`; bounds broadcast against the values.

    In float32, as the largest weight of a row lies between two integers: float64 would take the other one.
    """
    grid = config.grid
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if grid.symmetric:
        step = np.float32(np.maximum(-low, high) / ((grid.qmax - grid.qmin) / 2))
        zero = (grid.qmin + grid.qmax + 1) // 2
    else:
        step = np.float32((high - low) / (grid.qmax - grid.qmin))
        zero = np.clip(grid.qmin - np.round(low / step), grid.qmin, grid.qmax)
    integers = np.clip(np.round(np.float32(values) * (1 / step)) + zero, grid.qmin, grid.qmax)
    return (integers - zero).astype(np.float64) * step


def computed(layer: Any, rows: Any, weight: Any) -> Any:
    """Return a layer's own torch function on rows of its input, in float64 and without its bias."""
    x, w = torch.from_numpy(rows), torch.from_numpy(weight)
    if isinstance(layer, nn.Linear):
        return F.linear(x, w).numpy()
    function = getattr(F, type(layer).__name__.replace("ConvTranspose", "conv_transpose").replace("Conv", "conv"))
    places = x if x.dim() == w.dim() else x.reshape(*x.shape, *[1] * (w.dim() - 2))
    return function(places, w, groups=layer.groups).numpy()


def brute_force(source: Source, name: str, layer: Any, alpha: float, config: OpConfig) -> float:
    assert source.stats is not None
    stats = source.stats.tensors[source.graph[name].tensors[0]]
    weight = source.model.get_parameter(f"{name}.weight").detach().double().numpy()
    transposed = isinstance(layer, nn.ConvTranspose2d)
    channels, groups = len(stats.channel_max), getattr(layer, "groups", 1)
    widest = np.zeros(channels)
    shape = np.ones((channels, *weight.shape))  # 1 where a channel is read, else 0
    for j in range(channels):
        size = len(weight) // groups
        for row in range(len(weight)):
            for column in range(weight.shape[1]):
                read = row if transposed else row // size * weight.shape[1] + column
                shape[j, row, column] = read == j
        widest[j] = np.abs(weight * shape[j]).max()
    largest = np.maximum(np.abs(stats.channel_min), np.abs(stats.channel_max)).astype(np.float64)
    scales = np.float32(largest**alpha / widest ** (1 - alpha))
    scaled = np.float32(weight) * sum(shape[j] * scales[j] for j in range(channels)).astype(np.float32)
    rows = stats.rows[: alphas.ROWS].astype(np.float64)
    along = scales.reshape(-1, *[1] * (rows.ndim - 2))
    low, high = (stats.channel_min / scales).min(), (stats.channel_max / scales).max()
    noisy_rows = quantized(np.float32(rows) / along, low, high, config.activation)
    axes: Any = tuple(a for a in range(weight.ndim) if a != (1 if transposed else 0))
    if config.weight.granularity is Granularity.PER_TENSOR:
        axes = None
    bounds = (f(axis=axes, keepdims=True) for f in (scaled.min, scaled.max))
    exact, noisy = computed(layer, rows, weight), computed(layer, noisy_rows, quantized(scaled, *bounds, config.weight))
    return float(((exact - noisy) ** 2).sum() / (exact**2).sum())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=list(LAYERS))
def test_the_losses_are_those_of_a_plain_loop(
    make: Any, shape: tuple[int, ...], config: OpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alphas, "clipping_error", lambda _, __, vectors: np.zeros(vectors.shape))  # test_unseen.py
    torch.manual_seed(0)
    layer = make()
    source = prepared(Absorbing(layer, 10, len(shape) > 2), *(torch.randn(shape) for _ in range(2)))
    recipe = all_int8(source, config)
    scorer = alphas._Scorer(source, recipe)
    (group,) = (source.graph.groups[name] for name in smoothable(source.graph, recipe))
    candidates = list(Smoothing().grid)
    got = scorer.losses(group, scorer.scales(group, candidates))[0]
    wanted = [brute_force(source, "layer", layer, alpha, config) for alpha in candidates]
    assert got == pytest.approx(wanted, rel=1e-3)
    best = tuned_alphas(source, Smoothing(init_alpha=0), recipe)[group.name]
    assert wanted[candidates.index(best)] <= min(wanted) * 1.001


def test_a_range_that_is_clipped_is_the_recipes_own() -> None:
    source = prepared(nn.Sequential(nn.LayerNorm(10), nn.Linear(10, 6)), outlying(64, 10))
    clipping = replace(INT8, activation=replace(INT8.activation, algorithm=Percentile(90.0)))
    losses = []
    for config in (INT8, clipping):
        scorer = alphas._Scorer(source, all_int8(source, config))
        group = source.graph.groups["1/0"]
        losses.append(scorer.losses(group, scorer.scales(group, [0.5]))[0, 0])
    assert losses[1] > 10 * losses[0]


def test_a_weights_range_is_the_recipes_own() -> None:
    torch.manual_seed(0)
    model = nn.Linear(20_000, 8)
    with torch.no_grad():
        model.weight.uniform_(-1, 1)[:, 0] = 1.1  # to cut it makes all others finer
    source = prepared(nn.Sequential(model), torch.randn(32, 20_000))
    losses = []
    for algorithm in (MinMax(), MSE()):
        weight = replace(INT8.weight, algorithm=algorithm, reduce_range=True)
        scorer = alphas._Scorer(source, all_int8(source, replace(INT8, weight=weight)))
        (loss,) = scorer._call_losses(source.graph["0"], np.ones((1, 20_000), np.float32), activation=False)
        losses.append(loss)
    assert losses[1] < 0.9 * losses[0]


def test_outliers_of_the_first_batch_count() -> None:
    # INC decides by its last batch alone (facts/inc.md, A9)
    torch.manual_seed(0)
    calm = [torch.randn(16, 10) for _ in range(4)]
    outliers = torch.randn(16, 10)
    outliers[:, 3] *= 200
    model = nn.Sequential(nn.Identity(), nn.Linear(10, 6))
    found = []
    for batches in ([outliers, *calm], [*calm, outliers], calm):
        source = prepared(model, *batches)
        found.append(tuned_alphas(source, Smoothing(), all_int8(source)))
    assert found[0]["1/0"] > found[2]["1/0"]
    assert found[1]["1/0"] > found[2]["1/0"]


# ---- how the calls of a group decide -----------------------------------------------------------------------------

WORKED = {0.3: (1, 9), 0.5: (4, 5), 0.7: (6, 4)}  # alpha to what q and k lose: the example in Smoothing's docstring


def chosen(combined: Any) -> float:
    return list(WORKED)[int(np.argmin(combined))]


def test_the_example_of_the_docstring_is_true() -> None:
    losses = np.array(list(WORKED.values())).T
    q, k = losses
    assert (q.tolist(), k.tolist()) == ([1, 4, 6], [9, 5, 4])
    assert losses.sum(axis=0).tolist() == [10, 9, 10]
    assert COMBINE[SharedCriterion.MIN](losses, axis=0).tolist() == [1, 4, 4]
    assert COMBINE[SharedCriterion.MAX](losses, axis=0).tolist() == [9, 5, 6]
    wins = {criterion: chosen(COMBINE[criterion](losses, axis=0)) for criterion in SharedCriterion}
    assert wins == {"mean": 0.5, "min": 0.3, "max": 0.5}
    own = [chosen(q), chosen(k)]  # INC: each call's best, and of these alphas the smallest or largest
    assert (min(own), max(own)) == (0.3, 0.7)
    assert max(WORKED, key=lambda alpha: WORKED[alpha][0]) == max(own)  # "the worst of the three for q"
    assert "1, 4 and 6, k loses 9, 5 and" in str(Smoothing.__doc__)


@pytest.mark.parametrize(("criterion", "alpha"), [("mean", 0.5), ("min", 0.3), ("max", 0.5)])
def test_the_criterion_is_applied_to_the_losses(
    criterion: SharedCriterion, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = np.array(list(WORKED.values()), np.float64).T
    monkeypatch.setattr(alphas._Scorer, "losses", lambda *_: losses)
    source = prepared(Shared(), outlying(8, 10))
    smoothing = Smoothing(init_alpha=0.3, alpha_min=0.3, alpha_max=0.7, alpha_step=0.2, shared_criterion=criterion)
    assert tuned_alphas(source, smoothing, all_int8(source)) == {"q/0": alpha}


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(10, 6), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.tanh()
        return torch.cat([self.q(h), self.k(h)], dim=-1)


@pytest.mark.parametrize("initial", [0.0, 0.35, 0.8, 1])
def test_the_initial_alpha_wins_ties_and_is_a_candidate_off_the_grid(
    initial: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alphas._Scorer, "losses", lambda _, __, vectors: np.ones((2, len(vectors))))
    source = prepared(Shared(), outlying(8, 10))
    assert tuned_alphas(source, Smoothing(init_alpha=initial), all_int8(source)) == {"q/0": initial}


def test_an_automatic_initial_alpha_stays_within_the_bounds() -> None:
    source = prepared(Shared(), outlying(2048, 10))
    scorer = alphas._Scorer(source, all_int8(source))
    group = source.graph.groups["q/0"]
    free = scorer.candidates(group, Smoothing(init_alpha="auto"))[0]
    assert 0 < free < 1
    for low, high in ((0.0, 0.01), (0.99, 1.0)):
        smoothing = Smoothing(init_alpha="auto", alpha_min=low, alpha_max=high)
        assert scorer.candidates(group, smoothing)[0] == min(max(free, low), high)


def test_an_automatic_initial_alpha_is_the_activations_share_of_the_error() -> None:
    source = prepared(Shared(), outlying(64, 10))
    fine = replace(INT8.activation, reduce_range=False)
    coarse = replace(fine, reduce_range=True)
    shares = []
    for activation in (fine, coarse):
        scorer = alphas._Scorer(source, all_int8(source, replace(INT8, activation=activation)))
        shares.append(scorer.candidates(source.graph.groups["q/0"], Smoothing(init_alpha="auto"))[0])
    assert shares[0] < shares[1]  # coarser activations err more


# ---- which groups ------------------------------------------------------------------------------------------------


def test_a_number_is_for_all_groups_and_of_several_the_first() -> None:
    source = prepared(Shared(), outlying(8, 10))
    recipe = all_int8(source)
    assert tuned_alphas(source, Smoothing(alpha=1), recipe) == {"q/0": 1.0}
    assert tuned_alphas(source, Smoothing(alpha=(0.2, 0.7)), recipe) == {"q/0": 0.2}


def test_calls_in_float_have_no_say() -> None:
    source = prepared(Shared(), outlying(8, 10))
    assert tuned_alphas(source, Smoothing(), Recipe({})) == {}
    recipe = Recipe({"q": INT8})
    assert alphas._Scorer(source, recipe).losses(source.graph.groups["q/0"], np.ones((1, 10), np.float32)).shape == (
        1,
        1,
    )


def test_convolutions_are_not_smoothed_where_it_costs_a_multiplication() -> None:
    source = prepared(nn.Sequential(nn.Tanh(), nn.Conv2d(10, 4, 3)), outlying(2, 10, 5, 5))
    assert list(source.graph.groups) == ["1/0"]
    assert smoothable(source.graph, all_int8(source)) == []


def test_without_samples_of_a_call_the_initial_alpha_stays() -> None:
    source = prepared(Shared(), outlying(8, 10))
    assert source.stats is not None
    none = {n: replace(s, rows=np.zeros((0, 10), np.float32)) for n, s in source.stats.tensors.items()}
    source = replace(source, stats=replace(source.stats, tensors=none))
    assert tuned_alphas(source, Smoothing(init_alpha=0.6), all_int8(source)) == {"q/0": 0.6}


def test_without_statistics_there_is_nothing_to_tune() -> None:
    source = replace(prepared(Shared(), outlying(8, 10)), stats=None)
    with pytest.raises(RecipeError, match="needs calibration statistics"):
        tuned_alphas(source, Smoothing(), all_int8(source))
    assert advised_alphas(source, all_int8(source)) == {}


def test_what_is_clipped_counts_where_ranges_are_fixed_only() -> None:
    def losses(approach: Approach) -> Any:
        source = prepared(Shared(), outlying(8, 10))
        scorer = alphas._Scorer(source, all_int8(source, replace(INT8, approach=approach)))
        group = source.graph.groups["q/0"]
        return scorer.losses(group, scorer.scales(group, [0.0, 1.0])).mean(axis=0)

    assert (losses(Approach.STATIC) > 2 * losses(Approach.DYNAMIC)).all()


def test_candidates_are_compared_in_parts_where_weights_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    source = prepared(Shared(), outlying(8, 10))
    scorer, group = alphas._Scorer(source, all_int8(source)), source.graph.groups["q/0"]
    vectors = scorer.scales(group, Smoothing().grid)
    whole = scorer.losses(group, vectors)
    for at_once in (200, 1):  # some at once; one candidate is more than that already
        monkeypatch.setattr(alphas, "AT_ONCE", at_once)
        assert scorer.losses(group, vectors) == pytest.approx(whole)


def test_alphas_of_an_equalized_model_are_those_of_its_own_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 6))
    with torch.no_grad():
        model[0].weight *= torch.exp(torch.randn(10, 1) * 2)  # type: ignore[operator]
    source = prepared(model, outlying(32, 10))
    recipe = replace(all_int8(source), transforms=(Transform.EQUALIZATION,))
    equalized = source.under(recipe)
    assert tuned_alphas(source, Smoothing(), recipe) == tuned_alphas(equalized, Smoothing(), all_int8(source))


# ---- advice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [nn.Identity, lambda: nn.LayerNorm(10)], ids=["computed", "absorbed"])
def test_smoothing_is_advised_where_outliers_are_seen(before: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(before(), nn.Linear(10, 6))
    x = torch.randn(4096, 10)
    if model[0].state_dict():
        model[0].weight.data[3] = 100
    else:
        x[:, 3] *= 100
    source = prepared(model, x)
    assert advised_alphas(source, all_int8(source)).keys() == {"1/0"}


def test_no_multiplication_is_advised_where_the_error_is_negligible(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Identity(), nn.Linear(10, 6)), torch.randn(4096, 10)
    x[:, 3] *= 100
    source = prepared(model, x)
    assert advised_alphas(source, all_int8(source))
    monkeypatch.setattr(alphas, "NEGLIGIBLE", 1.0)
    assert advised_alphas(source, all_int8(source)) == {}


def test_no_multiplication_is_advised_without_outliers() -> None:
    source = prepared(Shared(), torch.randn(64, 10))
    assert advised_alphas(source, all_int8(source)) == {}


def test_nothing_is_advised_that_would_change_the_model(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)

    class Copied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(10), nn.Linear(10, 6)
            self.copied = [self.fc.weight]
            with torch.no_grad():
                self.norm.weight[3] = 100

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.norm(x), self.copied[0])

    source = prepared(Copied(), torch.randn(64, 10))
    assert advised_alphas(source, all_int8(source)) == {}
    assert "no smoothing is advised" in caplog.text
