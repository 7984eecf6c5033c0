"""IPEX's own prepare, load_qconf_summary and convert, given raysq's qconf, against raysq's own build of the recipe."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from raysq.arithmetic import Grid, qparams
from raysq.capabilities import Capabilities
from raysq.errors import BackendError, RaysqError
from raysq.flattened import Flattened
from raysq.graph import OpType
from raysq.inspection import deployable
from raysq.intercept import Interceptor, Operands, Site
from raysq.kernels import base
from raysq.kernels.floats import freeze, warm_up
from raysq.kernels.qconf import why_not
from raysq.observation import observe
from raysq.plan import CallPlan
from raysq.recipe import (
    BF16,
    FP32,
    Approach,
    Granularity,
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

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # IPEX's observers complain of data that they don't need
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


INT8 = OpConfig(Precision.INT8)
SYMMETRIC_S8 = TensorConfig(QuantDType.S8, Scheme.SYMMETRIC)


@pytest.mark.parametrize(
    "recipe",
    [Recipe({}), Recipe({"fc": INT8, "head": FP32}), Recipe({"fc": replace(INT8, activation=SYMMETRIC_S8)})],
)
def test_what_a_qconf_can_hold_of_a_recipe_has_no_reason(recipe: Recipe) -> None:
    assert why_not(recipe) == ()


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe({"fc": BF16}), "bf16"),
        (Recipe({"fc": replace(INT8, approach=Approach.DYNAMIC)}), "dynamic"),
        (Recipe({"fc": replace(INT8, rounding=Rounding.ADAROUND)}), "rounding"),
        (Recipe({"fc": replace(INT8, activation=replace(SYMMETRIC_S8, scheme=Scheme.AFFINE))}), "symmetric only"),
        (Recipe({}, transforms=(Transform.EQUALIZATION,)), "equalization"),
    ],
)
def test_what_a_qconf_can_not_hold_has_one(recipe: Recipe, reason: str) -> None:
    (only,) = why_not(recipe)
    assert reason in only


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.pool, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        return self.fc(torch.flatten(self.pool(x + self.second(x).relu()), 1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, 32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).view(*x.shape[:2], 4, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (torch.matmul(q, k.transpose(2, 3)) / 8**0.5).softmax(-1)
        return x + self.out(torch.matmul(weights, v).transpose(1, 2).reshape(x.shape))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Parameter(torch.randn(5, 32) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return nn.functional.linear(x, self.head)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.lstm, self.fc = nn.EmbeddingBag(50, 16, mode="sum"), nn.LSTM(16, 32), nn.Linear(32, 8)

    def forward(self, items: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(self.bag(items, starts).reshape(5, 2, 16))[0])


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]] = {
    "convolutions": lambda: (Convolutions(), (torch.randn(2, 3, 12, 12),)),
    "transformer": lambda: (Transformer(), (torch.randn(2, 6, 32),)),
    "words": lambda: (Words(), (torch.randint(0, 50, (40,)), torch.arange(0, 40, 4))),
}
# both paths round the same values by the same scales, but fuse differently: a value on an edge may fall to either side
ROUNDING = 0.02


def ipex() -> Any:
    try:
        return base.get("ipex")
    except BackendError as exc:
        pytest.skip(str(exc))


def made(name: str) -> tuple[nn.Module, Source]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    copied, graph = deployable(model.eval(), inputs, {})
    return model, Source(copied, graph, observe(copied, graph, [(inputs, {})]), inputs)


def all_int8(source: Source, capabilities: Capabilities) -> dict[str, OpConfig]:
    activation = TensorConfig(QuantDType.U8, Scheme.AFFINE, reduce_range=capabilities.reduce_range)
    configs = {}
    for call in source.graph.calls:
        if call.op in capabilities.ops:
            granularities = capabilities.ops[call.op].granularities or (Granularity.PER_CHANNEL,)
            weight = TensorConfig(QuantDType.S8, Scheme.SYMMETRIC, granularities[0])
            configs[call.name] = OpConfig(Precision.INT8, Approach.STATIC, activation, weight)
    return configs


def run_by_ipex(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], qconf: Path, smooth: dict[str, bool] | None = None
) -> torch.Tensor:
    """Follow IPEX's tutorial on the user's own model, without calibration."""
    from intel_extension_for_pytorch import quantization

    mapping = quantization.default_static_qconfig_mapping
    if smooth is not None:
        mapping = quantization.get_smooth_quant_qconfig_mapping(**smooth)
    prepared = quantization.prepare(copy.deepcopy(model), mapping, example_inputs=inputs)
    prepared.load_qconf_summary(str(qconf))
    flat = Flattened(quantization.convert(prepared), inputs)
    script = freeze(flat)
    warm_up(script, flat)
    return script(*inputs)


def every_second(configs: dict[str, OpConfig]) -> dict[str, OpConfig]:
    return {name: FP32 if i % 2 else config for i, (name, config) in enumerate(configs.items())}


def per_tensor(configs: dict[str, OpConfig]) -> dict[str, OpConfig]:
    def changed(config: OpConfig) -> OpConfig:
        return replace(config, weight=replace(config.weight, granularity=Granularity.PER_TENSOR))

    return {name: config if "lstm" in name else changed(config) for name, config in configs.items()}


def narrow_keys(configs: dict[str, OpConfig]) -> dict[str, OpConfig]:
    """Give one reader of a shared input another scale than its neighbours."""
    from raysq.calibration.percentile import Percentile

    def changed(config: OpConfig) -> OpConfig:
        return replace(config, activation=replace(config.activation, algorithm=Percentile(90.0)))

    return {name: changed(config) if name.endswith(".k") else config for name, config in configs.items()}


@pytest.mark.parametrize("change", [dict, every_second, per_tensor], ids=["all", "fallback", "per tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_ipex_computes_from_the_qconf_what_raysq_built(name: str, change: Any, tmp_path: Path) -> None:
    engine, (model, source) = ipex(), made(name)
    recipe = Recipe(change(all_int8(source, engine.capabilities())))
    built = engine.build(source, recipe)
    built.save(tmp_path)
    with torch.no_grad():
        got, wanted = run_by_ipex(model, source.args, tmp_path / "configure.json"), built.model(*source.args)
        exact = model(*source.args)
    assert (got - wanted).abs().max() <= ROUNDING * wanted.abs().max()
    assert not torch.allclose(got, exact, rtol=0, atol=1e-4 * float(exact.abs().max())), "nothing was quantized"


def test_readers_of_one_tensor_may_differ_in_scale(tmp_path: Path) -> None:
    engine, (model, source) = ipex(), made("transformer")
    recipe = Recipe(narrow_keys(all_int8(source, engine.capabilities())))
    built = engine.build(source, recipe)
    built.save(tmp_path)
    qconf = json.loads((tmp_path / "configure.json").read_text())
    read = {
        info["fqn"]: (info["input_tensor_infos"][0]["id"], *info["input_tensor_infos"][0]["scale"])
        for info in qconf["blocks:0"]["q_op_infos"].values()
        if info["fqn"] in ("blocks.0.q", "blocks.0.k", "blocks.0.v")
    }
    assert read["blocks.0.q"] == read["blocks.0.v"]
    assert read["blocks.0.k"][0] != read["blocks.0.q"][0], "the last scale that is loaded for an id wins"
    assert read["blocks.0.k"][1] < read["blocks.0.q"][1]
    if not engine.capabilities().reduce_range:  # there IPEX clamps at 8 bits what the recipe clamps at 7
        with torch.no_grad():
            got, wanted = run_by_ipex(model, source.args, tmp_path / "configure.json"), built.model(*source.args)
        assert (got - wanted).abs().max() <= ROUNDING * wanted.abs().max()


def test_no_scale_is_left_where_nothing_is_quantized() -> None:
    engine, (_, source) = ipex(), made("transformer")
    qconf = engine.configure(source, Recipe({}))
    assert '"scale"' not in json.dumps(qconf)
    assert "torch.quint8" not in {
        tensor["force_dtype"]
        for module in qconf.values()
        for info in module["q_op_infos"].values()
        for tensor in info["input_tensor_infos"]
        if tensor
    }


class Shared(nn.Module):
    """Three linear layers and a product read one tensor, whose fourth channel is an outlier."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, 32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        with torch.no_grad():
            self.norm.weight[3] = 40.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = self.q(y), self.k(y), self.v(y)
        return torch.cat([q, k, v, self.out(v), torch.matmul(y, y.transpose(1, 2)) / 300], -1)


