"""The one place where a model's calls are intercepted: inspecting, observing and building all stand on it.

A torch function mode sees modules and functional ops alike, under `torch.jit.trace` too. Global forward hooks keep
the path of the module that is running, so that every call gets a name that is stable from run to run.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raysq.graph import OpType

__all__ = ["POOLS", "Function", "Interceptor", "Operands", "Site", "Window", "with_strides"]

CALLS: Mapping[str, OpType] = {
    "conv1d": OpType.CONV1D,
    "conv2d": OpType.CONV2D,
    "conv3d": OpType.CONV3D,
    "conv_transpose1d": OpType.CONV_TRANSPOSE1D,
    "conv_transpose2d": OpType.CONV_TRANSPOSE2D,
    "conv_transpose3d": OpType.CONV_TRANSPOSE3D,
    "linear": OpType.LINEAR,
    "addmm": OpType.LINEAR,
    "matmul": OpType.MATMUL,
    "bmm": OpType.BMM,
    "add": OpType.ADD,
    "max_pool1d": OpType.MAX_POOL,
    "max_pool2d": OpType.MAX_POOL,
    "max_pool3d": OpType.MAX_POOL,
    "avg_pool2d": OpType.AVG_POOL,
    "avg_pool3d": OpType.AVG_POOL,
    "adaptive_avg_pool2d": OpType.AVG_POOL,
    "adaptive_avg_pool3d": OpType.AVG_POOL,
    "embedding_bag": OpType.EMBEDDING_BAG,
    "lstm": OpType.LSTM,
}
POOLS = (OpType.MAX_POOL, OpType.AVG_POOL)
SPELLINGS = {"__add__": "add", "__radd__": "add", "__matmul__": "matmul", "__rmatmul__": "matmul", "mm": "matmul"}
NUMBERS = ("stride", "padding", "output_padding", "dilation", "groups")  # of a convolution
IN_PLACE = {"__iadd__": "add", "add_": "add", "relu_": "relu", "__imul__": "mul", "mul_": "mul", "relu6_": "relu6"}
OUT_OF_PLACE: Mapping[str, Callable[..., Any]] = {
    "add": torch.add,
    "mul": torch.mul,
    "relu": torch.relu,
    "relu6": F.relu6,
}
PLACES = functools.partial(torch.nonzero, as_tuple=True)  # what `torch.where` of a condition alone is
# A copy of torch's own function in which no argument ever claims to override it: run under the mode again,
# it shows the linear layers and products inside, which torch hides in one opaque call.
ATTENTION = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.__dict__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
ATTENTION.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


@dataclass(frozen=True)
class Site:
    """Where a function was called from: its name, kind, and the module whose forward was running."""

    name: str
    op: OpType
    function: str
    module: str


@dataclass(frozen=True)
class Operands:
    """The tensors of a quantizable call, whatever the spelling of the function was.

    Attributes:
        activations: inputs that are data.
        weights: trained operands; an LSTM has several, most calls have one, products and sums none.
        function: computes the call of activations, weights and bias.
        bias: that of a convolution or linear layer that has one.
        groups: of a convolution, else 1.
        window: what a convolution reads around a position, None for every other call.
    """

    activations: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    function: Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None], Any]
    bias: Tensor | None = None
    groups: int = 1
    window: Window | None = None

    def run(self, activations: Sequence[Tensor], weights: Sequence[Tensor], shift: Tensor | None = None) -> Any:
        """Compute the call with other activations and weights, and with its bias shifted."""
        bias = self.bias if shift is None else shift if self.bias is None else self.bias + shift
        return self.function(activations, weights, bias)


@dataclass(frozen=True)
class Window:
    """The receptive field of a convolution, one entry per spatial axis; `padding` on each side or "same"/"valid"."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]


