"""Recipes out of IPEX's files: raysq's own come back as they were, others as far as a recipe can hold them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raysq import compat
from raysq.calibration.kl import KL
from raysq.calibration.minmax import MinMax
from raysq.calibration.mse import MSE
from raysq.errors import RecipeError, StorageError
from raysq.graph import ModelGraph
from raysq.inspection import deployable
from raysq.ipex_recipe import recipe_from_ipex
from raysq.kernels import base
from raysq.kernels.cpu import lacks_vnni
from raysq.observation import observe
from raysq.recipe import (
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
from raysq.source import Source

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),  # IPEX's observers complain of data that they don't need
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
LOST_SCALES = "its scales: they are calibrated anew"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 4)
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.out(torch.matmul(torch.matmul(self.q(y), self.k(y).transpose(1, 2)).softmax(-1), x))


def ipex() -> Any:
    from raysq.errors import BackendError

    try:
        return base.get("ipex")
    except BackendError as exc:
        pytest.skip(str(exc))


def made() -> tuple[nn.Module, torch.Tensor, Source]:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 5, 16)
    copied, graph = deployable(model, (x,), {})
    return model, x, Source(copied, graph, observe(copied, graph, [((x,), {})]), (x,))


def config(**changes: Any) -> OpConfig:
    activation = TensorConfig(QuantDType.U8, Scheme.AFFINE, reduce_range=lacks_vnni())
    return replace(OpConfig(Precision.INT8, Approach.STATIC, activation), **changes)


PER_TENSOR = TensorConfig(QuantDType.S8, Scheme.SYMMETRIC, Granularity.PER_TENSOR)
BY_KL = TensorConfig(QuantDType.U8, Scheme.AFFINE, algorithm=KL(), reduce_range=lacks_vnni())
RECIPES = {
    "mixed": Recipe({"q": config(weight=PER_TENSOR), "k": FP32, "matmul": config(activation=BY_KL), "out": config()}),
    "no int8": Recipe({"q": FP32, "k": FP32, "matmul": FP32, "matmul#2": FP32, "out": FP32}),
    "smoothed": Recipe({"q": config(), "k": config(), "out": config()}, smoothing={"q/0": (1.0, 2.0) * 8}),
}


@pytest.mark.parametrize("with_graph", [False, True], ids=["alone", "with the graph"])
@pytest.mark.parametrize("name", RECIPES)
def test_raysq_s_own_file_gives_its_recipe_back(name: str, with_graph: bool, tmp_path: Path) -> None:
    engine, (_, _, source) = ipex(), made()
    wanted = RECIPES[name]
    (tmp_path / "configure.json").write_text(json.dumps(engine.configure(source, wanted)))
    with pytest.warns(UserWarning, match=LOST_SCALES):
        got = recipe_from_ipex(tmp_path / "configure.json", source.graph if with_graph else None)
    assert {n for n, c in got.ops.items() if c.is_int8} == set(wanted.int8_calls)
    assert all(got.config(n) == wanted.config(n) for n in wanted.int8_calls)
    assert got.smoothing.keys() == wanted.smoothing.keys()
    for group, scales in wanted.smoothing.items():
        assert got.smoothing[group] == pytest.approx(scales)
    engine.build(source, got)


def test_an_edit_of_the_file_is_read_not_what_raysq_wrote_beside_it(tmp_path: Path) -> None:
    engine, (_, _, source) = ipex(), made()
    qconf = json.loads(json.dumps(engine.configure(source, Recipe({"q": config(), "out": config()}))))
    for module in qconf.values():
        for op in module["q_op_infos"].values():
            if op["fqn"] == "q":
                op["input_tensor_infos"][0]["force_dtype"] = "torch.float32"
                op["weight_tensor_infos"][0]["inf_dtype"] = "torch.float32"
    (tmp_path / "configure.json").write_text(json.dumps(qconf))
    with pytest.warns(UserWarning, match=LOST_SCALES):
        assert recipe_from_ipex(tmp_path / "configure.json").int8_calls == ("out",)


def written_by_ipex(path: Path, **smooth: Any) -> ModelGraph:
    """Calibrate and save with IPEX alone."""
    ipex()
    from intel_extension_for_pytorch import quantization

    model, x, source = made()
    mapping = quantization.default_static_qconfig_mapping
    if smooth:
        mapping = quantization.get_smooth_quant_qconfig_mapping(**smooth)
    prepared = quantization.prepare(model, mapping, example_inputs=(x,))
    with torch.no_grad():
        prepared(x)
    prepared.save_qconf_summary(str(path))
    return source.graph


@pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning")
def test_ipex_s_default_is_read(tmp_path: Path) -> None:
    graph = written_by_ipex(tmp_path / "configure.json")
    with pytest.warns(UserWarning, match=LOST_SCALES):
        recipe = recipe_from_ipex(tmp_path / "configure.json", graph)
    assert set(recipe.int8_calls) == {"q", "k", "matmul", "matmul#2", "out"}
    for name in recipe.int8_calls:
        assert recipe.config(name).activation == TensorConfig(QuantDType.U8, Scheme.AFFINE, algorithm=MSE())
        assert recipe.config(name).weight.granularity is Granularity.PER_CHANNEL
    with pytest.warns(UserWarning, match="the names of functional ops"):
        alone = recipe_from_ipex(tmp_path / "configure.json")
    assert {"q", "k", "out"} < set(alone.int8_calls) and len(alone.int8_calls) == 5


@pytest.mark.parametrize("share", [True, False])
def test_ipex_s_smoothquant_is_read(share: bool, tmp_path: Path) -> None:
    graph = written_by_ipex(tmp_path / "configure.json", alpha=0.5, share_weight_observers=share)
    with pytest.warns(UserWarning, match=LOST_SCALES) as said:
        recipe = recipe_from_ipex(tmp_path / "configure.json", graph)
    saved = json.loads((tmp_path / "configure.json").read_text())
    ops = {op["fqn"]: op for m in saved.values() for op in m["q_op_infos"].values()}
    factors = ops["q"]["weight_tensor_infos"][0]["smooth_quant_scaling_factor"]
    assert recipe.smoothing["q/0"] == pytest.approx(tuple(factors))
    assert recipe.config("q").activation.algorithm == MinMax()
    assert recipe.config("matmul").activation.algorithm == MSE()
    lost = "k has smoothing scales of its own: it gets those of q/0"
    assert (lost in str(said[0].message)) is not share


def listed(path: Path, **changes: Any) -> ModelGraph:
    """Calibrate with IPEX 1.x's API, and edit the file."""
    model, x, source = made()
    conf = compat.QuantConf()
    with compat.calibrate(conf), torch.no_grad():
        model(x)
    conf.save(path)
    ops = json.loads(path.read_text())
    for op in ops:
        op.update(changes.get(f"{op['name']}{op['id']}", {}))
    path.write_text(json.dumps(ops))
    return source.graph


