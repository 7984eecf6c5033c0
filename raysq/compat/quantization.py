"""Static quantization as IPEX 1.x had it: calibrate in a `with` block, save what was found, edit it, convert."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from raysq import listed_op, listed_plans
from raysq.arithmetic import QParams
from raysq.autotuning import autotune
from raysq.calibration_data import arguments
from raysq.capabilities import Capabilities
from raysq.errors import CalibrationError, OptionError, RecipeError
from raysq.graph import Call
from raysq.inspection import deployable
from raysq.kernels import base, ipex
from raysq.listed_op import ListedOp
from raysq.listed_plans import GRIDS
from raysq.observation import observe
from raysq.plan import CallPlan, Planner
from raysq.recipe import FP32, Approach, OpConfig, Precision, QuantDType, Recipe, Scheme, TensorConfig
from raysq.source import Source

__all__ = ["QuantConf", "autotune", "calibrate", "convert"]

log = logging.getLogger("raysq")

ON_TORCHSCRIPT = ("ipex", "onednn", "reference")  # IPEX 1.x returns a ScriptModule
SCHEMES = {torch.per_tensor_affine: Scheme.AFFINE, torch.per_tensor_symmetric: Scheme.SYMMETRIC}
S8_TO_U8 = 128  # the same values on the other type: s8 with zero point z is u8 with z + 128


class QuantConf:
    """How a model is quantized: what a calibration found, or what a file says, edited by hand or not.

    Symmetric activations are int8 where the CPU has kernels for them. Without VNNI their products would saturate: they
    are uint8 there, with the zero point in the middle, and ranges take seven of the eight bits, in both schemes.
    Smoothing, bf16 and dynamic quantization have no place in such a file: `raysq.quantize` and a recipe have them.

    Args:
        configure_file: a list that `save` wrote; None where the model is calibrated.
        qscheme: of the activations, `torch.per_tensor_affine` or `torch.per_tensor_symmetric`; a file has its own.

    Raises:
        OptionError: another scheme.
        StorageError: the file can't be read.
        RecipeError: it isn't such a list.

    Example:
        >>> conf = QuantConf(qscheme=torch.per_tensor_affine)
        >>> with calibrate(conf):  # doctest: +SKIP
        ...     model(x)
        >>> conf.save("configure.json")  # doctest: +SKIP
    """

    def __init__(
        self, configure_file: str | Path | None = None, qscheme: torch.qscheme = torch.per_tensor_affine
    ) -> None:
        if qscheme not in SCHEMES:
            raise OptionError(f"`qscheme` must be one of {[str(s) for s in SCHEMES]}, got {qscheme!r}.")
        self.qscheme = qscheme
        self._entries = None if configure_file is None else _read(configure_file)
        self._model: nn.Module | None = None
        self._batches: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    @property
    def entries(self) -> tuple[ListedOp, ...]:
        """An entry for each op, in execution order; one pass over the collected inputs finds their ranges.

        Raises:
            CalibrationError: nothing was calibrated, or the model fails on an input.
        """
        if self._entries is None:
            if self._model is None:
                raise CalibrationError(
                    "this QuantConf knows no ranges yet. Call the model inside of `with calibrate(conf):`, or give it "
                    "a file: `QuantConf('configure.json')`."
                )
            self._entries = _calibrated(self._model, self._batches, SCHEMES[self.qscheme])
        return self._entries

    def save(self, configure_file: str | Path) -> None:
        """Write the entries as a JSON list, which `QuantConf(configure_file)` and an editor read.

        Raises:
            CalibrationError: nothing was calibrated.
            StorageError: the path can't be written.
        """
        listed_op.write(configure_file, self.entries)

    def add(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the inputs of one more call of the model.

        Raises:
            CalibrationError: it is another model than before.
        """
        if self._model not in (None, model):
            raise CalibrationError(
                f"one QuantConf is for one model: it saw a {type(self._model).__name__}, then another "
                f"{type(model).__name__}. Call nothing but the model inside of `calibrate`."
            )
        if self._model is None and self._entries is not None:
            raise CalibrationError("this QuantConf was read from a file; calibrate a new one: `QuantConf()`.")
        self._model, self._entries = model, None
        self._batches.append((args, kwargs))


@contextmanager
def calibrate(conf: QuantConf) -> Iterator[None]:
    """Collect the inputs of the model that is called inside; more blocks and batches add to the same statistics.

    The model isn't changed; its outputs are those of fp32.

    Raises:
        CalibrationError: no model was called, or another one than before.

    Example:
        >>> conf = QuantConf()
        >>> for x in batches:  # doctest: +SKIP
        ...     with calibrate(conf):
        ...         model(x)
    """
    running: list[nn.Module] = []
    positional: tuple[Any, ...] = ()
    calls = 0

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal positional
        if not running:
            positional = _copied(args)  # before the model can change them in place
        running.append(module)

    def leave(module: nn.Module, _: object, *rest: Any) -> None:
        nonlocal calls
        running.pop()
        if len(rest) == 1:  # the call failed: torch leaves out its keyword arguments
            return
        kwargs, _ = rest
        if not running:
            conf.add(module, positional, _copied(kwargs))
            calls += 1

    hooks = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, with_kwargs=True, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not calls:
        raise CalibrationError("no model was called inside of `calibrate`, and one must be.")


