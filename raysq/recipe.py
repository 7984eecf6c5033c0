"""A Recipe says, per call of a model, in which precision and with which quantization it runs.

It is the only currency between searchers, backends and results: frozen, hashable and JSON in both
directions. Nothing in it belongs to one backend. Strings stand in JSON only; in here a choice is a type.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeVar

from raysq import calibration, plain_data
from raysq.arithmetic import Grid
from raysq.calibration.base import Calibrator
from raysq.calibration.minmax import MinMax
from raysq.checks import is_whole
from raysq.errors import RecipeError, shown, unknown

__all__ = [
    "SCHEMA",
    "Approach",
    "Granularity",
    "OpConfig",
    "Precision",
    "QuantDType",
    "Recipe",
    "Rounding",
    "Scheme",
    "TensorConfig",
    "Transform",
]

E = TypeVar("E", bound=StrEnum)

SCHEMA = 1  # grows by additions only: a reader of schema n accepts every schema <= n


class Precision(StrEnum):
    """The type a call computes in."""

    INT8 = "int8"
    BF16 = "bf16"
    FP32 = "fp32"


class Approach(StrEnum):
    """When activations get their quantization parameters: before deployment, at each call, or never."""

    STATIC = "static"
    DYNAMIC = "dynamic"
    WEIGHT_ONLY = "weight_only"  # the weight has eight bits, the call computes in float


class QuantDType(StrEnum):
    """The integer type of a quantized tensor, in INC's spelling."""

    S8 = "int8"
    U8 = "uint8"


class Scheme(StrEnum):
    """How a range maps to integers: with any zero point, or with zero in the middle."""

    AFFINE = "asym"
    SYMMETRIC = "sym"