def test_the_list_of_ipex_1_is_read(tmp_path: Path) -> None:
    graph = listed(tmp_path / "c.json", linear1={"inputs_quantized": [False], "weight_granularity": "per_tensor"})
    with pytest.warns(UserWarning, match=LOST_SCALES):
        recipe = recipe_from_ipex(tmp_path / "c.json", graph)
    assert graph.calls[1].name == "k"
    assert set(recipe.int8_calls) == {"q", "matmul", "matmul#2", "out"}
    assert recipe.config("q") == config()


def test_the_list_without_a_graph_keeps_its_own_names_and_says_so(tmp_path: Path) -> None:
    listed(tmp_path / "c.json")
    with pytest.warns(UserWarning, match="which module each op is.*raysq.inspect"):
        recipe = recipe_from_ipex(tmp_path / "c.json")
    assert recipe.int8_calls == ("linear0", "linear1", "linear4", "matmul2", "matmul3")


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"matmul2": {"inputs_quantized": [True, False]}}, "only some inputs of matmul are quantized"),
        ({"linear4": {"outputs_quantized": [True]}}, "the result of out is quantized"),
    ],
)
def test_what_a_recipe_cannot_hold_is_said(changes: dict[str, Any], lost: str, tmp_path: Path) -> None:
    graph = listed(tmp_path / "c.json", **changes)
    with pytest.warns(UserWarning, match=lost):
        recipe_from_ipex(tmp_path / "c.json", graph)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("nonsense", StorageError, "must hold a configuration"),
        ("{}", RecipeError, "is neither"),
        ('{"schema": 1, "ops": {}}', RecipeError, "is neither"),
        ('[{"id": 0}]', RecipeError, "in an op of IPEX's list `name` must be text, got None"),
        ("[7]", RecipeError, "must be an object, got 7"),
    ],
)
def test_other_files_are_refused(text: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(error, match=message):
        recipe_from_ipex(tmp_path / "c.json")
