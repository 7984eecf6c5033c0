"""The arguments of IPEX's RFC: their ranges, defaults and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysq.errors import OptionError
from raysq.smoothing import SharedCriterion, Smoothing

OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("alpha", -0.1, r"\[0, 1\]"),
    ("alpha", 1.01, r"\[0, 1\]"),
    ("alpha", math.nan, r"\[0, 1\]"),
    ("alpha", True, r"\[0, 1\]"),
    ("alpha", None, r"\[0, 1\]"),
    ("alpha", "automatic", "'auto'"),
    ("alpha", "0.5", "'auto'"),
    ("alpha", [], "empty list"),
    ("alpha", [0.5, 2], r"\[0, 1\]"),
    ("alpha", [0.5, "auto"], r"\[0, 1\]"),
    ("init_alpha", 1.5, r"\[0, 1\]"),
    ("init_alpha", "best", "'auto'"),
    ("alpha_min", -1, r"\[0, 1\]"),
    ("alpha_min", "auto", r"\[0, 1\]"),
    ("alpha_max", 7, r"\[0, 1\]"),
    ("alpha_step", 0, r"\(0, 1\]"),
    ("alpha_step", 0.0, r"\(0, 1\]"),
    ("alpha_step", -0.1, r"\(0, 1\]"),
    ("alpha_step", 1.5, r"\(0, 1\]"),
    ("shared_criterion", "median", "max, mean, min"),
    ("enable_blockwise_loss", 1, "True or False"),
    ("enable_blockwise_loss", "yes", "True or False"),
]


@pytest.mark.parametrize(("name", "value", "rule"), OUT_OF_RANGE)
def test_what_is_out_of_range_raises_and_names_the_range(name: str, value: Any, rule: str) -> None:
    with pytest.raises(OptionError, match=rule) as raised:
        Smoothing(**{name: value})
    assert name in str(raised.value)


def test_bounds_must_not_cross() -> None:
    with pytest.raises(OptionError, match=r"`alpha_min` \(0.8\) must not be above `alpha_max` \(0.3\)"):
        Smoothing(alpha_min=0.8, alpha_max=0.3)


def test_the_defaults_are_those_of_the_rfc() -> None:
    assert Smoothing.of({}) == Smoothing()
    assert Smoothing() == Smoothing("auto", 0.5, 0.0, 1.0, 0.1, SharedCriterion.MEAN, False)


def test_what_a_partial_dict_leaves_out_has_its_default() -> None:
    got = Smoothing.of({"auto_alpha_args": {"alpha_min": 0.8, "alpha_max": 0.99, "alpha_step": 0.01}})
    assert got == Smoothing(alpha_min=0.8, alpha_max=0.99, alpha_step=0.01)
    assert (got.alpha, got.init_alpha, got.shared_criterion) == ("auto", 0.5, "mean")


def test_every_argument_has_a_place() -> None:
    auto = {
        "init_alpha": "auto",
        "alpha_min": 0,
        "alpha_max": 1,
        "alpha_step": 1,
        "shared_criterion": "max",
        "enable_blockwise_loss": True,
    }
    got = Smoothing.of({"alpha": "auto", "auto_alpha_args": auto})
    assert got == Smoothing("auto", "auto", 0, 1, 1, SharedCriterion.MAX, True)


@pytest.mark.parametrize("alpha", [0, 1, 0.5, [0.2, 0.4], (0.1,)])
def test_alpha_may_be_a_number_or_several(alpha: Any) -> None:
    assert Smoothing.of({"alpha": alpha}).alpha == (tuple(alpha) if isinstance(alpha, list) else alpha)


@pytest.mark.parametrize("alpha", [0.5, [0.3, 0.5]])
def test_arguments_without_effect_raise(alpha: Any) -> None:
    with pytest.raises(OptionError, match="would have no effect"):
        Smoothing.of({"alpha": alpha, "auto_alpha_args": {"alpha_min": 0.1}})
    assert Smoothing.of({"alpha": alpha, "auto_alpha_args": {}}).grid[0] == 0  # nothing given, nothing lost


@pytest.mark.parametrize(
    "arguments",
    [
        {"alfa": 0.5},
        {"folding": True},
        {"init_alpha": 0.5},  # belongs one level deeper: INC drops it silently
        {"auto_alpha_args": {"alpha": 0.5}},
        {"auto_alpha_args": {"alpha_mim": 0.5}},
        {"auto_alpha_args": {"n_samples": 32}},
    ],
)
def test_unknown_keys_raise_and_known_ones_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="alpha"):
        Smoothing.of(arguments)


@pytest.mark.parametrize("arguments", [None, 0.5, "auto", [], {"auto_alpha_args": None}, {"auto_alpha_args": [0.1]}])
def test_what_is_no_dict_raises(arguments: Any) -> None:
    with pytest.raises(OptionError, match="must be a dict"):
        Smoothing.of(arguments)


GRIDS = [
    # low, high, step, candidates; INC indexes past the end of str(0), and passes the upper bound
    (0, 1, 0.1, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
    (0, 1, 1, [0.0, 1.0]),
    (0, 1, 0.3, [0.0, 0.3, 0.6, 0.9]),
    (0.2, 0.8, 0.05, [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8]),
    (0.3, 0.7, 0.1, [0.3, 0.4, 0.5, 0.6, 0.7]),
    (0.5, 0.5, 0.1, [0.5]),
    (0.5, 0.55, 0.1, [0.5]),
    (0.5, 0.50002, 1e-05, [0.5, 0.50001, 0.50002]),
]


@pytest.mark.parametrize(("low", "high", "step", "candidates"), GRIDS)
def test_the_grid_is_what_its_decimals_say(low: float, high: float, step: float, candidates: list[float]) -> None:
    assert list(Smoothing(alpha_min=low, alpha_max=high, alpha_step=step).grid) == candidates


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 100))
def test_the_grid_never_passes_its_bounds(low: int, width: int, step: int) -> None:
    high = min(100, low + width)
    grid = Smoothing(alpha_min=low / 100, alpha_max=high / 100, alpha_step=step / 100).grid
    assert [round(100 * alpha) for alpha in grid] == list(range(low, high + 1, step))
    assert all(alpha == round(alpha, 2) for alpha in grid)
