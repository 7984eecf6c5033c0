"""Reads a recipe out of IPEX's configuration files: `save_qconf_summary`'s of IPEX 2.x, and the list of 1.x.

A recipe names algorithms, and scales follow from statistics. So a file's numbers are not kept: the algorithm that they
came from is, and calibration finds them again. Whatever else a file says that a recipe can't is named in a warning.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from raysq import listed_op
from raysq.calibration import Calibrator, parse
from raysq.calibration.minmax import MinMax
from raysq.calibration.moving_average import MovingAverage
from raysq.calibration.mse import MSE
from raysq.errors import RaysqError, RecipeError, shown
from raysq.graph import ModelGraph, OpType
from raysq.kernels.cpu import lacks_vnni
from raysq.kernels.qconf import FACTOR, Op, match, ops_of
from raysq.listed_op import MIN_MAX, ListedOp, kind_of
from raysq.listed_plans import matched
from raysq.recipe import FP32, Approach, Granularity, OpConfig, Precision, QuantDType, Recipe, Scheme, TensorConfig

__all__ = ["recipe_from_ipex"]

OBSERVERS: Mapping[str, Calibrator] = {
    "MinMaxObserver": MinMax(),
    "HistogramObserver": MSE(),  # torch's searches for the least squared error too
    "MovingAverageMinMaxObserver": MovingAverage(),
}
DTYPES = {"torch.quint8": QuantDType.U8, "torch.qint8": QuantDType.S8}
SCALES = "its scales: they are calibrated anew, by the algorithm that the file names"
PASS_GRAPH = "Pass `graph=raysq.inspect(model, example_inputs)`"
NO_MODULES = f"which module each op is: IPEX 1.x lists them by number. {PASS_GRAPH}"


def recipe_from_ipex(path: str | Path, graph: ModelGraph | None = None) -> Recipe:
    """Return the recipe that an IPEX `configure.json` stands for; a warning says what it can't hold of the file.

    Modules are found by their names. Functional ops (a matmul, a sum) have no name in a file that raysq didn't write,
    and the list of IPEX 1.x names nothing; these are found by their order in the graph. Without it they keep the
    file's own names ("matmul3", "linear0"), under which no model has a call.

    Args:
        path: what `save_qconf_summary`, `raysq.Result.save` or `raysq.compat`'s `QuantConf.save` wrote.
        graph: the model's, as `raysq.inspect` returns it.

    Raises:
        StorageError: the file can't be read.
        RecipeError: it is neither form, or describes another model than the graph.

    Example:
        >>> recipe = recipe_from_ipex("configure.json", raysq.inspect(model, x))  # doctest: +SKIP
    """
    data = listed_op.read(path)
    neither = f"{path} is neither IPEX 2.x's `save_qconf_summary` nor a list of ops as IPEX 1.x wrote it"
    if isinstance(data, list):
        recipe, lost = _of_list([ListedOp.from_dict(item) for item in data], graph)
    elif isinstance(data, dict) and data and all(isinstance(m, dict) and "q_op_infos" in m for m in data.values()):
        try:
            recipe, lost = _of_summary(data, graph)
        except RaysqError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as exc:  # whatever isn't there
            raise RecipeError(f"{neither} ({type(exc).__name__}: {shown(str(exc))}). Write it anew.") from exc
    else:
        raise RecipeError(f"{neither}. Write it anew.")
    warnings.warn(f"of {path} a recipe can't hold {'; '.join(lost)}.", stacklevel=2)
    return recipe


def _of_list(ops: Iterable[ListedOp], graph: ModelGraph | None) -> tuple[Recipe, list[str]]:
    known = [op for op in ops if kind_of(op.name) is not None]
    lost = [SCALES] if graph else [SCALES, NO_MODULES]
    named = {op.label: op for op in known} if graph is None else matched(known, graph)
    configs: dict[str, OpConfig] = {}
    for name, op in named.items():
        configs[name] = FP32
        if op.is_int8:  # the list doesn't say whether bits were saved for a CPU without VNNI
            configs[name] = _reduced(op.config, lacks_vnni())
        elif any(op.inputs_quantized):
            lost.append(f"that only some inputs of {name} are quantized: it stays in fp32")
        if any(op.outputs_quantized) and kind_of(op.name) not in (OpType.LSTM, OpType.EMBEDDING_BAG):
            lost.append(f"that the result of {name} is quantized: its readers decide that")
    return Recipe(configs), lost


def _of_summary(summary: Mapping[str, Any], graph: ModelGraph | None) -> tuple[Recipe, list[str]]:
    lost = [SCALES]
    named = _named(summary, graph, lost)
    configs = {name: _config(name, op, lost) for name, op in named.items()}
    groups: dict[str, dict[tuple[float, ...], str]] = defaultdict(dict)  # scales to the first call that has them
    for name, (op, group) in _grouped(named, graph).items():
        if configs[name].is_int8:
            groups[group].setdefault(tuple(op.info["weight_tensor_infos"][0].get(FACTOR, ())), name)
    smoothing = {}
    for group, found in groups.items():
        scales = next((scales for scales in found if scales), None)
        if scales is not None:
            smoothing[group] = scales
            others = [name for other, name in found.items() if other != scales]
            lost.extend(f"that {name} has smoothing scales of its own: it gets those of {group}" for name in others)
    return Recipe(configs, smoothing), lost


def _named(summary: Mapping[str, Any], graph: ModelGraph | None, lost: list[str]) -> dict[str, Op]:
    """Return the ops that raysq knows by the name of their call: raysq's own, the graph's, or the module's path."""
    found = sorted((op for op in ops_of(summary) if op.kind is not None), key=lambda op: op.order)
    own = {op.info["call"]: op for op in found if "call" in op.info}
    if own:
        return own
    if graph is not None:
        named = match(found, graph.calls, ())
        missing = [call.name for call in graph.calls if call.name not in named]
        if missing:
            lost.append(f"anything of {', '.join(missing)}, which it doesn't list: they stay in fp32")
        return named
    times: Counter[str] = Counter()
    for number, op in enumerate(found):
        name = op.info["fqn"] if op.info["op_type_is_module"] else f"{op.kind}{number}"
        times[name] += 1
        own[name if times[name] == 1 else f"{name}#{times[name]}"] = op
    if not all(op.info["op_type_is_module"] for op in found):
        lost.append(f"the names of functional ops. {PASS_GRAPH}")
    return own


