"""Measures sensitivities over Ray: a task for some calls at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayTaskError

from raysq.tuning import shipping
from raysq.tuning.capacity import slots
from raysq.tuning.runner import session

if TYPE_CHECKING:
    from raysq.recipe import Recipe
    from raysq.sensitivities import Sensitivity
    from raysq.source import Source

__all__ = ["in_parallel"]


def in_parallel(
    method: Sensitivity, source: Source, recipe: Recipe, parts: Sequence[Sequence[str]], at_once: int | None
) -> Iterator[tuple[Sequence[str], Mapping[str, float]]]:
    """Yield the calls of each part and their costs, in the order in which they are done.

    Args:
        method: measures the costs.
        source: the model, with its statistics.
        recipe: how each call is quantized.
        parts: calls that are measured together.
        at_once: tasks at the same time at most, a CPU each; None: as many as there are CPUs.

    Raises:
        ModelError: the model can't be pickled; the message names the attribute.
        RaysqError: what the method raises.
    """
    with session(verbose=0):
        job = ray.put(_packed(method, source, recipe))
        left = list(reversed(parts))
        running: dict[Any, Sequence[str]] = {}
        try:
            while left or running:
                while left and len(running) < (at_once or slots(1)):
                    part = left.pop()
                    running[_scores.remote(job, part)] = part
                done = ray.wait(list(running))[0][0]
                try:
                    yield running.pop(done), ray.get(done)
                except RayTaskError as exc:
                    raise exc.cause from exc
        finally:
            for task in running:
                ray.cancel(task)


@ray.remote(num_cpus=1)
def _scores(job: shipping.Packed, calls: Sequence[str]) -> Mapping[str, float]:
    method, source, recipe = shipping.unpack(job)
    costs: Mapping[str, float] = method.scores(source, recipe, calls)
    return costs


def _packed(method: Sensitivity, source: Source, recipe: Recipe) -> shipping.Packed:
    try:
        return shipping.pack((method, source, recipe))
    except Exception:
        shipping.pack_model(source.model)  # names what can't be pickled
        raise
