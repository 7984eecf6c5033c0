"""What one int8 kernel computes: a call, the function and the sum after it, and in which type its result is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysq.arithmetic import Grid, QParams
from raysq.kernels.script_graph import constant
from raysq.plan import CallPlan

__all__ = ["CONVOLUTION", "IDENTITY", "LINEAR", "PASSING", "Fused", "PostOp", "clipped", "fuse", "is_reduced"]

CONVOLUTION, LINEAR = "aten::_convolution", "aten::linear"
PASSING = {  # ops that keep each value as it is, so that they run on integers as well
    "aten::view",
    "aten::reshape",
    "aten::flatten",
    "aten::unflatten",
    "aten::transpose",
    "aten::permute",
    "aten::t",
    "aten::squeeze",
    "aten::unsqueeze",
    "aten::contiguous",
    "aten::max_pool2d",
}


ORIGINS = {  # ops whose result may have other sizes than what they read: at another batch, or another length
    "aten::adaptive_avg_pool2d",
    "aten::adaptive_max_pool2d",
    "aten::amax",
    "aten::amin",
    "aten::index",
    "aten::index_select",
    "aten::max",
    "aten::mean",
    "aten::min",
    "aten::narrow",
    "aten::select",
    "aten::slice",
    "aten::sum",
}


TENSORS = ("TensorType", "ListType", "OptionalType")  # types of values that are tensors, or may hold some


@dataclass(frozen=True)
class PostOp:
    """A function that is applied to a kernel's result, in oneDNN's spelling."""

    name: str
    scalars: tuple[float, ...] = ()
    algorithm: str = ""


IDENTITY = PostOp("none")


@dataclass
class Fused:
    """One int8 kernel.

    Attributes:
        name: of the call.
        node: of the call in the graph.
        plan: its operands' parameters.
        at: the last of the nodes that it computes, whose place it takes.
        function: applied at the end.
        sum: the node of what is added before that, None for nothing.
        addend: which operand of it that is.
        result: parameters of the integers that it writes; None where it writes floats.
    """

    name: str
    node: Any
    plan: CallPlan
    at: Any
    function: PostOp = IDENTITY
    sum: Any = None
    addend: int = 0
    result: QParams | None = None

    @property
    def params(self) -> QParams:
        """Parameters of what it reads."""
        params = self.plan.inputs[0]
        assert params is not None
        return params

    @property
    def other(self) -> Any:
        """What is added, None for nothing; another kernel may have come in its place since."""
        return None if self.sum is None else self.sum.inputsAt(self.addend)

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution, else a linear layer."""
        return bool(self.node.kind() == CONVOLUTION)

    @property
    def takes_post_ops(self) -> bool:
        """Whether its kernel applies functions and sums: 1-d and 3-d convolutions don't."""
        return not self.is_convolution or len(constant(self.node.inputsAt(3))) == 2


def fuse(
    graph: Any, given: int, calls: Mapping[str, Any], plans: Mapping[str, CallPlan], *, alone: bool
) -> list[Fused]:
    """Return the int8 kernels of a graph, in the order of their nodes.

    Args:
        graph: all of it.
        given: how many of its inputs come first and are the model's.
        calls: nodes of the calls that run in int8.
        plans: theirs.
        alone: whether each kernel computes its call only, as where tensors change in place: a kernel in another's
            place would read them too late.
    """
    kernels = [Fused(name, node, plans[name], node) for name, node in calls.items()]
    if alone:
        return kernels
    fusing = [kernel for kernel in kernels if kernel.takes_post_ops]
    for kernel in fusing:
        kernel.function, kernel.at = _function_after(kernel.node, kernel.is_convolution)
    sums = _Sums(graph, given, kernels)
    for kernel in fusing:
        if kernel.function is IDENTITY:
            sums.take(kernel)
    readers = {k.node.output().debugName(): k for k in kernels}
    for kernel in kernels:
        if kernel.sum is None:
            kernel.result = _integers(kernel, readers)
    return sorted(kernels, key=lambda kernel: sums.order[kernel.at.output().debugName()])


def _same_grid(a: QParams, b: QParams) -> bool:
    """Whether both stand for the same integers."""
    return a.grid == b.grid and float(a.scale) == float(b.scale) and int(a.zero_point) == int(b.zero_point)


def _function_after(node: Any, convolution: bool, after_sum: bool = False) -> tuple[PostOp, Any]:
    """Return the function that alone reads a result, and its node; IDENTITY and the same node where there is none."""
    reader = _only_reader(node.output())
    function = None if reader is None else _post_op(reader, convolution, after_sum)
    return (IDENTITY, node) if function is None else (function, reader)


def _post_op(node: Any, convolution: bool, after_sum: bool) -> PostOp | None:
    kind = node.kind()
    if kind == "aten::relu":
        return PostOp("relu")
    if after_sum:
        return None
    if kind == "aten::relu6":
        return PostOp("hardtanh", (0.0, 6.0))
    if kind in ("aten::hardtanh", "aten::clamp"):
        low, high = (constant(node.inputsAt(i)) for i in (1, 2))
        if not isinstance(low, int | float) or not isinstance(high, int | float):
            return None
        return PostOp("hardtanh", (float(low), float(high)))
    if kind == "aten::hardswish":
        return PostOp("hardswish")
    if kind == "aten::silu":
        return PostOp("swish")
    if kind == "aten::gelu" and not convolution:
        return PostOp("gelu", (), str(constant(node.inputsAt(1))))
    return None


