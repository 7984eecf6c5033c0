"""Keeps oneDNN Graph from doing in a product's kernel what only its reference kernels can, many times slower.

A product's kernel takes in functions of its result, and sums with and factors of another tensor. Fast kernels (IPEX
2.8, measured on AVX2) are there for a tensor of the product's own shape, one value, and one per channel. With others,
such as a mask or a bias that the samples of a batch share, or a gate per sample, the kernel is a reference one. So is
that of a matrix product which is changed before it is added to a tensor of its own shape, such as half a residual:
the sum is made where the other operand lies, and nothing may come before that. Convolutions may do it.
"""

from __future__ import annotations

from raysq.graph import Call, ModelGraph, Node, activation_axis

__all__ = ["set_apart"]

TAKEN_IN = {  # functions of the result, and arithmetic with another tensor; names without underscores around
    *("abs", "clamp", "clamp_max", "clamp_min", "dropout", "elu", "exp", "gelu", "hardsigmoid", "hardswish"),
    *("hardtanh", "leaky_relu", "log", "mish", "neg", "pow", "reciprocal", "relu", "relu6", "round", "rsqrt"),
    *("sigmoid", "silu", "softplus", "sqrt", "square", "tanh"),
    *("add", "radd", "iadd", "sub", "rsub", "isub", "subtract", "mul", "rmul", "imul", "multiply"),
    *("div", "rdiv", "truediv", "rtruediv", "itruediv", "divide", "true_divide", "maximum", "minimum"),
}
SUMS = {"add", "radd", "iadd"}
IDENTITIES = {"dropout"}  # at inference


def set_apart(graph: ModelGraph) -> frozenset[str]:
    """Return the products whose result needs a memory of its own, so that their kernels end with it."""
    return frozenset(call.name for call in graph.calls if call.op.is_product and _has_no_fast_kernel(call, graph))


def _has_no_fast_kernel(call: Call, graph: ModelGraph) -> bool:
    """Whether arithmetic that may be taken in has an operand for which there is no fast kernel."""
    product = call.output_shape
    channels = activation_axis(call.op, len(product)) % len(product)
    values = [graph.node_of[call.name].outputs[0]]
    unchanged = {values[0]}
    for value in values:  # which grow on the way
        for node in graph.readers.get(value, ()):
            function = node.function.strip("_")
            if node.shapes[:1] != (product,) or function not in TAKEN_IN:
                continue
            others = _others(node, value, graph)
            if not all(_is_fast(shape, product, channels, fixed) for shape, fixed in others):
                return True
            changed = value not in unchanged or node.call is None  # by a factor of the sum's, `alpha`
            if function in SUMS and not call.op.is_conv and changed and (product, False) in others:
                return True
            if node.outputs[0] not in values:
                values.append(node.outputs[0])
                if function in IDENTITIES and value in unchanged:
                    unchanged.add(node.outputs[0])
    return False


def _others(node: Node, value: int, graph: ModelGraph) -> list[tuple[tuple[int, ...], bool]]:
    """Return the shapes of what a node reads beside a value, and whether that is the same for all inputs."""
    fixed = [*(graph.is_constant(read) for read in node.inputs), *(True for _ in node.parameters)]
    return [
        each
        for place, each in enumerate(zip(node.read_shapes, fixed, strict=True))
        if place != node.inputs.index(value)
    ]


def _is_fast(shape: tuple[int, ...], product: tuple[int, ...], channels: int, fixed: bool) -> bool:
    """Whether a kernel may take in a tensor, at other batches than the example's too.

    Where that is 1, what isn't the same for all inputs grows along the first axis, and what is doesn't.
    """
    padded = (*(1 for _ in product[len(shape) :]), *shape)
    grows = product[0] == 1 and not fixed and len(shape) == len(product)
    wide = [axis for axis, size in enumerate(padded) if size > 1 or (axis == 0 and grows)]
    return wide in ([], [channels]) or (padded == product and not (fixed and padded[0] == 1))
