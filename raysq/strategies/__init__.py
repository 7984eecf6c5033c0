"""Search strategies by name; each is a Ray Tune searcher."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from raysq.errors import OptionError, unknown
from raysq.strategies import inc_names, plugins
from raysq.strategies.auto import Auto
from raysq.strategies.base import BARRIER, History, Proposal, Strategy
from raysq.strategies.basic import Basic
from raysq.strategies.bayesian import Bayesian
from raysq.strategies.conservative import Conservative
from raysq.strategies.constrained import Constrained
from raysq.strategies.exhaustive import Exhaustive
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
    Bayesian,
    Constrained,
    TPE,
    HyperOptTPE,
    NSGA2,
    Exhaustive,
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
        name: one of those in `ALL`, in any case; INC's "O0", "O1" or "sigopt"; or what an installed package
            brings by an entry point of the group "raysq.strategies".
        kwargs: what it takes; with "sigopt" in INC's spelling too.

    Raises:
        OptionError: an unknown name or argument, one that this strategy does not use, or a value out of its range.

    Example:
        >>> get("tpe", startup_trials=5).name
        'tpe'
    """
    kinds = {kind.name: kind for kind in ALL}
    canonical, arguments = inc_names.translated(name, kwargs)
    kind = kinds.get(canonical) or plugins.load(canonical)
    if kind is None:
        raise OptionError(unknown("strategy", name, {*kinds, *inc_names.ALIASES, *plugins.names()}))
    _check(kind, arguments)
    return kind(**arguments)


def _check(kind: type[Strategy], arguments: Mapping[str, Any]) -> None:
    known = _parameters(kind)
    for key in arguments:
        if key in known:
            continue
        owners = [other.name for other in ALL if key in _parameters(other)]
        owners += ["sigopt"] if key in inc_names.SIGOPT_ARGUMENTS else []
        if owners:
            raise OptionError(
                f"strategy {kind.name!r} does not use {key!r}: leave it out. It is an argument of {', '.join(owners)}."
            )
        if not known:
            raise OptionError(f"strategy {kind.name!r} takes no arguments, got {key!r}.")
        raise OptionError(unknown(f"argument of strategy {kind.name!r}:", key, known))


def _parameters(kind: type[Strategy]) -> list[str]:
    return list(inspect.signature(kind).parameters)
