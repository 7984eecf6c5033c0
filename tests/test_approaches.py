"""When activations are quantized: before deployment, at each call or never, of a whole model or call by call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from simulation import CAPABILITIES, sixty_calls
from torch import nn

import raysq
from raysq.errors import BackendError, OptionError
from raysq.kernels import base
from raysq.recipe import Approach, Precision, Recipe, Rounding
from raysq.sensitivities import MSE
from raysq.space import build_space


class Mixed(nn.Module):
    """Every kind of call that torch has dynamic kernels for, and a product, for which it has none."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(50, 16, mode="sum")
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, items: torch.Tensor) -> torch.Tensor:  # (batch, steps, items)
        h = torch.stack([self.bag(step) for step in items.unbind(1)], 1)
        h = self.fc(self.lstm(h)[0])[:, None]
        return self.out(torch.matmul(h.transpose(2, 3), h))


def calib() -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 50, (8, 4, 5), generator=generator),) for _ in range(3)]


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture(params=["reference", "ipex"])
def backend(request: pytest.FixtureRequest) -> str:
    try:
        return base.get(request.param).name
    except BackendError as exc:
        pytest.skip(str(exc))


@pytest.mark.parametrize("approach", ["static", "dynamic", "auto"])
def test_each_approach_runs_without_tuning(backend: str, approach: str) -> None:
    model = mixed()
    quantized = raysq.quantize(model, calib(), backend=backend, approach=approach)
    wanted = Approach.DYNAMIC if approach == "dynamic" else Approach.STATIC
    int8 = {name: c.approach for name, c in quantized.recipe.ops.items() if c.is_int8}
    assert set(int8.values()) == {wanted}
    assert {"lstm", "fc", "out"} <= {name for name in int8 if quantized.executed[name] is Precision.INT8}
    with torch.no_grad():
        exact = model(*calib()[0])
    assert 0 < (quantized(*calib()[0]) - exact).abs().max() < 0.15 * exact.abs().max()


def test_auto_mixes_the_approaches_call_by_call(backend: str) -> None:
    prepared = raysq.prepare(mixed(), calib(), backend=backend, approach="auto", smoothing=False)
    both = {name for name, configs in prepared.space.options.items() if {c.approach for c in configs} == {*SHARED}}
    assert {"lstm", "fc", "out"} <= both
    space = prepared.space.narrow({"linear.approach": "dynamic", "lstm.approach": "static"})
    assert space.default().config("fc").approach is Approach.DYNAMIC
    one = prepared.space.per_op()
    names = {dimension.name: dimension for dimension in one.dimensions}
    text = next(str(value) for value in names["op/out"].values if "dynamic" in str(value))
    recipe = one.recipe({"op/out": text})
    assert {name: recipe.config(name).approach for name in ("fc", "out")} == {"fc": SHARED[0], "out": SHARED[1]}
    built = base.get(backend).build(prepared.source, recipe)
    assert built.executed["fc"] is built.executed["out"] is Precision.INT8


SHARED = (Approach.STATIC, Approach.DYNAMIC)


def test_weight_only_rounds_weights_and_nothing_else() -> None:
    model = mixed()
    quantized = raysq.quantize(model, calib(), backend="reference", approach="weight_only")
    weighted = {name for name, config in quantized.recipe.ops.items() if config.is_int8}
    assert weighted == {name for name in weighted if quantized.recipe.ops[name].approach is Approach.WEIGHT_ONLY}
    assert {"lstm", "fc", "out"} <= weighted and not any("matmul" in name for name in weighted)
    with torch.no_grad():
        for module in (model.bag, model.lstm, model.fc, model.out):
            for weight in module.parameters():
                if weight.dim() == 2:
                    scale = weight.abs().amax(1, keepdim=True) / 127.5
                    weight.copy_((weight / scale).round().clamp(-128, 127) * scale)
        torch.testing.assert_close(quantized(*calib()[0]), model(*calib()[0]), rtol=0, atol=1e-5)


def test_weight_only_needs_no_calibration_data() -> None:
    with_data = raysq.quantize(mixed(), calib(), backend="reference", approach="weight_only")
    without = raysq.quantize(mixed(), None, backend="reference", approach="weight_only", example_inputs=calib()[0])
    assert torch.equal(with_data(*calib()[0]), without(*calib()[0]))
    assert not with_data.recipe.smoothing, "there are no activations to smooth"


def test_a_backend_without_the_approach_names_one_that_has_it() -> None:
    with pytest.raises(OptionError, match="'ipex' has no kernel for approach='weight_only'. Pass backend='reference'"):
        build_space(sixty_calls(), CAPABILITIES, approach="weight_only")


def test_weight_only_is_less_sensitive_than_static() -> None:
    prepared = raysq.prepare(mixed(), calib(), backend="reference", smoothing=False)
    static = prepared.space.default()
    weight_only = Recipe(
        {
            name: replace(config, approach=Approach.WEIGHT_ONLY)
            for name, config in static.ops.items()
            if prepared.source.graph[name].op.has_weight
        }
    )
    assert {config.rounding for config in weight_only.ops.values()} == {Rounding.NEAREST}
    costs = [MSE().scores(prepared.source, recipe) for recipe in (static, weight_only)]
    assert all(0 < costs[1][name] < costs[0][name] for name in ("fc", "out"))
