"""Recipes on OpenVINO's kernels, against the float simulation of the same recipe; what really ran; what is saved."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from int8_calls import MODELS, engine, int8_everywhere, made, source
from torch import nn

import raysq
from raysq.errors import BackendError
from raysq.graph import OpType
from raysq.kernels import base
from raysq.kernels.built import load
from raysq.kernels.executed import NOT_FUSED
from raysq.recipe import (
    FP32,
    Approach,
    Granularity,
    Precision,
    Recipe,
    Rounding,
    Transform,
)
from raysq.source import Source


@pytest.fixture
def openvino() -> base.Backend:
    return engine("openvino")


RUN = {OpType.CONV1D, OpType.CONV2D, OpType.CONV3D, OpType.LINEAR, OpType.ADD, OpType.MAX_POOL, OpType.AVG_POOL}
ROUNDING = 0.02  # of the largest output: a value on an edge may fall to either side, one step of the last input


def everywhere(of: Source) -> Recipe:
    return int8_everywhere(of, engine("openvino").capabilities(), Approach.STATIC)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("kind", MODELS)
def test_the_kernels_compute_what_the_reference_simulates(
    openvino: base.Backend, kind: str, granularity: Granularity
) -> None:
    of = made(kind)
    recipe = everywhere(of)
    recipe = recipe.with_ops(
        {n: replace(c, weight=replace(c.weight, granularity=granularity)) for n, c in recipe.ops.items()}
    )
    built = openvino.build(of, recipe)
    # what stays in float is not rounded, so the reference must not round it either
    same = recipe.with_ops(dict.fromkeys(built.left_in_float, FP32))
    assert error(built.model(*of.args), engine("reference").build(of, same).model(*of.args)) <= ROUNDING
    ran = {call.name for call in of.graph.calls if built.executed[call.name] is Precision.INT8}
    assert ran >= {call.name for call in of.graph.calls if call.op in RUN}, built.left_in_float
    assert built.left_in_float == dict.fromkeys(recipe.ops.keys() - ran, NOT_FUSED)


@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_a_fallback_takes_effect_in_the_executed_graph(openvino: base.Backend, kind: str) -> None:
    of = made(kind)
    first, last = (call.name for call in of.graph.calls if call.op.has_weight)
    built = openvino.build(of, everywhere(of).with_ops({first: FP32}))
    assert built.executed[first] is Precision.FP32 and built.executed[last] is Precision.INT8
    assert built.left_in_float == {}


@pytest.mark.parametrize("kind", ["conv2d", "linear", "rows of a weight"])
def test_weights_and_biases_that_look_at_data_run_on_the_kernels(openvino: base.Backend, kind: str) -> None:
    of = made(kind)
    plain = everywhere(of)
    weighted = {n: replace(c, rounding=Rounding.ADAROUND) for n, c in plain.ops.items() if of.graph[n].op.has_weight}
    recipe = replace(plain.with_ops(weighted), transforms=tuple(Transform))
    built = openvino.build(of, recipe)
    same = recipe.with_ops(dict.fromkeys(built.left_in_float, FP32))
    wanted = engine("reference").build(of, same).model(*of.args)
    assert error(built.model(*of.args), wanted) <= ROUNDING
    assert not torch.equal(wanted, engine("reference").build(of, plain).model(*of.args))


def test_smoothing_runs_on_the_kernels(openvino: base.Backend) -> None:
    torch.manual_seed(0)
    wide = torch.randn(64, 32) * torch.logspace(-2, 2, 32)  # its smallest channels vanish in one grid for all
    of = source(nn.Sequential(nn.Linear(32, 16)), wide)
    recipe = everywhere(of)
    smoothed = recipe.with_smoothing({"0/0": 0.5})
    got = openvino.build(of, smoothed).model(wide)
    assert error(got, engine("reference").build(of, smoothed).model(wide)) <= ROUNDING
    with torch.no_grad():
        exact = of.model(wide)
    assert (got - exact).square().mean() < (openvino.build(of, recipe).model(wide) - exact).square().mean()


def test_a_model_is_converted_once_and_no_recipe_shows_in_the_next(
    openvino: base.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = made("conv2d")
    recipe = everywhere(of)
    first = openvino.build(of, recipe).model(*of.args)
    monkeypatch.delattr(torch.jit, "trace")
    in_float = openvino.build(of, Recipe({})).model(*of.args)
    torch.testing.assert_close(in_float, of.model(*of.args), rtol=1e-4, atol=1e-5)
    assert torch.equal(openvino.build(of, recipe).model(*of.args), first)


@pytest.mark.parametrize("kind", MODELS)
def test_the_float_form_computes_what_the_model_computes(openvino: base.Backend, kind: str) -> None:
    of = made(kind)
    built = openvino.build_float(of, "openvino")
    with torch.no_grad():
        torch.testing.assert_close(built.model(*of.args), of.model(*of.args), rtol=1e-4, atol=1e-5)
    assert set(built.executed.values()) == {Precision.FP32}


@pytest.mark.parametrize("kind", ["conv2d", "linear", "add"])
def test_any_batch_size_gives_the_same_rows(openvino: base.Backend, kind: str) -> None:
    of = made(kind)
    model, (x,) = openvino.build(of, everywhere(of)).model, of.args
    whole = model(x)
    for rows in (1, len(x) - 1, 1, 1, 2 * len(x), len(x)):  # first in the network of open axes, then in one of its own
        part = model(torch.cat([x, x])[:rows])
        assert part.shape[0] == rows
        assert error(part[:1], whole[:1]) <= ROUNDING


def test_results_stay_what_they_are_when_the_model_is_called_again(openvino: base.Backend) -> None:
    of = made("linear")
    model = openvino.build(of, everywhere(of)).model
    first = model(*of.args)
    kept = first.clone()
    model(-of.args[0])
    assert torch.equal(first, kept)


@pytest.mark.parametrize("pool", ["as the recipe has it", "in float"])
def test_a_max_pool_passes_on_the_integers_that_its_reader_takes(openvino: base.Backend, pool: str) -> None:
    of = made("max_pool")
    recipe = everywhere(of) if pool == "as the recipe has it" else everywhere(of).with_ops({"pool": FP32})
    built = openvino.build(of, recipe)
    assert error(built.model(*of.args), engine("reference").build(of, recipe).model(*of.args)) <= ROUNDING
    assert built.executed["pool"] is Precision.INT8
    ran = [node.get_rt_info()["layerType"].astype(str) for node in built.network.executed.get_ordered_ops()]
    rounding = ran[ran.index("Convolution") : len(ran) - ran[::-1].index("Convolution")]
    assert not {"Subgraph", "FakeQuantize"} & set(rounding)  # none between what makes and what reads the pool's input


def test_what_clamps_to_a_smaller_grid_stands_for_the_function_before_it(openvino: base.Backend) -> None:
    of = made("conv2d")
    recipe = everywhere(of)
    narrow = {n: replace(c, activation=replace(c.activation, reduce_range=True)) for n, c in recipe.ops.items()}
    built = openvino.build(of, recipe.with_ops(narrow))
    assert "Relu" not in {op.get_type_name() for op in built.network.model.get_ops()}
    assert (
        error(built.model(*of.args), engine("reference").build(of, recipe.with_ops(narrow)).model(*of.args)) <= ROUNDING
    )


def test_a_max_pool_that_someone_else_reads_stays_in_float(openvino: base.Backend) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.last = nn.Conv2d(8, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            pooled = self.pool(self.conv(x).relu())
            return pooled, self.last(pooled)

    torch.manual_seed(0)
    of = source(Model(), torch.randn(2, 8, 12, 12))
    built = openvino.build(of, everywhere(of).with_ops({"conv": FP32, "pool": FP32}))
    torch.testing.assert_close(built.model(*of.args)[0], of.model(*of.args)[0], rtol=1e-4, atol=1e-5)
    assert built.executed["last"] is Precision.INT8


@pytest.mark.parametrize(
    "given",
    [lambda x: x, lambda x: x.double(), lambda x: x.t().contiguous().t(), lambda x: x.requires_grad_()],
    ids=["plain", "another type", "another layout", "with gradients"],
)
def test_any_tensor_of_these_shapes_is_read_as_it_is(openvino: base.Backend, given: Callable[..., Any]) -> None:
    of = made("linear")
    model = openvino.build(of, everywhere(of)).model
    x = given(of.args[0].clone())
    for got in (model(x), model.bound(x)()):
        assert torch.equal(got, model(*of.args)) and not got.requires_grad


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_given_the_width_that_they_read(openvino: base.Backend, kind: type[nn.RNNBase]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head = kind(8, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.cells(x)[0])  # type: ignore[no-any-return]

    of = source(Model().eval(), torch.randn(4, 6, 8))
    model = openvino.build(of, Recipe({})).model
    torch.testing.assert_close(model(torch.ones(3, 5, 8)), of.model(torch.ones(3, 5, 8)), rtol=1e-4, atol=1e-5)
    for width in (9, 7):
        for _ in range(2):  # with a network of its own, and without
            with pytest.raises(RuntimeError, match="reads 8 features"):
                model(torch.ones(3, 6, width))


def test_a_bound_run_reads_what_its_tensors_hold_by_then(openvino: base.Backend) -> None:
    of = made("linear")
    model = openvino.build(of, everywhere(of)).model
    x = of.args[0].clone()
    run = model.bound(x)
    first = run()
    assert torch.equal(first, model(x))
    x.neg_()
    expected = model(x)
    assert run() is first  # its own memory, written anew
    assert torch.equal(first, expected) and torch.equal(model(-x), model.bound(-x)())


def test_a_model_follows_torchs_number_of_threads(openvino: base.Backend) -> None:
    of = made("linear")
    network = openvino.build(of, everywhere(of)).network
    before, usable = torch.get_num_threads(), len(os.sched_getaffinity(0))
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            network(*of.args)
            assert network._threads == threads
            (compiled,) = network._networks.values()
            assert compiled.request.get_compiled_model().get_property("INFERENCE_NUM_THREADS") == min(threads, usable)
    finally:
        torch.set_num_threads(before)


def test_unused_inputs_several_outputs_and_integers(openvino: base.Backend) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(20, 8), nn.Linear(8, 4)

        def forward(self, ids: torch.Tensor, unused: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.fc(self.table(ids) * mask[..., None])
            return {"scores": y, "best": y.argmax(-1), "positive": y > 0}

    inputs = torch.randint(0, 20, (3, 5)), torch.randn(2), torch.ones(3, 5)
    of = source(Model(), *inputs)
    got, wanted = openvino.build(of, Recipe({})).model(*inputs), of.model(*inputs)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def test_a_copy_computes_the_same(openvino: base.Backend) -> None:
    of = made("conv2d")
    model = openvino.build(of, everywhere(of)).model
    assert torch.equal(copy.deepcopy(model)(*of.args), model(*of.args))


def test_a_saved_model_is_int8_and_computes_the_same_bits(openvino: base.Backend, tmp_path) -> None:
    torch.manual_seed(0)
    of = source(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)), torch.randn(16, 256))
    built = openvino.build(of, everywhere(of))
    built.save(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(loaded(*of.args), built.model(*of.args))
    assert loaded(of.args[0][:3]).shape == (3, 256)
    weights = 2 * 256 * 256
    assert weights < (tmp_path / "model.bin").stat().st_size < 1.1 * weights
    assert weights < built.size_bytes == sum((tmp_path / f"model.{end}").stat().st_size for end in ("xml", "bin"))


def test_the_artifact_runs_without_torch_and_raysq(openvino: base.Backend, tmp_path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.randn(4, 3, 12, 12)
    quantized = raysq.quantize(model, [x], backend="openvino")
    quantized.save(tmp_path)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", quantized(x).numpy())
    script = (
        "import sys, numpy\n"
        "sys.modules['openvino_telemetry'] = None\n"
        "import openvino\n"
        "model = openvino.Core().compile_model('model.xml', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})\n"
        "y = model(numpy.load('x.npy'))[0]\n"
        "assert numpy.abs(y - numpy.load('y.npy')).max() <= 0.02 * numpy.abs(y).max()\n"
        "assert not {'torch', 'raysq'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert torch.equal(raysq.load(tmp_path)(x), quantized(x))


def test_importing_openvino_reports_nothing() -> None:
    engine("openvino")
    script = (
        "import sys\n"
        "from raysq.kernels import base\n"
        "base.get('openvino')\n"
        "assert 'openvino' in sys.modules and 'openvino_telemetry' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_model_that_cannot_be_converted_is_a_backend_error(openvino: base.Backend) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvalsh(self.fc(x))

    of = source(Odd(), torch.randn(8, 8))
    with pytest.raises(BackendError, match="OpenVINO can't"):
        openvino.build(of, everywhere(of))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)), (32,)),
        (lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)), (6, 32)),
        (lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 4)), (3, 8, 8)),
    ],
    ids=["matrices", "sequences", "an image and a matrix"],
)
def test_a_smoothed_model_computes_the_same_at_any_batch(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = build().eval()
    batches = [torch.randn(8, *shape) for _ in range(2)]
    smoothing = raysq.Smoothing(alpha=0.5)
    int8 = raysq.quantize(model, batches, backend="openvino", smoothing=smoothing)
    assert int8.recipe.smoothing
    x = batches[0][:5]
    with torch.no_grad():
        first, second, exact = int8(x), int8(x), model(x)  # the second call has a network of its own
    assert error(first, exact) < 0.1
    assert error(first, second) < 0.02
