"""IPEX's own prepare, load_qconf_summary and convert, given raysq's qconf, against raysq's own build of the recipe."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raysq.errors import BackendError, RaysqError
from raysq.flattened import Flattened
from raysq.inspection import deployable
from raysq.kernels import base
from raysq.kernels.floats import freeze, warm_up
from raysq.observation import observe
from raysq.recipe import (
    BF16,
    FP32,
    Approach,
    Granularity,
    OpConfig,
    Precision,
    QuantDType,
    Recipe,
    Scheme,
    TensorConfig,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # IPEX's observers complain of data that they don't need
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


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


def made(name: str) -> tuple[nn.Module, base.Source]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    copied, graph = deployable(model.eval(), inputs, {})
    return model, base.Source(copied, graph, observe(copied, graph, [(inputs, {})]), inputs)


def all_int8(source: base.Source, capabilities: base.Capabilities) -> dict[str, OpConfig]:
    activation = TensorConfig(QuantDType.U8, Scheme.AFFINE, reduce_range=capabilities.reduce_range)
    configs = {}
    for call in source.graph.calls:
        if call.op in capabilities.ops:
            granularities = capabilities.ops[call.op].granularities or (Granularity.PER_CHANNEL,)
            weight = TensorConfig(QuantDType.S8, Scheme.SYMMETRIC, granularities[0])
            configs[call.name] = OpConfig(Precision.INT8, Approach.STATIC, activation, weight)
    return configs


def run_by_ipex(model: nn.Module, inputs: tuple[torch.Tensor, ...], qconf: Path) -> torch.Tensor:
    """Follow IPEX's tutorial on the user's own model, without calibration."""
    from intel_extension_for_pytorch import quantization

    mapping = quantization.default_static_qconfig_mapping
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


class OneDimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_a_call_that_ipex_does_not_quantize_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, x = ipex(), torch.randn(2, 4, 9)
    copied, graph = deployable(OneDimensional().eval(), (x,), {})
    source = base.Source(copied, graph, observe(copied, graph, [((x,), {})]), (x,))
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
    with pytest.raises(RaysqError, match="dynamic quantization is chosen by a qconfig mapping"):
        engine.configure(source, Recipe({"fc": dynamic}))
    if Precision.BF16 in engine.capabilities().ops[source.graph["fc"].op].precisions:
        with pytest.raises(RaysqError, match="bf16 is global in IPEX"):
            engine.configure(source, Recipe({"fc": BF16}))


@pytest.mark.parametrize("name", MODELS)
def test_the_framework_s_default_runs(name: str) -> None:
    engine, (model, source) = ipex(), made(name)
    built = engine.build_default(replace(source, stats=None), [(source.args, {})])
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
    source = base.Source(copied, graph, None, (x,), {"scale": torch.ones(1)})
    built = engine.build_default(source, [((x,), {"scale": torch.ones(1)})])
    once, twice = (built.model(x, scale=torch.full((1,), factor)) for factor in (1.0, 2.0))
    assert isinstance(twice, outputs.SequenceClassifierOutput)
    assert torch.equal(twice.logits, 2 * once.logits)
