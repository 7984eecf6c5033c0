"""Switches: what is turned on or off for a whole model, as INC's "recipes" are; each narrows the space.

smooth_quant            activations smoothed, where that is advised; if nowhere, all that can be
equalization            cross-layer equalization
bias_correction         biases that make up for int8's mean error
adaround                weights rounded by looking at data
first_op_float          the first convolution, linear or matmul stays in float
last_op_float           the last one does
pre_post_process_float  all calls without a weight before the first of those, and after the last, do
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

from raysq.errors import OptionError, SpaceError, unknown
from raysq.features import OVERRIDE, Value
from raysq.graph import Call, ModelGraph
from raysq.model_choices import OFF
from raysq.recipe import Rounding, Transform
from raysq.space import SearchSpace
from raysq.spelling import spell

__all__ = ["ALL", "Switch", "Switches", "free_switches", "read_switches", "with_switches"]

Switches = Mapping[str, bool | None]  # None leaves a switch to the search

MIDDLE = 0.5  # alpha where none is advised: activations and weights share the difficulty alike
ALIASES: Mapping[str, tuple[str, bool]] = MappingProxyType(  # INC's name: raysq's, and whether it means the opposite
    {
        "fast_bias_correction": ("bias_correction", False),
        "first_conv_or_matmul_quantization": ("first_op_float", True),
        "last_conv_or_matmul_quantization": ("last_op_float", True),
        "pre_post_process_quantization": ("pre_post_process_float", True),
    }
)
ONNX_ONLY = "it is about ONNX Runtime's graphs"
MEANINGLESS: Mapping[str, str] = MappingProxyType(
    {
        "weight_correction": "raysq corrects what rounding does to the mean in the biases, by `bias_correction`",
        "gemm_to_matmul": ONNX_ONLY,
        "graph_optimization_level": ONNX_ONLY,
        "add_qdq_pair_to_weight": ONNX_ONLY,
        "optypes_to_exclude_output_quant": ONNX_ONLY,
        "dedicated_qdq_pair": ONNX_ONLY,
    }
)


@dataclass(frozen=True)
class Switch:
    """One thing that is on or off.

    Attributes:
        name: what users call it.
        narrow: returns the space in which it is on, or off, in every recipe; the same space where it has no effect.
    """

    name: str
    narrow: Callable[[SearchSpace, bool], SearchSpace]


def read_switches(given: object) -> dict[str, bool | None]:
    """Return switches by raysq's names; INC's are understood.

    Raises:
        OptionError: not a mapping, an unknown name, a value that isn't True, False or None, one that is given twice.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise OptionError(f"`switches` must be a dict of name to True, False or None, got {type(given).__name__}.")
    found: dict[str, bool | None] = {}
    for key, value in given.items():
        if key in MEANINGLESS:
            raise OptionError(f"switch {key!r} has no meaning here: {MEANINGLESS[key]}. Leave it out.")
        name, opposite = ALIASES.get(key, (key, False))
        if name not in NAMES:
            raise OptionError(unknown("switch", key, NAMES))
        if not isinstance(value, bool | None):
            raise OptionError(f"switch {key!r} must be True, False or None, got {value!r}.")
        if name in found:
            raise OptionError(f"switch {name!r} is given twice, the second time as {key!r}. Leave one out.")
        found[name] = value if value is None else value != opposite
    return found


def with_switches(space: SearchSpace, switches: Switches) -> SearchSpace:
    """Return the space in which switches are on or off in every recipe; a `UserWarning` names those without effect.

    Args:
        space: what may be tried.
        switches: by name, as `read_switches` returns them.

    Raises:
        SpaceError: nothing would be left in int8.
    """
    for switch in ALL:
        value = switches.get(switch.name)
        if value is not None:
            narrowed = switch.narrow(space, value)
            if value and narrowed == space:  # what is off already is as it was asked for
                warnings.warn(f"switch {switch.name!r} changes nothing in this model; ignored.", stacklevel=2)
            space = narrowed
    return space


def free_switches(space: SearchSpace) -> dict[str, Switch]:
    """Return the switches that may be on or off in a space, by name: not those that are fixed, or have no effect."""
    return {switch.name: switch for switch in ALL if _is_free(switch, space)}


def _is_free(switch: Switch, space: SearchSpace) -> bool:
    try:
        return switch.narrow(space, True) != switch.narrow(space, False)
    except SpaceError:  # on, it would leave nothing in int8
        return False


def _smoothed(space: SearchSpace, on: bool) -> SearchSpace:
    values = {kind: space.model.values[kind] for kind in space.model.kinds}
    if on:
        advised = {kind: own for kind, own in values.items() if own[0] != OFF}
        changes = {kind: _alphas(own) for kind, own in (advised or values).items()}
        return space.narrow({kind: alphas for kind, alphas in changes.items() if alphas})
    if not all(OFF in own for own in values.values()):
        return space
    off = space.narrow(dict.fromkeys(values, OFF))
    return replace(off, model=replace(off.model, everywhere=()))


def _alphas(values: Sequence[Value]) -> list[Value]:
    """Return the values that smooth, the default first."""
    alphas = [value for value in values if value != OFF]
    return sorted(alphas, key=lambda alpha: alpha != MIDDLE) if values[0] == OFF else alphas


def _transformed(transform: Transform, space: SearchSpace, on: bool) -> SearchSpace:
    possible = on in space.model.values.get(transform.value, ())
    return space.narrow({transform.value: on}) if possible else space


def _rounded(space: SearchSpace, on: bool) -> SearchSpace:
    changes = {}
    for name, values in space.choices.items():
        kept = [value for value in values if (value == Rounding.ADAROUND) == on]
        if name.endswith(".rounding") and not space.model.is_about(name) and kept:
            changes[name] = kept
    return space.narrow(changes)


def _floated(calls: Callable[[ModelGraph], list[Call]], space: SearchSpace, on: bool) -> SearchSpace:
    names = [call.name for call in calls(space.graph) if call.name in space.flippable]
    if on:
        return space.without_int8(names)
    return space.narrow({OVERRIDE + name: [spell(c) for c in space.options[name] if c.is_int8] for name in names})


def _key_places(graph: ModelGraph) -> list[int]:
    """Return where products are among the calls."""
    return [i for i, call in enumerate(graph.calls) if call.op.is_product]


def _first(graph: ModelGraph) -> list[Call]:
    return [graph.calls[i] for i in _key_places(graph)[:1]]


def _last(graph: ModelGraph) -> list[Call]:
    return [graph.calls[i] for i in _key_places(graph)[-1:]]


def _around(graph: ModelGraph) -> list[Call]:
    places = _key_places(graph)
    if not places:
        return []
    outer = [*graph.calls[: places[0]], *graph.calls[places[-1] :]]
    return [call for call in outer if not (call.op.has_weight or call.op.is_product)]


ALL = (
    Switch("smooth_quant", _smoothed),
    *(Switch(transform.value, partial(_transformed, transform)) for transform in Transform),
    Switch("adaround", _rounded),
    Switch("first_op_float", partial(_floated, _first)),
    Switch("last_op_float", partial(_floated, _last)),
    Switch("pre_post_process_float", partial(_floated, _around)),
)
NAMES = tuple(switch.name for switch in ALL)