class Granularity(StrEnum):
    """One scale for a whole tensor, or one for each output channel of a weight."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"


class Rounding(StrEnum):
    """How weights are rounded to the grid."""

    NEAREST = "nearest"
    ADAROUND = "adaround"


class Transform(StrEnum):
    """Changes of the whole model before quantization, applied in this order."""

    EQUALIZATION = "equalization"
    BIAS_CORRECTION = "bias_correction"


@dataclass(frozen=True)
class TensorConfig:
    """How one tensor is quantized.

    Attributes:
        dtype: s8 holds [-128, 127], u8 holds [0, 255].
        scheme: affine or symmetric.
        granularity: per tensor, or per output channel (weights only).
        algorithm: the calibrator that picks the range from the statistics.
        reduce_range: use 7 of the 8 bits, for CPUs whose int8 products saturate (no VNNI).
    """

    dtype: QuantDType
    scheme: Scheme
    granularity: Granularity = Granularity.PER_TENSOR
    algorithm: Calibrator = MinMax()
    reduce_range: bool = False

    @property
    def grid(self) -> Grid:
        """The integers that the tensor may take."""
        symmetric = self.scheme is Scheme.SYMMETRIC
        if self.dtype is QuantDType.S8:
            return Grid(-64, 63, symmetric) if self.reduce_range else Grid(-128, 127, symmetric)
        return Grid(0, 127 if self.reduce_range else 255, symmetric)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; `from_dict` is its inverse."""
        return {
            "dtype": self.dtype.value,
            "scheme": self.scheme.value,
            "granularity": self.granularity.value,
            "algorithm": str(self.algorithm),
            "reduce_range": self.reduce_range,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorConfig:
        """Read the JSON form.

        Raises:
            RecipeError: an unknown key or value.
        """
        _check_keys("tensor configuration", data, {"dtype", "scheme", "granularity", "algorithm", "reduce_range"})
        return cls(
            dtype=_enum(QuantDType, data.get("dtype", "uint8")),
            scheme=_enum(Scheme, data.get("scheme", "asym")),
            granularity=_enum(Granularity, data.get("granularity", "per_tensor")),
            algorithm=calibration.parse(data.get("algorithm", "minmax")),
            reduce_range=_boolean("reduce_range", data.get("reduce_range", False)),
        )


DEFAULT_ACTIVATION = TensorConfig(QuantDType.U8, Scheme.AFFINE)
DEFAULT_WEIGHT = TensorConfig(QuantDType.S8, Scheme.SYMMETRIC, Granularity.PER_CHANNEL)


@dataclass(frozen=True)
class OpConfig:
    """How one call runs. The fields after `precision` matter for int8 only.

    Attributes:
        precision: the type it computes in; of a weight-only call the type of its weight.
        approach: static, dynamic or no quantization of its activations.
        activation: how its inputs are quantized.
        weight: how its weight is quantized; ignored by calls that have none.
        rounding: how the weight is rounded.
    """

    precision: Precision
    approach: Approach = Approach.STATIC
    activation: TensorConfig = DEFAULT_ACTIVATION
    weight: TensorConfig = DEFAULT_WEIGHT
    rounding: Rounding = Rounding.NEAREST

    def __post_init__(self) -> None:
        if self.activation.granularity is not Granularity.PER_TENSOR:
            raise RecipeError("activations are quantized per tensor: no int8 kernel takes another granularity.")

    @property
    def is_int8(self) -> bool:
        """Whether the call computes in int8."""
        return self.precision is Precision.INT8

    @property
    def reads_int8(self) -> bool:
        """Whether the call's activations are quantized."""
        return self.is_int8 and self.approach is not Approach.WEIGHT_ONLY

    def __str__(self) -> str:
        if not self.is_int8:
            return str(self.precision)
        x, w = self.activation, self.weight
        return f"{self.approach}, x {x.dtype} {x.scheme} {x.algorithm}, w {w.dtype} {w.granularity} {self.rounding}"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; `from_dict` is its inverse."""
        if not self.is_int8:
            return {"precision": self.precision.value}
        return {
            "precision": self.precision.value,
            "approach": self.approach.value,
            "activation": self.activation.to_dict(),
            "weight": self.weight.to_dict(),
            "rounding": self.rounding.value,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OpConfig:
        """Read the JSON form.

        Raises:
            RecipeError: an unknown key or value.
        """
        _check_keys("call's configuration", data, {"precision", "approach", "activation", "weight", "rounding"})
        precision = _enum(Precision, data.get("precision"))
        if precision is not Precision.INT8:
            return cls(precision)
        return cls(
            precision=precision,
            approach=_enum(Approach, data.get("approach", "static")),
            activation=TensorConfig.from_dict(data.get("activation", DEFAULT_ACTIVATION.to_dict())),
            weight=TensorConfig.from_dict(data.get("weight", DEFAULT_WEIGHT.to_dict())),
            rounding=_enum(Rounding, data.get("rounding", "nearest")),
        )


FP32 = OpConfig(Precision.FP32)
BF16 = OpConfig(Precision.BF16)


@dataclass(frozen=True)
class Recipe:
    """What runs how, for a whole model.

    Attributes:
        ops: call name to its configuration; a call that is not named stays in fp32.
        smoothing: name of a group of calls that share an input, to the SmoothQuant alpha in [0, 1] or to
            fixed positive scales, one per input channel.
        transforms: changes of the whole model before quantization.

    Example:
        >>> recipe = Recipe({"fc": OpConfig(Precision.INT8)})
        >>> Recipe.from_json(recipe.to_json()) == recipe
        True
    """

    ops: Mapping[str, OpConfig]
    smoothing: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    transforms: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        for group, alpha in self.smoothing.items():
            _check_smoothing(group, alpha)
        if len(set(self.transforms)) != len(self.transforms):
            raise RecipeError(f"each transform may stand once, got {[str(t) for t in self.transforms]}.")
        order = list(Transform)
        object.__setattr__(self, "ops", MappingProxyType(dict(sorted(self.ops.items()))))
        smoothing = {group: _floats(alpha) for group, alpha in sorted(self.smoothing.items())}
        object.__setattr__(self, "smoothing", MappingProxyType(smoothing))
        object.__setattr__(self, "transforms", tuple(sorted(self.transforms, key=order.index)))

    def __eq__(self, other: object) -> bool:
        """Whether both run the same: fields that don't matter, as a float call's weight scheme, make no difference."""
        return self.digest == other.digest if isinstance(other, Recipe) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Recipe.from_dict, (self.to_dict(),)  # a mapping proxy can't be pickled

    def config(self, call: str) -> OpConfig:
        """Return the configuration of a call, fp32 where the recipe doesn't name it."""
        return self.ops.get(call, FP32)

    @property
    def int8_calls(self) -> tuple[str, ...]:
        """Names of the calls that run in int8."""
        return tuple(name for name, config in self.ops.items() if config.is_int8)

    def with_ops(self, changes: Mapping[str, OpConfig]) -> Recipe:
        """Return a copy in which the named calls are configured anew."""
        return replace(self, ops={**self.ops, **changes})

    def with_smoothing(self, smoothing: Mapping[str, float | tuple[float, ...]]) -> Recipe:
        """Return a copy that is smoothed like this."""
        return replace(self, smoothing=smoothing)

    def with_transform(self, transform: Transform) -> Recipe:
        """Return a copy that has one more transform."""
        return replace(self, transforms=(*self.transforms, transform))

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits that name this recipe: equal recipes, equal digests."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; `from_dict` is its inverse."""
        return {
            "schema": SCHEMA,
            "ops": {name: config.to_dict() for name, config in self.ops.items()},
            "smoothing": {g: list(a) if isinstance(a, tuple) else a for g, a in self.smoothing.items()},
            "transforms": [t.value for t in self.transforms],
        }

    def to_json(self, indent: int | None = None) -> str:
        """Return the recipe as JSON text: on one line, or indented for people."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Read plain data.

        Raises:
            RecipeError: not a recipe, a newer schema, an unknown key or value.
        """
        _check_keys("recipe", data, {"schema", "ops", "smoothing", "transforms"})
        schema = data.get("schema", SCHEMA)
        if not is_whole(schema) or not 1 <= schema <= SCHEMA:
            raise RecipeError(f"recipe schema must be at most {SCHEMA}, got {shown(schema)}. Update raysq to read it.")
        ops, smoothing, transforms = data.get("ops", {}), data.get("smoothing", {}), data.get("transforms", ())
        if (
            not isinstance(ops, Mapping)
            or not isinstance(smoothing, Mapping)
            or not isinstance(transforms, list | tuple)
        ):
            raise RecipeError("in a recipe, `ops` and `smoothing` must be objects and `transforms` a list.")
        return cls(
            ops={str(name): OpConfig.from_dict(config) for name, config in ops.items()},
            smoothing={str(g): tuple(a) if isinstance(a, list) else a for g, a in smoothing.items()},
            transforms=tuple(_enum(Transform, t) for t in transforms),
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Recipe:
        """Read JSON text.

        Raises:
            RecipeError: not JSON, or not a recipe.
        """
        try:
            data = plain_data.from_json(text)
        except ValueError as exc:
            raise RecipeError(f"a recipe must be JSON: {exc}") from exc
        return cls.from_dict(data)


def _check_keys(what: str, data: object, known: set[str]) -> None:
    if not isinstance(data, Mapping):
        raise RecipeError(f"a {what} must be an object, got {type(data).__name__}.")
    for key in data:
        if key not in known:
            raise RecipeError(unknown(f"key in a {what}:", key, known))


def _enum(kind: type[E], value: object) -> E:
    try:
        return kind(str(value))
    except ValueError as exc:
        raise RecipeError(unknown(kind.__name__, value, [m.value for m in kind])) from exc


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(f"`{name}` must be true or false, got {shown(value)}.")
    return value


def _floats(alpha: float | tuple[float, ...]) -> float | tuple[float, ...]:
    """Return floats for integers and 0.0 for -0.0, so that what is equal has one spelling in JSON."""
    return tuple(float(a) for a in alpha) if isinstance(alpha, tuple) else float(alpha) + 0.0


def _check_smoothing(group: str, alpha: object) -> None:
    values = alpha if isinstance(alpha, tuple) else (alpha,)
    if not values or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise RecipeError(f"smoothing of {group!r} must be an alpha or a list of scales, got {shown(alpha)}.")
    if isinstance(alpha, tuple):
        if not all(0 < v <= sys.float_info.max for v in alpha):
            raise RecipeError(f"smoothing scales of {group!r} must be positive and finite.")
    elif not 0 <= values[0] <= 1:
        raise RecipeError(f"alpha of {group!r} must lie in [0, 1], got {shown(alpha)}.")
