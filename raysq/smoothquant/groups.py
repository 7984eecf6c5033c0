"""Which activations must be scaled alike, and what can absorb the scales: the units of smoothing and equalization.

Dividing an activation by a positive scale per channel changes nothing if every weight that reads it is multiplied by
the same. The division is free where whatever makes the activation has parameters to put it into. Between the two, an
activation may pass what is linear or positively homogeneous per channel (f(x / s) = f(x) / s: ReLU, pooling, sums of
activations that are all divided), so that a whole residual stream shares one vector; a ReLU6 or a GELU ends it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raysq.graph import activation_axis

if TYPE_CHECKING:
    from raysq.graph import Call, ModelGraph, Node

__all__ = ["Group", "Producer", "find_groups"]

ROW_NORMS = ("layer_norm", "rms_norm")  # parameters along the last axis
CHANNEL_NORMS = ("batch_norm", "group_norm", "instance_norm")  # along axis 1
GAINS = ("weight", "gamma", "scale")  # what the only parameter of a norm is called, unless it is a mere bias
SHAPES = ("flatten", "view", "reshape", "squeeze", "unsqueeze")
ELEMENTWISE = ("relu", "leaky_relu", "prelu", "dropout", "contiguous", "clone", "detach", "float", "abs", "neg")
POOLS = {  # to the number of last axes that they mix; without a batch axis, channels may be among them
    f"{kind}_pool{axes}d": axes for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for axes in (1, 2, 3)
}
SUMS = ("add", "sub", "__sub__", "__rsub__")
PRODUCTS = ("mul", "__mul__", "__rmul__", "multiply")  # not `div`, which may round: the record doesn't say
VIEWS = ("split", "chunk", "__getitem__", "t", "transpose", "unflatten", "T", "mT")


@dataclass(frozen=True)
class Producer:
    """What divides an activation at no cost.

    Attributes:
        call: the convolution or linear layer whose output channels are divided, or None.
        vectors: parameters of one value per channel that are: its bias, or a norm's weight and bias.
    """

    call: str | None
    vectors: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Activations that share one vector of scales, and the weights that make up for it.

    Attributes:
        name: of its first activation that a weight reads, as `Call.tensors` spells it.
        channels: length of the vector.
        tensors: the activations that are divided, in execution order.
        calls: the calls whose weights are multiplied, in execution order.
        results: the calls whose results are divided.
        producers: what absorbs the division; none: it has to be computed, at each of the calls.
    """

    name: str
    channels: int
    tensors: tuple[str, ...]
    calls: tuple[str, ...]
    results: tuple[str, ...] = ()
    producers: tuple[Producer, ...] = ()


def find_groups(graph: ModelGraph) -> dict[str, Group]:
    """Return the groups by name; calls whose weight can't be scaled for them alone are in none."""
    groups: dict[str, Group] = {}
    grouped: set[str] = set()
    for call in graph.calls:
        if call.name in grouped or not call.op.has_matrix or not graph.node_of[call.name].inputs:
            continue
        for group in (_absorbed(graph, call), _computed(graph, call)):
            if group is not None and grouped.isdisjoint(group.calls) and _may_change(graph, group):
                groups[group.name] = group
                grouped.update(group.calls)
                break
    return groups


class _InexactError(Exception):
    """The division can't be absorbed."""


