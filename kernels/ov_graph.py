"""From a model and a plan to OpenVINO's graph, and from the executed graph back to what ran in which precision."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from raysq.errors import BackendError
from raysq.flattened import Flattened
from raysq.graph import ModelGraph
from raysq.intercept import Interceptor, Operands, Site
from raysq.kernels.base import Source
from raysq.kernels.executed import NOT_FUSED
from raysq.kernels.ov_network import runtime
from raysq.plan import CallPlan
from raysq.recipe import Precision

__all__ = ["converted", "precisions"]

OnCall = Callable[[Site, Operands], Any]

NAME = re.compile(r"__module\.scopes\.(?P<call>\d+)/aten::(?P<op>\w+)/")
OPS = ("conv", "linear", "matmul", "mm", "add", "pool")  # what names of the calls' own ops hold, not those of rounding
KERNELS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "Pooling", "Subgraph"}
PASSIVE = {"Const", "Convert", "FakeQuantize", "Reorder", "Reshape", "Transpose"}  # they move or round data
PRECISIONS = {"I8": Precision.INT8, "bf16": Precision.BF16}  # by the end of a kernel's name, such as "jit_avx2_I8"


class Scope(nn.Module):
    """Runs one call: OpenVINO names an op by the module that it was traced in."""

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


def converted(source: Source, on_call: OnCall | None = None) -> tuple[Any, Flattened]:
    """Return a model as an `openvino.Model` with open axes, its ops named by their calls, and what it was traced from.

    Args:
        source: the model.
        on_call: computes each call; default the call itself.

    Raises:
        BackendError: it can't be traced, or OpenVINO lacks one of its ops.
    """
    runtime()
    from openvino._offline_transformations import compress_quantize_weights_transformation
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
    from openvino.passes import ConstantFolding, Manager

    flat = Flattened(source.model, source.args, source.kwargs)
    flat.scopes = nn.ModuleList(Scope() for _ in source.graph.calls)
    places = {call.name: scope for call, scope in zip(source.graph.calls, flat.scopes, strict=True)}

    def scoped(site: Site, operands: Operands) -> Any:
        def run() -> Any:
            return on_call(site, operands) if on_call else operands.run(operands.activations, operands.weights)

        return places[site.name](run) if site.name in places else run()

    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        try:
            with Interceptor(source.model, scoped, out_of_place=source.graph.out_of_place):
                traced = torch.jit.trace(flat, flat.example, check_trace=False, strict=False)
            decoder = TorchScriptPythonDecoder(traced)  # must outlive the conversion, which doesn't hold it
            front = FrontEndManager().load_by_framework("pytorch")
            model = front.convert(front.load(decoder))
        except Exception as exc:
            raise BackendError(f"OpenVINO can't convert the model: {exc}") from exc
    passes = Manager()
    passes.register_pass(ConstantFolding())  # int8 kernels are chosen where a rounding's bounds are constants
    passes.run_passes(model)
    compress_quantize_weights_transformation(model)  # weights become int8 constants
    return model, flat


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
