"""torchao's form of SmoothQuant: what is observed, what int8 computes, and how the weights travel."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from raysq.errors import BackendError, CalibrationError, ModelError, OptionError

pytest.importorskip("torchao")

from torchao.quantization import quantize_  # noqa: E402

from raysq.torchao import SmoothQuantConfig, SmoothQuantTensor, insert_smoothquant_observers_  # noqa: E402
from raysq.torchao.kernel import int8_product  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OUTLIER = 3  # a channel 100 times as large as the others


def inputs(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., OUTLIER] *= 100
    return x


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 10, bias=False)).eval()


def quantized(
    model: nn.Module, *batches: Tensor, alpha: float | None = 0.5, config: SmoothQuantConfig | None = None
) -> nn.Module:
    model = copy.deepcopy(model)
    insert_smoothquant_observers_(model, alpha)
    for batch in batches:
        model(batch)
    quantize_(model, config or SmoothQuantConfig())
    return model


def reloaded(model: nn.Module, into: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    into.load_state_dict(torch.load(file, weights_only=True), assign=True)
    return into


def relative_error(output: Tensor, expected: Tensor) -> float:
    return ((output - expected).abs().max() / expected.abs().max()).item()


def simulated(
    linear: nn.Linear, x: Tensor, seen: Tensor, alpha: float | None, activation: str, largest_weight: int
) -> Tensor:
    """Compute the formulas of the paper, products in float64."""
    weight, largest = linear.weight.detach(), seen.flatten(0, -2).abs().amax(0)
    s = torch.ones_like(largest) if alpha is None else largest**alpha / weight.abs().amax(0) ** (1 - alpha)
    rows = x / s
    a = (largest / s).max() / 127 if activation == "static" else rows.abs().amax(-1, keepdim=True) / 127
    w_scale = (weight * s).abs().amax(1, keepdim=True) / largest_weight
    w = (weight * s / w_scale).round().clamp(-largest_weight, largest_weight).double() * w_scale
    y = ((rows / a).round().clamp(-127, 127).double() * a) @ w.t()
    return y if linear.bias is None else y + linear.bias.detach()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 24), (2, 3, 24)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("reduce_range", [True, False], ids=["7 bits", "8 bits"])
@pytest.mark.parametrize("activation", ["dynamic", "static"])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 1.0])
def test_int8_computes_what_a_float_simulation_does(alpha, activation, reduce_range, shape, bias):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias)
    seen, x = inputs(50, 24), inputs(*shape, seed=1)
    config = SmoothQuantConfig(activation, reduce_range)
    output = quantized(nn.Sequential(linear), seen, alpha=alpha, config=config)(x)
    expected = simulated(linear, x, seen, alpha, activation, 63 if reduce_range else 127)
    # A value beside a tie may round to the other side, because of the last bit of a scale: one step of 127.
    assert output.shape == expected.shape
    assert relative_error(output, expected) < 1 / 127
    assert (output - expected).abs().median() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("largest", [63, 127])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_products_are_exact_where_16_bits_would_overflow(largest, rows):
    x = torch.full((rows, 1000), 127, dtype=torch.int8)
    weight = torch.full((8, 1000), largest, dtype=torch.int8)
    weight[1::2] *= -1
    product = int8_product(x, weight, torch.ones(8), largest)
    assert torch.equal(product.long(), x.long() @ weight.long().t())


def test_maxima_run_over_all_batches_whatever_their_shape():
    seen = inputs(60, 24)
    in_batches = quantized(mlp(), seen[:10], seen[10:40].reshape(5, 6, 24), seen[:0], seen[40:])
    at_once = quantized(mlp(), seen)
    for one, other in zip(in_batches, at_once, strict=True):
        if isinstance(one, nn.Linear):
            assert torch.allclose(one.weight.equalization_scale, other.weight.equalization_scale)


def test_observing_changes_no_output_and_adds_no_state():
    model, x = mlp(), inputs(5, 24)
    expected, keys = model(x), list(model.state_dict())
    insert_smoothquant_observers_(model, 0.5)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys


def test_equalization_saves_what_an_outlier_channel_costs():
    torch.manual_seed(0)
    model, seen, x = nn.Sequential(nn.Linear(64, 64)), inputs(100, 64), inputs(20, 64, seed=1)
    with torch.no_grad():
        model[0].weight[:, OUTLIER] /= 100  # so that the other channels matter
    errors = {alpha: relative_error(quantized(model, seen, alpha=alpha)(x), model(x)) for alpha in (None, 0.5)}
    assert errors[0.5] < errors[None] / 5


def test_modules_stay_and_their_weights_are_int8_tensors():
    model = mlp()
    int8 = quantized(model, inputs(50, 24))
    assert [type(m) for m in int8.modules()] == [type(m) for m in model.modules()]
    assert list(int8.state_dict()) == list(model.state_dict())
    for linear in (int8[0], int8[2]):
        assert isinstance(linear.weight, SmoothQuantTensor)
        assert isinstance(linear.weight, nn.Parameter)
        assert linear.weight.qdata.dtype is torch.int8
        assert not linear._forward_pre_hooks  # nothing observes any longer


def test_dequantized_weights_err_by_half_a_step():
    model = mlp()
    weight = quantized(model, inputs(50, 24))[0].weight
    steps = (weight.dequantize() - model[0].weight) * weight.equalization_scale / weight.scale[:, None]
    assert steps.abs().max() < 0.5001


@pytest.mark.parametrize("activation", ["dynamic", "static"])
def test_a_saved_state_loads_into_the_original_model_with_identical_outputs(activation):
    int8, x = quantized(mlp(), inputs(50, 24), config=SmoothQuantConfig(activation)), inputs(4, 24, seed=1)
    assert torch.equal(reloaded(int8, into=mlp(seed=1))(x), int8(x))


def test_loading_without_assign_says_what_is_missing():
    state = quantized(mlp(), inputs(50, 24)).state_dict()
    with pytest.raises(RuntimeError, match="assign=True"):
        mlp().load_state_dict(state)
    with pytest.raises(RuntimeError, match="assign=True"):
        quantized(mlp(), inputs(50, 24), config=SmoothQuantConfig("static")).load_state_dict(state)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_quantized_model_copies_after_it_ran(again):
    int8, x = quantized(mlp(), inputs(50, 24)), inputs(4, 24)
    expected = int8(x)  # oneDNN's copy of a weight can't be copied
    assert torch.equal(again(int8)(x), expected)


def test_an_observed_model_copies_with_its_observers():
    model = mlp()
    insert_smoothquant_observers_(model, 0.5)
    model(inputs(50, 24))
    duplicate = copy.deepcopy(model)
    quantize_(duplicate, SmoothQuantConfig())
    assert not duplicate[0]._forward_pre_hooks
    assert model[0]._forward_pre_hooks  # the original still observes


def test_a_state_copied_over_a_quantized_model_takes_effect():
    x, one = inputs(4, 24), quantized(mlp(0), inputs(50, 24))
    other = quantized(mlp(1), inputs(50, 24))
    assert not torch.equal(other(x), one(x))
    other.load_state_dict(one.state_dict())  # without assign: copy_ into the weights that ran
    assert torch.equal(other(x), one(x))


def test_dead_channels_have_scale_1_and_do_not_explode_later():
    seen = inputs(50, 24)
    seen[:, 7] = 0
    model = mlp()
    with torch.no_grad():
        model[0].weight[:, 11] = 0
        model[0].weight[5] = 0  # an output that is its bias
    int8 = quantized(model, seen)
    assert int8[0].weight.equalization_scale[[7, 11]].tolist() == [1, 1]
    alive = inputs(50, 24, seed=1)  # channel 7 wakes up
    assert relative_error(int8(alive), model(alive)) < 0.05
    assert int8(torch.zeros(2, 24)).isfinite().all()


class Tied(nn.Module):
    """A head that shares its weight with the embedding, as small language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)))


