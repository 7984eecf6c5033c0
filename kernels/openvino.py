"""Runs recipes on OpenVINO: FakeQuantize nodes in its graph, from which its own passes choose int8 kernels.

The recipe's roundings are traced as torch's fake quantization, which OpenVINO's PyTorch frontend turns into
FakeQuantize. What really runs is read back from the graph that is executed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from raysq.arithmetic import QParams
from raysq.deployed import Deployed
from raysq.errors import BackendError
from raysq.flattened import Flattened
from raysq.graph import OpType
from raysq.kernels import grids
from raysq.kernels.base import Capabilities, OpCapability, Source, check
from raysq.kernels.built import ScriptedModel
from raysq.kernels.cpu import has_bf16, instruction_sets, lacks_vnni
from raysq.kernels.executed import without_unfused
from raysq.kernels.floats import FORMS, build_form
from raysq.kernels.insertion import Insertion
from raysq.kernels.ov_graph import converted, precisions
from raysq.kernels.ov_network import Network, OpenVINOModel, runtime
from raysq.plan import CallPlan
from raysq.recipe import Approach, Precision, Recipe, TensorConfig

__all__ = ["Engine"]

FP32_FORM, BF16_FORM = "openvino", "openvino bf16"
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
S8, U8 = (-128, 127), (0, 255)  # the only grids that int8 kernels are chosen for


class Numerics:
    """torch's fake quantization on eight bits."""

    def __init__(self) -> None:
        self._rounded: dict[tuple[int, float, int, int, int], tuple[Tensor, Tensor]] = {}

    def activation(self, x: Tensor, params: QParams) -> Tensor:
        """Round once per tensor and scale: calls that share an input share its integers."""
        grid = params.grid
        key = (id(x), float(params.scale), int(params.zero_point), grid.qmin, grid.qmax)
        if key not in self._rounded:
            self._rounded[key] = (x, _rounded(x, params))
        return self._rounded[key][1]

    def dynamic(self, x: Tensor, config: TensorConfig) -> Tensor:
        raise BackendError("OpenVINO has no dynamic int8 kernels; its capabilities say so.")

    def weight(self, w: Tensor, params: QParams) -> Tensor:
        return _rounded(w, params)


def _rounded(x: Tensor, params: QParams) -> Tensor:
    """Round to all eight bits what a smaller grid has clamped before: kernels for 7 bits don't exist."""
    grid, scale, zero = params.grid, torch.from_numpy(params.scale), torch.from_numpy(params.zero_point)
    qmin, qmax = S8 if grid.qmin < 0 else U8
    bounds = [(bound - zero) * scale for bound in (grid.qmin, grid.qmax)] if grid.steps < qmax - qmin else []
    if params.axis is None:
        if bounds:
            x = x.clamp(*map(float, bounds))
        return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), qmin, qmax)
    if bounds:
        shape = [-1 if axis == params.axis else 1 for axis in range(x.dim())]
        x = x.clamp(*(bound.reshape(shape) for bound in bounds))
    return torch.fake_quantize_per_channel_affine(x, scale, zero, params.axis, qmin, qmax)


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

    def float_forms(self) -> tuple[str, ...]:
        """Name plain TorchScript in both layouts, and OpenVINO in fp32 and, where the CPU has it, bf16."""
        return (*FORMS, FP32_FORM, BF16_FORM) if has_bf16() else (*FORMS, FP32_FORM)

    def build_float(self, source: Source, form: str) -> ScriptedModel | OpenVINOModel:
        """Build one float form."""
        if form in FORMS:
            return build_form(source, FORMS[form], self.name)
        precision = Precision.BF16 if form == BF16_FORM else Precision.FP32
        model, flat = converted(source)
        network = self._warm(Network(model, _shapes(flat), precision), flat)
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
        model, flat = converted(source, Insertion(plans, Numerics()))
        network = self._warm(Network(model, _shapes(flat)), flat)
        executed, left = precisions(network.executed, source.graph, plans)
        return OpenVINOModel(self.name, network, Deployed.of(network, flat), executed, left, flat.example)

    def _warm(self, network: Network, flat: Flattened) -> Network:
        try:
            network(*flat.example)
        except Exception as exc:
            raise BackendError(f"OpenVINO can't run the model on the example inputs: {exc}") from exc
        return network


def _shapes(flat: Flattened) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in flat.example)
