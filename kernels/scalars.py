"""Gives computed tensors without axes one, where arithmetic reads them beside others: else oneDNN Graph crashes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from raysq.kernels.script_graph import constant

__all__ = ["with_axis"]

ARITHMETIC = {"aten::add", "aten::div", "aten::mul", "aten::sub"}
WHOLE = {
    "aten::max": 1,
    "aten::mean": 2,
    "aten::min": 1,
    "aten::prod": 2,
    "aten::sum": 2,
}  # inputs where no axis is named
ALIKE = ARITHMETIC | {  # ops whose result has axes if something that they read has
    *("aten::abs", "aten::clamp", "aten::clamp_min", "aten::exp", "aten::log", "aten::neg", "aten::pow", "aten::relu"),
    *(
        "aten::dequantize",
        "aten::quantize_per_tensor",
        "aten::reciprocal",
        "aten::rsqrt",
        "aten::sigmoid",
        "aten::sqrt",
    ),
    *("aten::gelu", "aten::hardswish", "aten::silu", "aten::softmax", "aten::tanh", "aten::to"),
}
WIDE = {"aten::_convolution", "aten::bmm", "aten::layer_norm", "aten::linear", "aten::matmul"}


def with_axis(graph: Any, example: Sequence[Tensor]) -> None:
    """Reshape what has no axis and is computed to one place, beside what has axes; what isn't known stays.

    Args:
        graph: of a frozen module, which forgets shapes.
        example: its inputs.
    """
    given = list(graph.inputs())[1:]
    axes: dict[str, bool] = {x.debugName(): t.dim() > 0 for x, t in zip(given, example, strict=True)}
    for node in list(graph.nodes()):
        operands = [value for value in node.inputs() if value.type().kind() == "TensorType"]
        known = [_has_axes(value, axes) for value in operands]
        if node.kind() in ARITHMETIC and len(operands) == 2 and True in known and False in known:
            place = known.index(False)
            if operands[place].node().kind() != "prim::Constant":
                with graph.insert_point_guard(node):
                    node.replaceInput(
                        place, graph.insert("aten::reshape", [operands[place], graph.insertConstant([1])])
                    )
        if node.kind() in WIDE or (node.kind() in ALIKE and True in known):
            axes[node.output().debugName()] = True
        elif _is_of_all(node) or (node.kind() in ALIKE and known and set(known) == {False}):
            axes[node.output().debugName()] = False


def _is_of_all(node: Any) -> bool:
    if node.kind() in ("aten::amax", "aten::amin"):
        return bool(constant(node.inputsAt(1)) == [])
    return bool(WHOLE.get(node.kind()) == node.inputsSize())


def _has_axes(value: Any, axes: dict[str, bool]) -> bool | None:
    """Whether a tensor has axes; None where that isn't known."""
    if value.node().kind() != "prim::Constant":
        return axes.get(value.debugName())
    held = value.toIValue()
    return held.dim() > 0 if isinstance(held, Tensor) else None
