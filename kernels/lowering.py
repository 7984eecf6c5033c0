"""From a captured model and a recipe's plans to a scripted module on oneDNN's int8 kernels."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raysq.arithmetic import QParams, quantize
from raysq.graph import Call, ModelGraph, activation_axis
from raysq.intercept import Window
from raysq.kernels.captured import MARK, Captured
from raysq.kernels.fusion import CONVOLUTION, LINEAR, PASSING, Fused, clipped, fuse, is_reduced
from raysq.kernels.in_place import overwrite
from raysq.kernels.packed import packed_convolution, packed_linear
from raysq.kernels.script_graph import Ints, Scalars, Writer, constant, module
from raysq.plan import CallPlan
from raysq.recipe import Precision
from raysq.weight import weight_of

__all__ = ["Packing", "lower", "unlowerable"]

UINT8, FLOAT32, BFLOAT16 = 0, 6, 15  # TorchScript's numbers of the types
CHANNELS_LAST = 2  # and of the memory format
SUMMING = "onednn::qconv2d_pointwise"  # the kernel of a convolution that takes post-ops
WINDOW = (3, 4, 5)  # operands of a convolution's node: stride, padding, dilation
KEPT_BYTES = 256 << 20  # of weights that the last recipe hasn't: those that are tried in turn alternate between few


# quantizes to uint8 and passes the memory on as such: `int_repr` copies it, which takes 20 times as long as quantizing
QUANTIZED = """
def quantized(x: Tensor, scale: float, zero: int) -> Tensor:
    q = torch.quantize_per_tensor(x.contiguous(), scale, zero, torch.quint8)
    return torch.empty([0], dtype=torch.uint8).set_(q, 0, q.size(), q.stride())

def quantized_2d(x: Tensor, scale: float, zero: int) -> Tensor:
    q = torch.quantize_per_tensor(x.contiguous(memory_format=torch.channels_last), scale, zero, torch.quint8)
    return torch.empty([0], dtype=torch.uint8).set_(q.permute([0, 2, 3, 1]), 0, q.size(), q.stride())
"""


@functools.cache
def _quantizing() -> torch.jit.CompilationUnit:
    return torch.jit.CompilationUnit(QUANTIZED)


@dataclass(frozen=True)
class _Packed:
    """A packed weight, and the parameter that it was made of as long as anyone else holds that."""

    parameter: weakref.ref[nn.Parameter]
    module: Any

    @property
    def nbytes(self) -> int:
        """What it takes: the integers as they are stored, and in the kernel's layout."""
        return 2 * int(self.module.weight.nbytes)


