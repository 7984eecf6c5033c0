"""Every kind of call through the real int8 kernels, against the float simulation of the same recipe."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from int8_calls import MODELS, engine, int8_everywhere, made, source
from torch import nn

import raysq
from raysq.errors import RecipeError
from raysq.recipe import (
    BF16,
    FP32,
    Approach,
    OpConfig,
    Precision,
    QuantDType,
    Recipe,
    Rounding,
    Scheme,
    TensorConfig,
    Transform,
)
from raysq.source import Source
from raysq.space import build_space

# an intermediate value that lies on a rounding edge may fall to either side: one step of the last layer's input;
# an LSTM also rounds the state at every step, which the reference does not
ROUNDING = {"lstm": 0.06}


@pytest.mark.parametrize("name", ["ipex", "onednn"])
def test_every_kind_of_call_that_a_backend_claims_is_covered_here(name: str) -> None:
    assert {*engine(name).capabilities().ops} <= {*MODELS, "embedding_bag"}


@pytest.mark.parametrize("name", ["ipex", "onednn"])
@pytest.mark.parametrize("kind", [*MODELS, "embedding_bag"])
def test_int8_kernels_compute_what_the_reference_simulates(kind: str, name: str) -> None:
    backend, reference, of = engine(name), engine("reference"), made(kind)
    recipe = int8_everywhere(of, backend.capabilities(), Approach.STATIC)
    built = backend.build(of, recipe)
    # what the kernels left in float is not rounded by them, so the reference must not round it either
    same = recipe.with_ops(dict.fromkeys(built.left_in_float, FP32))
    got, wanted = built.model(*of.args), reference.build(of, same).model(*of.args)
    assert (got - wanted).abs().max() <= ROUNDING.get(kind, 0.02) * wanted.abs().max()
    claimed = [call.name for call in of.graph.calls if call.op in backend.capabilities().ops]
    assert all(built.executed[name] is Precision.INT8 for name in claimed), built.left_in_float


@pytest.mark.parametrize("kind", ["linear", "lstm", "embedding_bag"])
def test_dynamic_int8_modules_compute_what_the_reference_simulates(kind: str) -> None:
    ipex, reference, of = engine("ipex"), engine("reference"), made(kind)
    recipe = int8_everywhere(of, ipex.capabilities(), Approach.DYNAMIC)
    built = ipex.build(of, recipe)
    got, wanted = built.model(*of.args), reference.build(of, recipe).model(*of.args)
    assert (got - wanted).abs().max() <= ROUNDING.get(kind, 0.02) * wanted.abs().max()
    assert {*built.executed.values()} == {Precision.INT8}, "read from the graph: quantized::linear_dynamic and the like"


@pytest.mark.parametrize(
    ("name", "approach"),
    [("ipex", Approach.STATIC), ("ipex", Approach.DYNAMIC), ("onednn", Approach.STATIC)],
)
def test_a_computed_division_runs_on_the_kernels(name: str, approach: Approach) -> None:
    backend, reference = engine(name), engine("reference")
    torch.manual_seed(0)
    wide = torch.randn(64, 32) * torch.logspace(-2, 2, 32)  # its smallest channels vanish in one grid for all
    of = source(nn.Sequential(nn.Linear(32, 16)), wide)
    recipe = int8_everywhere(of, backend.capabilities(), approach)
    smoothed = recipe.with_smoothing({"0/0": 0.5})
    got, wanted = backend.build(of, smoothed).model(wide), reference.build(of, smoothed).model(wide)
    assert (got - wanted).abs().max() <= 0.02 * wanted.abs().max()
    with torch.no_grad():
        exact = of.model(wide)
    assert (got - exact).square().mean() < (backend.build(of, recipe).model(wide) - exact).square().mean()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("ipex", k) for k in ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "rows of a weight")),
        *(("onednn", k) for k in ("conv1d", "conv2d", "conv3d", "linear", "rows of a weight")),
    ],
)
def test_weights_and_biases_that_look_at_data_run_on_the_kernels(name: str, kind: str) -> None:
    backend, reference, of = engine(name), engine("reference"), made(kind)
    plain = int8_everywhere(of, backend.capabilities(), Approach.STATIC)
    weighted = {n: replace(c, rounding=Rounding.ADAROUND) for n, c in plain.ops.items() if of.graph[n].op.has_weight}
    recipe = replace(plain.with_ops(weighted), transforms=tuple(Transform))
    built = backend.build(of, recipe)
    same = recipe.with_ops(dict.fromkeys(built.left_in_float, FP32))
    wanted = reference.build(of, same).model(*of.args)
    assert (built.model(*of.args) - wanted).abs().max() <= 0.02 * wanted.abs().max()
    assert not torch.equal(
        wanted, reference.build(of, plain.with_ops(dict.fromkeys(built.left_in_float, FP32))).model(*of.args)
    )


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.EmbeddingBag(50, 32, mode="mean"), (torch.randint(0, 50, (4, 6)),)),
        (nn.LSTM(16, 32, bias=False), (torch.randn(4, 10, 16),)),
        (nn.LSTM(16, 32, proj_size=8), (torch.randn(4, 10, 16),)),
    ],
    ids=["mean", "no bias", "projection"],
)
def test_what_torch_has_no_dynamic_module_for_stays_in_float(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.fc = module, nn.Linear(8, 8)

        def forward(self, *x: torch.Tensor) -> torch.Tensor:
            result = self.inside(*x)
            result = result if isinstance(result, torch.Tensor) else result[0]
            return self.fc(result[..., :8])

    ipex, of = engine("ipex"), source(Inside(), *inputs)
    built = ipex.build(of, int8_everywhere(of, ipex.capabilities(), Approach.DYNAMIC))
    assert built.executed == {"inside": Precision.FP32, "fc": Precision.INT8}
    assert "torch has none" in built.left_in_float["inside"]


@pytest.mark.parametrize("name", ["ipex", "onednn"])
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_a_fallback_takes_effect_in_the_executed_graph(name: str, kind: str) -> None:
    backend, of = engine(name), made(kind)
    recipe = build_space(of.graph, backend.capabilities()).default()
    first, last = (call.name for call in of.graph.calls if call.op.has_weight)
    built = backend.build(of, recipe.with_ops({first: FP32}))
    assert built.executed[first] is Precision.FP32
    assert built.executed[last] is Precision.INT8


@pytest.mark.parametrize("name", ["ipex", "onednn", "openvino", "reference"])
@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3, padding=1), nn.Linear(9, 9)], ids=["conv", "linear"])
def test_no_build_writes_into_its_inputs(name: str, layer: nn.Module) -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.layer(x)  # a fused sum is written into `x`

    backend, x = engine(name), torch.randn(2, 8, 9, 9)
    of, kept = source(Shortcut(), x), x.clone()
    forms = [backend.build_float(of, form) for form in backend.float_forms()]
    for built in (*forms, backend.build(of, int8_everywhere(of, backend.capabilities(), Approach.STATIC))):
        built.model(x)
        assert torch.equal(x, kept)


@pytest.mark.parametrize("name", ["ipex", "onednn", "openvino", "reference"])
@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(4)])
def test_a_pool_may_have_no_batch_axis(name: str, pool: nn.Module) -> None:
    x = torch.randn(8, 12, 16)
    of = source(nn.Sequential(nn.Linear(16, 16), pool, nn.Tanh()), x)
    with torch.no_grad():
        torch.testing.assert_close(engine(name).build(of, Recipe({})).model(x), of.model(x), rtol=0, atol=1e-5)


class Relative(nn.Module):
    """Attends to learned positions, whose keys are the same for every input, as DeBERTa's are."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(6, 16))
        self.norm, self.query, self.key = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.query(x) @ self.key(self.norm(self.positions)).T


