"""The search space: description, capabilities and rules; flat config and recipe."""

from __future__ import annotations

import copy
import pickle
import random
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
import yaml
from simulation import CAPABILITIES, Simulation, make_call, make_graph

from raysq import description
from raysq.errors import OptionError, RecipeError, SpaceError
from raysq.graph import OpType
from raysq.kernels.base import BACKENDS
from raysq.recipe import Approach, OpConfig, Precision, QuantDType, Recipe, Rounding, Scheme, TensorConfig, Transform
from raysq.space import RESERVED, SearchSpace, build_space
from raysq.spelling import parse, spell

SIM = Simulation()
SPACE = SIM.space()

SMALL = make_graph(
    [
        make_call("conv", OpType.CONV2D),
        make_call("fc1", OpType.LINEAR, block="b"),
        make_call("fc2", OpType.LINEAR, block="b"),
        make_call("b:matmul", OpType.MATMUL),
        make_call("b:add", OpType.ADD),
    ]
)


def small(**kwargs: Any) -> SearchSpace:
    return build_space(SMALL, CAPABILITIES, **kwargs)


def schemes(space: SearchSpace, call: str) -> set[str]:
    return {config.activation.scheme.value for config in space.options[call] if config.is_int8}


def precisions(space: SearchSpace, call: str) -> list[str]:
    configs = space.options.get(call, (OpConfig(Precision.FP32),))
    return list(dict.fromkeys(config.precision.value for config in configs))


# descriptions


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_backend_has_a_description(backend: str) -> None:
    assert description.load(backend).backend == backend


@pytest.mark.parametrize("op", OpType)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kind_of_call_is_described(backend: str, op: OpType) -> None:
    assert description.load(backend).choices(make_call("x", op)) is not None


def described(change: dict[str, Any]) -> dict[str, Any]:
    entry = {
        "precision": ["int8", "fp32"],
        "activation": {"dtype": ["uint8"], "scheme": ["asym"], "algorithm": ["minmax"]},
        "weight": {"dtype": ["int8"], "scheme": ["sym"], "algorithm": ["minmax"], "granularity": ["per_channel"]},
    }
    for path, value in change.items():
        place: Any = entry
        *outer, key = path.split(".")
        for name in outer:
            place = place[name]
        place[key] = value
    return {"schema": 1, "backend": "x", "ops": {"linear": entry}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": ["int9"]}, "unknown value 'int9'.*Did you mean 'int8'"),
        ({"precision": []}, "list of one or more"),
        ({"activation.sheme": ["asym"]}, "unknown key 'sheme'.*Did you mean 'scheme'"),
        ({"activation.granularity": ["per_channel"]}, "unknown key 'granularity'"),
        ({"activation.algorithm": ["minmix"]}, "minmix"),
        ({"weight.algorithm": ["kl"]}, "ranges of activations"),
        ({"wieght": {}}, "Did you mean 'weight'"),
    ],
)
def test_a_wrong_description_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        description.load(described(change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schema": 2, "ops": {}}, "`schema` must be"),
        ({"ops": {}}, "`schema` must be"),
        ({"schema": 1, "ops": {"linaer": {}}}, "Did you mean 'linear'"),
        ([], "must be a mapping"),
    ],
)
def test_a_wrong_frame_is_refused(content: Any, message: str, tmp_path: Any) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(SpaceError, match=message):
        description.load(path)


def test_an_unknown_description_names_the_known_ones() -> None:
    with pytest.raises(SpaceError, match="Did you mean 'ipex'"):
        description.load("ipexx")


def test_a_description_of_ones_own_is_used() -> None:
    space = small(description=described({"activation.algorithm": ["kl"]}))
    assert set(space.options) == {"fc1", "fc2"}
    assert str(space.default().config("fc1").activation.algorithm) == "kl"


# capabilities


