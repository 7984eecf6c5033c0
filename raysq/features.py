"""How the compact dimensions, shared by many calls, bear on the options of one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

from raysq.description import family
from raysq.graph import Call, ModelGraph
from raysq.recipe import OpConfig
from raysq.spelling import spell

__all__ = [
    "BLOCK",
    "FEATURES",
    "FLOAT_CALLS",
    "FLOAT_DTYPE",
    "OVERRIDE",
    "Per",
    "Value",
    "all_reordered",
    "block_of",
    "canonical",
    "classifier",
    "features_of",
    "group_of",
    "int8_or_float",
    "pick",
]

Value = str | int | float | bool

OVERRIDE = "op/"
BLOCK = "block/"
FLOAT_DTYPE = "float_dtype"
FLOAT_CALLS = "float_calls."
FEATURES: Mapping[str, Callable[[OpConfig], str]] = {  # of an int8 call, in the order in which they narrow its options
    "approach": lambda c: c.approach.value,
    "activation": lambda c: f"{c.activation.dtype} {c.activation.scheme}",
    "algorithm": lambda c: str(c.activation.algorithm),
    "bits": lambda c: "7" if c.activation.reduce_range else "8",
    "weight": lambda c: f"{c.weight.dtype} {c.weight.scheme}",
    "weight_algorithm": lambda c: str(c.weight.algorithm),
    "granularity": lambda c: c.weight.granularity.value,
    "rounding": lambda c: c.rounding.value,
}
WEIGHT_FEATURES = ("weight", "weight_algorithm", "granularity", "rounding")


class Per(StrEnum):
    """What there is one dimension for, that chooses between int8 and float."""

    FAMILY = "family"
    BLOCK = "block"
    CALL = "call"


def pick(configs: tuple[OpConfig, ...], call: Call, point: Mapping[str, Value], wanted: Value | None) -> OpConfig:
    """Return the first option that has what is wanted, passing over wishes that none of those left can grant.

    Args:
        configs: the options.
        call: whose they are.
        point: what is wanted by dimension.
        wanted: "int8" or "float"; None where nothing says so.
    """
    wishes = [(family(call), wanted)]
    wishes += [(name, point.get(name)) for name in (f"{group_of(call)}.{feature}" for feature in FEATURES)]
    wishes += [(FLOAT_DTYPE, point.get(FLOAT_DTYPE))]
    left = list(configs)
    for name, value in wishes:
        if value is not None:
            classify = classifier(name, call)
            left = [config for config in left if classify(config) == value] or left
        if name == family(call):  # its default decides: what follows is about int8 or about float
            left = [config for config in left if config.is_int8 == left[0].is_int8]
    return left[0]


def classifier(name: str, call: Call) -> Callable[[OpConfig], str | None]:
    """Return what a dimension says about one of a call's options; None where it says nothing."""
    if name == OVERRIDE + call.name:
        return spell
    if name in (family(call), block_of(call)):
        return int8_or_float
    if name == FLOAT_DTYPE:
        return lambda config: None if config.is_int8 else config.precision.value
    group, _, feature = name.rpartition(".")
    if group == group_of(call) and feature in features_of(call):
        return lambda config: FEATURES[feature](config) if config.is_int8 else None
    return lambda config: None


def _reordered(
    configs: tuple[OpConfig, ...], classify: Callable[[OpConfig], str | None], values: Sequence[Value]
) -> tuple[OpConfig, ...]:
    """Keep the options that have one of the values, in their order; those that the dimension is not about stay."""
    kinds = [classify(config) for config in configs]
    kept = [config for config, kind in zip(configs, kinds, strict=True) if kind in values and kind is not None]
    if not kept:
        return configs
    kept.sort(key=lambda config: values.index(str(classify(config))))
    replacements = iter(kept)
    merged = [next(replacements, None) if kind is not None else c for c, kind in zip(configs, kinds, strict=True)]
    return tuple(config for config in merged if config is not None)


def all_reordered(
    options: Mapping[str, tuple[OpConfig, ...]], graph: ModelGraph, name: str, values: Sequence[Value]
) -> dict[str, tuple[OpConfig, ...]]:
    """Reorder the options of every call by a dimension; what is equal is looked at once, and is one tuple."""
    done: dict[tuple[object, ...], tuple[OpConfig, ...]] = {}
    shared: dict[tuple[OpConfig, ...], tuple[OpConfig, ...]] = {}
    found = {}
    for call, configs in ((graph[name], configs) for name, configs in options.items()):
        by_itself = name in (OVERRIDE + call.name, block_of(call))
        key = (id(configs), family(call), group_of(call), call.op.has_weight, by_itself)
        if key not in done:
            own = _reordered(configs, classifier(name, call), values)
            done[key] = shared.setdefault(own, own)
        found[call.name] = done[key]
    return found


def int8_or_float(config: OpConfig) -> str:
    """Return what a family's dimension calls this."""
    return "int8" if config.is_int8 else "float"


def features_of(call: Call) -> tuple[str, ...]:
    """Return the features that matter for a call: one without a weight has none of a weight."""
    return tuple(f for f in FEATURES if call.op.has_weight or f not in WEIGHT_FEATURES)


def group_of(call: Call) -> str:
    """Name of the calls that share the dimensions of quantization: a family, depthwise with the other convolutions."""
    return "conv" if call.op.is_conv else family(call)


def block_of(call: Call) -> str:
    """Name of the dimension of the block that encloses a call; "" where none does."""
    return BLOCK + call.block if call.block else ""


def canonical(config: OpConfig) -> OpConfig:
    """Return the form that options have: a float one says nothing about quantization."""
    return config if config.is_int8 else OpConfig(config.precision)