@dataclass(frozen=True)
class Function:
    """A torch function that was called, with the arguments it got."""

    name: str
    module: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Interceptor(TorchFunctionMode):
    """Runs `on_call` in place of every quantizable call inside `model`, by default the call itself.

    Args:
        model: the root; functions called outside of its forward pass through untouched.
        on_call: gets the site and its operands, returns the result of the call.
        on_function: told of every other function and of every call, with its result.
        out_of_place: turn in-place ops into out-of-place ones, so that they can be quantized and fused.
    """

    def __init__(
        self,
        model: nn.Module,
        on_call: Callable[[Site, Operands], Any] | None = None,
        on_function: Callable[[Function, Site | None, Any], None] | None = None,
        *,
        out_of_place: bool = True,
    ) -> None:
        super().__init__()
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._leaves = {
            path: not any(module.children()) and type(module).__module__.startswith("torch.nn")
            for path, module in model.named_modules()
        }
        self._on_call = on_call or (lambda _, operands: operands.run(operands.activations, operands.weights))
        self._on_function = on_function
        self._out_of_place = out_of_place
        self._stack: list[str] = []
        self._seen: Counter[str] = Counter()
        self._hooks: list[Any] = []
        self._depth = 0

    def __enter__(self) -> Interceptor:
        if self._depth == 0:  # entered again inside of an attention
            self._stack.clear()
            self._hooks = [
                nn.modules.module.register_module_forward_pre_hook(self._enter_module),
                nn.modules.module.register_module_forward_hook(self._leave_module, always_call=True),
            ]
        self._depth += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self._depth -= 1
        if self._depth == 0:
            for hook in self._hooks:
                hook.remove()

    def _enter_module(self, module: nn.Module, _: object) -> None:
        path = self._paths.get(id(module))
        if path is not None:
            if not self._stack:
                self._seen.clear()
            self._stack.append(path)

    def _leave_module(self, module: nn.Module, _: object, __: object) -> None:
        if id(module) in self._paths and self._stack:
            self._stack.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self._stack:
            return func(*args, **kwargs)
        if name == "__get__":
            return self._attribute(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return ATTENTION(*args, **kwargs)
        if self._out_of_place:
            func, name, args, kwargs = _without_mutation(func, name, args, kwargs)
        if func is torch.where and len(args) + len(kwargs) == 1:  # IPEX's passes fail on "aten::where" of one operand
            func, name = PLACES, "nonzero"
            args, kwargs = (*args, *kwargs.values()), {}
        name = SPELLINGS.get(name, name)
        operands = _operands(name, func, args, kwargs)
        site = None if operands is None else self._site(name)
        result = func(*args, **kwargs) if site is None or operands is None else self._on_call(site, operands)
        if self._on_function is not None:
            self._on_function(Function(name, self._stack[-1], args, kwargs), site, result)
        return result

    def _attribute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read an attribute of a tensor; some, as `.mT`, are functions of it."""
        result = func(*args, **kwargs)
        if self._on_function is not None and isinstance(result, Tensor):
            self._on_function(Function(func.__self__.__name__, self._stack[-1], args, kwargs), None, result)
        return result

    def _site(self, function: str) -> Site:
        module = self._stack[-1]
        base = module if module and self._leaves[module] else f"{module}:{function}" if module else function
        self._seen[base] += 1
        name = base if self._seen[base] == 1 else f"{base}#{self._seen[base]}"
        return Site(name, CALLS[function], function, module)


def _without_mutation(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, str, tuple[Any, ...], dict[str, Any]]:
    """Return the out-of-place spelling of an in-place function; others come back as they are."""
    if kwargs.get("inplace") is True:
        return func, name, args, {**kwargs, "inplace": False}
    plain = IN_PLACE.get(name)
    if plain is None or not _same_kind(args):
        return func, name, args, kwargs
    return OUT_OF_PLACE[plain], plain, args, kwargs


def _same_kind(args: tuple[Any, ...]) -> bool:
    """Whether the result of an in-place op has the first operand's shape and type, as its out-of-place form would."""
    target = args[0]
    if not target.is_floating_point():
        return False
    return all(
        not isinstance(a, Tensor)
        or (a.dtype == target.dtype and torch.broadcast_shapes(a.shape, target.shape) == target.shape)
        for a in args[1:]
    )


def _operands(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands | None:
    """Return the tensors of a quantizable call, or None if this use of the function is not one."""
    op = CALLS.get(name)
    if op is None:
        return None
    if op is OpType.LSTM:
        return _lstm(func, args, kwargs)
    if op is OpType.EMBEDDING_BAG:
        return _embedding_bag(func, args, kwargs)
    if name == "addmm":
        return _addmm(args, kwargs)
    if op is OpType.LINEAR:
        args, kwargs = _positional(("input", "weight", "bias"), args, kwargs)
        if not _is_data(args[0]) or not _is_data(args[1]):
            return None
        bias, rest = _bias(args, kwargs)
        return Operands((args[0],), (args[1],), lambda a, w, b: func(a[0], w[0], _like(b, w[0]), *rest, **kwargs), bias)
    if op.is_conv:
        return _conv(name, func, args, kwargs)
    if op in (OpType.MATMUL, OpType.BMM, OpType.ADD):
        args, kwargs = _positional(("input", "other" if op is not OpType.BMM else "mat2"), args, kwargs)
        if len(args) != 2 or kwargs or not all(_is_data(a) for a in args):
            return None
        if (
            op is OpType.ADD
            and args[0].shape != args[1].shape
            or op is not OpType.ADD
            and min(a.dim() for a in args) < 2
        ):
            return None
        return Operands(args, (), lambda a, *_: func(a[0], a[1]))
    args, kwargs = _positional(("input",), args, kwargs)
    if not _is_data(args[0]) or kwargs.get("return_indices"):
        return None
    args, kwargs = _with_stride(name, args, kwargs)
    if args[0].dim() == 1 + int(name[-2]):  # without a batch axis, which oneDNN Graph's pools need
        return Operands((args[0],), (), lambda a, *_: func(a[0][None], *args[1:], **kwargs)[0])
    return Operands((args[0],), (), lambda a, *_: func(a[0], *args[1:], **kwargs))


class _Strides(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if CALLS.get(name) in POOLS:
            args, kwargs = _with_stride(name, args, kwargs)
        return func(*args, **kwargs)


def with_strides(model: nn.Module) -> nn.Module:
    """Make a model spell out its pools' default strides whoever runs or traces it, and return it."""
    kind = type(model)

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Strides():
            return kind.forward(self, *args, **kwargs)

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return model


def _with_stride(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Spell out a pool's default stride, its kernel size: oneDNN Graph fails on the empty list that is traced."""
    if name.startswith("adaptive"):
        return args, kwargs
    args, kwargs = _positional(("input", "kernel_size", "stride"), args, kwargs)
    if len(args) == 2:
        return (*args, args[1]), kwargs
    return (*args[:2], args[1] if args[2] is None or args[2] == [] else args[2], *args[3:]), kwargs


def _positional(
    names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Move leading keyword arguments to their positions."""
    kwargs = dict(kwargs)
    for name in names[len(args) :]:
        if name not in kwargs:
            break
        args = (*args, kwargs.pop(name))
    return args, kwargs


def _conv(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands | None:
    transposed = "transpose" in name
    names: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    if transposed:
        names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    given |= {name: _fixed(given[name]) for name in NUMBERS if name in given}
    x, weight = given["input"], given["weight"]
    axes = weight.dim() - 2
    if not _is_data(x) or not _is_data(weight) or x.dim() != axes + 2:
        return None
    if isinstance(given.get("padding"), str):
        given["padding"] = _padding(given, axes)
    args, kwargs = _positional(names, (), given)
    window = None
    if not transposed:
        padding = given.get("padding", 0)
        window = Window(
            kernel=tuple(weight.shape[2:]),
            stride=_per_axis(given.get("stride", 1), axes),
            padding=padding if isinstance(padding, str) else _per_axis(padding, axes),
            dilation=_per_axis(given.get("dilation", 1), axes),
        )
    bias, rest = _bias(args, kwargs)
    groups = given.get("groups", 1)
    return Operands(
        (x,), (weight,), lambda a, w, b: func(a[0], w[0], _like(b, w[0]), *rest, **kwargs), bias, groups, window
    )


def _fixed(value: Any) -> Any:
    """Return a size that is being traced as the number that it is: TorchScript takes no tensor for a window."""
    return int(value) if isinstance(value, Tensor) else value


def _padding(given: Mapping[str, Any], axes: int) -> tuple[int, ...] | str:
    """Spell out "valid" and an even "same" in numbers: oneDNN Graph fuses no other convolution."""
    if given["padding"] == "valid":
        return (0,) * axes
    reach = [
        d * (k - 1) for k, d in zip(given["weight"].shape[2:], _per_axis(given.get("dilation", 1), axes), strict=True)
    ]
    return "same" if any(r % 2 for r in reach) else tuple(r // 2 for r in reach)


def _bias(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, tuple[Any, ...]]:
    """Take the bias out of the arguments of a convolution or linear layer."""
    return (args[2], args[3:]) if len(args) > 2 else (kwargs.pop("bias", None), ())


def _like(bias: Tensor | None, weight: Tensor) -> Tensor | None:
    return bias if bias is None or bias.dtype == weight.dtype else bias.to(weight.dtype)


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * axes if len(values) == 1 else values


def _addmm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands | None:
    """`addmm(bias, x, weight)`, with a trained weight of shape (in, out): a linear layer written the other way."""
    args, kwargs = _positional(("input", "mat1", "mat2"), args, kwargs)
    if len(args) != 3 or kwargs or not isinstance(args[2], nn.Parameter) or args[0].dim() != 1 or not _is_data(args[1]):
        return None
    bias, x, weight = args
    return Operands((x,), (weight.t(),), lambda a, w, b: F.linear(a[0], w[0], _like(b, w[0])), bias)


def _embedding_bag(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands | None:
    args, kwargs = _positional(("input", "weight"), args, kwargs)
    indices, weight, *rest = args
    if not _is_data(weight):
        return None
    return Operands((), (weight,), lambda _, w, __: func(indices, w[0], *rest, **kwargs))


def _lstm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands | None:
    """`lstm(input, hx, weights, …)`; the packed-sequence form has a tensor in second place and stays in float."""
    if isinstance(args[1], Tensor) or not _is_data(args[0]):
        return None
    x, hidden, flat, *rest = args
    return Operands((x,), tuple(flat), lambda a, w, _: func(a[0], hidden, list(w), *rest, **kwargs))


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
