"""The fp32 model as one TorchScript graph from which any recipe is lowered, so that a model is traced once.

Its inputs are the model's flat tensors, then the parameters and buffers that it reads, by name: the same graph serves
every set of weights, smoothed ones included. The result of each quantizable call goes through a node that bears the
call's name.

A trace, not `torch.export`: that one took 16 to 33 seconds for models of 4 to 54 layers where a trace takes 0.2 to 4,
fixes sizes of 0 and 1, and adds checks of sizes to the graph.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raysq.errors import BackendError
from raysq.flattened import Flattened
from raysq.intercept import Interceptor, Operands, Site
from raysq.kernels.tracing import TRACEABLE

if TYPE_CHECKING:
    from raysq.source import Source

__all__ = ["MARK", "Captured", "capture"]

MARK = "raysq::call"


@dataclass(frozen=True)
class Captured:
    """A traced model.

    Attributes:
        graph: never changed; what is lowered is a copy of it.
        flat: how the model is called.
        parameters: names of the parameters and buffers among the graph's inputs, after the model's tensors.
    """

    graph: Any
    flat: Flattened
    parameters: tuple[str, ...]


def capture(source: Source) -> Captured:
    """Trace a model, the one that a recipe's scales have not been worked into yet.

    Raises:
        BackendError: TorchScript can't trace it.
    """
    _define_mark()
    flat = Flattened(source.model, source.args, source.kwargs)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        try:
            with Interceptor(source.model, _marked, out_of_place=source.graph.out_of_place):
                traced = torch.jit.trace(flat, flat.example, check_trace=False, strict=False)
        except Exception as exc:
            raise BackendError(f"TorchScript can't trace the model: {exc}\n{TRACEABLE}") from exc
    graph = traced.inlined_graph
    torch._C._jit_pass_cse(graph)
    return Captured(graph, flat, _with_parameters_as_inputs(graph))


@functools.cache
def _define_mark() -> torch.library.Library:
    """Register the node that names calls; it lasts as long as what this returns."""
    library = torch.library.Library("raysq", "FRAGMENT")
    library.define("call(Tensor x, str name) -> Tensor")
    library.impl("call", lambda x, name: x.clone(), "CompositeExplicitAutograd")
    return library


def _marked(site: Site, operands: Operands) -> Any:
    result = operands.run(operands.activations, operands.weights)
    return torch.ops.raysq.call(result, site.name) if isinstance(result, Tensor) else result


def _with_parameters_as_inputs(graph: Any) -> tuple[str, ...]:
    """Let a graph read parameters as inputs instead of attributes of `self`; return their names."""
    root = next(graph.inputs())
    paths = {root.debugName(): ""}
    names = []
    attributes = [node for node in graph.nodes() if node.kind() == "prim::GetAttr"]
    for node in attributes:
        path = f"{paths[node.input().debugName()]}.{node.s('name')}"
        value = node.output()
        paths[value.debugName()] = path
        if value.type().kind() == "TensorType":
            given = graph.addInput()
            given.setType(value.type())
            value.replaceAllUsesWith(given)
            names.append(path.removeprefix(".model."))
    for node in reversed(attributes):
        node.destroy()
    graph.eraseInput(0)
    return tuple(names)