def shared() -> tuple[nn.Module, Source]:
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(2, 5, 32)
    copied, graph = deployable(model, (x,), {})
    return model, Source(copied, graph, observe(copied, graph, [((x,), {})]), (x,))


def factors(source: Source, call: str, alpha: float) -> NDArray[np.float32]:
    """Return s of SmoothQuant's equation 4 for one layer."""
    assert source.stats is not None
    stats = source.stats.tensors[source.graph[call].tensors[0]]
    weight = source.model.get_parameter(str(source.graph[call].weight)).detach().abs().numpy()
    largest = np.maximum(-stats.channel_min, stats.channel_max)
    return np.asarray(largest**alpha / weight.max(0) ** (1 - alpha), np.float32)


def smoothed(source: Source, recipe: Recipe, scales: dict[str, NDArray[np.float32]]) -> dict[str, CallPlan]:
    """Plan by hand: the activation of each named layer is divided by its scales, its weight multiplied."""
    assert source.stats is not None
    plans = source.planner.plan(recipe)
    for name, s in scales.items():
        call, grid = source.graph[name], recipe.config(name).activation.grid
        stats = source.stats.tensors[call.tensors[0]]
        weight = source.model.get_parameter(str(call.weight)).detach().numpy() * s
        plans[name] = replace(
            plans[name],
            inputs=(qparams((stats.channel_min / s).min(), (stats.channel_max / s).max(), grid),),
            weights={0: qparams(weight.min(1), weight.max(1), Grid(-128, 127, symmetric=True), 0)},
            multiplier=1 / s,
        )
    return plans


