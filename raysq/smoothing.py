"""Smoothing says how the alphas of SmoothQuant are found: the arguments of IPEX's RFC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from enum import StrEnum
from functools import cached_property
from typing import Any

from raysq.errors import OptionError, unknown

__all__ = ["SharedCriterion", "Smoothing"]


class SharedCriterion(StrEnum):
    """How calls that share an input decide on one alpha: by the mean, smallest or largest of their losses."""

    MEAN = "mean"
    MIN = "min"
    MAX = "max"


@dataclass(frozen=True)
class Smoothing:
    """How the alphas of SmoothQuant are found: the arguments of IPEX's RFC, with its names and defaults.

    `shared_criterion` combines the losses of the calls that share an input, for each alpha, and the alpha with the
    least of that wins. Say q and k share an input, and at alpha 0.3, 0.5 and 0.7 q loses 1, 4 and 6, k loses 9, 5 and
    4: the sums 10, 9 and 10 make "mean" take 0.5; the smaller of each, 1, 4 and 4, make "min" take 0.3; the larger,
    9, 5 and 6, make "max" take 0.5. Intel Neural Compressor first lets each call choose (q 0.3, k 0.7) and then takes
    the smallest or largest of those alphas: its "min" is 0.3, its "max" 0.7, the worst of the three for q.

    Attributes:
        alpha: one for all groups, in [0, 1]; several, each of which is tried on the whole model; or "auto": one for
            each group, by the error that int8 makes there.
        init_alpha: in [0, 1], a candidate of its own that wins ties; "auto" starts where activations and weights have
            their shares of the error.
        alpha_min: smallest candidate, in [0, 1].
        alpha_max: largest candidate, in [0, 1], not below `alpha_min`; reached if steps lead there, never passed.
        alpha_step: between candidates, in (0, 1].
        shared_criterion: "mean", "min" or "max" of the losses of calls that share an input.
        enable_blockwise_loss: whether the error is that of the enclosing block's output instead of the layer's.

    Raises:
        OptionError: a value out of its range.
    """

    alpha: float | tuple[float, ...] | str = "auto"
    init_alpha: float | str = 0.5
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    alpha_step: float = 0.1
    shared_criterion: SharedCriterion = SharedCriterion.MEAN
    enable_blockwise_loss: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.alpha, list | tuple):
            object.__setattr__(self, "alpha", tuple(self.alpha))
            if not self.alpha:
                raise OptionError("`alpha` must be a number, a list of at least one, or 'auto', got an empty list.")
        for value in self.alpha if isinstance(self.alpha, tuple) else (self.alpha,):
            _check_alpha("alpha", value, "a number in [0, 1], a list of them, or 'auto'", isinstance(self.alpha, str))
        _check_alpha("init_alpha", self.init_alpha, "a number in [0, 1] or 'auto'", isinstance(self.init_alpha, str))
        _check_alpha("alpha_min", self.alpha_min, "a number in [0, 1]")
        _check_alpha("alpha_max", self.alpha_max, "a number in [0, 1]")
        _check_alpha("alpha_step", self.alpha_step, "a number in (0, 1]")
        if self.alpha_step == 0:
            raise OptionError("`alpha_step` must be a number in (0, 1], got 0.")
        if self.alpha_min > self.alpha_max:
            raise OptionError(f"`alpha_min` ({self.alpha_min}) must not be above `alpha_max` ({self.alpha_max}).")
        try:
            object.__setattr__(self, "shared_criterion", SharedCriterion(self.shared_criterion))
        except ValueError as exc:
            known = [c.value for c in SharedCriterion]
            raise OptionError(unknown("shared_criterion", self.shared_criterion, known)) from exc
        if not isinstance(self.enable_blockwise_loss, bool):
            raise OptionError(f"`enable_blockwise_loss` must be True or False, got {self.enable_blockwise_loss!r}.")

    @classmethod
    def of(cls, smoothquant_args: Mapping[str, Any]) -> Smoothing:
        """Read the RFC's `smoothquant_args`; what is left out has its default.

        Args:
            smoothquant_args: {"alpha": …, "auto_alpha_args": {…}}; auto_alpha_args go with alpha "auto" only.

        Raises:
            OptionError: an unknown key, an argument that would have no effect, a value out of its range.

        Example:
            >>> Smoothing.of({"alpha": "auto", "auto_alpha_args": {"alpha_min": 0.8}}).alpha_min
            0.8
        """
        given = dict(_mapping("smoothquant_args", smoothquant_args, ["alpha", "auto_alpha_args"]))
        names = [f.name for f in fields(cls) if f.name != "alpha"]
        auto = _mapping("auto_alpha_args", given.pop("auto_alpha_args", {}), names)
        if auto and given.get("alpha", "auto") != "auto":
            raise OptionError(
                f"`auto_alpha_args` go with alpha 'auto' only, and would have no effect with {given['alpha']!r}."
            )
        return cls(**given, **auto)

    @cached_property
    def grid(self) -> tuple[float, ...]:
        """The candidates from `alpha_min` to `alpha_max`, exactly as their decimals say."""
        low, high, step = (Decimal(str(v)) for v in (self.alpha_min, self.alpha_max, self.alpha_step))
        return tuple(float(low + step * k) for k in range(int((high - low) / step) + 1))


def _check_alpha(name: str, value: object, rule: str, may_be_auto: bool = False) -> None:
    if may_be_auto and value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise OptionError(f"`{name}` must be {rule}, got {value!r}.")


def _mapping(name: str, value: object, known: list[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(f"`{name}` must be a dict, got {type(value).__name__}.")
    for key in value:
        if key not in known:
            raise OptionError(unknown(f"key in `{name}`:", key, known))
    return value
