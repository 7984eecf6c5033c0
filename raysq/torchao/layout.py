"""A Linear's int8 weight as a tensor subclass, which divides, quantizes and multiplies what comes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchao.utils import TorchAOBaseTensor

from raysq.errors import ModelError
from raysq.torchao.kernel import LARGEST_OF_7_BITS, LARGEST_OF_8_BITS, forget, int8_product

__all__ = ["SmoothQuantTensor"]

SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # all zeros would give 0


class SmoothQuantTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """An int8 weight with one scale per output channel; it stands in for a float weight in `linear`.

    linear(x, w) = (x / equalization_scale / a) @ qdata.T * scale * a + bias, the first factor rounded to [-127, 127].
    a is `activation_scale` (static), or that of each token's own largest magnitude (dynamic). NaN stays NaN only if
    dynamic.

    Attributes:
        qdata: (out, in), int8: the weight times `equalization_scale`, quantized.
        scale: (out,), float32.
        equalization_scale: (in,), float32; None divides by nothing.
        activation_scale: (), float32; None is dynamic.
        reduce_range: whether `qdata` takes 7 bits.
    """

    tensor_data_names = ["qdata", "scale"]
    tensor_attribute_names = ["dtype", "reduce_range"]
    optional_tensor_data_names = ["equalization_scale", "activation_scale"]

    qdata: Tensor
    scale: Tensor
    reduce_range: bool
    equalization_scale: Tensor | None
    activation_scale: Tensor | None

    def __new__(cls, qdata: Tensor, scale: Tensor, dtype: torch.dtype, *_: Any, **__: Any) -> SmoothQuantTensor:
        """Make a tensor of the float weight's shape and type, without data of its own."""
        tensor: SmoothQuantTensor = torch.Tensor._make_wrapper_subclass(
            cls, qdata.shape, dtype=dtype, device=qdata.device
        )
        return tensor

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
        reduce_range: bool,
        equalization_scale: Tensor | None = None,
        activation_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.reduce_range = reduce_range
        self.equalization_scale = equalization_scale
        self.activation_scale = activation_scale

    @classmethod
    @torch.no_grad()
    def from_float(
        cls,
        weight: Tensor,  # (out, in)
        equalization_scale: Tensor | None = None,
        activation_scale: Tensor | None = None,
        *,
        reduce_range: bool = False,
    ) -> SmoothQuantTensor:
        """Quantize a weight; see the class for the arguments."""
        scaled = weight.float() if equalization_scale is None else weight.float() * equalization_scale
        scale = (scaled.abs().amax(1) / _largest(reduce_range)).clamp_min(SMALLEST_SCALE)
        qdata = (scaled / scale[:, None]).round().to(torch.int8)
        return cls(qdata, scale, weight.dtype, reduce_range, equalization_scale, activation_scale)

    def dequantize(self) -> Tensor:
        """Return the float weight that this one stands in for, (out, in)."""
        weight = self.qdata * self.scale[:, None]
        return (weight if self.equalization_scale is None else weight / self.equalization_scale).to(self.dtype)

    def _stable_hash_for_caching(self) -> str:
        """Tell torch.compile's cache all that its code depends on."""
        inner = [self.qdata, self.scale, self.equalization_scale, self.activation_scale]
        shapes = [t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in inner]
        return repr((type(self), self.dtype, self.reduce_range, self.requires_grad, shapes))


@torch.no_grad()
def _linear(input: Tensor, weight: SmoothQuantTensor, bias: Tensor | None = None) -> Tensor:
    rows = input.reshape(-1, input.shape[-1]).float()
    if weight.equalization_scale is not None:
        rows = rows / weight.equalization_scale
    a = weight.activation_scale
    if a is None:
        a = (rows.abs().amax(1, keepdim=True) / LARGEST_OF_8_BITS).clamp_min(SMALLEST_SCALE)
    rows = (rows / a).round_().clamp_(-LARGEST_OF_8_BITS, LARGEST_OF_8_BITS).to(torch.int8)
    output: Tensor = int8_product(rows, weight.qdata, weight.scale, _largest(weight.reduce_range)).mul_(a)
    if bias is not None:
        output.add_(bias)
    return output.reshape(*input.shape[:-1], len(weight.qdata)).to(input.dtype)


def _largest(reduce_range: bool) -> int:
    return LARGEST_OF_7_BITS if reduce_range else LARGEST_OF_8_BITS


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, SmoothQuantTensor) or not isinstance(source, SmoothQuantTensor):
        raise ModelError(
            "int8 and float weights can't be copied into each other. Call load_state_dict(..., assign=True)."
        )
    if target.__tensor_flatten__() != source.__tensor_flatten__():
        raise ModelError("int8 weights of another kind can't be copied. Call load_state_dict(..., assign=True).")
    for name in target.__tensor_flatten__()[0]:
        getattr(target, name).copy_(getattr(source, name))
    forget(target.qdata)
    return target


def _implement(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda func, types, args, kwargs: function(*args, **kwargs)


SmoothQuantTensor.implements(torch.ops.aten.linear.default)(_implement(_linear))
SmoothQuantTensor.implements_torch_function(functional.linear)(_implement(_linear))
SmoothQuantTensor.implements(torch.ops.aten.copy_.default)(_implement(_copy_))
torch.serialization.add_safe_globals([SmoothQuantTensor])  # for torch.load(..., weights_only=True)