def simulated(source: Source, plans: dict[str, CallPlan]) -> torch.Tensor:
    """Compute in float what the plans say, by torch's own fake quantization."""

    def run(site: Site, operands: Operands) -> Any:
        plan, activations, weights = plans[site.name], list(operands.activations), list(operands.weights)
        if not plan.config.is_int8 or plan.reason:
            return operands.run(activations, weights)
        if plan.multiplier is not None:
            factor = torch.from_numpy(plan.multiplier)
            activations[0], weights[0] = activations[0] * factor, weights[0] * (1 / factor)
        rounded = []
        for tensor, params in zip(activations, plan.inputs, strict=True):
            assert params is not None
            scale, zero_point = float(params.scale), int(params.zero_point)
            rounded.append(torch.fake_quantize_per_tensor_affine(tensor, scale, zero_point, 0, 255))
        for position, params in (plan.weights or {}).items():
            scales, zero_points = torch.from_numpy(params.scale), torch.from_numpy(params.zero_point)
            weights[position] = torch.fake_quantize_per_channel_affine(
                weights[position], scales, zero_points, 0, -128, 127
            )
        return operands.run(rounded, weights)

    with torch.no_grad(), Interceptor(source.model, run):
        result: torch.Tensor = source.model(*source.args)
    return result


SMOOTHED: dict[str, tuple[dict[str, float], set[str]]] = {  # alpha of each smoothed layer, layers in fp32
    "all alike": ({"q": 0.5, "k": 0.5, "v": 0.5}, set()),
    "one of three": ({"k": 0.5}, set()),
    "each its own": ({"q": 0.5, "k": 0.8, "v": 0.2, "out": 0.5}, set()),
    "first in fp32": ({"k": 0.5, "v": 0.5}, {"q"}),
    "product in fp32": ({"q": 0.5, "k": 0.5, "v": 0.5}, {"matmul"}),
}


@pytest.mark.parametrize("share", [True, False], ids=["shared weight observers", "own weight observers"])
@pytest.mark.parametrize("case", SMOOTHED)
def test_ipex_multiplies_as_the_plans_say(case: str, share: bool, tmp_path: Path) -> None:
    from raysq.kernels.ipex import summary
    from raysq.kernels.qconf import fill

    engine, (model, source) = ipex(), shared()
    alphas, floats = SMOOTHED[case]
    configs = all_int8(source, engine.capabilities())
    recipe = Recipe({name: FP32 if name in floats else config for name, config in configs.items()})
    same = len(set(alphas.values())) == 1 and len(alphas) == 3
    plans = smoothed(source, recipe, {n: factors(source, "q" if same else n, alpha) for n, alpha in alphas.items()})
    qconf = fill(summary(source, smooth=True), source.graph, plans, source.stats)
    (tmp_path / "configure.json").write_text(json.dumps(qconf))
    with torch.no_grad():
        got = run_by_ipex(model, source.args, tmp_path / "configure.json", {"share_weight_observers": share})
    wanted = simulated(source, plans)
    error = (got - wanted).abs() / wanted.abs().max()
    assert error.max() <= ROUNDING and (error <= 1e-5).float().mean() > 0.97  # a value on an edge may fall either way


def test_a_smoothed_recipe_gives_ipex_the_numbers_that_raysq_folds(tmp_path: Path) -> None:
    engine, (model, source) = ipex(), shared()
    recipe = Recipe(all_int8(source, engine.capabilities()), smoothing={"q/0": 0.5, "out/0": 0.5})
    built = engine.build(source, recipe)
    built.save(tmp_path)
    with torch.no_grad():
        got = run_by_ipex(model, source.args, tmp_path / "configure.json", {})
        exact, wanted = model(*source.args), built.model(*source.args)
    part = slice(0, 96)  # of q, k and v
    assert (got - wanted)[..., part].abs().max() <= ROUNDING * wanted[..., part].abs().max()
    plain = engine.build(source, Recipe(recipe.ops)).model(*source.args)
    losses = [float((y - exact)[..., part].abs().mean()) for y in (got, plain)]
    assert losses[0] < losses[1] / 2, "smoothing is what the outlier needs"


