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

from raysq.graph import OpType, activation_axis

if TYPE_CHECKING:
    from raysq.graph import Call, ModelGraph, Node

__all__ = ["Group", "Producer", "find_groups"]

ROW_NORMS = ("layer_norm", "rms_norm")  # parameters along the last axis
CHANNEL_NORMS = ("batch_norm", "group_norm", "instance_norm")  # along axis 1
SHAPES = ("flatten", "view", "reshape", "squeeze", "unsqueeze")
HOMOGENEOUS = {
    *("relu", "leaky_relu", "prelu", "dropout", "contiguous", "clone", "detach", "to", "float", "abs", "neg"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "interpolate"),
}
SUMS = ("add", "sub", "__sub__", "__rsub__")
PRODUCTS = ("mul", "__mul__", "__rmul__", "multiply")
DIVISIONS = ("div", "__truediv__", "divide", "true_divide")
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
        if call.name in grouped or not _has_matrix(call) or not graph.node_of[call.name].inputs:
            continue
        group = _absorbed(graph, call) or _computed(graph, call)
        if group is not None and _may_change(graph, group):
            groups[group.name] = group
            grouped.update(group.calls)
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
                yield other, self._moved(value, axis, other)
        elif maker.function in PRODUCTS and len(maker.inputs) == 2:
            divided = [v for v in maker.inputs if v in self.axes]
            if len(divided) > 1:
                raise _InexactError
            if not divided:
                factor = self._factor(maker, value, axis)
                yield factor, self._moved(value, axis, factor)
        elif _is_homogeneous(maker):
            yield maker.inputs[0], self._moved(value, axis, maker.inputs[0])
        else:
            raise _InexactError

    def _down(self, reader: Node, value: int, axis: int) -> Iterator[tuple[int, int]]:
        call = None if reader.call is None else self.graph[reader.call]
        if call is not None and _has_matrix(call):
            if reader.inputs[0] != value or value in reader.inputs[1:] or axis != _matrix_axis(call):
                raise _InexactError
            self.calls[call.name] = None
            return
        product = reader.function in PRODUCTS and len(reader.inputs) == 2 and reader.inputs[0] != reader.inputs[1]
        summed = reader.function in SUMS and len(reader.inputs) == 2
        if not (product or summed or _is_homogeneous(reader)):
            raise _InexactError
        yield reader.outputs[0], self._moved(value, axis, reader.outputs[0])

    def _producer(self, maker: Node, axis: int) -> Producer | None:
        """Return how a node absorbs a division of its result along an axis, None if it can't."""
        trained = {name: self.graph.parameters[name] for name in maker.parameters if name in self.graph.parameters}
        vectors = tuple(n for n, shape in trained.items() if math.prod(shape) == self.channels)
        last = len(maker.shapes[0]) - 1
        call = None if maker.call is None else self.graph[maker.call]
        if call is not None and _has_matrix(call):
            bias = tuple(name for name in vectors if name != call.weight)
            if call.weight is None or len(maker.inputs) != 1 or axis != _matrix_axis(call):
                raise _InexactError
            if len(trained) > 1 + len(bias):
                raise _InexactError  # a bias that more than one value is made of
            return Producer(call.name, bias)
        if maker.function in ROW_NORMS:
            normalized = axis == last and all(shape == (self.channels,) for shape in trained.values())
            return Producer(None, vectors) if vectors and normalized else None
        if maker.function in CHANNEL_NORMS:
            return Producer(None, vectors) if vectors and axis == 1 else None
        if maker.function in PRODUCTS and len(maker.inputs) == 1 and len(trained) == 1 and vectors:
            shape = trained[vectors[0]]
            aligned = len(shape) <= last + 1 and shape[len(shape) - (last + 1 - axis)] == self.channels
            return Producer(None, vectors) if aligned and maker.inputs[0] not in self.axes else None
        return None

    def _factor(self, product: Node, value: int, axis: int) -> int:
        """Return the factor of a product that is divided in its place: the last that a weight makes."""
        for factor in reversed(product.inputs):
            maker = self.graph.makers.get(factor)
            while maker is not None and _is_homogeneous(maker):
                maker = self.graph.makers.get(maker.inputs[0])
            if maker is not None and maker.call is not None and _has_matrix(self.graph[maker.call]):
                return factor
        raise _InexactError

    def _moved(self, value: int, axis: int, other: int) -> int:
        """Return where the channels are in a value that is made of another, or that another is made of."""
        if other not in self.graph.makers:
            raise _InexactError
        ours, theirs = self._shape(value), self._shape(other)
        if len(ours) == len(theirs) and ours[axis] == theirs[axis] and (ours == theirs or axis < 2):
            return axis
        return _same_axis(ours, axis, theirs)


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
    if not graph.out_of_place:
        return None  # a tensor is read under a name that the record doesn't follow
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


def _computed(graph: ModelGraph, call: Call) -> Group:
    """Return the group of the calls that read the same activation."""
    calls = tuple(c.name for c in graph.calls if _has_matrix(c) and c.tensors[:1] == call.tensors[:1])
    channels = call.input_shapes[0][_matrix_axis(call)]
    return Group(call.tensors[0], channels, call.tensors, calls)


def _may_change(graph: ModelGraph, group: Group) -> bool:
    """Whether every weight of a group is a parameter, and nothing else reads the parameters that it changes."""
    producers = {producer.call for producer in group.producers if producer.call is not None}
    for names in (set(group.calls), producers):
        for name in names:
            weight = graph[name].weight
            if weight is None:
                return False
            if not all(node.call in names or _reads_other_rows(graph, node, names) for node in _readers(graph, weight)):
                return False
    vectors = (vector for producer in group.producers for vector in producer.vectors)
    return all(len(list(_readers(graph, vector))) == 1 for vector in vectors)


def _reads_other_rows(graph: ModelGraph, node: Node, names: set[str]) -> bool:
    """Whether a call reads other rows of a parameter than those named do."""
    if node.call is None:
        return False
    other = graph[node.call]
    rows = range(other.weight_start, other.weight_start + (other.weight_shape or (0,))[0])
    ours = [graph[name] for name in names if graph[name].weight == other.weight]
    return not other.weight_transposed and all(
        not call.weight_transposed
        and (rows.stop <= call.weight_start or call.weight_start + call.weight_shape[0] <= rows.start)
        for call in ours
    )


def _readers(graph: ModelGraph, parameter: str) -> Iterator[Node]:
    """Yield the nodes that compute with a parameter, seen through views of it."""
    for node in graph.nodes:
        if parameter not in node.parameters:
            continue
        if node.function in VIEWS and not node.inputs:
            yield from (reader for value in node.outputs for reader in graph.readers.get(value, ()))
        else:
            yield node


def _is_homogeneous(node: Node) -> bool:
    if len(node.inputs) != 1:
        return False
    if node.function in (*PRODUCTS, *DIVISIONS):
        return not node.parameters  # by a number
    return node.function in HOMOGENEOUS or node.function in SHAPES


def _has_matrix(call: Call) -> bool:
    return call.op.is_conv or call.op is OpType.LINEAR


def _matrix_axis(call: Call) -> int:
    """Return the axis of a call's channels, in its input and its output alike."""
    dimensions = len(call.input_shapes[0])
    return activation_axis(call.op, dimensions) % dimensions
