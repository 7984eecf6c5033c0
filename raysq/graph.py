"""What a model computes: every call that could run in int8, by a stable name, and how calls feed each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from raysq.smoothquant.groups import Group

__all__ = ["Call", "ModelGraph", "Node", "OpType", "activation_axis"]


SHAPE_CHANGES = {"flatten", "view", "reshape", "squeeze", "contiguous", "dropout"}  # dropout is idle in eval mode


class OpType(StrEnum):
    """The kinds of calls that some backend can run in int8."""

    CONV1D = "conv1d"
    CONV2D = "conv2d"
    CONV3D = "conv3d"
    CONV_TRANSPOSE1D = "conv_transpose1d"
    CONV_TRANSPOSE2D = "conv_transpose2d"
    CONV_TRANSPOSE3D = "conv_transpose3d"
    LINEAR = "linear"
    MATMUL = "matmul"
    BMM = "bmm"
    ADD = "add"
    MAX_POOL = "max_pool"
    AVG_POOL = "avg_pool"
    EMBEDDING_BAG = "embedding_bag"
    LSTM = "lstm"

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution, transposed ones included."""
        return self in CONVOLUTIONS

    @property
    def has_weight(self) -> bool:
        """Whether one of its operands is a trained weight."""
        return self in WEIGHTED

    @property
    def is_transposed(self) -> bool:
        """Whether it is a transposed convolution, whose weight is (in, out/groups, *kernel)."""
        return self.value.startswith("conv_transpose")

    @property
    def has_matrix(self) -> bool:
        """Whether it multiplies what it reads by one weight: a convolution or a linear layer."""
        return self.is_conv or self is OpType.LINEAR

    @property
    def is_product(self) -> bool:
        """Whether it multiplies what it reads, by a weight or by another activation."""
        return self.has_matrix or self in (OpType.MATMUL, OpType.BMM)


