"""Weights in the layout of oneDNN's kernels, which can't be serialized: they are stored plain and packed on loading.

Each class is scripted once; every further weight is a copy of that module with other tensors.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from raysq.intercept import Window

__all__ = ["packed_convolution", "packed_linear"]


class Linear(nn.Module):
    """An int8 weight (out, in), its scales and zero points (out,) or (1,), and the packed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = self.scale = self.zero = self.packed = torch.empty(0)

    @torch.jit.export
    def pack(self, weight: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Take a weight."""
        self.weight = weight
        self.scale = scale
        self.zero = zero
        self.packed = torch.ops.onednn.qlinear_prepack(weight, None)

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, Tensor, Tensor, bool]:
        return self.weight, self.scale, self.zero, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, Tensor, Tensor, bool]) -> None:
        self.training = state[3]
        self.pack(state[0], state[1], state[2])


class Convolution(nn.Module):
    """An int8 weight (out, in/groups, *kernel), its scales and zero points, and the packed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = self.scale = self.zero = self.packed = torch.empty(0)
        self.input_scale = 1.0
        self.window = [[1], [0], [1], [1], [0]]  # stride, padding, dilation; groups; the input's zero point

    @torch.jit.export
    def pack(self, weight: Tensor, scale: Tensor, zero: Tensor, input_scale: float, window: list[list[int]]) -> None:
        """Take a weight, and what its layout depends on."""
        self.weight = weight
        self.scale = scale
        self.zero = zero
        self.input_scale = input_scale
        self.window = window
        self.packed = torch.ops.onednn.qconv_prepack(
            weight, scale, input_scale, window[4][0], window[0], window[1], window[2], window[3][0], None
        )

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, Tensor, Tensor, float, list[list[int]], bool]:
        return self.weight, self.scale, self.zero, self.input_scale, self.window, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, Tensor, Tensor, float, list[list[int]], bool]) -> None:
        self.training = state[5]
        self.pack(state[0], state[1], state[2], state[3], state[4])


@functools.cache
def _scripted(kind: type[nn.Module]) -> Any:
    return torch.jit.script(kind())


def packed_linear(weight: Tensor, scale: Tensor, zero: Tensor) -> Any:
    """Return a scripted module that holds the weight of a linear layer.

    Args:
        weight: (out, in), int8.
        scale: (out,) or (1,), float32.
        zero: of that shape, int32.
    """
    module = copy.copy(_scripted(Linear))
    module.pack(weight, scale, zero)
    return module


def packed_convolution(
    weight: Tensor, scale: Tensor, zero: Tensor, input_scale: float, input_zero: int, window: Window, groups: int
) -> Any:
    """Return a scripted module that holds the weight of a convolution.

    Args:
        weight: (out, in/groups, *kernel), int8.
        scale: (out,) or (1,), float32.
        zero: of that shape, int32.
        input_scale: of what it reads.
        input_zero: zero point of what it reads.
        window: what it reads around a position; `padding` in numbers.
        groups: of the convolution.
    """
    module = copy.copy(_scripted(Convolution))
    sizes = [[*window.stride], [*window.padding], [*window.dilation], [groups], [input_zero]]
    module.pack(weight, scale, zero, input_scale, sizes)
    return module
