"""Sensitivities: how much int8 costs each call, so that a search knows which calls to spare first."""

from __future__ import annotations

from raysq.sensitivities.base import Sensitivity, rank
from raysq.sensitivities.mse import MSE
from raysq.sensitivities.mse_v2 import MSEv2
from raysq.sensitivities.probe import Probe

__all__ = ["ALL", "MSE", "MSEv2", "Probe", "Sensitivity", "rank"]

ALL: tuple[type[Sensitivity], ...] = (MSE, MSEv2, Probe)