def test_a_weight_that_an_embedding_shares_stays_in_float_there():
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(30).view(3, 10)
    int8 = quantized(model, ids)
    assert torch.equal(int8.embedding.weight, model.embedding.weight)
    assert isinstance(int8.head.weight, SmoothQuantTensor)
    assert relative_error(int8(ids), model(ids)) < 0.05
    assert torch.equal(reloaded(int8, into=Tied())(ids), int8(ids))


def test_two_linears_that_share_a_weight_have_scales_of_their_own():
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    model[2].weight = model[0].weight
    x = inputs(50, 24)
    int8 = quantized(model, x)
    assert not torch.equal(int8[0].weight.equalization_scale, int8[2].weight.equalization_scale)
    assert relative_error(int8(x), model(x)) < 0.05


def test_a_linear_with_two_names_is_quantized_once():
    linear = nn.Linear(24, 24)
    model = nn.Sequential(nn.Sequential(linear), nn.ReLU(), nn.Sequential(linear))
    x = inputs(50, 24)
    int8 = quantized(model, x)
    assert int8[0][0] is int8[2][0]
    assert relative_error(int8(x), model(x)) < 0.05


def test_only_observed_linears_are_quantized():
    model, x = mlp(), inputs(50, 24)
    insert_smoothquant_observers_(model, 0.5, lambda module, name: name == "2")
    model(x)
    quantize_(model, SmoothQuantConfig())
    assert type(model[0].weight) is nn.Parameter
    assert isinstance(model[2].weight, SmoothQuantTensor)