def test_what_the_backend_cannot_run_is_left_out() -> None:
    no_bf16 = {op: replace(c, precisions=(Precision.INT8, Precision.FP32)) for op, c in CAPABILITIES.ops.items()}
    only_linear = replace(CAPABILITIES, ops={OpType.LINEAR: no_bf16[OpType.LINEAR]})
    space = build_space(SMALL, only_linear)
    assert set(space.options) == {"fc1", "fc2"}
    assert precisions(space, "fc1") == ["int8", "fp32"]


def test_seven_bits_are_the_default_where_products_saturate_and_eight_a_choice() -> None:
    space = build_space(SMALL, replace(CAPABILITIES, reduce_range=True))
    assert all(c.activation.reduce_range for c in space.default().ops.values() if c.is_int8)
    assert space.choices["linear.bits"] == ("7", "8")


def test_nothing_in_int8_is_an_error() -> None:
    with pytest.raises(SpaceError, match="no call may run in int8"):
        build_space(SMALL, replace(CAPABILITIES, ops={}))


@pytest.mark.parametrize(
    ("approach", "linear", "conv"),
    [("static", {"static"}, {"static"}), ("dynamic", {"dynamic"}, set()), ("auto", {"static", "dynamic"}, {"static"})],
)
def test_approach(approach: str, linear: set[str], conv: set[str]) -> None:
    space = small(approach=approach)
    found = {call: {c.approach.value for c in space.options[call] if c.is_int8} for call in ("fc1", "conv")}
    assert found == {"fc1": linear, "conv": conv}


def test_what_dynamic_quantization_does_not_cover_stays_in_fp32_by_default() -> None:
    space = small(approach="dynamic")
    assert precisions(space, "conv") == ["fp32", "bf16"]
    assert space.default().int8_calls == ("fc1", "fc2")


def test_an_unknown_approach_is_refused() -> None:
    with pytest.raises(OptionError, match="Did you mean 'static'"):
        small(approach="statik")


# rules


@pytest.mark.parametrize("pattern", ["linear", "Linear", "LINEAR", "lin.*", "linear|conv2d"])
def test_a_type_matches_whole_in_ipex_and_module_spelling(pattern: str) -> None:
    space = small(op_type_dict={pattern: {"activation": {"scheme": ["sym"]}}})
    assert schemes(space, "fc1") == {"sym"}
    assert schemes(space, "b:matmul") == {"sym", "asym"}


def test_a_part_of_a_name_matches_nothing_and_warns() -> None:
    with pytest.warns(UserWarning, match=re.escape("op_name_dict['fc']: matches no call")):
        space = small(op_name_dict={"fc": {"activation": {"scheme": "sym"}}})
    assert schemes(space, "fc1") == {"sym", "asym"}


def test_a_name_beats_a_type_and_later_beats_earlier() -> None:
    sym, asym = ({"activation": {"scheme": s}} for s in ("sym", "asym"))
    space = small(op_type_dict={"linear": sym, "matmul": sym, "mat.*": asym}, op_name_dict={"fc1": asym})
    assert [schemes(space, call) for call in ("fc1", "fc2", "b:matmul")] == [{"asym"}, {"sym"}, {"asym"}]


@pytest.mark.parametrize(
    ("activation", "weight", "expected"),
    [
        (["fp32"], ["fp32"], ["fp32"]),
        (["bf16"], None, ["bf16"]),
        ("fp32", ["int8"], ["fp32"]),
        (["uint8", "fp32"], ["int8", "fp32"], ["int8", "fp32"]),
        (["fp32", "uint8"], None, ["fp32", "int8"]),
        (["uint8"], None, ["int8", "bf16", "fp32"]),
    ],
)
def test_a_float_dtype_means_the_precision(activation: Any, weight: Any, expected: list[str]) -> None:
    rule = {"activation": {"dtype": activation}} | ({"weight": {"dtype": weight}} if weight else {})
    assert precisions(small(op_name_dict={"fc1": rule}), "fc1") == expected