@dataclass
class _Stream:
    """The activations reached so far by following a division up to its producers and down to its readers."""

    graph: ModelGraph
    channels: int
    axes: dict[int, int] = field(default_factory=dict)  # value to the axis of its channels
    calls: dict[str, None] = field(default_factory=dict)
    producers: dict[int, Producer] = field(default_factory=dict)  # by the index of their node
    products: list[Node] = field(default_factory=list)

    def follow(self, value: int, axis: int) -> None:
        """Add an activation and all that must be divided with it.

        Raises:
            _InexactError: something on the way is neither homogeneous nor can it absorb a division.
        """
        pending = [(value, axis)]
        while pending:
            value, axis = pending.pop()
            if value in self.axes:
                if self.axes[value] != axis:
                    raise _InexactError
                continue
            maker = self.graph.makers.get(value)
            if maker is None or value in self.graph.outputs or self._shape(value)[axis] != self.channels:
                raise _InexactError
            self.axes[value] = axis
            pending += self._up(maker, value, axis)
            for reader in self.graph.readers.get(value, ()):
                pending += self._down(reader, value, axis)
        if any((one in self.axes) == (other in self.axes) for one, other in (node.inputs for node in self.products)):
            raise _InexactError  # divided twice: a product of an activation and its own ReLU

    def _shape(self, value: int) -> tuple[int, ...]:
        maker = self.graph.makers[value]
        return maker.shapes[maker.outputs.index(value)]

    def _up(self, maker: Node, value: int, axis: int) -> Iterator[tuple[int, int]]:
        producer = self._producer(maker, axis)
        if producer is not None:
            self.producers[maker.index] = producer
            return
        if maker.function in SUMS and len(maker.inputs) == 2:
            for other in maker.inputs:
                yield other, self._moved(maker, value, axis, other)
        elif maker.function in PRODUCTS and len(maker.inputs) == 2:
            self.products.append(maker)
            if not any(v in self.axes for v in maker.inputs):
                factor = self._factor(maker)
                yield factor, self._moved(maker, value, axis, factor)
        elif _is_homogeneous(maker):
            yield maker.inputs[0], self._moved(maker, value, axis, maker.inputs[0])
        else:
            raise _InexactError

    def _down(self, reader: Node, value: int, axis: int) -> Iterator[tuple[int, int]]:
        call = None if reader.call is None else self.graph[reader.call]
        if call is not None and call.op.has_matrix:
            if reader.inputs[0] != value or value in reader.inputs[1:] or axis != _matrix_axis(call):
                raise _InexactError
            self.calls[call.name] = None
            return
        combined = reader.function in (*SUMS, *PRODUCTS) and len(reader.inputs) == 2
        if not (combined or _is_homogeneous(reader)):
            raise _InexactError
        yield reader.outputs[0], self._moved(reader, value, axis, reader.outputs[0])

    def _producer(self, maker: Node, axis: int) -> Producer | None:
        """Return how a node absorbs a division of its result along an axis, None if it can't."""
        trained = {name: self.graph.parameters[name] for name in maker.parameters if name in self.graph.parameters}
        vectors = tuple(n for n, shape in trained.items() if math.prod(shape) == self.channels)
        last = len(maker.shapes[0]) - 1
        call = None if maker.call is None else self.graph[maker.call]
        if call is not None and call.op.has_matrix:
            bias = tuple(name for name in vectors if name != call.weight)
            if call.weight is None or len(maker.inputs) != 1 or axis != _matrix_axis(call):
                raise _InexactError
            if set(maker.parameters) != {call.weight, *bias}:
                raise _InexactError  # a bias that more than one value is made of, or that is a buffer
            return Producer(call.name, bias)
        if len(maker.inputs) != 1 or not vectors or len(vectors) != len(trained):
            return None
        if maker.function in (*ROW_NORMS, *CHANNEL_NORMS):
            statistics = 2 if maker.function == "batch_norm" else 0  # are buffers
            whole = len(vectors) == 2 or vectors[0].rpartition(".")[2] in GAINS
            whole = whole and len(maker.parameters) == len(vectors) + statistics
            along = axis == (last if maker.function in ROW_NORMS else 1)
            return Producer(None, vectors) if whole and along else None
        if maker.function in PRODUCTS and len(maker.parameters) == 1:
            shape = trained[vectors[0]]
            place = len(shape) - (last + 1 - axis)
            return Producer(None, vectors) if place >= 0 and shape[place] == self.channels else None
        return None

    def _factor(self, product: Node) -> int:
        """Return the factor of a product that is divided in its place: the last that a weight makes."""
        for factor in reversed(product.inputs):
            maker = self.graph.makers.get(factor)
            while maker is not None and _is_homogeneous(maker):
                maker = self.graph.makers.get(maker.inputs[0])
            if maker is not None and maker.call is not None and self.graph[maker.call].op.has_matrix:
                return factor
        raise _InexactError

    def _moved(self, node: Node, value: int, axis: int, other: int) -> int:
        """Return where the channels are in another value, of which a node makes this one or the reverse."""
        if other not in self.graph.makers:
            raise _InexactError
        ours, theirs = self._shape(value), self._shape(other)
        if node.function in SHAPES:
            return _same_axis(ours, axis, theirs)
        mixed = len(ours) - 2 if node.function == "interpolate" else POOLS.get(node.function, 0)
        if len(ours) != len(theirs) or ours[axis] != theirs[axis] or axis >= len(ours) - mixed:
            raise _InexactError
        return axis


def _same_axis(ours: tuple[int, ...], axis: int, theirs: tuple[int, ...]) -> int:
    """Return the axis of the same channels in another shape of the same values.

    Raises:
        _InexactError: the channels are taken apart, or it can't be told from the shapes.
    """
    channels = ours[axis]
    if math.prod(ours) == math.prod(theirs) and theirs:
        if math.prod(ours[axis:]) == channels and theirs[-1] == channels:
            return len(theirs) - 1
        if theirs[: axis + 1] == ours[: axis + 1] and (math.prod(theirs[axis:]) == math.prod(ours[axis:])):
            return axis
    raise _InexactError


def _absorbed(graph: ModelGraph, call: Call) -> Group | None:
    """Return the group of the whole stream that a call reads, None if its division can't be absorbed."""
    if not graph.out_of_place or not graph.outputs:
        return None  # what the record doesn't follow: tensors that are read under another name, returned in a class
    if len(graph.node_of[call.name].inputs) != len(call.tensors):
        return None  # a bias that is computed is an input too
    axis = _matrix_axis(call)
    stream = _Stream(graph, call.input_shapes[0][axis])
    try:
        stream.follow(graph.node_of[call.name].inputs[0], axis)
    except _InexactError:
        return None
    tensors: dict[str, bool] = {}  # whether its statistics are along the same axis
    for other in graph.calls:
        for tensor, value, shape in zip(
            other.tensors, graph.node_of[other.name].inputs, other.input_shapes, strict=False
        ):
            if value in stream.axes:
                tensors.setdefault(tensor, activation_axis(other.op, len(shape)) % len(shape) == stream.axes[value])
    if not all(tensors.values()):
        return None
    return Group(
        name=call.tensors[0],
        channels=stream.channels,
        tensors=tuple(tensors),
        calls=tuple(other.name for other in graph.calls if other.name in stream.calls),
        results=tuple(c.name for c in graph.calls if stream.axes.keys() & set(graph.node_of[c.name].outputs)),
        producers=tuple(stream.producers[index] for index in sorted(stream.producers)),
    )


def _computed(graph: ModelGraph, call: Call) -> Group | None:
    """Return the group of the calls that read the same activation, None if its statistics are along another axis."""
    first = next(c for c in graph.calls if call.tensors[0] in c.tensors)
    dimensions = len(first.input_shapes[first.tensors.index(call.tensors[0])])
    if activation_axis(first.op, dimensions) % dimensions != _matrix_axis(call):
        return None
    alike = (c for c in graph.calls if c.op.has_matrix and c.tensors == call.tensors)
    calls = tuple(c.name for c in alike if _matrix_axis(c) == _matrix_axis(call))
    return Group(call.tensors[0], call.input_shapes[0][_matrix_axis(call)], call.tensors, calls)


def _may_change(graph: ModelGraph, group: Group) -> bool:
    """Whether every weight of a group is a parameter, and nothing else reads what it changes."""
    producers = tuple(producer.call for producer in group.producers if producer.call is not None)
    for names in (group.calls, producers):
        ours = [graph[name] for name in names]
        for call in ours:
            if call.weight is None:
                return False
            for node in _readers(graph, call.weight):
                reader = None if node.call is None else graph[node.call]
                if reader is None or reader.weight != call.weight:
                    return False
                if not (_reads_other_rows(reader, call) or (reader in ours and _reads_alike(reader, call))):
                    return False
    vectors = (vector for producer in group.producers for vector in producer.vectors)
    return all(len(list(_readers(graph, vector))) == 1 for vector in vectors)


def _reads_other_rows(one: Call, other: Call) -> bool:
    """Whether two calls read different rows of one parameter."""
    (first, last), (start, end) = ((c.weight_start, c.weight_start + c.weight_shape[0]) for c in (one, other))
    return not (one.weight_transposed or other.weight_transposed) and (last <= start or end <= first)


def _reads_alike(one: Call, other: Call) -> bool:
    """Whether two calls read the same rows of one parameter, with the same meaning."""
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("op", "groups", "weight_start", "weight_shape", "weight_transposed")
    )


def _readers(graph: ModelGraph, parameter: str) -> Iterator[Node]:
    """Yield the nodes that compute with a parameter, seen through views of it unless the model returns those."""
    for node in graph.nodes:
        if parameter not in node.parameters:
            continue
        if node.function in VIEWS and not node.inputs and not set(node.outputs) & set(graph.outputs):
            yield from (reader for value in node.outputs for reader in graph.readers.get(value, ()))
        else:
            yield node


def _is_homogeneous(node: Node) -> bool:
    if len(node.inputs) != 1:
        return False
    if node.function in PRODUCTS:
        return not node.parameters  # by a number
    return node.function in (*ELEMENTWISE, *SHAPES, *POOLS, "interpolate")


def _matrix_axis(call: Call) -> int:
    """Return the axis of a call's channels, in its input and its output alike."""
    dimensions = len(call.input_shapes[0])
    return activation_axis(call.op, dimensions) % dimensions