def _grouped(named: Mapping[str, Op], graph: ModelGraph | None) -> dict[str, tuple[Op, str]]:
    """Return the linear layers and the group that each is smoothed with: the readers of one tensor."""
    known = {call: name for name, group in graph.groups.items() for call in group.calls} if graph else {}
    readers: dict[tuple[str, int], str] = {}
    grouped = {}
    for name, op in named.items():
        if op.kind is OpType.LINEAR and op.info["op_type_is_module"]:
            first = readers.setdefault((op.module, op.info["input_tensor_infos"][0]["id"]), f"{name}/0")
            grouped[name] = op, known.get(name) or op.info.get("smoothing", first)
    return grouped


def _config(name: str, op: Op, lost: list[str]) -> OpConfig:
    inputs, weights = _operands(op)
    dtypes = [DTYPES.get(t["force_dtype"]) for t in inputs] or [DTYPES.get(weights[0]["inf_dtype"])]
    quantized = (any if op.kind is OpType.ADD else all)(dtypes)
    if not quantized or not all(_is_quantized(t) for t in weights):
        if any(dtypes):
            lost.append(f"that only some operands of {name} are quantized: it stays in fp32")
        return FP32
    dtype = next(dtype for dtype in dtypes if dtype) if inputs else QuantDType.U8
    observer = op.info["activation_observer"]
    symmetric = dtype is QuantDType.S8 or "symmetric" in observer.get("qscheme", "")
    if dtype is QuantDType.S8 and any(any(_flat(t.get("zero_point", []))) for t in inputs):
        lost.append(f"that int8 inputs of {name} have a zero point: they get 0")
    activation = TensorConfig(
        dtype,
        Scheme.SYMMETRIC if symmetric else Scheme.AFFINE,
        algorithm=_algorithm(name, op, lost),
        reduce_range=bool(observer.get("reduce_range", False)),
    )
    per_tensor = any(len(t.get("scale", ())) == 1 for t in weights)
    granularity = Granularity.PER_TENSOR if per_tensor else Granularity.PER_CHANNEL
    if weights and "weight_granularity" in op.info:  # one scale is also what one channel has
        granularity = Granularity(op.info["weight_granularity"])
    weight = TensorConfig(QuantDType.S8, Scheme.SYMMETRIC, granularity)
    return OpConfig(Precision.INT8, Approach.STATIC, activation, weight)


def _operands(op: Op) -> tuple[list[Any], list[Any]]:
    """Return what an op reads as data, and its weight matrices; a function takes its weight as an argument."""
    inputs = [t for t in op.info["input_tensor_infos"] if t and t["orig_dtype"] == "torch.float32"]
    weights = [t for t in op.info["weight_tensor_infos"] if t]
    assert op.kind is not None
    if op.kind is OpType.EMBEDDING_BAG:
        return [], weights or inputs
    if op.kind is OpType.LSTM:
        return inputs[:1], [t for t in weights if "scale" in t]
    return (inputs[:1], weights or inputs[1:2]) if op.kind.has_weight else (inputs, [])


def _is_quantized(tensor: Mapping[str, Any]) -> bool:
    return tensor.get("force_dtype", tensor["inf_dtype"]) in DTYPES


def _algorithm(name: str, op: Op, lost: list[str]) -> Calibrator:
    if "algorithm" in op.info:
        return parse(op.info["algorithm"].replace(MIN_MAX, "minmax"))
    observer = op.info["activation_observer"]
    if any(FACTOR in t for t in op.info["weight_tensor_infos"]):
        return MinMax()  # of the smoothed channels
    kind = observer.get("act_observer", observer)["name"]
    if kind not in OBSERVERS:
        lost.append(f"the observer {kind} of {name}: it is calibrated by minmax")
    return OBSERVERS.get(kind, MinMax())


def _flat(zero_points: Any) -> list[int]:
    """Return zero points from a list, or from the dictionary that a smoothed input has."""
    return sum(zero_points.values(), []) if isinstance(zero_points, dict) else zero_points


def _reduced(config: OpConfig, reduce_range: bool) -> OpConfig:
    return replace(config, activation=replace(config.activation, reduce_range=reduce_range))