class Cell(nn.Module):
    """A recurrent cell written by hand: its state begins with zeros."""

    def __init__(self, zeros: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.zeros, self.read, self.keep = zeros, nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.zeros(x)
        for step in range(3):
            state = torch.tanh(self.keep(state) + self.read(x[:, step]))
        return state


@pytest.mark.parametrize("name", ["ipex", "onednn", "openvino"])
@pytest.mark.parametrize("zeros", [lambda x: x.new_zeros(x.shape[0], 16), lambda x: torch.zeros_like(x[:, 0])])
def test_a_state_that_begins_with_zeros_is_no_obstacle(name: str, zeros: Any) -> None:
    engine(name)
    torch.manual_seed(0)
    model, x = Cell(zeros).eval(), torch.randn(16, 3, 16)
    quantized = raysq.quantize(model, [x], backend=name)
    assert quantized.executed["keep#2"] is Precision.INT8
    more = torch.randn(5, 3, 16)
    with torch.no_grad():
        exact = model(more)
    assert (quantized(more) - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", ["ipex", "onednn", "openvino"])
def test_a_call_that_nothing_reads_is_said_to_be_that(name: str) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.variance = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean, _ = self.mean(x), self.variance(x)  # which only training samples from
            return mean

    engine(name)
    left = raysq.quantize(Encoder().eval(), [torch.randn(16, 16)], backend=name).left_in_float
    assert left == {"variance": "nothing reads its result, so it isn't computed"}


@pytest.mark.parametrize("name", ["ipex", "ipex_qconf", "onednn", "openvino"])
def test_a_call_that_depends_on_no_input_is_no_obstacle(name: str) -> None:
    backend = engine(name)
    torch.manual_seed(0)
    of = source(Relative(), torch.randn(16, 16))
    assert of.graph.constant_calls == ("key",)
    built = backend.build(of, build_space(of.graph, backend.capabilities()).default())  # IPEX's kernel would crash
    assert built.executed["query"] is Precision.INT8
    assert built.executed["key"] is Precision.INT8 or built.left_in_float["key"]
    with torch.no_grad():
        exact = of.model(*of.args)
    assert (built.model(*of.args) - exact).norm() < 0.05 * exact.norm()


class Routed(nn.Module):
    """Gives the positive rows to one layer and the others to another: values decide how many each gets."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = x.new_zeros(x.shape[0], 8)  # `len(x)` would be a fixed number
        for layer, chosen in zip(self.layers, (x[:, 0] > 0, x[:, 0] <= 0), strict=True):
            rows = torch.where(chosen)[0]
            result.index_add_(0, rows, layer(x[rows]))
        return result


@pytest.mark.parametrize("name", ["ipex", "onednn", "reference"])
def test_rows_may_be_routed_by_their_values(name: str) -> None:
    backend = engine(name)
    torch.manual_seed(0)
    of = source(Routed(), torch.randn(32, 16))
    built = backend.build(of, build_space(of.graph, backend.capabilities()).default())
    assert set(built.executed.values()) == {Precision.INT8}
    x = torch.randn(24, 16)  # other rows, and other numbers of them, than the example has
    with torch.no_grad():
        assert (built.model(x) - of.model(x)).norm() < 0.05 * of.model(x).norm()


@pytest.mark.parametrize("name", ["ipex", "onednn", "openvino", "reference"])
def test_a_window_may_follow_from_sizes(name: str) -> None:
    class Causal(nn.Conv1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            reach = self.weight.shape[-1] - 1  # a tensor, where it is traced
            return nn.functional.conv1d(x, self.weight, self.bias, padding=reach, groups=x.shape[1])[..., :-reach]

    x = torch.randn(2, 8, 20)
    of = source(nn.Sequential(Causal(8, 8, 4, groups=8), nn.Conv1d(8, 4, 1)), x)
    with torch.no_grad():
        torch.testing.assert_close(engine(name).build(of, Recipe({})).model(x), of.model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ipex", "onednn", "openvino", "reference"])
@pytest.mark.parametrize(("kind", "axis"), [("linear", -1), ("conv2d", 1)])
@pytest.mark.parametrize("more", [1, -1])
def test_inputs_of_another_width_are_refused(name: str, kind: str, axis: int, more: int) -> None:
    backend, of = engine(name), made(kind)
    model = backend.build(of, build_space(of.graph, backend.capabilities()).default()).model
    shape = [2, *of.args[0].shape[1:]]
    model(torch.zeros(shape))
    shape[axis] += more
    with pytest.raises(RuntimeError):
        model(torch.zeros(shape))


@pytest.mark.parametrize("name", ["ipex", "onednn", "openvino", "reference"])
def test_the_same_recipe_built_twice_gives_the_same_bits(name: str) -> None:
    backend, of = engine(name), made("conv2d")
    recipe = build_space(of.graph, backend.capabilities()).default()
    assert torch.equal(backend.build(of, recipe).model(*of.args), backend.build(of, recipe).model(*of.args))


@pytest.mark.parametrize(
    ("dtype", "scheme"),
    [
        (QuantDType.U8, Scheme.AFFINE),
        (QuantDType.S8, Scheme.AFFINE),
        (QuantDType.S8, Scheme.SYMMETRIC),
        (QuantDType.U8, Scheme.SYMMETRIC),
    ],
)
@pytest.mark.parametrize("approach", list(Approach))
def test_the_reference_runs_every_pair(dtype: QuantDType, scheme: Scheme, approach: Approach) -> None:
    reference, of = engine("reference"), made("linear")
    config = OpConfig(Precision.INT8, approach, activation=TensorConfig(dtype, scheme))
    built = reference.build(of, Recipe(dict.fromkeys(of.graph.by_name, config)))
    exact = of.model(*of.args)
    error = (built.model(*of.args) - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.1  # rounded, and not by more than 8 bits (symmetric u8 after GELU: 7) allow


def test_bf16_per_call_rounds_that_call_only() -> None:
    reference, of = engine("reference"), made("linear")
    built = reference.build(of, Recipe({"0": BF16}))
    exact = of.model(*of.args)
    assert 0 < (built.model(*of.args) - exact).abs().max() < 0.02
    assert built.executed == {"0": Precision.BF16, "2": Precision.FP32}


def test_a_dynamic_recipe_needs_no_statistics() -> None:
    ipex, of = engine("ipex"), made("linear")
    bare = Source(of.model, of.graph, None, of.args)
    space = build_space(of.graph, ipex.capabilities(), approach="dynamic")
    built = ipex.build(bare, space.default())
    assert set(built.executed.values()) == {Precision.INT8}
    exact = of.model(*of.args)
    assert (built.model(*of.args) - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (Recipe({"nope": FP32}), "unknown call"),
        (Recipe({}, smoothing={"0": 0.5}), "unknown group to smooth"),
    ],
)
def test_what_a_backend_cannot_run_is_refused(recipe: Recipe, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        engine("reference").build(made("linear"), recipe)


@pytest.mark.parametrize(("name", "imports"), [("ipex", "torch, intel_extension_for_pytorch"), ("onednn", "torch")])
def test_the_artifact_runs_in_a_process_with_torch_and_its_kernels_only(name: str, imports: str, tmp_path) -> None:
    engine(name)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.randn(4, 3, 12, 12)
    quantized = raysq.quantize(model, [x], backend=name)
    quantized.save(tmp_path)
    torch.save((x, quantized(x)), tmp_path / "expected.pt")
    script = (
        f"import sys, {imports}\n"
        f"x, y = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"m = torch.jit.load({str(tmp_path / 'model.pt')!r})\n"
        "for _ in range(3): out = m(x)\n"
        "assert torch.equal(out, y) and 'raysq' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert torch.equal(raysq.load(tmp_path)(x), quantized(x))
