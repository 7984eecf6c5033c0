"""A recipe carried over to another space: what both have stays, what only one has goes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from simulation import CAPABILITIES, Simulation, make_call, make_graph

from raysq.graph import OpType
from raysq.recipe import BF16, FP32, OpConfig, Precision, QuantDType, Recipe, Scheme, TensorConfig, Transform
from raysq.space import SearchSpace, build_space
from raysq.spelling import parse
from raysq.transfer import adapted

SPACE = Simulation().space()


def space_of(*calls: str) -> SearchSpace:
    return build_space(make_graph([make_call(name, OpType.LINEAR) for name in calls]), CAPABILITIES)


def random_recipes(space: SearchSpace) -> list[Recipe]:
    rng = random.Random(0)
    drawn = [space.recipe({d.name: rng.choice(d.values) for d in space.dimensions}) for _ in range(30)]
    return [recipe for recipe in drawn if recipe.int8_calls]


@pytest.mark.parametrize("space", [SPACE, SPACE.per_op(), SPACE.per_block()])
def test_a_recipe_of_the_space_stays_as_it_is(space: SearchSpace) -> None:
    recipes = random_recipes(space)
    assert len(recipes) >= 5
    assert [adapted(recipe, space) for recipe in recipes] == recipes


def test_the_result_always_lies_in_the_space() -> None:
    narrowed = SPACE.narrow({"linear.algorithm": ["kl", "mse"], "float_dtype": "fp32"})
    for recipe in random_recipes(SPACE):
        found = adapted(recipe, narrowed)
        assert found is not None and narrowed.config(found)  # raises outside the space


def test_calls_are_told_by_name() -> None:
    recipe = space_of("fc1", "fc2", "gone").recipe({"op/fc2": "bf16"})
    found = adapted(recipe, space_of("fc1", "fc2", "new"))
    assert found is not None
    assert found.config("fc1") == recipe.config("fc1")
    assert found.config("fc2") == BF16
    assert found.config("new") == FP32  # as every call that a recipe doesn't name
    assert set(found.ops) == {"fc1", "fc2", "new"}


@pytest.mark.parametrize(
    ("wanted", "narrow", "gets"),
    [
        # what is wanted, what the space still has, the closest of that
        ("bf16", {"float_dtype": "fp32"}, "fp32"),
        ("fp32", {"linear": "int8"}, None),  # no float there: its default
        (
            "int8 static int8/sym/kl int8/sym/minmax/per_channel",
            {"linear.algorithm": ["mse", "minmax"]},
            "int8 static int8/sym/mse int8/sym/minmax/per_channel",
        ),
        ("int8 static int8/sym/kl int8/sym/minmax/per_channel", {"op/fc1": ["bf16", "fp32"]}, "bf16"),
    ],
)
def test_what_a_call_cannot_run_as_gives_way_to_the_closest(
    wanted: str, narrow: dict[str, str], gets: str | None
) -> None:
    space = space_of("fc1", "fc2").narrow(narrow)
    found = adapted(Recipe({"fc1": parse(wanted), "fc2": space.options["fc2"][0]}), space)
    assert found is not None
    assert found.config("fc1") == (parse(gets) if gets else space.default().config("fc1"))


def test_dropped_are_groups_scales_and_transforms_that_the_space_does_not_have() -> None:
    recipe = replace(
        SPACE.default(), smoothing={"a/0": 0.5, "b/0": (1.0, 2.0)}, transforms=(Transform.BIAS_CORRECTION,)
    )
    assert adapted(recipe, SPACE) == SPACE.default()


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe({"elsewhere": OpConfig(Precision.INT8)}),
        Recipe({"fc1": BF16}),
        Recipe({}),
    ],
    ids=["no call in common", "no call in int8", "empty"],
)
def test_nothing_in_common(recipe: Recipe) -> None:
    assert adapted(recipe, space_of("fc1", "fc2")) is None


def test_an_option_that_no_kernel_has_gives_way_to_one_of_the_same_scheme() -> None:
    odd = OpConfig(Precision.INT8, activation=TensorConfig(QuantDType.S8, Scheme.SYMMETRIC, reduce_range=True))
    found = adapted(Recipe({"fc1": odd}), space_of("fc1"))
    assert found is not None
    assert found.config("fc1").activation.dtype is QuantDType.S8