class Packing:
    """Packed weights of a model, kept from recipe to recipe: those of the last one, and `KEPT_BYTES` of others."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[object, ...], _Packed] = OrderedDict()  # the latest used last

    def get(self, call: Call, kernel: Fused, parameter: nn.Parameter) -> Any:
        """Return the module that holds the weight of a call, packed for its kernel."""
        plan, params = kernel.plan, kernel.params
        assert plan.weights is not None
        scales = plan.weights[0]
        grid = (float(params.scale), int(params.zero_point)) if kernel.is_convolution else ()
        rounded = None if plan.rounded is None else plan.rounded.tobytes()
        what = (scales.scale.tobytes(), scales.zero_point.tobytes(), scales.grid, rounded, grid)
        key = (call.name, id(parameter), *what)
        known = self.kept.get(key)
        if known is None or known.parameter() is not parameter:  # an id may be given again
            known = _Packed(weakref.ref(parameter), self._packed(call, kernel, parameter, scales))
            self.kept[key] = known
        self.kept.move_to_end(key)
        return known.module

    def trim(self, latest: int) -> None:
        """Forget what was made of parameters that are gone, and the oldest of what is too much.

        Args:
            latest: how many of the last used are kept in any case.
        """
        others = list(self.kept.items())[: len(self.kept) - latest]
        left = KEPT_BYTES
        for key, packed in reversed(others):
            left -= packed.nbytes
            if left < 0 or packed.parameter() is None:
                del self.kept[key]

    def _packed(self, call: Call, kernel: Fused, parameter: nn.Parameter, scales: QParams) -> Any:
        exact = weight_of(call, parameter.detach().numpy()) if kernel.plan.rounded is None else kernel.plan.rounded
        weight = torch.from_numpy(
            np.ascontiguousarray(quantize(exact, scales), np.int8)
        )  # packing reads memory in order
        scale, zero = (torch.from_numpy(np.atleast_1d(v)) for v in (scales.scale, scales.zero_point))
        if not kernel.is_convolution:
            return packed_linear(weight, scale, zero)
        stride, padding, dilation = (tuple(constant(kernel.node.inputsAt(i))) for i in WINDOW)
        window, params = Window(tuple(weight.shape[2:]), stride, padding, dilation), kernel.params
        return packed_convolution(weight, scale, zero, float(params.scale), int(params.zero_point), window, call.groups)


def unlowerable(captured: Captured, model: ModelGraph) -> dict[str, str]:
    """Return the calls that have no int8 kernel here although their kind has one, and why."""
    nodes = {constant(mark.inputsAt(1)): mark.inputsAt(0).node() for mark in _marks(captured.graph)}
    reasons = {}
    for call in model.calls:
        reason = _why_not(call, nodes.get(call.name))
        if reason:
            reasons[call.name] = reason
    return reasons


def _why_not(call: Call, node: Any) -> str:
    if node is None:
        return "its place in the traced graph is lost"
    if call.op.is_conv and node.kind() != CONVOLUTION:
        return "its padding has no int8 kernel"
    if call.op.has_weight and not call.op.is_conv and (node.kind() != LINEAR or len(call.input_shapes[0]) < 2):
        return "it is no plain linear layer"
    return ""


def lower(captured: Captured, model: nn.Module, calls: ModelGraph, plans: Mapping[str, CallPlan], kept: Packing) -> Any:
    """Return a scripted module that runs plans.

    Args:
        captured: the model's graph.
        model: whose parameters are read, with a recipe's scales worked into them.
        calls: its calls.
        plans: by call; one that has a reason stays in float.
        kept: packed weights of this model.
    """
    return _Lowering(captured, model, calls, plans, kept).run()


class _Lowering:
    """One graph on its way."""

    def __init__(
        self, captured: Captured, model: nn.Module, calls: ModelGraph, plans: Mapping[str, CallPlan], kept: Packing
    ) -> None:
        self._captured, self._calls, self._plans, self._kept = captured, calls, plans, kept
        self._tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self._graph = captured.graph.copy()
        inputs = [value.debugName() for value in self._graph.inputs()]
        self._names = dict(zip(inputs[self._given :], captured.parameters, strict=True))
        self._write = Writer(self._graph)
        self._modules: dict[str, Any] = {}
        self._packed_inputs: dict[str, str] = {}  # graph input to the expression for it
        self._integers: dict[tuple[object, ...], Any] = {}
        self._smoothed: dict[tuple[str, bytes], Any] = {}
        self._shared = not any(_changes_memory(node) for node in self._graph.nodes())

    def run(self) -> Any:
        int8 = self._without_marks()
        kernels = fuse(self._graph, self._given, int8, self._plans, alone=not self._shared)
        for number, kernel in enumerate(kernels):
            self._emit(number, kernel)
        self._kept.trim(len(kernels))
        for node in self._graph.findAllNodes("aten::view"):
            if _is_resize(node):  # what a convolution returns may have another layout here, which `view` refuses
                self._instead(node, "aten::reshape")
        pools = self._graph.findAllNodes("aten::max_pool2d")
        for node in [pool for pool in pools if self._is_integer(pool.inputsAt(0))]:
            self._instead(node, "quantized::max_pool2d")  # the other counts positions in uint8: it refuses over 255
        torch._C._jit_pass_dce(self._graph)
        torch._C._jit_pass_cse(self._graph)
        if self._shared:
            overwrite(self._graph, self._write)
        return self._module()

    @property
    def _given(self) -> int:
        return len(self._captured.flat.example)

    def _without_marks(self) -> dict[str, Any]:
        """Take the marks out, smooth inputs, cast to bf16 and back; return the nodes of the calls in int8."""
        int8 = {}
        for mark in list(_marks(self._graph)):
            name, value = constant(mark.inputsAt(1)), mark.inputsAt(0)
            node, plan = value.node(), self._plans.get(name)
            result = value
            if plan is not None and plan.multiplier is not None:
                self._smooth(name, node, plan.multiplier)
            if plan is not None and not plan.reason and plan.config.precision is Precision.BF16:
                self._cast(node)
                with self._write.before(mark):
                    result = self._write.node("aten::to", value, FLOAT32, False, False, None)
                result.setType(mark.output().type())
            elif plan is not None and not plan.reason and plan.config.is_int8:
                int8[name] = node
            mark.output().replaceAllUsesWith(result)
            mark.destroy()
        return int8

    def _smooth(self, name: str, node: Any, factors: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        """Multiply what a call reads, once for all calls that share it."""
        value = node.inputsAt(0)
        key = (value.debugName(), factors.tobytes())
        if not self._shared or key not in self._smoothed:
            call = self._calls[name]
            shape = [1] * len(call.input_shapes[0])
            shape[activation_axis(call.op, len(shape))] = -1
            with self._write.before(node):
                vector = torch.from_numpy(factors).reshape(shape)
                product = self._write.node("aten::mul", value, vector)
            product.setType(value.type())
            self._smoothed[key] = product
        node.replaceInput(0, self._smoothed[key])

    def _cast(self, node: Any) -> None:
        """Let a node compute in bf16, on parameters that are held so."""
        for position, value in enumerate(list(node.inputs())):
            if value.debugName() in self._names:
                node.replaceInput(position, self._narrow(value))
            elif value.type().kind() == "TensorType" and value.type().scalarType() == "Float":
                with self._write.before(node):
                    node.replaceInput(position, self._write.node("aten::to", value, BFLOAT16, False, False, None))
        node.output().setType(torch._C.TensorType.get())  # the traced one is fp32

    def _narrow(self, parameter: Any) -> Any:
        """Return the input of the graph that has a parameter in bf16."""
        name = self._names[parameter.debugName()]
        narrow = f"{name} in bf16"
        if narrow not in self._tensors:
            self._tensors[narrow] = self._tensors[name].detach().to(torch.bfloat16)
            self._names[self._graph.addInput().debugName()] = narrow
        return next(value for value in self._graph.inputs() if self._names.get(value.debugName()) == narrow)

    def _emit(self, number: int, kernel: Fused) -> None:
        """Write one int8 kernel in the place of the nodes that it computes."""
        call, params, result = self._calls[kernel.name], kernel.params, kernel.result
        layer = f"layer{number}"
        self._modules[layer] = self._kept.get(call, kernel, self._tensors[str(call.weight)])  # type: ignore[arg-type]
        packed, scale, zero = (self._input(f"{layer}.{part}") for part in ("packed", "scale", "zero"))
        function, clip = kernel.function, False
        if result is not None and is_reduced(result.grid):
            both = clipped(function, result) if kernel.takes_post_ops else None
            function, clip = both or function, both is None
        written = (1.0, 0, FLOAT32) if result is None else (float(result.scale), int(result.zero_point), UINT8)
        post = (function.name, Scalars(function.scalars), function.algorithm)
        with self._write.before(kernel.at):
            x = self._quantized(kernel, len(call.input_shapes[0]))
            head = (x, float(params.scale), int(params.zero_point), packed, scale, zero)
            bias = self._bias(kernel)
            if not kernel.is_convolution:
                if kernel.other is None:
                    value = self._write.node("onednn::qlinear_pointwise", *head, bias, *written, *post)
                else:
                    value = self._write.node(
                        "onednn::qlinear_pointwise", *head, kernel.other, bias, *written, 1.0, 0, "add", 1.0, *post
                    )
            else:
                sizes = (*(Ints(constant(kernel.node.inputsAt(i))) for i in WINDOW), call.groups)
                if kernel.other is None:
                    kind = SUMMING if kernel.takes_post_ops else "onednn::qconv_pointwise"
                    value = self._write.node(kind, *head, bias, *sizes, *written, *post)
                else:
                    value = self._write.node(
                        SUMMING,
                        *head,
                        self._in_channels_last(kernel.other),
                        bias,
                        *sizes,
                        *written,
                        1.0,
                        0,
                        "sum",
                        1.0,
                        *post,
                    )
            if clip and result is not None:
                value = self._write.node("aten::clamp_", value, result.grid.qmin, result.grid.qmax)
        kernel.at.output().replaceAllUsesWith(value)
        if result is not None:
            self._integers[value.debugName(),] = value

    def _bias(self, kernel: Fused) -> Any:
        bias = kernel.node.inputsAt(2)
        shift = kernel.plan.shift
        if shift is None:
            return bias
        tensor = torch.from_numpy(shift)
        if bias.type().kind() == "NoneType":
            return tensor
        name = self._names.get(bias.debugName())
        return self._write.node("aten::add", bias, tensor, 1) if name is None else self._tensors[name].detach() + tensor

    def _quantized(self, kernel: Fused, dimensions: int) -> Any:
        """Return the integers of what a kernel reads: those that another one wrote, or quantized once for all."""
        value, params = kernel.node.inputsAt(0), kernel.params
        if self._is_integer(value):
            return value
        image = kernel.is_convolution and dimensions == 4
        scale, zero, grid = float(params.scale), int(params.zero_point), params.grid
        key = (value.debugName(), scale, zero, grid, image)
        if not self._shared or key not in self._integers:
            function = _quantizing().quantized_2d if image else _quantizing().quantized
            integers = self._write.inline(function, value, scale, zero)
            if is_reduced(grid):  # quantizing clamps to eight bits, a reduced range has seven
                integers = self._write.node("aten::clamp_", integers, grid.qmin, grid.qmax)
            self._integers[key] = integers
        return self._integers[key]

    def _in_channels_last(self, value: Any) -> Any:
        """Return a value in the layout that a convolution writes its sum in."""
        if value.node().kind() == SUMMING:
            return value
        return self._write.node("aten::contiguous", value, CHANNELS_LAST)

    def _is_integer(self, value: Any) -> bool:
        """Whether a value is what a kernel wrote as integers, shape changes apart."""
        while (value.debugName(),) not in self._integers:
            if value.node().kind() not in PASSING:
                return False
            value = value.node().inputsAt(0)
        return True

    def _instead(self, node: Any, kind: str) -> None:
        """Put an op of the same arguments in a node's place."""
        with self._write.before(node):
            node.output().replaceAllUsesWith(self._write.node(kind, *node.inputs()))

    def _input(self, expression: str) -> Any:
        value = self._graph.addInput()
        self._packed_inputs[value.debugName()] = expression
        return value

    def _module(self) -> Any:
        """Put graph, parameters and packed weights together; parameters that nothing reads any more are left out."""
        held: dict[str, Tensor] = {}
        expressions = []
        inputs = list(self._graph.inputs())
        for position in reversed(range(self._given, len(inputs))):
            value = inputs[position]
            if not value.uses():
                self._graph.eraseInput(position)
                continue
            expression = self._packed_inputs.get(value.debugName())
            if expression is None:
                expression = f"held{len(held)}"
                held[expression] = _in_fast_layout(self._tensors[self._names[value.debugName()]].detach(), value)
            expressions.append(expression)
        return module(self._graph, self._given, held, self._modules, expressions[::-1])


def _marks(graph: Any) -> list[Any]:
    return [node for node in graph.nodes() if node.kind() == MARK]


def _changes_memory(node: Any) -> bool:
    """Whether an op writes into its operand: then one value is not the same before and after it."""
    name = node.kind().partition("::")[2]
    return name.endswith("_") and not name.endswith("__") and name not in ("lift_fresh_",)


def _is_resize(node: Any) -> bool:
    """Whether a view changes the shape, not the type."""
    return bool(node.inputsAt(1).type().kind() == "ListType")


def _in_fast_layout(tensor: Tensor, value: Any) -> Tensor:
    """Return a convolution's weight in channels_last, in which float kernels are fastest."""
    if tensor.dim() == 4 and any(use.user.kind() == CONVOLUTION and use.offset == 1 for use in value.uses()):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor
