"""Lets functions write into what they alone read, where TorchScript would allocate and fill a tensor for each."""

from __future__ import annotations

from typing import Any

from raysq.kernels.script_graph import Writer

__all__ = ["overwrite"]

FUNCTIONS = {  # each has a twin that writes into its first operand
    "aten::add",
    "aten::clamp",
    "aten::div",
    "aten::gelu",
    "aten::hardswish",
    "aten::hardtanh",
    "aten::leaky_relu",
    "aten::masked_fill",
    "aten::mul",
    "aten::relu",
    "aten::sigmoid",
    "aten::silu",
    "aten::sub",
    "aten::tanh",
}
MAKERS = {  # their results lie in memory of their own
    *FUNCTIONS,
    *(f"{kind}_" for kind in FUNCTIONS),
    "aten::_convolution",
    "aten::bmm",
    "aten::layer_norm",
    "aten::linear",
    "aten::matmul",
    "aten::softmax",
}


def overwrite(graph: Any, write: Writer) -> None:
    """Let functions of a graph that changes no tensor write into their first operand, where nothing else reads it."""
    for node in list(graph.nodes()):
        if node.kind() in FUNCTIONS and _may_overwrite(node):
            with write.before(node):
                value = write.node(f"{node.kind()}_", *node.inputs())
            value.setType(node.output().type())
            node.output().replaceAllUsesWith(value)
            node.destroy()


def _may_overwrite(node: Any) -> bool:
    operand, *others = node.inputs()
    sizes = _float_sizes(operand)
    if operand.node().kind() not in MAKERS or len(operand.uses()) > 1 or sizes is None:
        return False
    if sizes != _float_sizes(node.output()):
        return False
    tensors = [value for value in others if value.type().kind() == "TensorType"]
    # a size of 1 may be a batch of one against which something else stays whole: at another batch the result grows
    return all(value.type().sizes() == [] for value in tensors) or 1 not in sizes


def _float_sizes(value: Any) -> list[int] | None:
    kind = value.type()
    if kind.kind() != "TensorType" or kind.scalarType() != "Float":
        return None
    sizes: list[int] | None = kind.sizes()
    return sizes
