"""From a model to OpenVINO's graph, and from the executed graph back to what ran in which precision."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raysq.errors import BackendError
from raysq.flattened import Flattened
from raysq.graph import Call, ModelGraph
from raysq.intercept import Interceptor, Operands, Site
from raysq.kernels.base import TRY_ELSEWHERE
from raysq.kernels.executed import NOT_FUSED
from raysq.kernels.ov_network import runtime
from raysq.plan import CallPlan
from raysq.recipe import Precision
from raysq.source import Source

__all__ = ["OUTPUT", "WEIGHT", "Marked", "marked", "precisions"]

NAME = re.compile(r"__module\.scopes\.(?P<call>\d+)/aten::(?P<op>\w+)/")
MARK = re.compile(r"__module\.scopes\.(?P<call>\d+)\.(?P<place>a\d|weight|output)/aten::\w+/Minimum")
OPS = ("conv", "linear", "matmul", "mm", "add", "pool")  # what names of the calls' own ops hold, not those of rounding
KERNELS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "Pooling", "Subgraph"}
PASSIVE = {"Const", "Convert", "FakeQuantize", "Reorder", "Reshape", "Transpose"}  # they move or round data
PRECISIONS = {"I8": Precision.INT8, "bf16": Precision.BF16}  # by the end of a kernel's name, such as "jit_avx2_I8"
ACTIVATIONS = 2  # that a call reads at most
WEIGHT, OUTPUT = "weight", "output"


class Mark(nn.Module):
    """Leaves a value as it is, and a node in the graph that is found by its name."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(max=math.inf)


class Scope(nn.Module):
    """Runs one call: OpenVINO names an op by the module that it was traced in."""

    def __init__(self) -> None:
        super().__init__()
        for place in (*map(_activation, range(ACTIVATIONS)), WEIGHT, OUTPUT):
            self.add_module(place, Mark())

    def forward(self, operands: Operands) -> Any:
        activations = [self._marked(_activation(i), a) for i, a in enumerate(operands.activations)]
        weights = (
            [self._marked(WEIGHT, w) for w in operands.weights] if len(operands.weights) == 1 else operands.weights
        )
        return self._marked(OUTPUT, operands.run(activations, weights))

    def _marked(self, place: str, value: Any) -> Any:
        markable = place in self._modules and isinstance(value, Tensor) and value.dtype is torch.float32
        return self.get_submodule(place)(value) if markable else value


@dataclass(frozen=True)
class Marked:
    """A model in OpenVINO's form, with a node at each place where a recipe may put something.

    Attributes:
        model: an `openvino.Model` with open axes, its ops named by their calls.
        flat: what it was traced from.
        graph: the calls.
    """

    model: Any
    flat: Flattened
    graph: ModelGraph

    def places(self, model: Any) -> Iterator[tuple[Call, int | str, Any]]:
        """Yield the marks of a clone: the call, which of its activations or WEIGHT or OUTPUT, and the node."""
        for node in model.get_ordered_ops():
            match = MARK.fullmatch(node.get_friendly_name())
            if match:
                place = match["place"]
                yield (
                    self.graph.calls[int(match["call"])],
                    place if place in (WEIGHT, OUTPUT) else int(place[1:]),
                    node,
                )


def marked(source: Source) -> Marked:
    """Return a model converted once, whatever recipes are built of it.

    Raises:
        BackendError: it can't be traced, or OpenVINO lacks one of its ops.
    """
    if Marked not in source.derived:
        source.derived[Marked] = _converted(source)
    found: Marked = source.derived[Marked]
    return found


def _converted(source: Source) -> Marked:
    runtime()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    flat = Flattened(source.model, source.args, source.kwargs)
    flat.scopes = nn.ModuleList(Scope() for _ in source.graph.calls)
    scopes = {call.name: scope for call, scope in zip(source.graph.calls, flat.scopes, strict=True)}

    def scoped(site: Site, operands: Operands) -> Any:
        if site.name in scopes:
            return scopes[site.name](operands)
        return operands.run(operands.activations, operands.weights)

    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        try:
            with Interceptor(source.model, scoped, out_of_place=source.graph.out_of_place):
                traced = torch.jit.trace(flat, flat.example, check_trace=False, strict=False)
            decoder = TorchScriptPythonDecoder(traced)  # must outlive the conversion, which doesn't hold it
            front = FrontEndManager().load_by_framework("pytorch")
            model = front.convert(front.load(decoder))
        except Exception as exc:
            raise BackendError(f"OpenVINO can't convert the model: {exc}\n{TRY_ELSEWHERE}") from exc
    return Marked(model, flat, source.graph)


def _activation(index: int) -> str:
    return f"a{index}"


def precisions(
    executed: Any, graph: ModelGraph, plans: Mapping[str, CallPlan]
) -> tuple[dict[str, Precision], dict[str, str]]:
    """Return each call's precision, and why those that should run in int8 don't.

    Args:
        executed: `Network.executed`.
        graph: the calls.
        plans: what was asked of them.
    """
    ran: dict[str, tuple[bool, Precision]] = {}
    for node in executed.get_ordered_ops():
        info = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        if info["layerType"] in PASSIVE:
            continue
        how = info["layerType"] in KERNELS, PRECISIONS.get(info["primitiveType"].rpartition("_")[2], Precision.FP32)
        for match in filter(None, map(NAME.match, info["originalLayersNames"].split(","))):
            call = graph.calls[int(match["call"])].name
            if not any(op in match["op"] for op in OPS):
                continue
            if call not in ran or (how[0] and not ran[call][0]):  # a bias or a scale may be a node of its own
                ran[call] = how
    found = {call.name: ran.get(call.name, (False, Precision.FP32))[1] for call in graph.calls}
    left = {name: plan.reason for name, plan in plans.items() if plan.reason}
    for name, plan in plans.items():
        if plan.config.is_int8 and not plan.reason and found[name] is not Precision.INT8:
            left[name] = NOT_FUSED
    return found, left
