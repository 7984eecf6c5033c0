"""Runs recipes on oneDNN's int8 kernels in plain torch: 2.8 and newer, without the extension.

A model is traced once. Each recipe is that graph with other nodes: convolutions and linear layers become oneDNN's int8
kernels, with the function or sum after them, and pass integers on where all that read them take the same ones. Packed
weights are kept, so that the next recipe costs what differs. What is measured is the module that is saved.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raysq.capabilities import Capabilities, OpCapability
from raysq.deployed import Deployed
from raysq.graph import OpType
from raysq.kernels import grids
from raysq.kernels.base import CallTime, check
from raysq.kernels.built import MODEL_FILE, ScriptedModel
from raysq.kernels.call_times import call_times
from raysq.kernels.captured import Captured, capture
from raysq.kernels.cpu import has_bf16, instruction_sets, lacks_vnni
from raysq.kernels.floats import FORMS, build_form, warm_up
from raysq.kernels.ipex import without_fusions
from raysq.kernels.lowering import Packing, lower, unlowerable
from raysq.kernels.packed import packed_linear
from raysq.recipe import Approach, Precision, Recipe
from raysq.source import Source

if TYPE_CHECKING:
    from raysq.plan import CallPlan

__all__ = ["Engine"]

SMALL_CALLS = 50  # the fastest counts


class Engine:
    """The oneDNN backend, for any torch from 2.8 on."""

    name = "onednn"

    def unavailable_because(self) -> str | None:
        """Say what is missing: oneDNN in this build of torch, or AVX2."""
        if not torch.backends.mkldnn.is_available():
            return "this build of torch has no oneDNN. Install torch's own wheels"
        if not {"avx512f", "avx2"} & set(instruction_sets()):
            return "its kernels need at least AVX2"
        return None

    def capabilities(self) -> Capabilities:
        """Return what has an int8 kernel on this CPU."""
        floats = (Precision.BF16, Precision.FP32) if has_bf16() else (Precision.FP32,)
        int8, static = (Precision.INT8, *floats), (Approach.STATIC,)
        weighted = OpCapability(int8, static, grids.U8, grids.WEIGHTS, grids.GRANULARITIES)
        kinds = (OpType.CONV1D, OpType.CONV2D, OpType.CONV3D, OpType.LINEAR)
        ops = dict.fromkeys(kinds, weighted)  # torch has no int8 product of two activations, LSTM or embedding bag
        return Capabilities(self.name, ops, instruction_sets(), lacks_vnni())

    def float_forms(self) -> tuple[str, ...]:
        """Name plain TorchScript in both layouts."""
        return tuple(FORMS)

    def build_float(self, source: Source, form: str) -> ScriptedModel:
        """Build one float form."""
        return build_form(source, FORMS[form], self.name)

    def unseen(self, source: Source) -> Mapping[str, str]:
        """Return the calls that the kernels can't take, and why."""
        kinds = self.capabilities().ops
        reasons = unlowerable(_captured(source), source.graph)
        return {name: reason for name, reason in reasons.items() if source.graph[name].op in kinds}

    def build(self, source: Source, recipe: Recipe) -> ScriptedModel:
        """Build a recipe."""
        check(recipe, source, self.capabilities())
        captured = _captured(source)
        scaled = source.under(recipe)
        plans = scaled.planner.plan(recipe, unlowerable(captured, source.graph))
        script = lower(captured, scaled.model, scaled.graph, plans, source.derived.setdefault(Packing, Packing()))
        with without_fusions(), _optimized_at_once():
            warm_up(script, captured.flat, runs=1)
        return ScriptedModel(
            self.name,
            script,
            Deployed.of(script, captured.flat),
            {name: _precision(plan) for name, plan in plans.items()},
            {name: p.reason for name, p in plans.items() if p.reason and p.config.precision is not Precision.FP32},
            captured.flat.example,
        )

    def read(self, directory: Path, example: tuple[Tensor, ...]) -> Any:
        """Return the script that a build saved, optimized as the build was."""
        script = torch.jit.load(str(directory / MODEL_FILE))
        with without_fusions(), _optimized_at_once(), torch.no_grad():
            script(*example)
        return script

    def call_times(self, source: Source, recipe: Recipe) -> dict[str, CallTime]:
        """Time the calls of a model in float, and those of a recipe that run in int8."""
        verbose = partial(torch.backends.mkldnn.verbose, torch.backends.mkldnn.VERBOSE_ON)
        return call_times(source, self.build(source, recipe), verbose, _around_ms())


def _around_ms() -> float:
    """Return what torch takes to set up a primitive, at every call: that of a product too small to take time itself."""
    layer = packed_linear(torch.zeros(8, 8, dtype=torch.int8), torch.ones(8), torch.zeros(8, dtype=torch.int32))
    x = torch.zeros(1, 8, dtype=torch.uint8)
    arguments: tuple[Any, ...] = (
        x,
        1.0,
        0,
        layer.packed,
        layer.scale,
        layer.zero,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    taken = []
    for _ in range(SMALL_CALLS):
        begun = time.perf_counter()
        torch.ops.onednn.qlinear_pointwise(*arguments)
        taken.append(1000 * (time.perf_counter() - begun))
    return min(taken)


@contextmanager
def _optimized_at_once() -> Iterator[None]:
    """Let TorchScript optimize a module at its first call, without the profile of a call before.

    A profile serves to fuse float ops, which is off on CPUs; the call that takes it costs as much as the optimizing.
    """
    internals: Any = torch._C  # its stubs take the number for a size
    before = internals._jit_set_num_profiled_runs(0)
    try:
        yield
    finally:
        internals._jit_set_num_profiled_runs(before)


def _captured(source: Source) -> Captured:
    if Captured not in source.derived:
        source.derived[Captured] = capture(source)
    captured: Captured = source.derived[Captured]
    return captured


def _precision(plan: CallPlan) -> Precision:
    return Precision.FP32 if plan.reason else plan.config.precision
