"""A search space in the words of Ray Tune and of Optuna."""

from __future__ import annotations

from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from ray import tune

from raysq.space import SearchSpace

__all__ = ["distributions", "domains"]


def domains(space: SearchSpace) -> dict[str, Any]:
    """Return a `param_space` for a Tuner; "op/<call>" becomes nested, since some searchers refuse a "/" in a key.

    Example:
        >>> tune.Tuner(trainable, param_space=domains(space))  # doctest: +SKIP
    """
    found: dict[str, Any] = {}
    for dimension in space.dimensions:
        *outer, key = dimension.name.split("/")
        place = found
        for name in outer:
            place = place.setdefault(name, {})
        values = dimension.values
        if isinstance(values, range):
            place[key] = tune.randint(values.start, values.stop)
        else:
            place[key] = tune.choice(list(values))
    return found


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Return Optuna's distributions, for `OptunaSearch(space=…)` or a study of one's own."""
    return {
        dimension.name: IntDistribution(dimension.values[0], dimension.values[-1])
        if isinstance(dimension.values, range)
        else CategoricalDistribution(dimension.values)
        for dimension in space.dimensions
    }