def test_the_first_of_a_rule_becomes_the_default() -> None:
    rule = {"activation": {"algorithm": ["kl", "minmax"], "scheme": ["sym", "asym"]}}
    config = small(op_name_dict={"fc1": rule}).default().config("fc1")
    assert (str(config.activation.algorithm), config.activation.scheme) == ("kl", Scheme.SYMMETRIC)


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        ({"activation": {"dtype": ["fp16"]}}, "fp16"),
        ({"activation": {"granularity": ["per_channel"]}}, "per_channel"),
        ({"activation": {"dtype": ["int8"], "scheme": ["asym"]}}, "int8 and scheme asym"),
        ({"weight": {"scheme": ["asym"]}}, "asym"),
    ],
)
def test_what_lies_outside_is_ignored_with_a_warning_that_names_it(rule: Any, named: str) -> None:
    with pytest.warns(UserWarning, match=named):
        space = small(op_name_dict={"fc1": rule})
    assert space.options == small().options


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"activations": {}}, "Did you mean 'activation'"),
        ({"activation": {"dtyp": ["int8"]}}, "Did you mean 'dtype'"),
        ({"activation": {"dtype": ["int7"]}}, "unknown dtype 'int7'"),
        ({"activation": {"scheme": ["symm"]}}, "Did you mean 'sym'"),
        ({"activation": {"algorithm": ["minmx"]}}, "minmx"),
        ({"weight": {"algorithm": ["kl"]}}, "ranges of activations"),
        ({"activation": {"scheme": []}}, "one or more"),
        (None, "must be a mapping"),
    ],
)
def test_a_wrong_rule_is_refused(rule: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        small(op_name_dict={"fc1": rule})


def test_a_bad_expression_is_refused() -> None:
    with pytest.raises(SpaceError, match="not a regular expression"):
        small(op_type_dict={"lin(ear": {"activation": {"scheme": "sym"}}})


def test_all_in_float_by_rule_is_an_error() -> None:
    with pytest.raises(SpaceError, match="no call may run in int8"):
        small(op_type_dict={".*": {"activation": {"dtype": "fp32"}}})


def test_good_rules_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(op_type_dict={"linear": {"weight": {"granularity": ["per_tensor"], "algorithm": "mse"}}})


# dimensions


def test_the_compact_space_has_about_twenty_dimensions() -> None:
    assert 10 <= len(SPACE.dimensions) <= 22


def test_a_single_choice_is_no_dimension() -> None:
    space = small(op_type_dict={"linear": {"activation": {"scheme": "sym"}}})
    assert "linear.activation" not in {d.name for d in space.dimensions}
    assert space.recipe({"linear.activation": "int8 sym"}) == space.default()  # naming it is no error


def test_the_per_op_space_has_one_per_call() -> None:
    assert [d.name for d in SPACE.per_op().dimensions] == [f"op/{call}" for call in SPACE.options]


def test_the_per_block_space_has_one_per_block_beside_what_is_quantized_alike() -> None:
    names = [d.name for d in SPACE.per_block().dimensions]
    blocks = [f"block/blocks.{i}" for i in range(10)]
    features = [d.name for d in SPACE.dimensions if "." in d.name and not d.name.startswith("float_calls")]
    assert names == [*blocks, *features, "float_dtype"]  # no family: none has a call outside of the blocks


def test_calls_outside_of_all_blocks_are_chosen_by_family_in_the_per_block_space() -> None:
    names = [d.name for d in small(rankings={"mse": ["fc1"]}).per_block().dimensions]
    assert {"block/b", "conv", "matmul", "add"} <= set(names)
    assert not {"linear", "float_calls.mse"} & set(names)


def test_tables_name_every_dimension() -> None:
    for space in (SPACE, SPACE.per_op(), SPACE.per_block()):
        assert all(dimension.name in space.table() for dimension in space.dimensions)


def test_a_ranking_of_unknown_calls_is_refused() -> None:
    with pytest.raises(SpaceError, match="Did you mean 'fc1'"):
        small(rankings={"mse": ["fc11"]})


# config and recipe


def test_the_default_takes_each_first_option() -> None:
    assert all(SPACE.default().config(call) == options[0] for call, options in SPACE.options.items())


def random_points(space: SearchSpace, n: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [{d.name: rng.choice(d.values) for d in space.dimensions} for _ in range(n)]


RANKED = small(approach="auto", rankings={"mse": ["fc2", "conv", "fc1"]})


@pytest.mark.parametrize("space", [SPACE, RANKED, SPACE.per_block(), RANKED.per_block()])
def test_a_compact_recipe_needs_no_overrides(space: SearchSpace) -> None:
    for point in random_points(space, 50):
        recipe = space.recipe(point)
        config = space.config(recipe)
        assert space.recipe(config) == recipe
        assert set(config) == {d.name for d in space.dimensions}


@pytest.mark.parametrize("space", [SPACE, small(approach="auto")])
def test_any_recipe_has_a_config(space: SearchSpace) -> None:
    for point in random_points(space.per_op(), 20):
        recipe = space.recipe(point)
        assert space.recipe(space.config(recipe)) == recipe
        assert space.per_block().recipe(space.per_block().config(recipe)) == recipe
        assert space.per_op().config(recipe) == point


def test_values_are_plain() -> None:
    for space in (SPACE, SPACE.per_op(), SPACE.per_block()):
        assert all(type(v) in (str, int) for d in space.dimensions for v in d.values)


def test_float_calls_puts_the_most_sensitive_in_float() -> None:
    recipe = SPACE.recipe({"float_calls.mse": 3, "float_dtype": "fp32"})
    floats = [call for call, config in recipe.ops.items() if not config.is_int8]
    assert set(floats) == set(SIM.rankings["mse"][:3])
    assert {recipe.config(call).precision for call in floats} == {Precision.FP32}
    assert SPACE.config(recipe)["float_calls.mse"] == 3


def test_an_override_beats_all_dimensions() -> None:
    recipe = SPACE.recipe({"linear": "float", "op/blocks.0.fc1": spell(SPACE.options["blocks.0.fc1"][3])})
    assert recipe.config("blocks.0.fc1") == SPACE.options["blocks.0.fc1"][3]
    assert not recipe.config("blocks.0.fc2").is_int8


def floats(recipe: Recipe) -> set[str]:
    return {call for call in recipe.ops if not recipe.config(call).is_int8}


def test_a_block_in_float_is_a_fallback_set_in_any_space() -> None:
    for space in (SPACE, SPACE.per_block()):
        recipe = space.recipe({"block/blocks.3": "float", "float_dtype": "fp32"})
        assert floats(recipe) == {call.name for call in SIM.graph.calls if call.block == "blocks.3"}
        assert {recipe.config(call).precision for call in floats(recipe)} == {Precision.FP32}


def test_a_block_beats_families_and_is_beaten_by_a_call() -> None:
    first = "blocks.3.fc1"
    recipe = SPACE.recipe({"linear": "float", "block/blocks.3": "int8", f"op/{first}": "bf16"})
    assert first in floats(recipe)
    assert "blocks.3.fc2" not in floats(recipe) and "blocks.2.fc2" in floats(recipe)


def test_what_a_ranking_puts_in_float_stays_there_in_an_int8_block() -> None:
    most = SIM.rankings["mse"][0]
    recipe = SPACE.recipe({"float_calls.mse": 1, f"block/{SIM.graph[most].block}": "int8"})
    assert floats(recipe) == {most}


def test_nested_configs_are_read_too() -> None:
    assert SPACE.recipe({"op": {"blocks.0.fc1": "fp32"}}) == SPACE.recipe({"op/blocks.0.fc1": "fp32"})


def test_what_travels_beside_the_point_is_no_dimension() -> None:
    assert SPACE.recipe(dict.fromkeys(RESERVED, 1)) == SPACE.default()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"linear.activaton": "int8 sym"}, "Did you mean 'linear.activation'"),
        ({"linear.activation": "int8 asym"}, "must be one of"),
        ({"float_calls.mse": 60}, "must be one of 0 … 59"),
        ({"op/blocks.0.fc3": "fp32"}, "Did you mean"),
        ({"block/blocks.11": "float"}, "unknown block 'blocks.11'.*Did you mean"),
        ({"block/blocks.1": "bf16"}, "must be one of 'int8', 'float'"),
        ({"op/blocks.0.fc1": "int4"}, "a call's configuration must be"),
        ({"op/blocks.0:add": "int8 static uint8/asym/kl int8/sym/minmax/per_channel"}, "must run as"),
    ],
)
def test_a_config_outside_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        SPACE.recipe(config)


