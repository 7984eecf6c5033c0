"""What is turned on or off for a whole model, by whom, and what a search may then still choose."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from driving import drive, make
from simulation import CAPABILITIES, Simulation, make_call, make_graph
from torch import nn

import raysq
from raysq import strategies
from raysq.errors import InputError, OptionError, SpaceError
from raysq.graph import OpType
from raysq.model_choices import ModelChoices
from raysq.recipe import Recipe, Rounding, Transform
from raysq.smoothing import Smoothing
from raysq.space import SearchSpace, build_space
from raysq.switches import free_switches, read_switches, with_switches
from raysq.transfer import within


def small_space() -> SearchSpace:
    """A pool, a convolution, a matmul, a linear and an addition; the linear may be smoothed, by advice 0.7."""
    calls = [
        make_call("pool", OpType.MAX_POOL),
        make_call("conv", OpType.CONV2D),
        make_call("mm", OpType.MATMUL),
        make_call("fc", OpType.LINEAR),
        make_call("sum", OpType.ADD),
    ]
    model = ModelChoices(
        kinds={"alpha.fc": ("fc/0",), "alpha.mm": ("mm/0",)},
        alphas={"fc/0": 0.7},
        values={
            "alpha.fc": ("auto", "off", 0.5, 0.7),
            "alpha.mm": ("off", 0.5, 0.7),
            "equalization": (False, True),
            "bias_correction": (False, True),
        },
        everywhere=(0.3, 0.6),
    )
    return replace(build_space(make_graph(calls), CAPABILITIES), model=model)


SPACE = small_space()


def is_on(name: str, recipe: Recipe) -> bool:
    """Whether a switch is on in a recipe, told without the code under test."""
    floats = {"first_op_float": ["conv"], "last_op_float": ["fc"], "pre_post_process_float": ["pool", "sum"]}
    if name in floats:
        return not any(recipe.config(call).is_int8 for call in floats[name])
    if name == "adaround":
        configs = [recipe.config(call) for call in ("conv", "fc")]
        return {config.rounding for config in configs if config.is_int8} == {Rounding.ADAROUND}
    return bool(recipe.smoothing) if name == "smooth_quant" else Transform(name) in recipe.transforms


NAMES = (
    "smooth_quant",
    "equalization",
    "bias_correction",
    "adaround",
    "first_op_float",
    "last_op_float",
    "pre_post_process_float",
)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_fixed_switch_holds_in_every_recipe(name: str, value: bool) -> None:
    space = with_switches(SPACE, {name: value})
    assert is_on(name, space.default()) == value
    for recipe in (with_switches(SPACE, {name: not value}).default(), SPACE.default()):
        assert is_on(name, within(space, recipe)) == value
    for dimension in space.dimensions:
        assert all(is_on(name, space.recipe({dimension.name: v})) == value for v in dimension.values)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_fixed_is_no_longer_free(name: str) -> None:
    assert tuple(free_switches(SPACE)) == NAMES
    for value in (True, False):
        assert set(free_switches(with_switches(SPACE, {name: value}))) == {*NAMES} - {name}


@pytest.mark.parametrize("name", [kind.name for kind in strategies.ALL])
def test_what_is_fixed_holds_in_all_that_a_strategy_proposes(name: str) -> None:
    fixed = {"adaround": True, "equalization": False, "first_op_float": True, "last_op_float": False}
    plain = replace(SPACE, model=replace(SPACE.model, kinds={}, everywhere=()))
    sim = Simulation(graph=SPACE.graph, sensitive=2)
    strategy = make(name, sim, with_switches(plain, fixed))
    drive(strategy, sim)
    assert strategy.history
    for record in strategy.history:
        assert {key: is_on(key, record.recipe) for key in fixed} == fixed


def test_none_leaves_a_switch_to_the_search() -> None:
    assert with_switches(SPACE, dict.fromkeys(NAMES)) == SPACE


def test_smoothing_that_is_on_is_as_advised_or_else_everywhere() -> None:
    assert with_switches(SPACE, {"smooth_quant": True}).default().smoothing == {"fc/0": 0.7}
    unadvised = SPACE.narrow({"alpha.fc": ["off", 0.5, 0.7]})
    smoothed = with_switches(unadvised, {"smooth_quant": True}).default().smoothing
    assert smoothed == {"fc/0": 0.5, "mm/0": 0.5}


def test_smoothing_that_is_off_leaves_no_alphas_to_try() -> None:
    assert with_switches(SPACE, {"smooth_quant": False}).model.alpha_variants() == []


def test_a_call_that_the_user_holds_to_int8_stays_there() -> None:
    held = SPACE.narrow({"conv": "int8"})
    with pytest.warns(UserWarning, match="'first_op_float' changes nothing"):
        space = with_switches(held, {"first_op_float": True})
    assert space.default().config("conv").is_int8


def test_what_is_off_already_is_no_reason_to_warn() -> None:
    plain = SPACE.narrow({"equalization": False})
    assert with_switches(plain, {"equalization": False}) == plain


def test_a_switch_without_effect_warns() -> None:
    with pytest.warns(UserWarning, match="'equalization' changes nothing in this model"):
        with_switches(Simulation().space(), {"equalization": True})


def test_nothing_left_in_int8_is_refused() -> None:
    space = build_space(make_graph([make_call("fc", OpType.LINEAR)]), CAPABILITIES)
    assert "first_op_float" not in free_switches(space)
    with pytest.raises(SpaceError, match="nothing to search"):
        with_switches(space, {"first_op_float": True})


def test_a_nearest_recipe_keeps_what_is_allowed() -> None:
    recipe = SPACE.recipe({"linear.algorithm": "kl", "alpha.mm": 0.5})
    space = with_switches(SPACE, {"adaround": True, "equalization": True})
    nearest = within(space, recipe)
    assert str(nearest.config("fc").activation.algorithm) == "kl"
    assert nearest.config("fc").rounding is Rounding.ADAROUND
    assert nearest.smoothing == recipe.smoothing
    assert nearest.transforms == (Transform.EQUALIZATION,)
    assert within(SPACE, recipe) == recipe


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (None, {}),
        ({"adaround": True, "equalization": None}, {"adaround": True, "equalization": None}),
        ({"fast_bias_correction": True}, {"bias_correction": True}),
        ({"first_conv_or_matmul_quantization": False}, {"first_op_float": True}),
        ({"last_conv_or_matmul_quantization": True}, {"last_op_float": False}),
        ({"pre_post_process_quantization": None}, {"pre_post_process_float": None}),
    ],
)
def test_names_of_inc_are_understood(given: Any, read: dict[str, bool | None]) -> None:
    assert read_switches(given) == read


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["adaround"], "must be a dict of name to True, False or None, got list"),
        ({"adarond": True}, "Did you mean 'adaround'"),
        ({"adaround": 1}, "must be True, False or None, got 1"),
        ({"adaround": "on"}, "must be True, False or None, got 'on'"),
        ({"weight_correction": True}, "no meaning here: .*`bias_correction`"),
        ({"gemm_to_matmul": False}, "no meaning here: it is about ONNX"),
        ({"bias_correction": True, "fast_bias_correction": True}, "given twice"),
    ],
)
def test_what_is_no_switch_is_refused_before_any_work(given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        raysq.tune(nn.Linear(2, 2), None, print, switches=given)  # the calibration data would be refused next
    with pytest.raises(OptionError, match=message):
        raysq.prepare(nn.Linear(2, 2), switches=given)


@pytest.mark.parametrize(("smoothing", "smooth_quant"), [(False, True), (True, False), (Smoothing(), False)])
def test_smoothing_and_its_switch_may_not_contradict(smoothing: Smoothing | bool, smooth_quant: bool) -> None:
    with pytest.raises(OptionError, match="contradict"):
        raysq.prepare(nn.Linear(2, 2), switches={"smooth_quant": smooth_quant}, smoothing=smoothing)


def test_switches_without_tuning() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    calib = [torch.randn(16, 8)]
    switches = {"first_op_float": True, "adaround": True, "smooth_quant": False}
    recipe = raysq.quantize(model, calib, backend="reference", switches=switches).recipe
    assert recipe.int8_calls == ("2", "4")
    assert all(recipe.config(call).rounding is Rounding.ADAROUND for call in recipe.int8_calls)
    assert not recipe.smoothing
    with pytest.raises(InputError, match="no effect on the one that is given"):
        raysq.quantize(model, calib, recipe, backend="reference", switches=switches)


def test_what_changes_something_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_switches(SPACE, dict.fromkeys(NAMES, True))
