"""Sensitivities: how much int8 costs each call, so that a search knows which calls to spare first."""

from __future__ import annotations

from collections.abc import Mapping

from raysq.sensitivities.base import Sensitivity, rank
from raysq.sensitivities.mse import relative_errors

__all__ = ["ALL", "Sensitivity", "rank", "relative_errors"]

ALL: Mapping[str, Sensitivity] = {"mse": relative_errors}
