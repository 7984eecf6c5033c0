"""Runs recipes through IPEX's own quantization: prepare, load_qconf_summary, convert, trace, freeze.

This is what a user gets who loads a `configure.json`, so what is measured here holds for those lines in a script. It
builds slower than `raysq.kernels.ipex` and expresses less: scales and smoothing factors of the ops that IPEX records,
nothing that changes a weight.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raysq.capabilities import Capabilities, OpCapability
from raysq.errors import BackendError, RecipeError
from raysq.graph import Call, ModelGraph, OpType
from raysq.kernels import ipex
from raysq.kernels.base import TRY_ELSEWHERE, check
from raysq.kernels.built import ScriptedModel
from raysq.kernels.executed import NOT_FUSED, executed_ops, key_of, without_unfused
from raysq.kernels.qconf import Op, is_smoothed, match, ops_of, why_not
from raysq.recipe import Approach, Precision, Recipe
from raysq.source import Source

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Engine", "prepared_model"]

UNRECORDED = (OpType.CONV1D, OpType.CONV_TRANSPOSE1D)  # IPEX's prepare passes them by
SMOOTHED = ("Linear",)
NOT_SEEN = "IPEX's own quantization doesn't record every call of this kind here, so a qconf can't name it"
BY_KEYWORD = "it gets a tensor by keyword, where IPEX's own quantization does not look"
NOT_SMOOTHED = "its recipe smooths it, which a qconf can do to nn.Linear modules only"


class Engine:
    """IPEX with what a qconf JSON can express."""

    name = "ipex_qconf"

    def __init__(self) -> None:
        self._ipex = ipex.Engine()
        self._unseen: tuple[Source | None, Mapping[str, str]] = (None, {})

    def unavailable_because(self) -> str | None:
        """Say what is missing: the extension, its torch, or AVX2."""
        return self._ipex.unavailable_because()

    def capabilities(self) -> Capabilities:
        """Return what IPEX's own quantization runs: static int8 or fp32, without changes of the weights."""
        whole = self._ipex.capabilities()
        ops = {op: _static(capability) for op, capability in whole.ops.items() if op not in UNRECORDED}
        return Capabilities(self.name, ops, whole.isa, whole.reduce_range, transforms=(), smooths=SMOOTHED)

    def float_forms(self) -> tuple[str, ...]:
        """Name the float forms of the IPEX backend."""
        return self._ipex.float_forms()

    def build_float(self, source: Source, form: str) -> ScriptedModel:
        """Build one float form."""
        return self._ipex.build_float(source, form)

    def unseen(self, source: Source) -> Mapping[str, str]:
        """Return the calls that IPEX doesn't record as raysq does, and why."""
        if self._unseen[0] is not source:
            self._unseen = source, {**_unseen(source, self.capabilities()), **self._ipex.unseen(source)}
        return self._unseen[1]

    def build(self, source: Source, recipe: Recipe) -> ScriptedModel:
        """Build a recipe; calls that a qconf can't name or smooth, or that nothing fuses, are left in float."""
        check(recipe, source, self.capabilities())
        reasons = why_not(recipe)
        if reasons:
            raise RecipeError(
                f'a qconf can\'t express this recipe: {"; ".join(reasons)}. Change that, or pass `backend="ipex"`.'
            )
        idle = {name: reason for name, reason in self.unseen(source).items() if recipe.config(name).is_int8}
        idle |= self._not_smoothed(source.graph, recipe)
        return without_unfused(lambda unfused: self._convert(source, recipe, {**idle, **unfused}))[0]

    def _not_smoothed(self, graph: ModelGraph, recipe: Recipe) -> dict[str, str]:
        groups = (graph.groups[name] for name in recipe.smoothing if name in graph.groups)
        calls = [name for group in groups for name in group.calls if recipe.config(name).is_int8]
        return {name: NOT_SMOOTHED for name in calls if not self.capabilities().may_smooth(graph[name])}

    def _convert(self, source: Source, recipe: Recipe, idle: Mapping[str, str]) -> ScriptedModel:
        qconf = self._ipex.configure(source, recipe, idle)
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            try:
                converted = ipex.extension().quantization.convert(prepared_model(source, qconf), inplace=True)
            except Exception as exc:
                raise BackendError(f"IPEX can't convert the model: {exc}\n{TRY_ELSEWHERE}") from exc
        built = ipex.frozen(source, converted, self.name)
        wanted = [name for name in recipe.int8_calls if name not in idle]
        int8 = _run_in_int8(torch._C._last_executed_optimized_graph(), source.graph, wanted, _scopes(qconf))
        executed = {c.name: Precision.INT8 if c.name in int8 else Precision.FP32 for c in source.graph.calls}
        left = {**idle, **dict.fromkeys((name for name in wanted if name not in int8), NOT_FUSED)}
        return replace(built, executed=executed, left_in_float=left, configure=lambda: qconf)