@pytest.mark.parametrize(
    "recipe",
    [
        SPACE.default().with_ops({"blocks.0.fc1": OpConfig(Precision.INT8, Approach.DYNAMIC)}),
        SPACE.default().with_ops({"elsewhere": OpConfig(Precision.INT8)}),
        replace(SPACE.default(), smoothing={"a": 0.5}),
        replace(SPACE.default(), transforms=(Transform.EQUALIZATION,)),
    ],
)
def test_a_recipe_outside_is_refused(recipe: Recipe) -> None:
    with pytest.raises(SpaceError):
        SPACE.config(recipe)


# editing


def test_narrow_keeps_values_and_sets_the_default() -> None:
    space = SPACE.narrow({"linear.algorithm": ["kl", "mse"], "matmul": "float", "float_calls.mse": range(4)})
    tables = {d.name: d.values for d in space.dimensions}
    assert (tables["linear.algorithm"], tables["float_calls.mse"]) == (("kl", "mse"), range(4))
    assert "matmul" not in tables
    assert str(space.default().config("blocks.1.fc2").activation.algorithm) == "kl"
    assert not space.default().config("blocks.1:matmul").is_int8
    assert space.narrow({"op/blocks.0.fc1": "fp32"}).options["blocks.0.fc1"] == (OpConfig(Precision.FP32),)


