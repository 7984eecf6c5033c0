"""Scales against the papers' equations, computed here another way."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from raysq.inspection import deployable
from raysq.observation import observe
from raysq.smoothquant.rescaled import rescaled
from raysq.smoothquant.scales import equalization_scales, largest_activations, largest_weights, smoothing_scales
from raysq.source import Source
from raysq.weight import parameters_of

POSITIVE = st.floats(2**-10, 2**10, width=32)


def prepared(model: nn.Module, *batches: Tensor) -> Source:
    copy, graph = deployable(model.eval(), (batches[0],), {})
    return Source(copy, graph, observe(copy, graph, [((x,), {}) for x in batches]), (batches[0],))


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=6), st.floats(0, 1))
def test_scales_are_equation_4(pairs: list[tuple[float, float]], alpha: float) -> None:
    activations, weights = np.float32(pairs).T
    wanted = [math.pow(x, alpha) / math.pow(w, 1 - alpha) for x, w in zip(activations, weights, strict=True)]
    assert smoothing_scales(activations, weights, alpha) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("alpha", "scales"),
    [
        (0, [0.25, 2.0]),  # 1 / max|W|: all weights are equally wide then
        (0.0, [0.25, 2.0]),
        (0.5, [2.0, 2.0]),
        (1, [16.0, 2.0]),  # max|X|: all activations are
    ],
)
def test_alpha_0_and_1_move_all_of_the_difficulty(alpha: float, scales: list[float]) -> None:
    assert smoothing_scales(np.float32([16, 2]), np.float32([4, 0.5]), alpha).tolist() == scales


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize(
    ("activation", "weight"), [(0, 1), (1, 0), (0, 0), (math.inf, 1), (math.nan, 1), (1, math.inf)]
)
def test_a_dead_channel_has_scale_1(activation: float, weight: float, alpha: float) -> None:
    # INC: 1e-5 where no activation was seen, so that a later value explodes; 0^0 = 1 at alpha 0
    scales = smoothing_scales(np.float32([activation, 9]), np.float32([weight, 1]), alpha)
    assert scales[0] == 1
    assert scales[1] == pytest.approx(9**alpha)


def test_scales_stay_within_what_float32_can_undo() -> None:
    scales = smoothing_scales(np.float32([1e30, 1e-30]), np.float32([1e-30, 1e30]), 0.5)
    assert scales.tolist() == [2.0**20, 2.0**-20]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_out_of_range_raises(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        smoothing_scales(np.ones(1, np.float32), np.ones(1, np.float32), alpha)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return torch.cat([self.q(h), self.k(h), self.v(h)], dim=-1)


def test_calls_that_share_an_input_have_one_scale() -> None:
    model, batches = Shared(), (torch.randn(4, 8), torch.randn(4, 8) * 3)
    source = prepared(model, *batches)
    (group,) = source.graph.groups.values()
    seen = torch.cat([model.norm(x) for x in batches]).abs().amax(0).detach().numpy()
    read = torch.cat([model.q.weight, model.k.weight, model.v.weight]).abs().amax(0).detach().numpy()
    assert source.stats is not None
    assert group.calls == ("q", "k", "v")
    assert largest_activations(group, source.stats) == pytest.approx(seen)
    calls = [source.graph[name] for name in group.calls]
    assert largest_weights(calls, parameters_of(source.model)) == pytest.approx(read)


def test_where_no_activation_was_seen_the_largest_is_0() -> None:
    source = prepared(nn.Linear(6, 4), torch.randn(3, 6))
    (group,) = source.graph.groups.values()
    assert source.stats is not None
    assert largest_activations(group, replace(source.stats, tensors={})).tolist() == [0] * 6
    (name,) = group.tensors
    low, high = (np.float32([end, -1, 0, 1, 1, 1]) for end in (math.inf, -math.inf))
    seen = replace(source.stats.tensors[name], channel_min=low, channel_max=high)
    assert largest_activations(group, replace(source.stats, tensors={name: seen})).tolist() == [0, 1, 0, 1, 1, 1]


KINDS: dict[str, tuple[Any, tuple[int, ...], Any]] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6), lambda w: w.amax(0)),
    "conv": (lambda: nn.Conv2d(6, 4, 3), (3, 6, 5, 5), lambda w: w.amax((0, 2, 3))),
    "grouped": (
        lambda: nn.Conv2d(6, 4, 3, groups=2),
        (3, 6, 5, 5),
        lambda w: torch.cat([w[:2].amax((0, 2, 3)), w[2:].amax((0, 2, 3))]),
    ),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (3, 6, 5, 5), lambda w: w.amax((1, 2, 3))),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3), (3, 6, 5, 5), lambda w: w.amax((1, 2, 3))),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (3, 6, 5, 5), lambda w: w.amax((1, 2, 3))),
}


@pytest.mark.parametrize(("make", "shape", "widest"), KINDS.values(), ids=list(KINDS))
def test_the_largest_weight_of_each_input_channel(make: Any, shape: tuple[int, ...], widest: Any) -> None:
    layer = make()
    source = prepared(layer, torch.randn(shape))
    got = largest_weights(source.graph.calls, parameters_of(source.model))
    assert got.tolist() == widest(layer.weight.detach().abs()).tolist()


# ---- equalization ------------------------------------------------------------------------------------------------


def uneven(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= torch.exp(torch.randn(len(parameter), *[1] * (parameter.dim() - 1)) * 2)
    return model


def test_two_layers_are_equalized_as_nagel_does() -> None:
    torch.manual_seed(0)
    model = uneven(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    source = prepared(model, torch.randn(2, 3, 8, 8))
    made = [float(w.abs().max()) for w in source.model[0].weight.detach()]  # type: ignore[index]
    read = [float(w.abs().max()) for w in source.model[2].weight.detach().transpose(0, 1)]  # type: ignore[index]
    # equation 11: s = sqrt(r1 r2) / r2, with which both layers have the range sqrt(r1 r2) in this channel
    wanted = [math.sqrt(r1 * r2) / r2 for r1, r2 in zip(made, read, strict=True)]
    scales = equalization_scales(source.graph, parameters_of(source.model))
    assert scales.keys() == {"2/0"}
    assert scales["2/0"] == pytest.approx(wanted, rel=1e-5)
    assert scales["2/0"].dtype == np.float32


def test_a_chain_is_equalized_as_nagel_does() -> None:
    """Their algorithm: pairs of neighbours in turn, weights rescaled at once, until nothing changes."""
    torch.manual_seed(1)
    model = uneven(nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))))
    source = prepared(model, torch.randn(2, 6))
    weights = [layer.weight.detach().double().clone() for layer in model]  # type: ignore[union-attr]
    total = [torch.ones(6).double() for _ in range(3)]
    for _ in range(200):
        for i in range(3):
            r1, r2 = weights[i].abs().amax(1), weights[i + 1].abs().amax(0)
            s = (r1 * r2).sqrt() / r2
            weights[i] /= s[:, None]
            weights[i + 1] *= s
            total[i] *= s
    scales = equalization_scales(source.graph, parameters_of(source.model))
    for i, name in enumerate(("1/0", "2/0", "3/0")):
        assert scales[name] == pytest.approx(total[i].numpy(), rel=0.02)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def test_all_that_make_a_residual_stream_are_as_wide_as_all_that_read_it() -> None:
    torch.manual_seed(0)
    source = prepared(uneven(Residual()), torch.randn(2, 3, 6, 6))
    group = source.graph.groups["blocks.0.0/0"]
    assert group.calls == ("blocks.0.0", "blocks.1.0", "last")
    assert [p.call for p in group.producers] == ["stem", "blocks.0.3", "blocks.1.3"]
    new = parameters_of(rescaled(source, equalization_scales(source.graph, parameters_of(source.model))).model)
    made = np.max([np.abs(new[f"{p.call}.weight"]).max(axis=(1, 2, 3)) for p in group.producers], axis=0)
    read = np.max([np.abs(new[f"{call}.weight"]).max(axis=(0, 2, 3)) for call in group.calls], axis=0)
    assert made == pytest.approx(read, rel=0.01)  # the streams inside of the blocks converge together with it


def test_channels_that_one_side_does_not_use_are_not_equalized() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[1] = 0  # type: ignore[index]
        model[2].weight[:, 2] = 0  # type: ignore[index]
    source = prepared(model, torch.randn(2, 4))
    scales = equalization_scales(source.graph, parameters_of(source.model))["2/0"]
    assert scales[[1, 2]].tolist() == [1, 1]
    assert np.isfinite(scales).all()
