"""Fast and accurate int8 on CPU: a Ray Tune search over quantization recipes.

Example:
    >>> import raysq
    >>> result = raysq.tune(model, calib, eval_fn)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from raysq import errors
from raysq.api import inspect, load, prepare, quantize, search_space, trainable, tune
from raysq.autotuning import autotune
from raysq.calibration_data import Calibration
from raysq.drawn import Evaluation
from raysq.goal import Goal
from raysq.ipex_recipe import recipe_from_ipex
from raysq.latency import Latency
from raysq.recipe import Recipe
from raysq.result import Result
from raysq.sensitivity_table import sensitivity
from raysq.smoothing import Smoothing
from raysq.stream import Stream
from raysq.workers import Workers

if TYPE_CHECKING:
    from raysq import strategies
    from raysq.tuning.stopper import AccuracyConstraintStopper
    from raysq.tuning.study import OptunaStudy

__version__ = version("raysq")

__all__ = [
    "AccuracyConstraintStopper",
    "Calibration",
    "Evaluation",
    "Goal",
    "Latency",
    "OptunaStudy",
    "Recipe",
    "Result",
    "Smoothing",
    "Stream",
    "Workers",
    "autotune",
    "errors",
    "inspect",
    "load",
    "prepare",
    "quantize",
    "recipe_from_ipex",
    "search_space",
    "sensitivity",
    "strategies",
    "trainable",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import what needs Ray when it is asked for."""
    if name == "strategies":
        return importlib.import_module("raysq.strategies")
    if name == "AccuracyConstraintStopper":
        return importlib.import_module("raysq.tuning.stopper").AccuracyConstraintStopper
    if name == "OptunaStudy":
        return importlib.import_module("raysq.tuning.study").OptunaStudy
    raise AttributeError(f"module 'raysq' has no attribute {name!r}")
