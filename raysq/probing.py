"""Builds a recipe once, to find the calls whose int8 kernels are missing, fail, crawl or err."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raysq.baseline import outputs
from raysq.errors import BackendError
from raysq.graph import OpType
from raysq.kernels import base
from raysq.kernels.executed import unfused
from raysq.latency import HOPELESS, Timing
from raysq.recipe import FP32, Recipe
from raysq.space import SearchSpace

if TYPE_CHECKING:
    from raysq.kernels.base import Backend, BuiltModel
    from raysq.source import Source

__all__ = ["CRAWLING", "Probe", "Settled", "crawls", "is_hopeless", "probe", "settled"]

log = logging.getLogger("raysq")

REFERENCE = "reference"
CRAWLS = "runs in a reference kernel in this model, many times slower than in fp32"
CRAWLING = (
    f"a forward takes more than {HOPELESS:.0f} times as long as in fp32: an int8 kernel of this recipe is a reference "
    "kernel, or compiled anew for each shape. Another backend may have a fast one."
)
ERRS = "computes something else than the recipe says, on this CPU"
WRONG = 0.2  # of the output's own size: an error below is no disaster, whatever its cause
AFFORDABLE_S = 0.1
TIMES_REFERENCE = 3.0  # kernels round differently, but one that errs so much more than the simulation is wrong


@dataclass(frozen=True)
class Probe:
    """What a build showed.

    Attributes:
        space: the space without the int8 options that don't work.
        left_in_float: the calls that lost them, and why.
        build_s: seconds that a build takes.
    """

    space: SearchSpace
    left_in_float: Mapping[str, str]
    build_s: float


def probe(space: SearchSpace, source: Source, engine: Backend) -> Probe:
    """Build the default recipe; take int8 from kinds of calls that fail, crawl or err, and calls that nothing fuses.

    Raises:
        BackendError: not even one kind of call can be built in int8.
    """
    found = settled(space.default(), source, engine)
    left = {**found.left_in_float, **unfused(found.built)}
    if any(c.is_int8 for name, configs in space.options.items() if name not in left for c in configs):
        return Probe(space.without_int8(left), left, found.build_s)
    return Probe(space, {}, found.build_s)


@dataclass(frozen=True)
class Settled:
    """A recipe without the kinds of calls that don't work in int8, built.

    Attributes:
        recipe: what is left of it.
        built: the build.
        build_s: seconds that it took.
        left_in_float: the calls that are in float instead, and why.
    """

    recipe: Recipe
    built: BuiltModel
    build_s: float
    left_in_float: Mapping[str, str]


def settled(recipe: Recipe, source: Source, engine: Backend) -> Settled:
    """Build a recipe; take int8 from kinds of calls that fail, crawl or err.

    Raises:
        BackendError: not even one kind of call can be built in int8.
    """
    left: dict[str, str] = {}
    recipe, built, build_s = _buildable(recipe, source, engine, left)
    if engine.name != REFERENCE:
        for fails, reason in ((_crawls, CRAWLS), (_errs, ERRS)):
            if fails(built, source, recipe):
                recipe, built = _exonerated(recipe, built, source, engine, left, fails, reason)
    return Settled(recipe, built, build_s, left)


def crawls(built: BuiltModel, source: Source, forward: Callable[[], object]) -> bool:
    """Whether a warmed-up forward of a build on the example inputs is hopelessly slow against the eager fp32 model's.

    Eager fp32 is slower than any form that is deployed, so no recipe that might win is called so. What lasts less than
    a tenth of a second never is: a search can afford it, and a timing ends it. What is slow runs again: it may have
    lost the core. The simulation, which nobody deploys, may be slow; it too is run once.
    """
    fp32 = partial(outputs, source.model, source.args, source.kwargs)
    for _ in range(2):
        took = _seconds(forward)
        if built.backend == REFERENCE or took < AFFORDABLE_S or took <= HOPELESS * _seconds(fp32):
            return False
    return True


def is_hopeless(timing: Timing, built: BuiltModel) -> bool:
    """Whether a build was so slow that it must not be deployed; not the simulation, see `crawls`."""
    return timing.hopeless and built.backend != REFERENCE


def _seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _buildable(
    recipe: Recipe, source: Source, engine: Backend, left: dict[str, str]
) -> tuple[Recipe, BuiltModel, float]:
    """Return the recipe with those kinds of calls in float that can't be built, built."""
    while True:
        begun = time.perf_counter()
        try:
            built = engine.build(source, recipe)
        except BackendError as exc:
            kinds = _kinds(recipe, source)
            if len(kinds) < 2:
                raise
            recipe = _without(kinds[0], recipe, source, left, f"int8 {kinds[0]} fails in this model: {exc}")
            continue
        return recipe, built, time.perf_counter() - begun


def _exonerated(
    recipe: Recipe,
    built: BuiltModel,
    source: Source,
    engine: Backend,
    left: dict[str, str],
    fails: Callable[[BuiltModel, Source, Recipe], bool],
    reason: str,
) -> tuple[Recipe, BuiltModel]:
    """Return the recipe without the one kind of calls that makes it fail; as it is where that isn't a single kind.

    Then the scores decide, and who takes the default recipe without one is warned.
    """
    for kind in _kinds(recipe, source):
        blamed: dict[str, str] = {}
        why = f"int8 {kind} {reason}"
        innocent = _without(kind, recipe, source, blamed, why)
        if not innocent.int8_calls:
            continue
        rebuilt = engine.build(source, innocent)
        if not fails(rebuilt, source, innocent):
            left |= blamed
            log.warning("%s: %d calls stay in float.", why, len(blamed))
            return innocent, rebuilt
    log.warning("int8 as a whole %s: see what a score says of it, or take another backend.", reason)
    return recipe, built


def _crawls(built: BuiltModel, source: Source, _: Recipe) -> bool:
    """Whether a forward takes so much longer than the fp32 model's that a kernel must be oneDNN's reference."""
    return crawls(built, source, partial(outputs, built.model, source.args, source.kwargs))


def _errs(built: BuiltModel, source: Source, recipe: Recipe) -> bool:
    """Whether the built model is far from fp32, and much farther than the recipe's simulation."""
    exact = outputs(source.model, source.args, source.kwargs)
    error = _error(outputs(built.model, source.args, source.kwargs), exact)
    if error <= WRONG:
        return False
    simulated = base.get(REFERENCE).build(source, recipe)
    return error > TIMES_REFERENCE * _error(outputs(simulated.model, source.args, source.kwargs), exact)


def _error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest root mean square error of a float output, relative to the output's own."""
    errors = [0.0]
    for ours, theirs in zip(got, exact, strict=True):
        finite = theirs.isfinite() if theirs.is_floating_point() else torch.zeros(())
        if finite.any():
            difference, size = (ours - theirs)[finite], theirs[finite]
            errors.append(float(difference.square().mean().sqrt() / size.square().mean().sqrt().clamp_min(1e-12)))
    return max(errors)


def _kinds(recipe: Recipe, source: Source) -> list[OpType]:
    """Return the kinds of calls that run in int8, those first that matter least."""
    present = {source.graph[name].op for name in recipe.int8_calls}
    return [op for op in reversed(OpType) if op in present]  # OpType starts with what matters most


def _without(kind: OpType, recipe: Recipe, source: Source, left: dict[str, str], reason: str) -> Recipe:
    """Return the recipe with one kind of calls in float, and note why."""
    calls = [name for name in recipe.int8_calls if source.graph[name].op is kind]
    left |= dict.fromkeys(calls, reason)
    return recipe.with_ops(dict.fromkeys(calls, FP32))