def test_narrow_takes_blocks_and_the_first_value_becomes_the_default() -> None:
    fixed = SPACE.narrow({"block/blocks.3": "float"})
    assert "block/blocks.3" not in {d.name for d in fixed.per_block().dimensions}
    assert floats(fixed.default()) == {call.name for call in SIM.graph.calls if call.block == "blocks.3"}
    assert fixed.recipe({"block/blocks.3": "float"}) == fixed.default()  # naming it is no error
    turned = SPACE.narrow({"block/blocks.3": ["float", "int8"]})
    assert turned.default() == fixed.default()
    assert {d.name: d.default for d in turned.per_block().dimensions}["block/blocks.3"] == "float"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear.algorithm": []}, "at least one"),
        ({"linear.algorithm": ["median"]}, "must be one of"),
        ({"lin": ["int8"]}, "unknown dimension"),
    ],
)
def test_narrow_refuses_what_is_not_there(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        SPACE.narrow(changes)


def test_a_ranking_can_be_added() -> None:
    space = SPACE.with_ranking("mine", ["blocks.3.fc1", "blocks.2.conv"])
    assert not space.recipe({"float_calls.mine": 1}).config("blocks.3.fc1").is_int8


def test_it_survives_copies() -> None:
    assert copy.deepcopy(SPACE) is SPACE
    assert pickle.loads(pickle.dumps(SPACE)).recipe({"linear": "float"}) == SPACE.recipe({"linear": "float"})


def test_it_needs_no_ray() -> None:
    code = "import raysq.space, sys; assert not {'ray', 'optuna'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# spelling


@pytest.mark.parametrize("config", list(dict.fromkeys(c for o in small(approach="auto").options.values() for c in o)))
def test_a_spelling_is_read_back(config: OpConfig) -> None:
    assert parse(spell(config)) == config


def test_seven_bits_and_rounding_are_spelled() -> None:
    activation = TensorConfig(QuantDType.S8, Scheme.SYMMETRIC, reduce_range=True)
    config = OpConfig(Precision.INT8, activation=activation, rounding=Rounding.ADAROUND)
    assert parse(spell(config)) == config


@pytest.mark.parametrize("text", ["", "int8", "fp64", "fp32 static", "int8 static uint8 int8", "int8 a b c d e", None])
def test_a_wrong_spelling_is_refused(text: Any) -> None:
    with pytest.raises(RecipeError, match="a call's configuration must be"):
        parse(text)