def test_only_linear_modules_can_be_smoothed() -> None:
    engine, (_, source) = ipex(), made("convolutions")
    recipe = Recipe(all_int8(source, engine.capabilities()), smoothing={"first/0": (1.0, 2.0, 4.0)})
    with pytest.raises(BackendError, match=r"first is smoothed, which IPEX does to nn.Linear modules only"):
        engine.configure(source, recipe)


def test_each_op_says_what_ipex_1_said_and_which_call_it_is() -> None:
    engine, (_, source) = ipex(), made("transformer")
    configs = all_int8(source, engine.capabilities())
    configs["blocks.0.k"] = FP32
    qconf = json.loads(json.dumps(engine.configure(source, Recipe(configs))))
    ops = {i["call"]: i for m in qconf.values() for i in m["q_op_infos"].values() if "call" in i}
    assert set(configs) <= set(ops) <= set(source.graph.by_name)
    for name, op in ops.items():
        call = source.graph[name]
        assert op["name"] == call.op.value and op["algorithm"] == "min_max"
        assert len(op["input_scales"]) == len(op["inputs_flow"]) == len(call.tensors)
        rounded = [name in configs and configs[name].is_int8] * len(call.tensors)
        if call.op is OpType.ADD:  # one operand comes straight from an accumulator
            rounded = [place == 0 and is_int8 for place, is_int8 in enumerate(rounded)]
        assert op["inputs_quantized"] == rounded
    q = ops["blocks.0.q"]
    assert q["input_scales"] == q["input_tensor_infos"][0]["scale"]
    assert q["weight_scales"] == [q["weight_tensor_infos"][0]["scale"]]
    assert q["inputs_flow"] == ops["blocks.0.v"]["inputs_flow"] != ops["blocks.1.q"]["inputs_flow"]


class OneDimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_a_call_that_ipex_does_not_quantize_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, x = ipex(), torch.randn(2, 4, 9)
    copied, graph = deployable(OneDimensional().eval(), (x,), {})
    source = Source(copied, graph, observe(copied, graph, [((x,), {})]), (x,))
    recipe = Recipe(all_int8(source, engine.capabilities()))
    with pytest.raises(BackendError, match=r"0 calls of conv1d where raysq sees 1, conv among them"):
        engine.configure(source, recipe)
    with caplog.at_level(logging.INFO, logger="raysq"):
        engine.build(source, recipe).save(tmp_path)  # saving itself goes well
    assert (tmp_path / "model.pt").exists() and not (tmp_path / "configure.json").exists()
    assert "configure.json is not written: IPEX's own quantization sees 0 calls of conv1d" in caplog.text


def test_what_a_qconf_cannot_express_is_refused() -> None:
    engine, (_, source) = ipex(), made("convolutions")
    dynamic = OpConfig(
        Precision.INT8,
        Approach.DYNAMIC,
        TensorConfig(QuantDType.U8, Scheme.AFFINE, reduce_range=engine.capabilities().reduce_range),
    )
    with pytest.raises(RaysqError, match="dynamic and weight-only quantization are chosen by a qconfig mapping"):
        engine.configure(source, Recipe({"fc": dynamic}))
    if Precision.BF16 in engine.capabilities().ops[source.graph["fc"].op].precisions:
        with pytest.raises(RaysqError, match="bf16 is global in IPEX"):
            engine.configure(source, Recipe({"fc": BF16}))


@pytest.mark.parametrize("name", MODELS)
def test_the_framework_s_default_runs(name: str) -> None:
    engine, (model, source) = ipex(), made(name)
    built = engine.framework_default(replace(source, stats=None), [(source.args, {})])
    with torch.no_grad():
        got, exact = built.model(*source.args), model(*source.args)
    error = float((got - exact).abs().max() / exact.abs().max())
    assert 0 < error < 0.2  # eight bits, and saturating products on a CPU without VNNI


def test_keyword_inputs_and_output_classes_survive_the_framework_s_default() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> object:
            logits = self.fc(x) if scale is None else self.fc(x) * scale
            return outputs.SequenceClassifierOutput(logits=logits)

    engine, x = ipex(), torch.randn(3, 8)
    copied, graph = deployable(Head().eval(), (x,), {"scale": torch.ones(1)})
    source = Source(copied, graph, None, (x,), {"scale": torch.ones(1)})
    built = engine.framework_default(source, [((x,), {"scale": torch.ones(1)})])
    once, twice = (built.model(x, scale=torch.full((1,), factor)) for factor in (1.0, 2.0))
    assert isinstance(twice, outputs.SequenceClassifierOutput)
    assert torch.equal(twice.logits, 2 * once.logits)
