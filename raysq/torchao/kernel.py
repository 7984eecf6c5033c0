"""The product of int8 rows and an int8 weight: oneDNN's kernel where it is exact, else exact in float."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from raysq.kernels.cpu import lacks_vnni

__all__ = ["LARGEST_OF_7_BITS", "LARGEST_OF_8_BITS", "forget", "int8_product"]

LARGEST_OF_8_BITS = 127
LARGEST_OF_7_BITS = 63  # 2 * 255 * 63 < 2**15: two u8 x s8 products fit where they are added in int16
ZERO_POINT = 128  # rows go to oneDNN as u8: with one row its s8 kernel took 9 times as long

# Weights in oneDNN's layout, each as long as its weight lives. They can be neither copied nor pickled, so they can't be
# attributes of what is.
_packed = WeakTensorKeyDictionary()


@torch.library.custom_op("raysq::int8_product", mutates_args=())  # torch.compile takes it whole
def int8_product(
    rows: Tensor,  # (rows, in), int8
    weight: Tensor,  # (out, in), int8
    scale: Tensor,  # (out,), float32
    largest: int,  # magnitude that no weight exceeds
) -> Tensor:
    """Return rows @ weight.T * scale, (rows, out) in float32, from exact integer sums.

    In float, sums are exact up to 2**24, that is for 1040 input channels at the least.
    """
    if not _onednn_is_exact(weight, largest):
        return rows.float() @ weight.float().t() * scale
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        *(rows.view(torch.uint8) ^ ZERO_POINT, 1.0, ZERO_POINT),
        *(_onednn_weight(weight), scale, torch.zeros_like(scale, dtype=torch.int32)),
        *(None, 1.0, 0, torch.float32, "none", [], ""),  # no bias; the output is float
    )
    return product


@int8_product.register_fake
def _(rows: Tensor, weight: Tensor, scale: Tensor, largest: int) -> Tensor:
    return scale.new_empty(len(rows), len(weight))


def _onednn_is_exact(weight: Tensor, largest: int) -> bool:
    fits = largest <= LARGEST_OF_7_BITS or not lacks_vnni()
    return fits and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()


def forget(weight: Tensor) -> None:
    """Drop what is remembered of a weight that has changed."""
    _packed.pop(weight, None)


def _onednn_weight(weight: Tensor) -> Tensor:
    if weight not in _packed:
        _packed[weight] = torch.ops.onednn.qlinear_prepack(weight, None)
    packed: Tensor = _packed[weight]
    return packed
