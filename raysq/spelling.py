"""One call's configuration as one short string, for flat configs and tables, and back.

fp32    bf16    int8 static uint8/asym/kl int8/sym/minmax/per_channel
int8 dynamic uint8/asym/minmax/7bit int8/sym/mse/per_channel adaround
"""

from __future__ import annotations

from raysq import calibration
from raysq.errors import RecipeError
from raysq.recipe import (
    Approach,
    Granularity,
    OpConfig,
    Precision,
    QuantDType,
    Rounding,
    Scheme,
    TensorConfig,
)

__all__ = ["parse", "spell"]

SEVEN_BITS = "7bit"


def spell(config: OpConfig) -> str:
    """Return the string that `parse` reads.

    Example:
        >>> parse(spell(OpConfig(Precision.INT8))) == OpConfig(Precision.INT8)
        True
    """
    if not config.is_int8:
        return config.precision.value
    words = [
        config.precision.value,
        config.approach.value,
        _tensor(config.activation),
        _tensor(config.weight),
    ]
    if config.rounding is not Rounding.NEAREST:
        words.append(config.rounding.value)
    return " ".join(words)


def parse(text: str) -> OpConfig:
    """Return the configuration that a string spells.

    Raises:
        RecipeError: it spells none.
    """
    words = text.split() if isinstance(text, str) else []
    try:
        if len(words) == 1 and words[0] != Precision.INT8:
            return OpConfig(Precision(words[0]))
        precision, approach, activation, weight, *rounding = words
        if precision != Precision.INT8 or len(rounding) > 1:
            raise ValueError(text)
        return OpConfig(
            Precision.INT8,
            Approach(approach),
            _parse_tensor(activation),
            _parse_tensor(weight),
            Rounding(rounding[0]) if rounding else Rounding.NEAREST,
        )
    except ValueError as exc:  # RecipeError is one
        example = spell(OpConfig(Precision.INT8))
        raise RecipeError(
            f"a call's configuration must be 'fp32', 'bf16' or such as {example!r}, got {text!r}."
        ) from exc


def _tensor(tensor: TensorConfig) -> str:
    parts = [tensor.dtype.value, tensor.scheme.value, str(tensor.algorithm)]
    if tensor.granularity is Granularity.PER_CHANNEL:
        parts.append(tensor.granularity.value)
    if tensor.reduce_range:
        parts.append(SEVEN_BITS)
    return "/".join(parts)


def _parse_tensor(text: str) -> TensorConfig:
    dtype, scheme, algorithm, *flags = text.split("/")
    if not set(flags) <= {Granularity.PER_CHANNEL.value, SEVEN_BITS}:
        raise ValueError(text)
    return TensorConfig(
        QuantDType(dtype),
        Scheme(scheme),
        Granularity.PER_CHANNEL if Granularity.PER_CHANNEL.value in flags else Granularity.PER_TENSOR,
        calibration.parse(algorithm),
        SEVEN_BITS in flags,
    )
