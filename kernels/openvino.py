"""Runs recipes on OpenVINO: FakeQuantize nodes in its graph, from which its own passes choose int8 kernels.

A model is converted once, and each recipe's roundings are put into a clone of that. What really runs is read back from
the graph that is executed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from raysq.capabilities import Capabilities, OpCapability
from raysq.deployed import Deployed
from raysq.errors import BackendError
from raysq.flattened import Flattened
from raysq.graph import OpType
from raysq.kernels import grids
from raysq.kernels.base import TRY_ELSEWHERE, check
from raysq.kernels.built import ScriptedModel
from raysq.kernels.cpu import has_bf16, instruction_sets, lacks_vnni
from raysq.kernels.executed import without_unfused
from raysq.kernels.floats import FORMS, build_form
from raysq.kernels.ov_graph import marked, precisions
from raysq.kernels.ov_insertion import inserted
from raysq.kernels.ov_network import Network, OpenVINOModel, runtime
from raysq.plan import CallPlan
from raysq.recipe import Approach, Precision, Recipe
from raysq.source import Source

__all__ = ["Engine"]

FP32_FORM, BF16_FORM = "openvino", "openvino bf16"
CONSTANT = "it reads the same whatever the inputs are, so OpenVINO computes it beforehand, or can't in int8"
KINDS = (
    OpType.CONV1D,
    OpType.CONV2D,
    OpType.CONV3D,
    OpType.LINEAR,
    OpType.MATMUL,
    OpType.BMM,
    OpType.ADD,
    OpType.MAX_POOL,
    OpType.AVG_POOL,
)


class Engine:
    """The OpenVINO backend."""

    name = "openvino"

    def unavailable_because(self) -> str | None:
        """Say what is missing: the package, or a system that it loads on."""
        if importlib.util.find_spec("openvino") is None:
            return "openvino is not installed. Run: pip install 'raysq[openvino]'"
        try:
            runtime()
        except (ImportError, OSError, RuntimeError) as exc:
            return f"openvino can't be loaded: {exc}"
        return None

    def capabilities(self) -> Capabilities:
        """Return what OpenVINO's low-precision passes choose int8 kernels for on this CPU.

        bf16 is a setting of a whole network there, so it is a float form and no choice per call.
        """
        precisions = (Precision.INT8, Precision.FP32)
        static = (Approach.STATIC,)
        activations = grids.activations()
        kinds = set(KINDS)
        if lacks_vnni():  # measured on AVX2: products of activations have float kernels only
            kinds -= {OpType.MATMUL, OpType.BMM}
        weighted = OpCapability(precisions, static, activations, grids.WEIGHTS, grids.GRANULARITIES)
        plain = OpCapability(precisions, static, activations)
        ops = {op: weighted if op.has_weight else plain for op in OpType if op in kinds}
        return Capabilities(self.name, ops, instruction_sets(), lacks_vnni())

    def unseen(self, source: Source) -> Mapping[str, str]:
        """Return the calls that depend on no input of the model, and why they stay in float."""
        return dict.fromkeys(source.graph.filled_calls, CONSTANT)

    def float_forms(self) -> tuple[str, ...]:
        """Name plain TorchScript in both layouts, and OpenVINO in fp32 and, where the CPU has it, bf16."""
        return (*FORMS, FP32_FORM, BF16_FORM) if has_bf16() else (*FORMS, FP32_FORM)

    def build_float(self, source: Source, form: str) -> ScriptedModel | OpenVINOModel:
        """Build one float form."""
        if form in FORMS:
            return build_form(source, FORMS[form], self.name)
        precision = Precision.BF16 if form == BF16_FORM else Precision.FP32
        found = marked(source)
        flat = found.flat
        network = self._warm(Network(inserted(found, {}), _shapes(flat), precision), flat)
        executed = dict.fromkeys(source.graph.by_name, precision)
        return OpenVINOModel(self.name, network, Deployed.of(network, flat), executed, {}, flat.example)

    def build(self, source: Source, recipe: Recipe) -> OpenVINOModel:
        """Build a recipe; calls that no int8 kernel takes are left in float by a second build."""
        check(recipe, source, self.capabilities())
        scaled = source.under(recipe)
        return without_unfused(lambda idle: self._insert(scaled, scaled.planner.plan(recipe, idle)))[0]

    def read(self, directory: Path, example: tuple[Tensor, ...]) -> Network:
        """Return the network that a build saved."""
        return Network.load(directory, example)

    def _insert(self, source: Source, plans: dict[str, CallPlan]) -> OpenVINOModel:
        found = marked(source)
        flat = found.flat
        network = self._warm(Network(inserted(found, plans), _shapes(flat)), flat)
        executed, left = precisions(network.executed, source.graph, plans)
        return OpenVINOModel(self.name, network, Deployed.of(network, flat), executed, left, flat.example)

    def _warm(self, network: Network, flat: Flattened) -> Network:
        try:
            network(*flat.example)
        except Exception as exc:
            raise BackendError(f"OpenVINO can't run the model on the example inputs: {exc}\n{TRY_ELSEWHERE}") from exc
        return network


def _shapes(flat: Flattened) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in flat.example)
