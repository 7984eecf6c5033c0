"""What may be tuned in one model, in about twenty dimensions or one per block or call; flat config to recipe and back.

linear              "int8" or "float"                  families: conv, depthwise, linear, matmul, add, pool, …
linear.activation   "uint8 asym"                       dtype and scheme of the inputs
linear.algorithm    "kl"                               calibration of the inputs
linear.approach, linear.weight, linear.weight_algorithm, linear.granularity
float_dtype         "bf16" or "fp32"                   what a call runs in that isn't int8
float_calls.mse     3                                  how many of the most sensitive calls, by ranking "mse", are float
block/blocks.3      "int8" or "float"                  the calls of one block; beats their families
op/fc1              "int8 static uint8/asym/kl …"      one call by itself; beats all others

What is chosen of the model as a whole, alphas and transforms, stands in `raysq.model_choices`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from raysq.capabilities import Capabilities
from raysq.choices import options as call_options
from raysq.closest import closest_point
from raysq.description import Description, family, load
from raysq.errors import OptionError, RecipeError, SpaceError, unknown
from raysq.features import (
    BLOCK,
    FEATURES,
    FLOAT_CALLS,
    FLOAT_DTYPE,
    OVERRIDE,
    Per,
    Value,
    all_reordered,
    block_of,
    canonical,
    features_of,
    group_of,
    int8_or_float,
    pick,
)
from raysq.graph import Call, ModelGraph
from raysq.kernels.base import with_approaches
from raysq.model_choices import ModelChoices
from raysq.recipe import Approach, OpConfig, Recipe
from raysq.spelling import parse, spell

__all__ = ["APPROACHES", "RESERVED", "Dimension", "SearchSpace", "build_space", "flatten"]

RESERVED = ("label", "trial", "seen", "avoid")  # travel in a config beside the point: who suggested it, when, where not
APPROACHES = {
    "static": (Approach.STATIC,),
    "dynamic": (Approach.DYNAMIC,),
    "auto": (Approach.STATIC, Approach.DYNAMIC),
    "weight_only": (Approach.WEIGHT_ONLY,),
}


@dataclass(frozen=True)
class Dimension:
    """One thing that a search may choose; a range of numbers is ordered, other values are not.

    Attributes:
        name: its key in a flat config.
        values: two or more, the default first.
    """

    name: str
    values: tuple[Value, ...] | range

    @property
    def default(self) -> Value:
        """The first value."""
        return self.values[0]


@dataclass(frozen=True)
class SearchSpace:
    """Every recipe that may be tried. Frozen: `narrow`, `per_op`, `per_block` and `with_ranking` return another.

    Attributes:
        graph: the model's calls.
        options: what each call may run as, its default first; calls that aren't named stay in fp32.
        rankings: name to calls, the most sensitive first; each gives a dimension `float_calls.<name>`.
        counts: allowed numbers of float calls by ranking, where they were narrowed.
        per: whether int8 or float is chosen by family and by ranking, by block, or all of it by call.
        model: what may be chosen beside the calls: alphas and transforms.
    """

    graph: ModelGraph
    options: Mapping[str, tuple[OpConfig, ...]]
    rankings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    counts: Mapping[str, tuple[int, ...] | range] = field(default_factory=dict)
    per: Per = Per.FAMILY
    model: ModelChoices = field(default_factory=ModelChoices)

    def __post_init__(self) -> None:
        for name, calls in self.rankings.items():
            for call in calls:
                if call not in self.graph.by_name:
                    raise SpaceError(f"ranking {name!r}: {unknown('call', call, self.graph.by_name)}")
        if not any(config.is_int8 for configs in self.options.values() for config in configs):
            raise SpaceError(
                "no call may run in int8, so there is nothing to search. Allow int8 for some calls, or use another "
                "backend or approach."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> SearchSpace:
        return self  # frozen all through; Ray copies what it is given

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """What a search may choose: no more than about twenty, unless there is one per block or call."""
        every: Iterable[tuple[str, tuple[Value, ...] | range]] = self.choices.items()
        if self.per is Per.CALL:
            by_call = [(OVERRIDE + call, tuple(map(spell, configs))) for call, configs in self.options.items()]
            every = [*by_call, *self.model.by_group]
        elif self.per is Per.BLOCK:
            inside = {family(call) for call, _ in self._calls()} - {family(self.graph[c]) for c in self.outside_blocks}
            shared = [(k, v) for k, v in every if k not in inside and not k.startswith(FLOAT_CALLS)]
            every = [*self.blocks.items(), *shared]
        return tuple(Dimension(name, values) for name, values in every if len(values) > 1 and name not in self._idle)

    @cached_property
    def _idle(self) -> set[str]:
        """Families and blocks of which some calls are always int8 and others always float, so that none can choose."""
        every = {name for call, _ in self._calls() for name in (family(call), block_of(call))}
        return every - {
            name for call in self.flippable for name in (family(self.graph[call]), block_of(self.graph[call]))
        }

    @cached_property
    def choices(self) -> Mapping[str, tuple[Value, ...] | range]:
        """Values of every compact dimension, those with a single one included."""
        found: dict[str, dict[Value, None]] = {}
        for call, configs in self._calls():
            found.setdefault(family(call), {}).update((int8_or_float(c), None) for c in configs)
            for feature in features_of(call):
                values = found.setdefault(f"{group_of(call)}.{feature}", {})
                values.update((FEATURES[feature](c), None) for c in configs if c.is_int8)
        floats = (c.precision.value for call in self.flippable for c in self.options[call] if not c.is_int8)
        found[FLOAT_DTYPE] = dict.fromkeys(floats)
        tables: dict[str, tuple[Value, ...] | range] = {name: tuple(values) for name, values in found.items() if values}
        for name in self.rankings:
            count = len(self.ranking(name))
            tables[FLOAT_CALLS + name] = self.counts.get(name, range(max(count, 1)))  # all float is no int8 model
        return {**tables, **self.model.values}

    @cached_property
    def blocks(self) -> Mapping[str, tuple[Value, ...]]:
        """What the calls of each block may run in, by the key of a flat config."""
        found: dict[str, dict[Value, None]] = {}
        for call, configs in self._calls():
            if call.block:
                found.setdefault(block_of(call), {}).update((int8_or_float(c), None) for c in configs)
        return {name: tuple(values) for name, values in found.items()}

    @cached_property
    def flippable(self) -> Mapping[str, None]:
        """Names of the calls that may run in int8 or in float, in execution order."""
        return {call.name: None for call, configs in self._calls() if len({c.is_int8 for c in configs}) == 2}

    @property
    def outside_blocks(self) -> tuple[str, ...]:
        """Names of the calls that may run in int8 or in float and lie in no block."""
        return tuple(call for call in self.flippable if not self.graph[call].block)

    def _calls(self) -> Iterator[tuple[Call, tuple[OpConfig, ...]]]:
        return ((self.graph[name], configs) for name, configs in self.options.items())

    def ranking(self, name: str) -> tuple[str, ...]:
        """Return those calls of a ranking that may be int8 or float, the most sensitive first."""
        return tuple(call for call in self.rankings[name] if call in self.flippable)

    def default(self) -> Recipe:
        """Return the recipe in which each call has its first option."""
        return self.recipe({})

    def recipe(self, config: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a flat config, nested ones by "/" included; what it leaves out has its default.

        Raises:
            SpaceError: an unknown key, or a value outside the space.
        """
        point, overrides = self._checked(flatten(config))
        counts = {name: point.get(FLOAT_CALLS + name, self.choices[FLOAT_CALLS + name][0]) for name in self.rankings}
        floats = {call for name, k in counts.items() for call in self.ranking(name)[: int(k)]}
        picked: dict[tuple[object, ...], OpConfig] = {}
        ops = {}
        for call, configs in self._calls():
            as_float = call.name in floats
            wanted = "float" if as_float else point.get(block_of(call), point.get(family(call)))
            key = (id(configs), family(call), group_of(call), call.op.has_weight, wanted)
            if key not in picked:
                picked[key] = pick(configs, call, point, wanted)
            ops[call.name] = picked[key]
        return self.model.apply(point, Recipe({**ops, **overrides}))

    def config(self, recipe: Recipe) -> dict[str, Value]:
        """Return the flat config of a recipe: a value per dimension, and overrides where they don't suffice.

        Raises:
            SpaceError: the recipe lies outside the space.
        """
        self._check_inside(recipe)
        if self.per is Per.CALL:
            return {d.name: self._value_of(d.name, recipe) for d in self.dimensions}
        point = {**closest_point(self, recipe), **self.model.point(recipe)}
        point = {d.name: point.get(d.name, d.default) for d in self.dimensions}
        point.update(self.model.overrides(point, recipe))
        base = self.recipe(point)
        for call in self.options:
            config = canonical(recipe.config(call))
            if config != base.config(call):
                point[OVERRIDE + call] = spell(config)
        return point

    def _value_of(self, name: str, recipe: Recipe) -> Value:
        """Return what a recipe has in a dimension of one call or group, or in one of a transform."""
        if name.startswith(OVERRIDE):
            return spell(canonical(recipe.config(name.removeprefix(OVERRIDE))))
        return self.model.value_of(name, recipe)

    def per_op(self) -> SearchSpace:
        """Return the same space with a dimension per call."""
        return replace(self, per=Per.CALL)

    def per_block(self) -> SearchSpace:
        """Return the same space with a dimension per block that says whether its calls are int8 or float.

        Families have one for calls outside of all blocks, quantization is chosen as in the compact space; what stands
        in the rankings' `float_calls` keeps its default.
        """
        return replace(self, per=Per.BLOCK)

    def with_ranking(self, name: str, calls: Iterable[str]) -> SearchSpace:
        """Return this space with one more ranking, the most sensitive call first.

        Raises:
            SpaceError: a call that the model doesn't have.
        """
        counts = {key: value for key, value in self.counts.items() if key != name}
        return replace(self, rankings={**self.rankings, name: tuple(calls)}, counts=counts)

    def without_int8(self, calls: Container[str]) -> SearchSpace:
        """Return the space in which these calls stay in float.

        Raises:
            SpaceError: nothing would be left in int8.
        """
        options = {n: tuple(c for c in cs if not c.is_int8) if n in calls else cs for n, cs in self.options.items()}
        return replace(self, options={name: configs for name, configs in options.items() if configs})

    def quantization_only(self) -> SearchSpace:
        """Return the space in which every call that may run in int8 does, and the others run in their first float type.

        What is left to choose is how: schemes, algorithms, bits, alphas, transforms.
        """
        int8 = {name: tuple(c for c in configs if c.is_int8) for name, configs in self.options.items()}
        options = {name: int8[name] or configs[:1] for name, configs in self.options.items()}
        return replace(self, options=_shared(options), rankings={}, counts={})

    def narrow(self, changes: Mapping[str, Value | Sequence[Value]]) -> SearchSpace:
        """Return the space with other values for some dimensions; the first becomes the default, one is a constant.

        Calls that can't run as any of the values stay as they are.

        Args:
            changes: dimension, "block/<path>" or "op/<call>", to one value or several, all of which it has now.

        Raises:
            SpaceError: an unknown dimension, or a value that it doesn't have.

        Example:
            >>> space.narrow({"linear.algorithm": "kl", "float_calls.mse": range(5)})  # doctest: +SKIP
        """
        options, counts, model = self.options, dict(self.counts), self.model
        for name, given in changes.items():
            values = [given] if isinstance(given, str | int | float) else list(given)
            if not values:
                raise SpaceError(f"{name!r} must keep at least one value.")
            for value in values:
                self._checked({name: value})
            if model.is_about(name):
                model = model.narrowed(name, values)
                continue
            if name.startswith(FLOAT_CALLS):
                whole = range(int(values[0]), int(values[0]) + len(values))
                same = list(values) == list(whole)  # a range stays one: its numbers are ordered
                counts[name.removeprefix(FLOAT_CALLS)] = whole if same else tuple(int(value) for value in values)
                continue
            options = all_reordered(options, self.graph, name, values)
        return replace(self, options=options, counts=counts, model=model)

    def table(self) -> str:
        """Return the space as a text table: a row per dimension, its default first."""
        rows = [("dimension", "values, the default first")]
        for dimension in self.dimensions:
            values = dimension.values
            shown = f"{values[0]} … {values[-1]}" if isinstance(values, range) else ", ".join(map(str, values))
            rows.append((dimension.name, shown))
        width = max(len(name) for name, _ in rows)
        fixed = sum(len(configs) == 1 for configs in self.options.values())
        title = f"{len(self.dimensions)} dimensions for {len(self.options)} calls, {fixed} of them fixed"
        return "\n".join([title, *(f"{name:<{width}}  {values}" for name, values in rows)])

    def __str__(self) -> str:
        return self.table()

    def _checked(self, flat: Mapping[str, Any]) -> tuple[dict[str, Value], dict[str, OpConfig]]:
        point: dict[str, Value] = {}
        overrides: dict[str, OpConfig] = {}
        for key, value in flat.items():
            if key in RESERVED:
                continue
            if key.startswith(OVERRIDE):
                call = key.removeprefix(OVERRIDE)
                overrides[call] = self._override(call, value)
            elif self.model.is_about(key):
                self.model.check(key, value)
                point[key] = value
            else:
                values = self._values(key)
                if value not in values:
                    raise SpaceError(f"{key!r} must be one of {_shown(values)}, got {value!r}.")
                point[key] = value
        return point, overrides

    def _values(self, key: str) -> tuple[Value, ...] | range:
        """Return the values of a dimension or of a block."""
        if key.startswith(BLOCK):
            if key not in self.blocks:
                raise SpaceError(
                    unknown("block", key.removeprefix(BLOCK), (b.removeprefix(BLOCK) for b in self.blocks))
                )
            return self.blocks[key]
        if key not in self.choices:
            raise SpaceError(unknown("dimension", key, self.choices))
        return self.choices[key]

    def _override(self, call: str, value: Any) -> OpConfig:
        if call not in self.options:
            raise SpaceError(unknown("call", call, self.options))
        try:
            config = parse(value)
        except RecipeError as exc:
            raise SpaceError(f"`{OVERRIDE}{call}` must name a configuration: {exc}") from exc
        if config not in self.options[call]:
            raise SpaceError(f"{call!r} must run as {_shown([spell(c) for c in self.options[call]])}, got {value!r}.")
        return config

    def _check_inside(self, recipe: Recipe) -> None:
        self.model.check_inside(recipe)
        for call in recipe.ops:
            if call not in self.options and recipe.config(call).precision != "fp32":
                raise SpaceError(f"{call!r} must run in fp32, got {recipe.config(call).precision}.")
        for call, configs in self.options.items():
            config = canonical(recipe.config(call))
            if config not in configs:
                raise SpaceError(f"{call!r} must run as {_shown([spell(c) for c in configs])}, got {spell(config)!r}.")


