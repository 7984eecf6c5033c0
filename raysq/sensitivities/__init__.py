"""Sensitivities: how much int8 costs each call, so that a search knows which calls to spare first."""

from __future__ import annotations

import inspect
from typing import Any

from raysq.errors import OptionError, unknown
from raysq.sensitivities.base import Sensitivity, rank
from raysq.sensitivities.fisher import Fisher
from raysq.sensitivities.hawq_v2 import HAWQv2
from raysq.sensitivities.mse import MSE
from raysq.sensitivities.mse_v2 import MSEv2
from raysq.sensitivities.probe import Probe

__all__ = ["ALL", "MSE", "Fisher", "HAWQv2", "MSEv2", "Probe", "Sensitivity", "get", "rank"]

ALL: tuple[type[Sensitivity], ...] = (MSE, MSEv2, HAWQv2, Fisher, Probe)


def get(name: str, **kwargs: Any) -> Sensitivity:
    """Return a sensitivity by name.

    Args:
        name: one of those in `ALL`.
        kwargs: what it takes.

    Raises:
        OptionError: an unknown name or argument, or a value out of its range.

    Example:
        >>> get("mse_v2", confidence_batches=4)
        MSEv2(confidence_batches=4)
    """
    kinds = {kind.name: kind for kind in ALL}
    if name not in kinds:
        raise OptionError(unknown("sensitivity", name, kinds))
    known = list(inspect.signature(kinds[name]).parameters)
    for key in kwargs:
        if not known:
            raise OptionError(f"sensitivity {name!r} takes no arguments, got {key!r}.")
        if key not in known:
            raise OptionError(unknown(f"argument of sensitivity {name!r}:", key, known))
    return kinds[name](**kwargs)
