"""Search strategies by name; each is a Ray Tune searcher."""

from __future__ import annotations

import inspect
from typing import Any

from raysq.errors import OptionError, unknown
from raysq.strategies.auto import Auto
from raysq.strategies.base import BARRIER, History, Proposal, Strategy
from raysq.strategies.basic import Basic
from raysq.strategies.conservative import Conservative
from raysq.strategies.hawq_v2 import HAWQv2Order
from raysq.strategies.inc_auto import IncAuto
from raysq.strategies.mse import MSEOrder
from raysq.strategies.mse_v2 import MSEv2Order
from raysq.strategies.nsga2 import NSGA2
from raysq.strategies.optuna_searcher import ConstrainedOptuna
from raysq.strategies.random import Random
from raysq.strategies.tpe import TPE
from raysq.strategies.tpe_hyperopt import HyperOptTPE

__all__ = ["ALL", "BARRIER", "ConstrainedOptuna", "History", "Proposal", "Strategy", "get"]

ALL: tuple[type[Strategy], ...] = (
    Auto,
    TPE,
    HyperOptTPE,
    NSGA2,
    Random,
    IncAuto,
    Conservative,
    Basic,
    MSEOrder,
    MSEv2Order,
    HAWQv2Order,
)


def get(name: str, **kwargs: Any) -> Strategy:
    """Return a strategy by name, to be bound before use.

    Args:
        name: one of those in `ALL`.
        kwargs: what it takes.

    Raises:
        OptionError: an unknown name or argument, or a value out of its range.

    Example:
        >>> get("tpe", startup_trials=5).name
        'tpe'
    """
    kinds = {kind.name: kind for kind in ALL}
    if name not in kinds:
        raise OptionError(unknown("strategy", name, kinds))
    known = [p for p in inspect.signature(kinds[name]).parameters]
    for key in kwargs:
        if key not in known:
            if not known:
                raise OptionError(f"strategy {name!r} takes no arguments, got {key!r}.")
            raise OptionError(unknown(f"argument of strategy {name!r}:", key, known))
    return kinds[name](**kwargs)
