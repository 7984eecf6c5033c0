"""Alphas and transforms as dimensions of a search: values, recipes, and the way back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import raysq
from raysq import strategies
from raysq.errors import SpaceError
from raysq.prepared import Prepared
from raysq.recipe import Recipe, Transform
from raysq.smoothing import Smoothing
from raysq.space import flatten
from raysq.tuning.domains import domains


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks whose norms make one channel a hundred times as large as the others, and two linears in a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        with torch.no_grad():
            for block in self.blocks:
                block.norm.weight[3] *= 100
                block.up.weight[:, 3] /= 100

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(torch.relu(self.first(x)))


def prepared(smoothing: Smoothing | bool | None = None) -> Prepared:
    torch.manual_seed(1)
    return raysq.prepare(Net().eval(), [torch.randn(16, 8)], backend="reference", smoothing=smoothing)


SPACE = prepared().space
GROUPS = [group for groups in SPACE.model.kinds.values() for group in groups]
ALPHAS = st.one_of(st.just("off"), st.floats(0, 1))


def test_groups_in_the_same_place_of_every_block_share_a_dimension() -> None:
    assert set(SPACE.model.kinds) == {"alpha.up", "alpha.down", "alpha.first", "alpha.last"}
    assert SPACE.model.kinds["alpha.up"] == ("blocks.0.up/0", "blocks.1.up/0")


def test_the_default_recipe_is_smoothed_where_outliers_are_seen() -> None:
    assert set(SPACE.default().smoothing) >= {"blocks.0.up/0", "blocks.1.up/0"}
    assert "blocks.0.down/0" not in SPACE.default().smoothing  # a GELU before it: a multiplication would have to pay


def test_without_smoothing_no_alpha_is_advised_but_all_can_be_chosen() -> None:
    space = prepared(smoothing=False).space
    assert not space.default().smoothing
    assert space.recipe({"alpha.up": 0.5}).smoothing == {"blocks.0.up/0": 0.5, "blocks.1.up/0": 0.5}


def test_one_alpha_is_that_of_every_group() -> None:
    assert set(prepared(Smoothing(alpha=0.3)).space.default().smoothing.values()) == {0.3}


def test_alphas_of_a_list_are_tried_on_the_whole_model() -> None:
    space = prepared(Smoothing(alpha=(0.2, 0.8))).space
    ways = space.model.alpha_variants()
    assert [label for label, _ in ways] == ["alpha 0.2", "alpha 0.8"]
    assert [{*change(Recipe({})).smoothing.values()} for _, change in ways] == [{0.2}, {0.8}]
    suggested = strategies.get("auto").bind(space)
    labels = [suggested.suggest(str(i))["label"] for i in range(2)]
    assert labels == ["default", "alpha 0.8"]  # 0.2 everywhere is the default then


def test_a_group_by_itself_beats_its_kind() -> None:
    recipe = SPACE.recipe({"alpha.up": 0.5, "alpha/blocks.1.up/0": 0.85})
    assert recipe.smoothing["blocks.0.up/0"] == 0.5
    assert recipe.smoothing["blocks.1.up/0"] == 0.85


@settings(deadline=None, max_examples=50)
@given(st.fixed_dictionaries({}, optional={f"alpha/{group}": ALPHAS for group in GROUPS}), st.booleans(), st.booleans())
def test_a_recipe_comes_back_from_its_config(alphas: dict[str, object], equalized: bool, corrected: bool) -> None:
    recipe = SPACE.recipe({**alphas, "equalization": equalized, "bias_correction": corrected})
    assert SPACE.recipe(SPACE.config(recipe)) == recipe
    per_op = SPACE.per_op()
    assert per_op.recipe(per_op.config(recipe)) == recipe


def test_every_dimension_is_a_ray_tune_domain() -> None:
    assert set(domains(SPACE)) >= {"alpha.up", "equalization", "bias_correction"}
    assert "alpha/blocks.0.up/0" in flatten(domains(SPACE.per_op()))


def test_a_narrowed_dimension_has_its_first_value_as_default() -> None:
    assert not SPACE.narrow({"alpha.up": "off"}).default().smoothing.keys() & set(SPACE.model.kinds["alpha.up"])
    assert SPACE.narrow({"alpha/blocks.0.up/0": 0.25}).default().smoothing["blocks.0.up/0"] == 0.25
    assert SPACE.narrow({"bias_correction": True}).default().transforms == (Transform.BIAS_CORRECTION,)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"alpha.up": 2}, "one of 'auto', 'off'"),
        ({"alpha/blocks.0.up/0": 1.5}, r"\[0, 1\]"),
        ({"alpha/blocks.7.up/0": 0.5}, "unknown group to smooth"),
        ({"equalization": "yes"}, "one of False, True"),
    ],
)
def test_what_lies_outside_is_refused(config: dict[str, object], said: str) -> None:
    with pytest.raises(SpaceError, match=said):
        SPACE.recipe(config)


def test_fixed_scales_are_no_point_of_a_space() -> None:
    with pytest.raises(SpaceError, match="fixed scales"):
        SPACE.config(replace(SPACE.default(), smoothing={"blocks.0.up/0": (1.0,) * 8}))
