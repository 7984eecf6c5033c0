"""Sensitivities: how much int8 costs each call, so that a search knows which calls to spare first."""

from __future__ import annotations

from raysq.sensitivities.base import Sensitivity, rank
from raysq.sensitivities.mse import MSE

__all__ = ["ALL", "MSE", "Sensitivity", "rank"]

ALL: tuple[type[Sensitivity], ...] = (MSE,)
