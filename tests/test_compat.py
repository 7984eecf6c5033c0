"""IPEX 1.x's quantization API: the tutorial of seed 003 as it stands, and what its file says and does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

from raysq.arithmetic import Grid, QParams
from raysq.compat import QuantConf, calibrate, convert
from raysq.errors import CalibrationError, OptionError, RecipeError, StorageError
from raysq.kernels import base
from raysq.source import Source

KEYS = [  # of the tutorial's listing, in its order
    *("id", "name", "algorithm", "weight_granularity", "input_scales", "input_zero_points"),
    *("output_scales", "output_zero_points", "weight_scales", "input_quantized_dtypes", "output_quantized_dtypes"),
    *("inputs_quantized", "outputs_quantized", "inputs_flow", "outputs_flow"),
]

# The tutorial's code blocks in their order, without the prose between them and without their indentation, as the seed
# has lost it. Changed are only the import and what isn't Python, each listed in CORRECTIONS.
TUTORIAL = """
import torch
import torch.nn as nn
import intel_extension_for_pytorch as ipex
class MyModel(nn.Module):
def __init__(self):
super(MyModel, self).__init__()
self.conv = nn.Conv2d(10, 10, 3)
def forward(self, x):
x = self.conv(x)
return x
model = MyModel().eval()
# user dataset for calibration.
xx_c = [torch.randn(1, 10, 28, 28) for i in range(2))
# user dataset for validation.
xx_v = [torch.randn(1, 10, 28, 28) for i in range(20))
conf = ipex.quantization.QuantConf(qscheme=torch.per_tensor_affine)
with torch.no_grad():
for x in xx_c:
with ipex.quantization.calibrate(conf):
y = model(x)
conf.save('configure.json')
conf = ipex.quantization.QuantConf('configure.json')
with torch.no_grad():
trace_model = ipex.quantization.convert(model, conf, example_input)
with torch.no_grad():
for x in xx_v:
y = trace_model(x)
trace_model.save('quantization_model.pt')
import intel_extension_for_pytorch as ipex
loaded = torch.jit.load('quantization_model.pt')
# running the model using your dataset
"""
CORRECTIONS = (
    ("import intel_extension_for_pytorch as ipex", "import raysq.compat as ipex"),
    ("for i in range(2))", "for i in range(2)]"),  # a bracket closed by a parenthesis
    ("for i in range(20))", "for i in range(20)]"),
    ("convert(model, conf, example_input)", "convert(model, conf, xx_c[0])"),  # a name that the tutorial leaves open
)
INDENTED = {  # first words of the lines that the seed's text has moved to the margin
    1: ("def ", "for x in"),
    2: ("super(", "self.conv", "x = self", "return x", "with ipex", "y = trace_model"),
    3: ("y = model",),
}


def tutorial() -> str:
    code = TUTORIAL
    for wrong, right in CORRECTIONS:
        assert wrong in code
        code = code.replace(wrong, right)
    lines = []
    for line in code.splitlines():
        depth = next((n for n, starts in INDENTED.items() if line.startswith(starts)), 0)
        lines.append("    " * (1 if line.startswith("trace_model = ") else depth) + line)
    return "\n".join(lines)


def test_the_tutorial_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(tutorial(), "tutorial", "exec"), names)
    (entry,) = json.loads((tmp_path / "configure.json").read_text())
    assert list(entry) == KEYS
    assert (
        entry["name"] == "conv2d" and entry["algorithm"] == "min_max" and entry["weight_granularity"] == "per_channel"
    )
    assert entry["inputs_quantized"] == [True] and entry["outputs_quantized"] == [False]
    assert entry["inputs_flow"] == ["conv2d0.input0"] and entry["outputs_flow"] == ["conv2d0.output0"]
    assert entry["input_quantized_dtypes"] == entry["output_quantized_dtypes"] == ["uint8"]
    assert len(entry["weight_scales"]) == 1 and len(entry["weight_scales"][0]) == 10
    with torch.no_grad():
        for _ in range(2):
            names["loaded"](names["xx_v"][0])  # profiles, then compiles
        for x in names["xx_v"]:
            exact, y = names["model"](x), names["trace_model"](x)
            assert torch.equal(names["loaded"](x), y)
            error = float((y - exact).abs().max() / exact.abs().max())
            assert 1e-4 < error < 0.1, "int8 rounds, and not more than eight bits do"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.norm = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(2), nn.BatchNorm2d(8)
        self.left, self.right, self.out = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        x = torch.flatten(self.pool(self.norm(self.conv(x)).relu()), 1)
        x = self.left(x) + self.right(x).relu()
        return self.out(x if gain is None else x * gain)


def made() -> tuple[Net, list[torch.Tensor]]:
    torch.manual_seed(0)
    return Net().eval(), [torch.randn(n, 3, 9, 9) for n in (4, 2, 3)]


def calibrated(model: nn.Module, batches: list[torch.Tensor], **options: Any) -> QuantConf:
    conf = QuantConf(**options)
    for x in batches:
        with calibrate(conf), torch.no_grad():
            model(x)
    return conf


def saved(conf: QuantConf, path: Path) -> list[dict[str, Any]]:
    conf.save(path)
    listed: list[dict[str, Any]] = json.loads(path.read_text())
    return listed


@pytest.mark.parametrize("scheme", [torch.per_tensor_affine, torch.per_tensor_symmetric], ids=str)
def test_scales_are_those_of_torch_observers_over_all_batches(scheme: torch.qscheme, tmp_path: Path) -> None:
    model, batches = made()
    first = saved(calibrated(model, batches, qscheme=scheme), tmp_path / "c.json")[0]
    reduced = base.available().capabilities().reduce_range
    signed = first["input_quantized_dtypes"] == ["int8"]
    low, high = min(float(x.min()) for x in batches), max(float(x.max()) for x in batches)
    steps = 127 if reduced else 255
    if scheme is torch.per_tensor_affine:
        observer = MinMaxObserver(quant_min=0, quant_max=steps)
        for x in batches:
            observer(x)
        scale, zero_point = observer.calculate_qparams()
    else:  # torch has no symmetric u8 of seven bits; the formula is its symmetric one
        scale = torch.tensor(max(-low, high) / (steps / 2))
        zero_point = torch.tensor(0 if signed else (steps + 1) // 2)
    assert first["input_scales"] == [pytest.approx(float(scale), rel=1e-6)]
    assert first["input_zero_points"] == [int(zero_point)]


def test_weight_scales_are_those_of_torch_s_observer(tmp_path: Path) -> None:
    model, batches = made()
    left = saved(calibrated(model, batches), tmp_path / "c.json")
    observer = PerChannelMinMaxObserver(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    observer(model.left.weight)
    linear = [e for e in left if e["name"] == "linear"][0]
    np.testing.assert_allclose(linear["weight_scales"][0], observer.calculate_qparams()[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("split", [(1, 1, 1), (3,), (2, 1)], ids=str)
def test_statistics_accumulate_over_blocks_and_batches(split: tuple[int, ...]) -> None:
    model, batches = made()
    conf, rest = QuantConf(), iter(batches)
    for count in split:
        with calibrate(conf), torch.no_grad():
            for _ in range(count):
                model(next(rest))
    assert conf.entries == calibrated(model, batches).entries
    assert conf.entries != calibrated(model, batches[:1]).entries


def test_calibrating_on_after_a_look_at_the_entries_counts_all_batches() -> None:
    model, batches = made()
    conf = calibrated(model, batches[:1])
    assert conf.entries
    with calibrate(conf), torch.no_grad():
        for x in batches[1:]:
            model(x)
    assert conf.entries == calibrated(model, batches).entries


def test_the_model_is_not_changed_and_computes_in_fp32() -> None:
    model, batches = made()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    attributes = set(vars(model))
    with torch.no_grad():
        wanted = model(batches[0])
    conf = QuantConf()
    with calibrate(conf), torch.no_grad():
        assert torch.equal(model(batches[0]), wanted)
    convert(model, conf, batches[0])
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert set(vars(model)) == attributes and not model._forward_hooks and not model._forward_pre_hooks
    assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks


def test_inputs_are_those_of_the_call_whatever_the_caller_does_to_them_afterwards() -> None:
    model, batches = made()
    conf, buffer = QuantConf(), torch.empty(4, 3, 9, 9)
    for x in (batches[0], 0.1 * batches[0]):
        buffer.copy_(x)
        with calibrate(conf), torch.no_grad():
            model(buffer)
    buffer.fill_(1e6)
    assert conf.entries == calibrated(model, [batches[0], 0.1 * batches[0]]).entries


def test_keyword_inputs_are_collected_and_converted() -> None:
    model, (x, *_) = made()
    conf, gain = QuantConf(), torch.full((1,), 3.0)
    with calibrate(conf), torch.no_grad():
        exact = model(x, gain=gain)
    script = convert(model, conf, {"x": x, "gain": gain})
    with torch.no_grad():
        assert float((script(x, gain) - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_a_file_gives_what_the_calibration_gave_in_a_process_of_its_own(tmp_path: Path) -> None:
    model, batches = made()
    conf = calibrated(model, batches)
    conf.save(tmp_path / "configure.json")
    script = convert(model, conf, batches[0])
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_compat import made
from raysq.compat import QuantConf, convert
model, batches = made()
model.load_state_dict(torch.load("weights.pt"))
script = convert(model, QuantConf("configure.json"), batches[0])
with torch.no_grad():
    torch.save(script(batches[0]), "outputs.pt")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True, capture_output=True)
    with torch.no_grad():
        assert torch.equal(script(batches[0]), torch.load(tmp_path / "outputs.pt"))


def edited(conf: QuantConf, path: Path, change: dict[str, Any], ops: tuple[str, ...] = ()) -> QuantConf:
    """Save, set keys of all ops, or of those of some names, by hand, and read again."""
    listed = saved(conf, path)
    for op in listed:
        if not ops or op["name"] in ops:
            op.update({key: [value] * len(op[key]) if key.endswith("ed") else value for key, value in change.items()})
    path.write_text(json.dumps(listed))
    return QuantConf(path)


def test_a_false_in_inputs_quantized_takes_effect(tmp_path: Path) -> None:
    model, batches = made()
    conf = calibrated(model, batches)
    with torch.no_grad():
        exact, int8 = model(batches[0]), convert(model, conf, batches[0])(batches[0])
        for ops, wanted in (((), exact), (("linear",), None)):
            got = convert(model, edited(conf, tmp_path / "c.json", {"inputs_quantized": False}, ops), batches[0])
            found = got(batches[0])
            if wanted is not None:
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
            else:
                assert not torch.allclose(found, exact, atol=1e-5) and not torch.equal(found, int8)


def test_a_scale_that_is_edited_takes_effect(tmp_path: Path) -> None:
    model, batches = made()
    conf = calibrated(model, batches)
    listed = saved(conf, tmp_path / "c.json")
    listed[0]["input_scales"] = [10 * listed[0]["input_scales"][0]]
    (tmp_path / "c.json").write_text(json.dumps(listed))
    with torch.no_grad():
        exact = model(batches[0])
        fine, coarse = (
            float((convert(model, c, batches[0])(batches[0]) - exact).abs().max())
            for c in (conf, QuantConf(tmp_path / "c.json"))
        )
    assert coarse > 2 * fine


def test_weights_of_another_granularity_get_its_scales(tmp_path: Path) -> None:
    model, batches = made()
    conf = edited(calibrated(model, batches), tmp_path / "c.json", {"weight_granularity": "per_tensor"})
    from raysq import listed_plans
    from raysq.inspection import deployable

    copied, graph = deployable(model, (batches[0],), {})
    source = Source(copied, graph, None, (batches[0],))
    plan = listed_plans.plans(listed_plans.matched(conf.entries, graph), source.planner)["left"]
    assert plan.weights is not None
    assert float(plan.weights[0].scale) == pytest.approx(float(model.left.weight.detach().abs().max()) / 127.5)


def test_symmetric_activations_run_on_this_cpu(tmp_path: Path) -> None:
    model, batches = made()
    conf = calibrated(model, batches, qscheme=torch.per_tensor_symmetric)
    engine = base.available()
    for op, e in ((o["name"], o) for o in saved(conf, tmp_path / "c.json")):
        middle = {"int8": 0, "uint8": 64 if engine.capabilities().reduce_range else 128}
        for dtype, zero_point, flag in zip(
            e["input_quantized_dtypes"], e["input_zero_points"], e["inputs_quantized"], strict=True
        ):
            assert not flag or zero_point == middle[dtype], op
    with torch.no_grad():
        exact, got = model(batches[0]), convert(model, conf, batches[0])(batches[0])
    assert 0 < float((got - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_s8_of_another_cpu_becomes_the_same_values_in_u8() -> None:
    from raysq.compat.quantization import _as_u8

    s8 = QParams(np.float32(0.5), np.int32(0), Grid(-128, 127, symmetric=True))
    u8 = _as_u8(s8)
    q = np.arange(-128, 128)
    np.testing.assert_array_equal((q - int(s8.zero_point)) * 0.5, (q + 128 - int(u8.zero_point)) * 0.5)


def test_flow_names_tensors_by_what_makes_them(tmp_path: Path) -> None:
    model, batches = made()
    ops = {e["outputs_flow"][0].split(".")[0]: e for e in saved(calibrated(model, batches), tmp_path / "c.json")}
    pool = next(name for name in ops if "pool" in name)
    left, right, out = (name for name in ops if name.startswith("linear"))
    assert ops[left]["inputs_flow"] == ops[right]["inputs_flow"] == [f"{pool}.output0"]
    total = next(name for name in ops if name.startswith("add"))
    assert ops[total]["inputs_flow"] == [f"{left}.output0", f"{total}.input1"]  # nothing listed makes what relu gives
    assert ops[out]["inputs_flow"] == [f"{total}.output0"]
    assert [e["id"] for e in ops.values()] == list(range(len(ops)))


@pytest.mark.parametrize(
    ("scheme", "dtype"), [(torch.per_tensor_affine, "uint8"), (torch.per_tensor_symmetric, "int8")], ids=str
)
def test_without_ipex_the_reference_simulates(
    scheme: torch.qscheme, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raysq.kernels import reference

    monkeypatch.setattr(base, "available", lambda names: reference.Engine())
    model, batches = made()
    conf = calibrated(model, batches, qscheme=scheme)
    for op in saved(conf, tmp_path / "c.json"):
        assert set(op["input_quantized_dtypes"]) == {dtype}
    script = convert(model, QuantConf(tmp_path / "c.json"), batches[0])
    with torch.no_grad():
        assert 0 < float((script(batches[0]) - model(batches[0])).abs().max()) < 0.1


def other_model(tmp_path: Path) -> None:
    conf = QuantConf()
    for model in (nn.Linear(3, 3), nn.Linear(3, 3)):
        with calibrate(conf):
            model(torch.ones(1, 3))


def nothing_called(tmp_path: Path) -> None:
    with calibrate(QuantConf()):
        pass


def misfit(tmp_path: Path) -> None:
    model, batches = made()
    conf = calibrated(model, batches)
    convert(nn.Sequential(nn.Linear(4, 4)), conf, torch.ones(1, 4))


def bad_flag(tmp_path: Path) -> None:
    model, batches = made()
    edited(calibrated(model, batches), tmp_path / "c.json", {"inputs_quantized": "no"})


def bad_zero_point(tmp_path: Path) -> None:
    model, batches = made()
    conf = edited(calibrated(model, batches), tmp_path / "c.json", {"input_zero_points": [300]}, ("conv2d",))
    convert(model, conf, batches[0])


def no_list(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{}")
    QuantConf(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("misuse", "error", "message"),
    [
        (lambda _: QuantConf(qscheme=torch.per_channel_affine), OptionError, "must be one of"),
        (lambda path: QuantConf(path / "none.json"), StorageError, "must hold a configuration"),
        (lambda path: QuantConf().save(path / "c.json"), CalibrationError, "knows no ranges yet"),
        (no_list, RecipeError, "load_qconf_summary"),
        (nothing_called, CalibrationError, "no model was called"),
        (other_model, CalibrationError, "one QuantConf is for one model"),
        (misfit, RecipeError, "describes another model"),
        (bad_flag, RecipeError, "a list: true or false"),
        (bad_zero_point, RecipeError, "zero point 300"),
    ],
)
def test_misuse_is_explained(misuse: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        misuse(tmp_path)


def test_a_call_that_failed_is_not_counted() -> None:
    model, batches = made()
    conf = QuantConf()
    with calibrate(conf), torch.no_grad():
        with pytest.raises(RuntimeError):
            model(torch.ones(2, 5, 9, 9))
        for x in batches:
            model(x)
    assert conf.entries == calibrated(model, batches).entries
