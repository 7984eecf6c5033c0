"""Relative errors against torch's fake-quantize on the whole calibration data, and a culprit planted in a model."""

import functools
import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from raysq.arithmetic import dequantize, qparams, quantize
from raysq.calibration.percentile import Percentile
from raysq.inspection import deployable
from raysq.layer import rounded
from raysq.observation import observe
from raysq.recipe import (
    BF16,
    Approach,
    Granularity,
    OpConfig,
    Precision,
    QuantDType,
    Recipe,
    Scheme,
    TensorConfig,
)
from raysq.sensitivities import ALL, MSE, rank
from raysq.sensitivities.mse import relative_errors

INT8 = OpConfig(Precision.INT8)
PER_TENSOR = OpConfig(Precision.INT8, weight=TensorConfig(QuantDType.S8, Scheme.SYMMETRIC, Granularity.PER_TENSOR))
CLIPPING = TensorConfig(QuantDType.U8, Scheme.AFFINE, algorithm=Percentile(70))


class Net(nn.Module):
    """One of each kind of call that rows are sampled for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, stride=2, groups=4)
        self.short = nn.Conv2d(16, 32, 1, stride=2)  # reads what `grouped` reads, through another window
        self.depthwise = nn.Conv2d(32, 32, 5, padding=2, groups=32, dilation=1)
        self.up = nn.ConvTranspose2d(32, 8, 2, stride=2, groups=2)
        self.pool = nn.AvgPool2d(4)
        self.hidden = nn.Linear(32, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = self.grouped(x) + self.short(x)
        x = self.up(self.depthwise(x))
        x = self.pool(x).flatten(1)
        x = self.hidden(x)
        scores = torch.matmul(x[:, :, None], x[:, None, :]).mean(-1)
        return self.head(x + scores)


def prepare(model: nn.Module, batches):
    copy, graph = deployable(model, (batches[0],), {})
    stats = observe(copy, graph, [((batch,), {}) for batch in batches])
    return graph, stats, {name: p.detach().numpy() for name, p in copy.state_dict().items()}


def errors_of(model: nn.Module, batches, config: OpConfig = INT8) -> dict[str, float]:
    graph, stats, weights = prepare(model, batches)
    return relative_errors(graph, stats, weights, Recipe({call.name: config for call in graph.calls}))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def prepared(net, images):
    return prepare(net, images)


@pytest.fixture(scope="module")
def errors(prepared) -> dict[str, float]:
    graph, stats, weights = prepared
    return relative_errors(graph, stats, weights, Recipe({call.name: INT8 for call in graph.calls}))


@pytest.fixture(scope="module")
def images():
    return torch.randn(8, 6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def fake_quantized(x: torch.Tensor, axis: int | None = None) -> torch.Tensor:
    """Symmetric s8 per channel of a weight, affine u8 of an activation, by torch's own functions."""
    if axis is None:
        lo, hi = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        scale = (hi - lo) / 255
        return torch.fake_quantize_per_tensor_affine(x, scale, round(-lo / scale), 0, 255)
    scale = x.abs().amax([d for d in range(x.dim()) if d != axis]) / 127.5
    return torch.fake_quantize_per_channel_affine(x, scale, torch.zeros(len(scale)), axis, -128, 127)


@functools.cache
def reference(net: Net, batches: torch.Tensor) -> dict[str, float]:
    """Noise over signal of each module on all data, its bias left out."""
    seen = defaultdict(list)
    hooks = [m.register_forward_hook(lambda m, a, _: seen[m].append(a[0])) for m in net.children()]
    for batch in batches:
        net(batch)
    for hook in hooks:
        hook.remove()
    errors = {}
    for name, module in net.named_children():
        x = torch.cat(seen[module])
        rounded = fake_quantized(x)
        if isinstance(module, nn.AvgPool2d):
            exact, noisy = x, rounded
        else:
            axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
            forward = functools.partial(torch.func.functional_call, module)
            zero = torch.zeros_like(module.bias)
            exact = forward({"weight": module.weight, "bias": zero}, (x,))
            noisy = forward({"weight": fake_quantized(module.weight, axis), "bias": zero}, (rounded,))
        errors[name] = float((exact - noisy).square().sum() / exact.square().sum())
    return errors


@pytest.mark.parametrize("name", ["stem", "grouped", "short", "depthwise", "up", "hidden", "head", "pool"])
@torch.no_grad()
def test_equals_fake_quantize_on_the_whole_data_within_sampling(net, images, errors, name):
    (call,) = [c for c in errors if c.split(":")[0] == name]
    # 128 rows of a few correlated outputs each: with these seeds within 25 %
    assert errors[call] == pytest.approx(reference(net, images)[name], rel=0.25)


