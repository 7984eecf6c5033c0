"""Traces and freezes a model in a compilation unit of its own, so that nothing of it outlives it.

`torch.jit.trace` registers a type and a method for every module in one global unit that is never cleared. With them it
keeps what `freeze` makes of them and all their constants: 14 MB for each build of a MobileNetV2 of 9 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from raysq.flattened import Flattened

__all__ = ["TRACEABLE", "frozen"]

TRACEABLE = "Write what it names with tensors and torch's functions, or wrap the model in a module that can be traced."


def frozen(flat: Flattened) -> Any:
    """Return a flattened model, traced and frozen: a script module whose weights are constants.

    Models that hold more than tensors, such as weights that another library packed, are traced the usual way, and what
    came of them is moved. Only one that writes into a tensor of its own stays in the global unit.

    Raises:
        Exception: whatever the tracer or the model raises.
    """
    if _is_plain(flat):
        before = [t._version for t in _tensors(flat)]
        with _constant(flat):
            traced = _in_own_unit(flat)
        if before == [t._version for t in _tensors(flat)]:
            return torch.jit.freeze(traced.eval())
    return _moved(torch.jit.freeze(torch.jit.trace(flat, flat.example, check_trace=False, strict=False).eval()))


def _is_plain(flat: Flattened) -> bool:
    """Whether tensors are all that the model holds: no scripted modules, no packed weights."""
    held = (value for module in flat.modules() for value in (module, *vars(module).values()))
    return not any(isinstance(value, torch.jit.ScriptModule | torch.ScriptObject) for value in held)


def _tensors(flat: Flattened) -> Iterator[Tensor]:
    yield from flat.parameters()
    yield from flat.buffers()


@contextmanager
def _constant(flat: Flattened) -> Iterator[None]:
    """Let no parameter require a gradient: the tracer takes those for variables."""
    trained = [p for p in flat.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _in_own_unit(flat: Flattened) -> Any:
    graph, outputs = _recorded(flat)
    return _module(graph, None if isinstance(outputs, Tensor) else len(outputs))


def _moved(module: Any) -> Any:
    """Return a frozen module in a unit of its own, and leave nothing but its name where it was."""
    graph = module.graph
    (itself, *_), (result,) = graph.inputs(), graph.outputs()
    if itself.uses():
        return module
    graph.eraseInput(0)
    kinds = result.type()
    moved = _module(graph, len(kinds.elements()) if kinds.kind() == "TupleType" else None)
    _empty(graph)
    return moved


def _module(graph: Any, results: int | None) -> Any:
    """Return a module in a unit of its own whose forward is a copy of a graph.

    Args:
        graph: from flat tensors to one, or to a tuple.
        results: how many tensors are in the tuple; None for one without.
    """
    internals: Any = torch._C  # its stubs lack most of what follows
    module = internals.ScriptModule("__torch__.Traced", internals.CompilationUnit(), False)
    module._register_attribute("training", internals.BoolType.get(), False)
    stub = torch.zeros(1)

    def like(*_: Tensor) -> Any:
        return stub + 1 if results is None else tuple(stub + 1 for _ in range(results))

    names = [f"tensor{i}" for i, _ in enumerate(graph.inputs())]
    module._create_method_from_trace("forward", like, (stub,) * len(names), _no_name, False, False, names, False)
    body = module._get_method("forward").graph
    _empty(body)
    for output in body.insertGraph(graph, list(body.inputs())[1:]):
        body.registerOutput(output)
    return torch.jit._recursive.wrap_cpp_module(module)


def _empty(graph: Any) -> None:
    for _ in list(graph.outputs()):
        graph.eraseOutput(0)
    for node in reversed(list(graph.nodes())):
        node.destroy()


def _recorded(flat: Flattened) -> tuple[Any, Any]:
    """Return the graph of a forward, its nodes under the paths of their modules, and what the forward returned."""
    paths = {module: f"__module.{path}" for path, module in flat.named_modules() if path}
    tracer: Any = torch.jit._trace
    before = tracer._trace_module_map
    tracer._trace_module_map = paths
    try:
        graph, outputs = torch._C._create_graph_by_tracing(flat, flat.example, _no_name, False, False, None, [])
    finally:
        tracer._trace_module_map = before
    recorded: Any = graph
    for node in recorded.findAllNodes("prim::Constant"):
        if node.output().type().kind() == "TensorType":
            node.t_("value", node.t("value").detach())  # a parameter will require a gradient again
    return graph, outputs


def _no_name(_: Tensor) -> str:
    return ""
