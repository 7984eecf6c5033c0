"""Writing TorchScript graphs from Python: nodes with constant arguments, and a module from a graph and its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import ConcreteModuleType, IntType, ListType, NumberType, OptionalType, TensorType

__all__ = ["Ints", "Scalars", "Writer", "constant", "module"]


class Ints(tuple[int, ...]):
    """A list of integers as an argument."""


class Scalars(tuple[float, ...]):
    """A list of numbers as an argument."""


class Writer:
    """Adds nodes to a graph; values, tensors and plain Python values are arguments alike."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    @contextmanager
    def before(self, node: Any) -> Iterator[None]:
        """Add what is added inside before a node."""
        with self._graph.insert_point_guard(node):
            yield

    def node(self, kind: str, *arguments: Any) -> Any:
        """Add a node with one result, all of its arguments given in the order of the schema; return the result."""
        values = [self._value(argument) for argument in arguments]
        return self._graph.insertNode(self._graph.create(kind, values, 1)).output()

    def inline(self, function: Any, *arguments: Any) -> Any:
        """Add what a scripted function computes; return its result."""
        return self._graph.insertGraph(function.graph, [self._value(argument) for argument in arguments])[0]

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, torch._C.Value):
            return argument
        if isinstance(argument, Ints):
            return self._list(argument, ListType(IntType.get()))
        if isinstance(argument, Scalars):
            return self._list(argument, ListType(OptionalType(NumberType.get())))
        return self._graph.insertConstant(argument)

    def _list(self, items: Sequence[float], kind: Any) -> Any:
        node = self._graph.create("prim::ListConstruct", [self._graph.insertConstant(item) for item in items], 1)
        self._graph.insertNode(node).output().setType(kind)
        return node.output()


def constant(value: Any) -> Any:
    """Return what a value of a graph always is; None where it isn't a constant."""
    node = value.node()
    if node.kind() == "prim::ListConstruct":
        items = [constant(item) for item in node.inputs()]
        return None if any(item is None for item in items) else items
    if node.kind() != "prim::Constant":
        return None
    held = value.toIValue()
    return held.item() if isinstance(held, Tensor) and held.dim() == 0 else held


def module(graph: Any, given: int, held: Mapping[str, Tensor], modules: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return a scripted module whose forward is a graph.

    It lives in a compilation unit of its own, which goes when the module goes; scripted in the ordinary way, each
    would stay in torch's one global unit for good.

    Args:
        graph: what it computes.
        given: how many of the graph's inputs come first and are the forward's arguments.
        held: tensors by attribute.
        modules: scripted modules by attribute.
        names: expressions for the other inputs of the graph, such as "weight" or "layer.packed".
    """
    function = torch._C._create_function_from_graph("computed", graph)
    built: Any = torch._C.ScriptModule("Lowered", torch._C.CompilationUnit(), True)  # type: ignore[call-arg]
    built._register_attribute("training", torch._C.BoolType.get(), False)
    for name, tensor in held.items():
        built._register_attribute(name, TensorType.get(), tensor)
    for name, child in modules.items():
        built._register_attribute(name, child._c._type(), child._c)
    arguments = [f"x{i}" for i in range(given)]
    inner = ", ".join([*arguments, *(f"self.{name}" for name in names)])
    source = f"def forward({', '.join(['self', *arguments])}):\n    return computed({inner})\n"
    built._define(ConcreteModuleType.from_jit_type(built._type()), source, {"computed": function}.get)
    torch._C._jit_pass_inline(built._get_method("forward").graph)
    wrapped = torch.jit._recursive.wrap_cpp_module(built)
    wrapped.__dict__["_computed"] = function  # what was inlined refers to it; an error that finds it gone is a SIGSEGV
    return wrapped
