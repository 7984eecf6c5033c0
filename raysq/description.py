"""The YAML that says what may be tuned per kind of call, read and checked."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from raysq import calibration
from raysq.calibration.base import Calibrator
from raysq.errors import RecipeError, SpaceError, shown, unknown
from raysq.graph import Call, OpType
from raysq.plain_data import from_yaml
from raysq.recipe import Approach, Granularity, Precision, QuantDType, Rounding, Scheme

__all__ = ["Description", "OpChoices", "TensorChoices", "bundled", "family", "load"]

E = TypeVar("E", bound=StrEnum)

SCHEMA = 1
FAMILIES = (
    "conv",
    "depthwise",
    "linear",
    "matmul",
    "add",
    "pool",
    "embedding_bag",
    "lstm",
)


@dataclass(frozen=True)
class TensorChoices:
    """How a tensor may be quantized; the first of each is the default."""

    pairs: tuple[tuple[QuantDType, Scheme], ...] = ()
    algorithms: tuple[Calibrator, ...] = ()
    granularities: tuple[Granularity, ...] = (Granularity.PER_TENSOR,)
    roundings: tuple[Rounding, ...] = (Rounding.NEAREST,)


@dataclass(frozen=True)
class OpChoices:
    """How a kind of call may run; the first of each is the default."""

    precisions: tuple[Precision, ...]
    approaches: tuple[Approach, ...]
    activation: TensorChoices
    weight: TensorChoices


@dataclass(frozen=True)
class Description:
    """What may be tuned on a backend.

    Attributes:
        backend: its name.
        ops: by op type or family.
    """

    backend: str
    ops: Mapping[str, OpChoices]

    def choices(self, call: Call) -> OpChoices | None:
        """Return what may be tuned for a call, the narrowest entry first; None if it stays in float."""
        names = (
            *(("depthwise",) if call.is_depthwise else ()),
            call.op.value,
            _kind(call.op),
        )
        return next((self.ops[name] for name in names if name in self.ops), None)


def family(call: Call) -> str:
    """Return the family of a call: those whose precision is one dimension of the compact space."""
    return "depthwise" if call.is_depthwise and call.op.is_conv else _kind(call.op)


@functools.cache
def _kind(op: OpType) -> str:
    if op.is_conv:
        return "conv"
    return {OpType.BMM: "matmul", OpType.MAX_POOL: "pool", OpType.AVG_POOL: "pool"}.get(op, op.value)


def bundled() -> tuple[str, ...]:
    """Names of the descriptions that come with raysq, one per backend."""
    folder = resources.files("raysq") / "search_spaces"
    return tuple(sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml")))


def load(source: str | Path | Mapping[str, Any]) -> Description:
    """Read a description: the name of a bundled one, the path of a YAML file, or its content.

    Raises:
        SpaceError: no such file, or not a description.
    """
    if isinstance(source, Mapping):
        return _parse(source, "the description")
    if str(source) in bundled():
        text = (resources.files("raysq") / "search_spaces" / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, TypeError, UnicodeDecodeError) as exc:
            raise SpaceError(f"{unknown('search space', source, bundled())} A path of a YAML file works too.") from exc
    try:
        data = from_yaml(text)
    except ValueError as exc:
        raise SpaceError(f"a search space must be YAML, and {source} is not: {exc}") from exc
    return _parse(data, str(source))


def _parse(data: object, where: str) -> Description:
    content = check_keys(data, ("schema", "backend", "ops"), where)
    schema = content.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or not 1 <= schema <= SCHEMA:
        raise SpaceError(f"{where}: `schema` must be a number from 1 to {SCHEMA}, got {shown(schema)}.")
    ops = check_keys(content.get("ops"), {*FAMILIES, *(op.value for op in OpType)}, f"{where}: ops")
    return Description(
        str(content.get("backend", "")),
        {str(name): _op(entry, f"{where}: {name}") for name, entry in ops.items()},
    )


def _op(data: object, where: str) -> OpChoices:
    entry = check_keys(data, ("precision", "approach", "activation", "weight"), where)
    return OpChoices(
        precisions=enums(Precision, entry.get("precision"), f"{where}: precision"),
        approaches=enums(Approach, entry.get("approach", ["static"]), f"{where}: approach"),
        activation=_tensor(entry.get("activation"), f"{where}: activation", per_tensor=True),
        weight=_tensor(entry["weight"], f"{where}: weight") if "weight" in entry else TensorChoices(),
    )


def _tensor(data: object, where: str, *, per_tensor: bool = False) -> TensorChoices:
    keys = ("dtype", "scheme", "algorithm", *(() if per_tensor else ("granularity", "rounding")))
    entry = check_keys(data, keys, where)
    dtypes = enums(QuantDType, entry.get("dtype"), f"{where}: dtype")
    schemes = enums(Scheme, entry.get("scheme"), f"{where}: scheme")
    return TensorChoices(
        pairs=tuple(product(dtypes, schemes)),
        algorithms=algorithms(entry.get("algorithm"), f"{where}: algorithm", weight=not per_tensor),
        granularities=enums(
            Granularity,
            entry.get("granularity", ["per_tensor"]),
            f"{where}: granularity",
        ),
        roundings=enums(Rounding, entry.get("rounding", ["nearest"]), f"{where}: rounding"),
    )


def check_keys(data: object, known: Iterable[str], where: str) -> Mapping[str, Any]:
    """Return `data` if it is a mapping with known keys only.

    Raises:
        SpaceError: it isn't, with the near match.
    """
    if not isinstance(data, Mapping):
        raise SpaceError(f"{where} must be a mapping, got {type(data).__name__}.")
    names = set(known)
    for key in data:
        if key not in names:
            raise SpaceError(f"{where}: {unknown('key', key, names)}")
    return data


def listed(values: object, where: str) -> list[str]:
    """Return a list of distinct strings; a bare string is a list of one.

    Raises:
        SpaceError: empty, or something else.
    """
    items = [values] if isinstance(values, str) else values
    if not isinstance(items, list | tuple) or not items or not all(isinstance(v, str) for v in items):
        raise SpaceError(f"{where} must be a list of one or more names, got {shown(values)}.")
    return list(dict.fromkeys(items))


def enums(kind: type[E], values: object, where: str) -> tuple[E, ...]:
    """Return the members that a list names.

    Raises:
        SpaceError: an unknown name, with the near match.
    """
    known = [member.value for member in kind]
    for value in listed(values, where):
        if value not in known:
            raise SpaceError(f"{where}: {unknown('value', value, known)}")
    return tuple(kind(value) for value in listed(values, where))


def algorithms(values: object, where: str, *, weight: bool) -> tuple[Calibrator, ...]:
    """Return the calibrators that a list names.

    Raises:
        SpaceError: an unknown name, or one that doesn't work on weights where weights are meant.
    """
    try:
        found = tuple(calibration.parse(value) for value in listed(values, where))
    except RecipeError as exc:
        raise SpaceError(f"{where}: {exc}") from exc
    for algorithm in found:
        if weight and type(algorithm).weight_range is Calibrator.weight_range:
            raise SpaceError(
                f"{where}: {str(algorithm)!r} picks ranges of activations; weights take 'minmax' or 'mse'."
            )
    return found