def convert(model: nn.Module, conf: QuantConf | None = None, inputs: Any = None) -> nn.Module:
    """Return the quantized model as frozen TorchScript: `save` writes it, `torch.jit.load` reads it.

    Without a configuration it is IPEX 2.8's own `convert`, of a model that `autotune` returned: yet to be traced.

    It takes and returns tensors; an output of another class comes as a flat tuple of its tensors. Before it is loaded
    in another process, the backend's package must be imported there.

    Args:
        model: fp32; it isn't changed.
        conf: what was calibrated, or a file.
        inputs: example inputs: a tuple is positional, a dict keyword, anything else one argument.

    Raises:
        CalibrationError: nothing was calibrated.
        RecipeError: the entries don't fit the model, or the CPU can't run them.
        BackendError: the build failed.
    """
    if conf is None:
        converted: nn.Module = ipex.extension().quantization.convert(model)
        return converted
    args, kwargs = arguments(inputs)
    copied, graph = deployable(model, args, kwargs)
    engine = base.available(ON_TORCHSCRIPT)
    source = Source(copied, graph, None, args, kwargs)
    plans = listed_plans.plans(listed_plans.matched(conf.entries, graph), source.planner)
    plans = {name: _runnable(graph[name], plan, engine.capabilities()) for name, plan in plans.items()}
    recipe = Recipe({name: plan.config for name, plan in plans.items()})
    built = engine.build(_Planned(copied, graph, None, args, kwargs, plans=plans), recipe)
    for name, reason in built.left_in_float.items():
        log.info("%s runs in float: %s", name, reason)
    script: torch.jit.ScriptModule = built.script  # type: ignore[attr-defined]
    return script


class _Fixed(Planner):
    """Plans what was decided before, whatever the algorithms of a recipe would find."""

    def __init__(self, source: _Planned) -> None:
        super().__init__(source)
        self._plans = source.plans

    def plan(self, recipe: Recipe, left_in_float: Mapping[str, str] | None = None) -> dict[str, CallPlan]:
        """Return the plans; calls named in `left_in_float` stay there, for its reason."""
        reasons = left_in_float or {}
        plans = {call.name: self._plans.get(call.name, CallPlan(FP32)) for call in self._graph.calls}
        return {n: CallPlan(p.config, reason=reasons[n]) if n in reasons else p for n, p in plans.items()}


@dataclass(frozen=True)
class _Planned(Source):
    """A model whose plans are given, instead of statistics to make them from."""

    plans: Mapping[str, CallPlan] = field(default_factory=dict)

    @cached_property
    def planner(self) -> Planner:
        """What returns the plans."""
        return _Fixed(self)


def _read(path: str | Path) -> tuple[ListedOp, ...]:
    listed = listed_op.read(path)
    if not isinstance(listed, list):
        raise RecipeError(
            f"{path} must hold a list of ops, as `QuantConf.save` writes it. IPEX 2.x's own form is read by its "
            "`load_qconf_summary`, and by `raysq.recipe_from_ipex`."
        )
    return tuple(ListedOp.from_dict(item) for item in listed)


def _calibrated(
    model: nn.Module, batches: list[tuple[tuple[Any, ...], Mapping[str, Any]]], scheme: Scheme
) -> tuple[ListedOp, ...]:
    args, kwargs = batches[0]
    copied, graph = deployable(model, args, kwargs)
    stats = observe(copied, graph, batches)
    capabilities = base.available(ON_TORCHSCRIPT).capabilities()
    source = Source(copied, graph, stats, args, kwargs)
    recipe = Recipe({call.name: _config(call, scheme, capabilities) for call in graph.calls})
    return tuple(listed_plans.listed(graph, source.planner.plan(recipe), stats).values())


def _config(call: Call, scheme: Scheme, capabilities: Capabilities) -> OpConfig:
    """Return int8 where the kind of call has a kernel, in the scheme's own type or, without VNNI, in u8."""
    capability = capabilities.ops.get(call.op)
    if capability is None or Precision.INT8 not in capability.precisions:
        return FP32
    wanted = (QuantDType.U8 if scheme is Scheme.AFFINE else QuantDType.S8, scheme)
    dtype = QuantDType.S8 if wanted[0] is QuantDType.S8 and wanted in capability.activations else QuantDType.U8
    activation = TensorConfig(dtype, scheme, reduce_range=capabilities.reduce_range)
    weight = OpConfig(Precision.INT8).weight
    if capability.granularities:
        weight = replace(weight, granularity=capability.granularities[0])
    return OpConfig(Precision.INT8, Approach.STATIC, activation, weight)


def _runnable(call: Call, plan: CallPlan, capabilities: Capabilities) -> CallPlan:
    """Return a plan with its activations in u8, the same values, where there is no kernel for s8."""
    capability = capabilities.ops.get(call.op)
    if capability is None or (QuantDType.S8, Scheme.SYMMETRIC) in capability.activations or not plan.config.is_int8:
        return plan
    config = replace(plan.config, activation=TensorConfig(QuantDType.U8, Scheme.AFFINE))
    output = _as_u8(plan.output) if plan.output and plan.inputs else plan.output  # a sum of embeddings stays in s8
    return replace(plan, config=config, inputs=tuple(p and _as_u8(p) for p in plan.inputs), output=output)


def _as_u8(params: QParams) -> QParams:
    if params.grid.qmin == 0:
        return params
    return replace(params, zero_point=params.zero_point + S8_TO_U8, grid=GRIDS[QuantDType.U8])


def _copied(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)