def test_linears_may_differ_in_alpha():
    model, x = mlp(), inputs(50, 24)
    insert_smoothquant_observers_(model, 0.5)
    insert_smoothquant_observers_(model, None, lambda module, name: name == "2")
    model(x)
    quantize_(model, SmoothQuantConfig())
    assert model[0].weight.equalization_scale is not None
    assert model[2].weight.equalization_scale is None


def test_a_computed_weight_stays_in_float():
    model = nn.Sequential(nn.Linear(24, 24), nn.utils.parametrizations.weight_norm(nn.Linear(24, 24)))
    x = inputs(50, 24)
    int8 = quantized(model, x)
    assert isinstance(int8[0].weight, SmoothQuantTensor)
    assert not isinstance(int8[1].weight, SmoothQuantTensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_outputs_have_the_type_of_the_inputs(dtype):
    model, x = mlp().to(dtype), inputs(50, 24).to(dtype)
    int8 = quantized(model, x)
    assert int8(x).dtype is dtype
    assert int8[0].weight.dtype is dtype
    assert relative_error(int8(x), model(x)) < 0.1


def test_shapes_are_those_of_linear():
    int8 = quantized(mlp(), inputs(50, 24))
    assert [int8(torch.ones(*shape, 24)).shape for shape in [(), (0,), (2, 3)]] == [(10,), (0, 10), (2, 3, 10)]


def test_nan_stays_nan_where_activations_are_dynamic():
    int8 = quantized(mlp(), inputs(50, 24))
    x = inputs(2, 24)
    x[0, 0] = torch.nan
    assert int8(x).isnan().all(1).tolist() == [True, False]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_torch_compile_computes_the_same():
    int8, x = quantized(mlp(), inputs(50, 24)), inputs(4, 24)
    with torch.no_grad():
        assert torch.allclose(torch.compile(int8)(x), int8(x), atol=1e-5)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "0.5"])
def test_alpha_outside_of_its_range_is_refused(alpha):
    with pytest.raises(OptionError, match=r"`alpha` must lie in \[0, 1\]"):
        insert_smoothquant_observers_(mlp(), alpha)


def test_an_unknown_activation_is_refused():
    with pytest.raises(OptionError, match="unknown activation 'statik'.* Did you mean 'static'"):
        SmoothQuantConfig("statik")


def test_quantizing_before_observing_is_refused_with_the_right_order():
    model = mlp()
    with pytest.raises(ModelError, match=r"insert_smoothquant_observers_\(model, alpha=0.5\)"):
        quantize_(model, SmoothQuantConfig())


def test_a_layer_that_saw_no_data_is_named_and_nothing_is_quantized():
    model = mlp()
    insert_smoothquant_observers_(model, 0.5)
    model[0](inputs(5, 24))
    with pytest.raises(CalibrationError, match="; 2 saw none"):
        quantize_(model, SmoothQuantConfig())
    assert type(model[0].weight) is nn.Parameter
    model(inputs(50, 24))  # and it can go on
    quantize_(model, SmoothQuantConfig())
    assert isinstance(model[0].weight, SmoothQuantTensor)


def test_activations_that_are_not_finite_are_refused():
    model, x = mlp(), inputs(5, 24)
    insert_smoothquant_observers_(model, 0.5)
    x[0, 0] = torch.inf
    model(x)
    with pytest.raises(CalibrationError, match="0, 2 saw NaN or infinity"):
        quantize_(model, SmoothQuantConfig())


def test_a_model_without_linears_is_refused():
    with pytest.raises(ModelError, match="must have a Linear"):
        insert_smoothquant_observers_(nn.Sequential(nn.Conv2d(1, 1, 1)), 0.5)


def test_without_torchao_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.delitem(sys.modules, "raysq.torchao")
    with pytest.raises(BackendError, match=r"pip install 'raysq\[torchao\]'") as caught:
        importlib.import_module("raysq.torchao")
    assert isinstance(caught.value, ImportError)


def test_the_example_s_smoothed_model_is_nearer_to_fp32(monkeypatch):
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "torchao_smoothquant.py")
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "example", example)  # where its dataclass looks for its types
    spec.loader.exec_module(example)
    for name in ("STEPS", "ROUNDS", "CALIBRATION_BATCHES", "TEST_BATCHES"):
        monkeypatch.setattr(example, name, 2)
    fp32, *int8 = example.table()
    loss_added = {row.name: abs(row.perplexity - fp32.perplexity) for row in int8}
    assert loss_added["smoothed, static"] < loss_added["int8, static"] / 5
    assert all(row.size_bytes < fp32.size_bytes / 3 for row in int8)
