"""The grids that oneDNN's int8 kernels take, whichever backend calls them."""

from __future__ import annotations

from raysq.kernels.cpu import lacks_vnni
from raysq.recipe import Granularity, QuantDType, Scheme

__all__ = ["GRANULARITIES", "U8", "WEIGHTS", "activations"]

Grids = tuple[tuple[QuantDType, Scheme], ...]

U8: Grids = ((QuantDType.U8, Scheme.AFFINE),)
WEIGHTS: Grids = ((QuantDType.S8, Scheme.SYMMETRIC),)
GRANULARITIES = (Granularity.PER_CHANNEL, Granularity.PER_TENSOR)


def activations() -> Grids:
    """Return those of activations; without VNNI products of s8 saturate: off by 0.6 where outputs reach 2.2."""
    return U8 if lacks_vnni() else U8 + WEIGHTS