def build_space(
    graph: ModelGraph,
    capabilities: Capabilities,
    *,
    description: Description | Mapping[str, Any] | str | Path | None = None,
    op_type_dict: Mapping[str, Any] | None = None,
    op_name_dict: Mapping[str, Any] | None = None,
    approach: str = "static",
    rankings: Mapping[str, Iterable[str]] | None = None,
) -> SearchSpace:
    r"""Return what may be tuned: the description, within the capabilities, within the user's rules.

    A rule's key is a regular expression that must match the whole of a call's type ("linear", or its module's
    class, in any case) or name. Its value is in INC's spelling. By name beats by type, later beats earlier.

    Args:
        graph: the model's calls.
        capabilities: what the backend runs on this CPU.
        description: a bundled one by name, the path of a YAML file or its content; None: that of the backend.
        op_type_dict: rules by type.
        op_name_dict: rules by name.
        approach: "static", "dynamic" or "weight_only" (calls that can't are left in float), or "auto" (static and
            dynamic).
        rankings: name to calls, the most sensitive first.

    Raises:
        SpaceError: a malformed description or rule, or nothing may run in int8.
        OptionError: an approach that is unknown, or that the backend lacks.

    Example:
        >>> rules = {"fc2|conv\\d": {"activation": {"dtype": ["fp32"]}, "weight": {"dtype": ["fp32"]}}}
        >>> build_space(graph, capabilities, op_name_dict=rules)  # doctest: +SKIP
    """
    if approach not in APPROACHES:
        raise OptionError(unknown("approach", approach, APPROACHES))
    if capabilities.approaches and not set(APPROACHES[approach]) & capabilities.approaches:
        able = " or ".join(f"backend={name!r}" for name in with_approaches(APPROACHES[approach]))
        raise OptionError(f"backend {capabilities.backend!r} has no kernel for approach={approach!r}. Pass {able}.")
    if not isinstance(description, Description):
        description = load(capabilities.backend if description is None else description)
    options = call_options(graph, capabilities, description, APPROACHES[approach], op_type_dict, op_name_dict)
    return SearchSpace(graph, options, {name: tuple(calls) for name, calls in (rankings or {}).items()})


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join nested keys by "/": Ray's Optuna searcher splits them there."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, name + "/") if isinstance(value, Mapping) else {name: value})
    return flat


def _shared(options: Mapping[str, tuple[OpConfig, ...]]) -> dict[str, tuple[OpConfig, ...]]:
    """Return the same with one tuple for all calls that have equal options, which `recipe` is then quick to see."""
    shared: dict[tuple[OpConfig, ...], tuple[OpConfig, ...]] = {}
    return {name: shared.setdefault(configs, configs) for name, configs in options.items()}


def _shown(values: Iterable[Value]) -> str:
    if isinstance(values, range):
        return f"{values[0]} … {values[-1]}"
    return ", ".join(repr(value) for value in values)