CONVOLUTIONS = frozenset(op for op in OpType if op.value.startswith("conv"))
WEIGHTED = CONVOLUTIONS | {OpType.LINEAR, OpType.EMBEDDING_BAG, OpType.LSTM}
FILLS = frozenset(  # of what they read only shape and type matter
    {"full_like", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like"}
)


def activation_axis(op: OpType, dimensions: int) -> int:
    """Return the axis that channels run along in what a call of this kind reads and returns."""
    channels_first = op.is_conv or op in (OpType.MAX_POOL, OpType.AVG_POOL) or (op is OpType.ADD and dimensions >= 4)
    return 1 if channels_first and dimensions >= 3 else -1


@dataclass(frozen=True)
class Node:
    """One torch function call of the recorded forward, quantizable or not, in execution order.

    Attributes:
        index: its place in the order.
        function: torch's name, such as "conv2d" or "layer_norm".
        module: path of the innermost module whose forward made it, "" for the root.
        inputs: ids of the tensor values it reads (a value is one tensor at one version).
        outputs: ids of the values it makes.
        shapes: theirs in the recorded forward.
        call: name of the quantizable call it is, or None.
        parameters: names of the parameters and buffers that it reads.
        read_shapes: shapes of the values and then of the parameters that it reads.
    """

    index: int
    function: str
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    call: str | None
    parameters: tuple[str, ...]
    read_shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Call:
    """One call that a backend may run in int8.

    Attributes:
        name: module path, ":function" for calls that are not the module's own op, "#k" from the k-th repetition
            on ("fc", "fc#2", "blocks.0.attn:matmul#2").
        op: its kind.
        module: path of the module whose forward makes it.
        module_type: class name of that module.
        tensors: names of its activation inputs, "<first call that reads it>/<position>"; calls with an equal
            entry share that input.
        input_shapes: shapes of those inputs in the recorded forward.
        output_shape: shape of its result.
        weight: name of its weight in the state dict; None for none or for a computed one.
        weight_shape: its shape, () for none.
        groups: of a convolution, else 1.
        macs: multiply-accumulates of the recorded forward.
        block: path of the repeated block (transformer layer, residual block) that encloses it, or None.
        weight_start: its first row in that parameter: an attention reads q, k and v from one.
        weight_transposed: whether the parameter holds it transposed.
    """

    name: str
    op: OpType
    module: str
    module_type: str
    tensors: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]
    weight: str | None
    weight_shape: tuple[int, ...]
    groups: int
    macs: int
    block: str | None
    weight_start: int = 0
    weight_transposed: bool = False

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is convolved by itself."""
        return self.groups > 1 and len(self.weight_shape) > 2 and self.weight_shape[1] == 1


@dataclass(frozen=True)
class ModelGraph:
    """The calls of a model in execution order, and all nodes around them.

    Attributes:
        calls: the quantizable calls.
        nodes: every recorded torch function, for analyses that need the whole flow.
        blocks: paths of the repeated blocks, in execution order.
        folded: (convolution, batch norm) modules that deployment merges.
        left_in_float: function, by the name it would have as a call, and why it can't be quantized.
        parameters: shapes of the trained parameters.
        outputs: ids of the values that the model returns.
        out_of_place: whether in-place ops may run out of place; False where the model reads a tensor that
            was changed under another name.
        inputs: ids of the values that the model is given.
    """

    calls: tuple[Call, ...]
    nodes: tuple[Node, ...]
    blocks: tuple[str, ...]
    folded: tuple[tuple[str, str], ...]
    left_in_float: Mapping[str, str]
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: tuple[int, ...] = ()
    out_of_place: bool = True
    inputs: tuple[int, ...] = ()

    COLUMNS: ClassVar = ("call", "op", "inputs", "output", "MACs", "block", "scale absorbed by")

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row per call, as a person reads it: the cells of `COLUMNS`."""
        absorbed = {
            name: ", ".join(p.call or p.vectors[0].rpartition(".")[0] for p in group.producers)
            for group in self.groups.values()
            for name in group.calls
        }
        return [
            (
                call.name,
                call.op.value,
                " ".join("x".join(map(str, shape)) for shape in call.input_shapes),
                "x".join(map(str, call.output_shape)),
                f"{call.macs:,}",
                call.block or "",
                absorbed.get(call.name, ""),
            )
            for call in self.calls
        ]

    def _repr_html_(self) -> str:
        from raysq import notebook

        return notebook.of_graph(self)

    def __getitem__(self, name: str) -> Call:
        return self.by_name[name]

    @cached_property
    def by_name(self) -> dict[str, Call]:
        """Calls by name."""
        return {call.name: call for call in self.calls}

    @cached_property
    def makers(self) -> dict[int, Node]:
        """The node that makes each value."""
        return {value: node for node in self.nodes for value in node.outputs}

    @cached_property
    def readers(self) -> dict[int, list[Node]]:
        """The nodes that read each value."""
        readers: dict[int, list[Node]] = {}
        for node in self.nodes:
            for value in node.inputs:
                readers.setdefault(value, []).append(node)
        return readers

    @cached_property
    def node_of(self) -> dict[str, Node]:
        """The node of each call."""
        return {node.call: node for node in self.nodes if node.call is not None}

    @cached_property
    def _constant_nodes(self) -> frozenset[int]:
        """The nodes that compute the same whatever the model's inputs are, such as a bias by relative positions."""
        return self._nodes_of_no_input(frozenset())

    def _nodes_of_no_input(self, fills: frozenset[str]) -> frozenset[int]:
        """Return the nodes that read constants only; so counts what some functions make, whatever they read."""
        fixed: set[int] = set()
        nodes = []
        for node in self.nodes:
            if fixed.issuperset(node.inputs) or node.function in fills:
                fixed.update(node.outputs)
                nodes.append(node.index)
            elif node.function == "__setitem__":
                fixed.discard(node.inputs[0])
        return frozenset(nodes)

    @cached_property
    def unread_calls(self) -> frozenset[str]:
        """The calls whose result nothing reads, such as what only training needs."""
        wanted = {*self.readers, *self.outputs}
        return frozenset(name for name, node in self.node_of.items() if wanted.isdisjoint(node.outputs))

    @cached_property
    def constant_calls(self) -> tuple[str, ...]:
        """The calls that read the same whatever the model's inputs are, such as projections of relative positions."""
        return self._calls_among(self._constant_nodes)

    @cached_property
    def filled_calls(self) -> tuple[str, ...]:
        """The constant calls, and those whose input is filled in the shape of an input, such as a first state."""
        return self._calls_among(self._nodes_of_no_input(FILLS))

    def _calls_among(self, nodes: frozenset[int]) -> tuple[str, ...]:
        return tuple(n.call for n in self.nodes if n.index in nodes and n.call is not None)

    def is_constant(self, value: int) -> bool:
        """Whether a value is the same whatever the model's inputs are: computed so, or held by a module as it is."""
        maker = self.makers.get(value)
        return value not in self.inputs if maker is None else maker.index in self._constant_nodes

    def producer(self, call: str, position: int) -> tuple[Call | None, bool]:
        """Return the call whose result an input is, shape changes apart, and whether nobody else reads it."""
        inputs = self.node_of[call].inputs
        if position >= len(inputs):
            return None, False
        value, alone = inputs[position], True
        while True:
            alone = alone and len(self.readers[value]) == 1 and value not in self.outputs
            maker = self.makers.get(value)
            if maker is None:
                return None, False
            if maker.call is not None:
                return self.by_name[maker.call], alone
            if maker.function not in SHAPE_CHANGES or len(maker.inputs) != 1:
                return None, False
            value = maker.inputs[0]

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Activations that must be scaled alike, by the name of the first: the units of smoothing."""
        from raysq.smoothquant.groups import find_groups

        return find_groups(self)