def prepared_model(source: Source, qconf: Mapping[str, Any]) -> nn.Module:
    """Return a copy of the model as IPEX prepares it, with a qconf loaded: ready for its `convert`.

    Its observers have seen nothing, so that `save_qconf_summary` writes what was loaded.

    Args:
        source: the model and its example inputs.
        qconf: as `raysq.kernels.ipex.Engine.configure` returns it.

    Raises:
        BackendError: IPEX can't prepare the model, or load the configuration.
    """
    with torch.no_grad(), warnings.catch_warnings(action="ignore"), tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "configure.json"
        path.write_text(json.dumps(qconf))
        prepared: nn.Module = ipex.prepare(source, is_smoothed(qconf))
        try:
            prepared.load_qconf_summary(str(path))  # type: ignore[operator]  # IPEX adds it
        except Exception as exc:
            raise BackendError(f"IPEX can't load the configuration: {exc}\n{TRY_ELSEWHERE}") from exc
    return prepared


def _static(capability: OpCapability) -> OpCapability:
    precisions = tuple(p for p in capability.precisions if p is not Precision.BF16)
    return replace(capability, precisions=precisions, approaches=(Approach.STATIC,))


def _unseen(source: Source, capabilities: Capabilities) -> dict[str, str]:
    found = match(sorted(ops_of(ipex.summary(source)), key=lambda op: op.order), source.graph.calls, ())
    reasons = {c.name: _why_unseen(c, found.get(c.name)) for c in source.graph.calls if c.op in capabilities.ops}
    return {name: reason for name, reason in reasons.items() if reason}


def _why_unseen(call: Call, op: Op | None) -> str:
    if op is None:
        return NOT_SEEN
    inputs, weights = op.info["input_tensor_infos"], op.info["weight_tensor_infos"]
    needed = len(call.tensors) + (call.op.has_weight and not weights)  # a function takes its weight as an argument
    return BY_KEYWORD if len([tensor for tensor in inputs if tensor]) < needed else ""


def _scopes(qconf: Mapping[str, Any]) -> dict[str, str]:
    """Return the module in whose scope each call is traced: the one that IPEX records it for."""
    return {
        info["call"]: module.strip().replace(":", ".")
        for module, infos in qconf.items()
        for info in infos["q_op_infos"].values()
        if "call" in info
    }


def _run_in_int8(graph: Any, model: ModelGraph, wanted: Iterable[str], scopes: Mapping[str, str]) -> set[str]:
    """Return which of the calls that should run in int8 do.

    `convert` calls modules as functions, so a scope holds all ops of a kind of one module. Where a scope has as many
    int8 kernels of a kind as calls want them, these are theirs; where it has fewer, ops and calls are paired in order.
    """
    ran: dict[tuple[str, str], list[Precision]] = defaultdict(list)
    for op in executed_ops(graph):
        ran[op.module or "", op.key].append(op.precision)
    kernels = Counter(key for (_, key), found in ran.items() for p in found if p is Precision.INT8)
    named = set(wanted)
    asked = Counter(key_of(model[name]) for name in named)
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for call in model.calls:
        if call.name in scopes:
            groups[scopes[call.name], key_of(call)].append(call.name)
    int8: set[str] = set()
    for (scope, key), calls in groups.items():
        mine, found = [name for name in calls if name in named], ran[scope, key]
        if kernels[key] >= asked[key] or found.count(Precision.INT8) >= len(mine):
            int8.update(mine)
        elif len(found) == len(calls):
            int8.update(n for n, p in zip(calls, found, strict=True) if n in named and p is Precision.INT8)
    return int8
