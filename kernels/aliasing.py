"""Keeps a frozen graph from writing into the tensors that it is called with.

A sum that is fused into a convolution (TorchScript) or a linear layer (oneDNN Graph) is written into its other operand.
Neither looks whether that operand is an input of the graph, so a residual around the first layer would change the
caller's tensor: the second call on it computes something else.
"""

from __future__ import annotations

from typing import Any

__all__ = ["protect_inputs"]

SUMS = {"aten::add", "aten::add_"}
VIEWS = {  # ops whose result may share the memory of their first operand
    "aten::view",
    "aten::view_as",
    "aten::reshape",
    "aten::flatten",
    "aten::unflatten",
    "aten::transpose",
    "aten::permute",
    "aten::movedim",
    "aten::t",
    "aten::squeeze",
    "aten::unsqueeze",
    "aten::expand",
    "aten::slice",
    "aten::select",
    "aten::narrow",
    "aten::chunk",
    "aten::split",
    "aten::unbind",
    "aten::contiguous",
    "aten::to",
    "aten::detach",
    "aten::alias",
    "aten::dropout",
    "prim::ListUnpack",
}


def protect_inputs(graph: Any) -> None:
    """Let sums read copies of the graph's inputs, and of views of them; every other reader is left as it is."""
    inputs = {value.debugName() for value in graph.inputs()}
    for node in list(graph.nodes()):
        if node.kind() not in SUMS:
            continue
        for position, operand in enumerate(list(node.inputs())[:2]):
            if operand.type().kind() == "TensorType" and _origin(operand) in inputs:
                with graph.insert_point_guard(node):
                    node.replaceInput(position, graph.insert("aten::clone", [operand]))


def _origin(value: Any) -> str:
    """Return the name of the value whose memory a value may share."""
    while value.node().kind() in VIEWS:
        value = next(value.node().inputs())
    return str(value.debugName())