class _Sums:
    """Which kernels add what their result alone is added to.

    A convolution's kernel writes its sum into the tensor that is added, so nothing may read that later: neither a node
    behind, nor a kernel that took the place of one.
    """

    def __init__(self, graph: Any, given: int, kernels: Sequence[Fused]) -> None:
        nodes = list(graph.nodes())
        self.order = {value.debugName(): place for place, node in enumerate(nodes) for value in node.outputs()}
        self._origins = _origins(list(graph.inputs())[:given], nodes)
        self._taken: set[str] = set()
        self._overwritten: dict[str, int] = {}  # value to the place where a kernel writes into it
        self._places: dict[str, int] = {}  # result of a node that a kernel computes to the place of the kernel
        for kernel in kernels:
            self._places[_name(kernel.node)] = self.order[_name(kernel.at)]

    def take(self, kernel: Fused) -> None:
        """Let a kernel compute the sum that alone reads its result, where it can, and a ReLU after that."""
        value = kernel.at.output()
        node = _only_reader(value)
        if node is None or node.kind() != "aten::add" or constant(node.inputsAt(2)) != 1 or _name(node) in self._taken:
            return
        addend = int(node.inputsAt(0).debugName() == value.debugName())
        other = node.inputsAt(addend)
        if not self._grow_alike(value, other):
            return
        if kernel.is_convolution and not self._may_be_overwritten(other, node):
            return
        function, at = _function_after(node, kernel.is_convolution, after_sum=True)
        place = self.order[_name(at)]
        if self._overwritten.get(kernel.node.inputsAt(0).debugName(), math.inf) < place:
            return
        kernel.sum, kernel.addend, kernel.function, kernel.at = node, addend, function, at
        self._taken.add(_name(node))
        self._places |= {_name(kernel.node): place, _name(node): place}
        if kernel.is_convolution:
            self._overwritten[other.debugName()] = place

    def _grow_alike(self, value: Any, other: Any) -> bool:
        """Whether two values have the same sizes at every batch: a size of 1 may be one against which others grow."""
        sizes = _shape(value)
        if sizes is None or sizes != _shape(other):
            return False
        return 1 not in sizes or self._origins[value.debugName()] == self._origins[other.debugName()]

    def _may_be_overwritten(self, value: Any, by: Any) -> bool:
        """Whether a sum may be written into a tensor: nothing reads it later, or holds the same memory."""
        if value.node().kind() not in (CONVOLUTION, LINEAR, "aten::add", "aten::relu", "aten::hardtanh"):
            return False
        here = self.order[_name(by)]
        for use in value.uses():
            reader = use.user
            if reader.outputsSize() != 1:
                return False
            place = self.order.get(_name(reader), math.inf)
            if max(place, self._places.get(_name(reader), 0)) > here:
                return False
            if reader.kind() not in (CONVOLUTION, LINEAR, "aten::add", "aten::mul", "aten::relu", "aten::layer_norm"):
                return False
        return True


def _origins(inputs: Sequence[Any], nodes: Sequence[Any]) -> dict[str, frozenset[str]]:
    """Return what the sizes of each value come from: the model's inputs, and results that have sizes of their own."""
    found = {value.debugName(): frozenset([value.debugName()]) for value in inputs}
    for node in nodes:
        read = [found.get(value.debugName(), frozenset()) for value in node.inputs() if value.type().kind() in TENSORS]
        for value in node.outputs():
            name = value.debugName()
            found[name] = frozenset([name]) if node.kind() in ORIGINS else frozenset().union(*read)
    return found


def _integers(kernel: Fused, readers: Mapping[str, Fused]) -> QParams | None:
    """Return the grid that all readers of a result take it in, None where they differ or one takes floats."""
    grids: list[QParams] = []
    for reader in _readers(kernel.at.output()):
        fused = readers.get(reader.output().debugName()) if reader.outputsSize() == 1 else None
        if fused is None or fused.plan.multiplier is not None:
            return None
        grids.append(fused.params)
    if not grids or not all(_same_grid(grids[0], other) for other in grids):
        return None
    return grids[0]


def _readers(value: Any) -> Iterator[Any]:
    """Yield the nodes that read a value as their first input, through ops that keep values; others as they are."""
    for use in value.uses():
        if use.offset == 0 and use.user.kind() in PASSING:
            yield from _readers(use.user.output())
        else:
            yield use.user


def _only_reader(value: Any) -> Any:
    uses = value.uses()
    return uses[0].user if len(uses) == 1 else None


def _name(node: Any) -> str:
    return str(node.output().debugName())


def _shape(value: Any) -> list[int] | None:
    kind = value.type()
    return kind.sizes() if kind.kind() == "TensorType" else None


def clipped(function: PostOp, params: QParams) -> PostOp | None:
    """Return a function that also clips to a reduced grid, None where no single one does both.

    A kernel that writes uint8 clips to 255, a reduced grid ends at 127.
    """
    grid, scale, zero = params.grid, float(params.scale), int(params.zero_point)
    low, high = (grid.qmin - zero) * scale, (grid.qmax - zero) * scale
    if function.name == "none":
        return PostOp("hardtanh", (low, high))
    if function.name == "relu":
        return PostOp("hardtanh", (max(low, 0.0), high))
    if function.name == "hardtanh":
        return PostOp("hardtanh", (max(low, function.scalars[0]), min(high, function.scalars[1])))
    return None


def is_reduced(grid: Grid) -> bool:
    """Whether a grid leaves out integers that its type has."""
    return grid.steps < 255