def test_every_call_has_a_finite_error_in_execution_order(prepared, errors):
    assert list(errors) == [call.name for call in prepared[0].calls]
    assert len(errors) >= 11
    assert all(0 < error < 0.1 for error in errors.values())


def test_the_error_of_a_matmul_is_the_sum_of_its_operands(prepared, errors):
    graph, stats, _ = prepared
    call = next(c for c in graph.calls if "matmul" in c.name)
    x = torch.from_numpy(stats.tensors[call.tensors[0]].rows)
    noise = float((x - fake_quantized(x)).square().sum() / x.square().sum())
    assert errors[call.name] == pytest.approx(2 * noise, rel=0.25)  # both operands are the same tensor


def test_calls_left_in_float_are_left_out(prepared):
    graph, stats, weights = prepared
    assert relative_errors(graph, stats, weights, Recipe({"stem": BF16, "head": INT8})).keys() == {"head"}


def test_a_call_that_calibration_never_reached_is_left_out(prepared):
    graph, stats, weights = prepared
    tensors = {name: t for name, t in stats.tensors.items() if name not in graph["head"].tensors}
    short = type(stats)(tensors, stats.outputs, stats.items, stats.samples, stats.batches, stats.fingerprint)
    assert relative_errors(graph, short, weights, Recipe({"stem": INT8, "head": INT8})).keys() == {"stem"}


class TestCulprit:
    def mlp(self) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(32, 32) for _ in range(8)]).eval()

    batches = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(2))

    def test_a_weight_with_an_outlier_comes_first_per_tensor(self):
        model = self.mlp()
        with torch.no_grad():
            model[5].weight[3, 4] = 40.0
        assert rank(errors_of(model, self.batches, PER_TENSOR))[0] == "5"

    def test_a_finer_granularity_heals_it(self):
        model = self.mlp()
        with torch.no_grad():
            model[5].weight[3, 4] = 40.0
        assert errors_of(model, self.batches)["5"] < errors_of(model, self.batches, PER_TENSOR)["5"] / 5

    def test_an_activation_with_an_outlier_channel_comes_first(self):
        model = self.mlp()
        with torch.no_grad():
            model[2].weight[7] *= 300  # the input of 3 ...
            model[3].weight[:, 7] /= 300  # ... which brings it back
        assert rank(errors_of(model, self.batches))[0] == "3"

    def test_a_calibrator_that_clips_the_signal_costs(self):
        clipping = replace(INT8, activation=CLIPPING)
        assert errors_of(self.mlp(), self.batches, clipping)["0"] > 10 * errors_of(self.mlp(), self.batches)["0"]

    def test_dynamic_quantization_is_not_clipped(self):
        dynamic = OpConfig(Precision.INT8, Approach.DYNAMIC, activation=CLIPPING)
        assert errors_of(self.mlp(), self.batches, dynamic) == errors_of(self.mlp(), self.batches)

    def test_an_output_of_zero_has_no_error(self):
        model = self.mlp()
        with torch.no_grad():
            model[4].weight.zero_()
        assert errors_of(model, self.batches)["4"] == 0.0


@pytest.mark.parametrize(
    ("errors", "order"),
    [
        ({}, ()),
        ({"a": 0.1, "b": 0.3, "c": 0.1}, ("b", "a", "c")),
        ({"c": 0.0, "a": 0.0, "b": 0.0}, ("c", "a", "b")),
        ({"a": 1.0, "b": math.inf}, ("b", "a")),
    ],
)
def test_rank_is_stable(errors, order):
    assert rank(errors) == order


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_rounding_equals_the_arithmetic_to_the_bit(scheme, axis):
    x = np.random.default_rng(0).normal(size=(4, 5, 600)).astype(np.float32)
    others = None if axis is None else tuple(a for a in range(3) if a != axis)
    p = qparams(x.min(axis=others) / 2, x.max(axis=others), TensorConfig(QuantDType.U8, scheme).grid, axis)
    np.testing.assert_array_equal(rounded(torch.from_numpy(x), p).numpy(), dequantize(quantize(x, p), p))


def test_known_by_name():
    assert MSE in ALL


def test_the_weights_are_not_changed(prepared):
    graph, stats, weights = prepared
    before = {name: w.copy() for name, w in weights.items()}
    relative_errors(graph, stats, weights, Recipe({call.name: PER_TENSOR for call in graph.calls}))
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight, before[name])


def test_read_only_weights_give_the_same_errors(prepared, errors):
    graph, stats, weights = prepared
    frozen = {name: w.copy() for name, w in weights.items()}
    for weight in frozen.values():
        weight.flags.writeable = False
    assert relative_errors(graph, stats, frozen, Recipe({call.name: INT8 for call in graph.calls})) == errors
