"""What each call may run as: the description, within the backend's capabilities, within the user's rules."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar

from raysq import calibration
from raysq.calibration.minmax import MinMax
from raysq.capabilities import Capabilities, OpCapability
from raysq.description import (
    Description,
    OpChoices,
    TensorChoices,
    algorithms,
    check_keys,
    enums,
    listed,
)
from raysq.errors import SpaceError, unknown
from raysq.graph import Call, ModelGraph
from raysq.recipe import (
    DEFAULT_WEIGHT,
    Approach,
    Granularity,
    OpConfig,
    Precision,
    QuantDType,
    Rounding,
    Scheme,
    TensorConfig,
)

__all__ = ["options"]

T = TypeVar("T")
Wishes = Mapping[str, list[str]]

INTEGERS = tuple(dtype.value for dtype in QuantDType)
FLOATS = (
    "bf16",
    "fp32",
    "fp16",
)  # in a rule's dtype list they mean the precision; fp16 is INC's, no CPU backend runs it


@dataclass(frozen=True)
class Rule:
    """One entry of `op_type_dict` or `op_name_dict`."""

    where: str
    pattern: re.Pattern[str]
    by_name: bool
    wanted: Mapping[str, Wishes]

    def matches(self, call: Call) -> bool:
        """Whether the expression matches the whole name, or the whole type: raysq's or the module's class."""
        if self.by_name:
            return self.pattern.fullmatch(call.name) is not None
        if self.pattern.fullmatch(call.op.value):
            return True
        return re.fullmatch(self.pattern.pattern, call.module_type, re.IGNORECASE) is not None


def options(
    graph: ModelGraph,
    capabilities: Capabilities,
    description: Description,
    approaches: tuple[Approach, ...],
    op_type_dict: Mapping[str, Any] | None,
    op_name_dict: Mapping[str, Any] | None,
) -> dict[str, tuple[OpConfig, ...]]:
    """Return what each call may run as, its default first; calls that can only run in fp32 are left out.

    Calls with the same choices share one tuple. Rules apply in order, those by type before those by name, so that
    a name beats a type and a later rule an earlier one; what a backend can't run is ignored with a warning.

    Raises:
        SpaceError: a rule that is malformed.
    """
    rules = [
        *_rules("op_type_dict", op_type_dict),
        *_rules("op_name_dict", op_name_dict),
    ]
    ignored: list[str] = []
    unused = {rule.where for rule in rules}
    shared: dict[tuple[OpConfig, ...], tuple[OpConfig, ...]] = {}
    found = {}
    for call in graph.calls:
        choices, capability = description.choices(call), capabilities.ops.get(call.op)
        matching = [rule for rule in rules if rule.matches(call)]
        unused -= {rule.where for rule in matching}
        if choices is None or capability is None:
            ignored += [
                f"{rule.where}: {capabilities.backend} runs {call.op} in fp32 only; ignored." for rule in matching
            ]
            continue
        choices = bound = _within(choices, capability)
        for rule in matching:
            choices, outside = _apply(rule, choices, bound)
            what = f"outside what can be tuned for {call.op} on {capabilities.backend} and this CPU; ignored."
            ignored += [f"{rule.where}: {text} is {what}" for text in outside]
        configs = tuple(_expand(choices, call, approaches, capabilities.reduce_range))
        if not any(config.is_int8 for config in configs) and choices.precisions == bound.precisions:
            configs = tuple(sorted(configs, key=lambda config: config.precision is not Precision.FP32))
        if configs and configs != (OpConfig(Precision.FP32),):
            found[call.name] = shared.setdefault(configs, configs)
    ignored += [f"{where}: matches no call of this model; ignored." for where in sorted(unused)]
    for text in dict.fromkeys(ignored):
        warnings.warn(text, UserWarning, stacklevel=3)
    return found


def _rules(where: str, given: Mapping[str, Any] | None) -> Iterator[Rule]:
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise SpaceError(f"`{where}` must be a mapping from an expression to choices, got {type(given).__name__}.")
    for text, value in given.items():
        place = f"{where}[{text!r}]"
        try:
            pattern = re.compile(text)
        except (re.error, TypeError) as exc:
            raise SpaceError(f"{place} is not a regular expression: {exc}. Escape special characters by `\\`.") from exc
        tensors = check_keys(value, ("activation", "weight"), place)
        yield Rule(
            place,
            pattern,
            where == "op_name_dict",
            {t: _wishes(tensors[t], f"{place}: {t}") for t in tensors},
        )


def _wishes(value: object, where: str) -> dict[str, list[str]]:
    entry = check_keys(value, ("dtype", "scheme", "algorithm", "granularity"), where)
    wishes = {key: listed(names, f"{where}: {key}") for key, names in entry.items()}
    for name in wishes.get("dtype", ()):
        if name not in (*INTEGERS, *FLOATS):
            raise SpaceError(f"{where}: {unknown('dtype', name, (*INTEGERS, *FLOATS))}")
    if "scheme" in wishes:
        enums(Scheme, wishes["scheme"], f"{where}: scheme")
    if "granularity" in wishes:
        enums(Granularity, wishes["granularity"], f"{where}: granularity")
    if "algorithm" in wishes:
        algorithms(wishes["algorithm"], f"{where}: algorithm", weight=where.endswith("weight"))
    return wishes


def _within(choices: OpChoices, capability: OpCapability) -> OpChoices:
    weight, activation = choices.weight, choices.activation
    return OpChoices(
        precisions=_kept(choices.precisions, capability.precisions),
        approaches=_kept(choices.approaches, capability.approaches),
        activation=replace(activation, pairs=_kept(activation.pairs, capability.activations)),
        weight=replace(
            weight,
            pairs=_kept(weight.pairs, capability.weights),
            granularities=_kept(weight.granularities, capability.granularities),
        ),
    )


def _kept(values: tuple[T, ...], able: Iterable[T]) -> tuple[T, ...]:
    return tuple(value for value in values if value in able)


def _apply(rule: Rule, current: OpChoices, bound: OpChoices) -> tuple[OpChoices, list[str]]:
    """Return the choices that a rule leaves, and the wishes that lie outside."""
    outside: list[str] = []
    dtypes = [wishes["dtype"] for wishes in rule.wanted.values() if "dtype" in wishes]
    if any(name in FLOATS for names in dtypes for name in names):
        integer = all(set(names) & set(INTEGERS) for names in dtypes)
        named = dict.fromkeys("int8" if name in INTEGERS else name for names in dtypes for name in names)
        wanted = [name for name in named if integer or name in FLOATS]
        outside += [f"precision {name!r}" for name in wanted if name not in bound.precisions]
        precisions = tuple(Precision(name) for name in wanted if name in bound.precisions)
        current = replace(current, precisions=precisions or current.precisions)
    tensors = {"activation": current.activation, "weight": current.weight}
    for name, wishes in rule.wanted.items():
        limits = bound.weight if name == "weight" else bound.activation
        if limits.pairs:
            tensors[name], refused = _narrow(tensors[name], limits, wishes)
            outside += [f"{name} {text}" for text in refused]
    return replace(current, activation=tensors["activation"], weight=tensors["weight"]), outside


def _narrow(current: TensorChoices, bound: TensorChoices, wishes: Wishes) -> tuple[TensorChoices, list[str]]:
    outside: list[str] = []

    def granted(key: str, able: Iterable[object]) -> list[str]:
        spelled = [str(value) for value in able]
        names = [name for name in wishes.get(key, ()) if name not in FLOATS]
        if key == "algorithm":
            names = [str(calibration.parse(name)) for name in names]
        outside.extend(f"{key} {name!r}" for name in names if name not in spelled)
        return [name for name in names if name in spelled]

    dtypes = granted("dtype", (dtype for dtype, _ in bound.pairs))
    schemes = granted("scheme", (scheme for _, scheme in bound.pairs))
    names = granted("algorithm", bound.algorithms)
    granularities = granted("granularity", bound.granularities)
    pairs = [(d, s) for d, s in bound.pairs if (not dtypes or d in dtypes) and (not schemes or s in schemes)]
    if not pairs:
        outside.append(f"pair of dtype {'/'.join(dtypes)} and scheme {'/'.join(schemes)}")
    pairs = [pair for pair in pairs if pair in current.pairs] or pairs or list(current.pairs)
    pairs.sort(key=lambda pair: (_rank(pair[0], dtypes), _rank(pair[1], schemes)))
    return (
        TensorChoices(
            pairs=tuple(pairs),
            algorithms=tuple(calibration.parse(name) for name in names) or current.algorithms,
            granularities=tuple(Granularity(name) for name in granularities) or current.granularities,
            roundings=current.roundings,
        ),
        outside,
    )


def _rank(value: str, order: list[str]) -> int:
    return order.index(value) if value in order else 0


def _expand(choices: OpChoices, call: Call, approaches: tuple[Approach, ...], reduce: bool) -> Iterator[OpConfig]:
    for precision in choices.precisions:
        if precision is not Precision.INT8:
            yield OpConfig(precision)
            continue
        weights = [DEFAULT_WEIGHT]
        roundings: tuple[Rounding, ...] = (Rounding.NEAREST,)
        if call.op.has_weight:
            weight = choices.weight
            roundings = weight.roundings
            weights = [
                TensorConfig(d, s, g, a)
                for (d, s), g, a in product(weight.pairs, weight.granularities, weight.algorithms)
            ]
        for approach in _kept(choices.approaches, approaches):
            activation = choices.activation
            pairs, found = activation.pairs, activation.algorithms
            if approach is not Approach.STATIC:  # the range is taken from each input as it comes, or there is none
                pairs, found, roundings = pairs[:1], (MinMax(),), (Rounding.NEAREST,)
            reduced = (True, False) if reduce and approach is Approach.STATIC else (reduce,)
            if approach is Approach.DYNAMIC:
                reduced = (True,)  # as torch's modules have it: FBGEMM saturates with 8 bits on AVX-VNNI too
            tensors = [
                TensorConfig(d, s, algorithm=a, reduce_range=r) for r, (d, s), a in product(reduced, pairs, found)
            ]
            yield from (OpConfig(precision, approach, a, w, r) for r, a, w in product(roundings, tensors, weights))
