"""INC's staged strategies: what each proposes, in which order, and where it ends."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from driving import drive, make
from simulation import CAPABILITIES, Simulation, make_call, make_graph

import raysq
from raysq import strategies
from raysq.errors import CalibrationError, OptionError
from raysq.graph import OpType
from raysq.impact import impacts
from raysq.model_choices import ModelChoices
from raysq.recipe import Approach, Granularity, Recipe, Rounding, Transform
from raysq.sensitivities import MSE, MSEv2, rank
from raysq.space import SearchSpace, build_space
from raysq.strategies.base import Strategy
from raysq.strategies.moves import framework_default
from raysq.switches import with_switches

BUDGET = 50
NAMES = ("inc_auto", "conservative", "basic", "mse", "mse_v2", "hawq_v2")
SWITCHES = ["adaround", "first_op_float", "last_op_float", "pre_post_process_float"]  # those of the simulation
MODEL_WISE = [  # the choices per type, ever further from the default
    "all in int8",
    "conv.activation int8 sym",
    "conv.algorithm minmax",
    "conv.algorithm percentile(99.99)",
    "conv.algorithm kl",
    "conv.weight_algorithm mse",
    "conv.granularity per_tensor",
    "linear.activation int8 sym",
    "linear.algorithm minmax",
    "linear.algorithm percentile(99.99)",
    "linear.algorithm kl",
    "linear.weight_algorithm mse",
    "linear.granularity per_tensor",
    "matmul.activation int8 sym",
    "matmul.algorithm minmax",
    "matmul.algorithm kl",
    "add.activation int8 sym",
    "conv.activation int8 sym, conv.algorithm minmax",
    "conv.activation int8 sym, conv.algorithm percentile(99.99)",
]
FALLBACK = ["blocks.8", "blocks.2", "blocks.5", "blocks.7", "blocks.6", "blocks.3", "blocks.1"]
FALLBACK += ["blocks.8.fc2", "blocks.2.dw", "blocks.8:matmul", "blocks.5:matmul", "blocks.7.fc2", "blocks.7.conv"]
FALLBACK += ["blocks.6.conv"]


def search(
    name: str,
    sim: Simulation | None = None,
    space: SearchSpace | None = None,
    trials: int = BUDGET,
    slots: int = 1,
    **kwargs: Any,
) -> Strategy:
    """Run a strategy to its end, or to twice its budget if it doesn't keep to it."""
    sim = sim or Simulation()
    strategy = make(name, sim, space or sim.space(), trials, **kwargs)
    drive(strategy, sim, slots, trials=2 * trials)
    return strategy


@cache
def found(name: str, sensitive: int) -> Strategy:
    """Five calls too many lose much, or none does."""
    return search(name, Simulation(sensitive=sensitive))


def labels(strategy: Strategy) -> list[str]:
    return [record.label for record in strategy.history]


def recipe(strategy: Strategy, label: str) -> Recipe:
    (record,) = (record for record in strategy.history if record.label == label)
    return record.recipe


def floats(strategy: Strategy, label: str) -> set[str]:
    """Return the calls that a trial had in float."""
    return {call.name for call in strategy.graph.calls} - set(recipe(strategy, label).int8_calls)


def with_alphas(space: SearchSpace, *alphas: float) -> SearchSpace:
    model = ModelChoices({"alpha.fc1": ("blocks.0.fc1/0",)}, {}, {"alpha.fc1": ("off", *alphas)}, alphas)
    return replace(space, model=model)


@pytest.mark.parametrize("sensitive", [0, 5])
@pytest.mark.parametrize("name", NAMES)
def test_it_proposes_the_same_in_parallel(name: str, sensitive: int) -> None:
    assert labels(search(name, Simulation(sensitive=sensitive), slots=4)) == labels(found(name, sensitive))


@pytest.mark.parametrize("trials", [1, 7])
@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_to_its_budget(name: str, trials: int) -> None:
    assert 1 <= len(search(name, trials=trials).history) <= trials


@pytest.mark.parametrize("name", NAMES)
def test_nothing_goes_back_to_float_where_something_passes(name: str) -> None:
    assert not [label for label in labels(found(name, 0)) if label.endswith(("in bf16", "in fp32"))]


@pytest.mark.parametrize("name", ["inc_auto", "basic", "mse", "mse_v2", "hawq_v2"])
def test_half_of_the_budget_is_kept_for_fallback(name: str) -> None:
    sim = Simulation(tolerance=0.0, sensitive=60)
    strategy = search(name, sim, trials=30)
    whole = [record for record in strategy.history if " in bf16" not in record.label and " in fp32" not in record.label]
    assert len(whole) <= 15
    assert len(strategy.history) - len(whole) >= 12  # enough to bisect, in bf16 and in fp32


@pytest.mark.parametrize("name", NAMES)
def test_what_is_known_from_elsewhere_is_not_tried_again(name: str) -> None:
    sim = Simulation()
    strategy = make(name, sim, sim.space(), BUDGET)
    known = [record for record in found(name, 5).history if not record.feasible]
    for record in known:
        strategy.learn(record)
    drive(strategy, sim, trials=2 * BUDGET)
    tried = [record.recipe for record in strategy.history[len(known) :]]
    assert not {record.recipe for record in known} & set(tried)
    assert strategy.history.best is not None or name == "conservative"


# conservative


def test_conservative_takes_one_type_at_a_time_and_keeps_what_passes(caplog: pytest.LogCaptureFixture) -> None:
    sim = Simulation(sensitive=0)
    sim.loss["blocks.4:matmul"] = 0.5
    with caplog.at_level(logging.INFO, "raysq"):
        strategy = search("conservative", sim)
    assert labels(strategy) == ["conv in int8", "matmul in int8", "linear in int8"]
    int8 = [{strategy.graph[call].op for call in record.recipe.int8_calls} for record in strategy.history]
    assert int8 == [{OpType.CONV2D}, {OpType.CONV2D, OpType.MATMUL}, {OpType.CONV2D, OpType.LINEAR}]
    assert {strategy.history[0].recipe.config(call).precision for call in floats(strategy, "conv in int8")} == {
        "bf16",
        "fp32",  # additions have no bf16 here
    }
    lines = [record.getMessage() for record in caplog.records if "loses" in record.getMessage()]
    assert [line.split(": ")[0] for line in lines] == labels(strategy)
    assert [line.rpartition(", ")[2] for line in lines] == ["kept", "back in float", "kept"]


def test_conservative_goes_through_the_types_that_there_are() -> None:
    graph = make_graph([make_call("a:add", OpType.ADD), make_call("pool", OpType.MAX_POOL)])
    assert labels(search("conservative", Simulation(graph=graph, sensitive=0))) == ["add in int8", "pool in int8"]


# basic


def test_basic_goes_through_its_stages() -> None:
    assert labels(found("basic", 5)) == [
        "framework default",
        "all switches",
        *MODEL_WISE[:18],
        *[f"no {name}" for name in SWITCHES],  # the best so far has them all
        *[f"{what} in bf16" for what in FALLBACK],
        *[f"{count} calls in bf16 by impact" for count in (28, 14, 7, 3, 5, 4)],
    ]


def test_basic_spends_its_budget_where_something_passes() -> None:
    strategy = found("basic", 0)
    assert len(strategy.history) == BUDGET
    assert labels(strategy)[2:21] == MODEL_WISE
    assert labels(strategy)[-4:] == SWITCHES


def test_basic_falls_back_from_what_lost_least() -> None:
    strategy = found("basic", 5)
    whole = [record for record in strategy.history if "bf16" not in record.label]
    base = min(whole, key=lambda record: record.loss)
    inside = {call.name for call in strategy.graph.calls if call.block == "blocks.8"}
    outside = floats(strategy, base.label)
    assert floats(strategy, "blocks.8 in bf16") == outside | inside
    assert floats(strategy, "blocks.2.dw in bf16") == outside | {"blocks.2.dw"}
    alone = {call: record.loss for record in strategy.history for call in [record.label.removesuffix(" in bf16")]}
    order = sorted(FALLBACK[7:], key=lambda call: alone[call])
    assert floats(strategy, "4 calls in bf16 by impact") == outside | set(order[:4])


def test_basic_goes_one_by_one_where_trials_suffice() -> None:
    graph = make_graph([make_call(f"fc{i}", OpType.LINEAR) for i in range(6)])
    sim = Simulation(graph=graph, sensitive=4, tolerance=0.002)
    strategy = search("basic", sim)
    assert [label for label in labels(strategy) if "calls" in label] == [
        f"{count} calls in bf16 by impact" for count in (2, 3)
    ]  # that with one is known from the stage before
    assert strategy.history.best is not None


def test_bf16_comes_before_fp32() -> None:
    strategy = search("basic", Simulation(tolerance=0.0, sensitive=60), trials=40)
    accumulated = [label for label in labels(strategy) if label.endswith("by impact")]
    precisions = [label.split()[3] for label in accumulated]
    assert precisions == ["bf16"] * 6 + ["fp32"] * 6


def test_basic_tries_the_alphas_of_a_list_first() -> None:
    space = with_alphas(Simulation().space(), 0.3, 0.6)
    strategy = search("basic", space=space, trials=20)
    assert labels(strategy)[:3] == ["alpha 0.3", "alpha 0.6", "framework default"]
    assert not recipe(strategy, "framework default").smoothing
    assert recipe(strategy, "conv.activation int8 sym").smoothing == {"blocks.0.fc1/0": 0.3}  # the first of equals


@pytest.mark.parametrize("sensitive", [0, 5])
def test_dynamic_is_tried_only_where_nothing_static_passes(sensitive: int) -> None:
    sim = Simulation(sensitive=sensitive)
    strategy = search("basic", sim, sim.space(approach="auto"))
    assert ("dynamic" in labels(strategy)) == (sensitive > 0)
    if sensitive:
        dynamic = recipe(strategy, "dynamic")
        found = {call.name: dynamic.config(call.name).approach for call in strategy.graph.calls if call.op == "linear"}
        assert set(found.values()) == {Approach.DYNAMIC}


def test_switches_that_are_fixed_are_not_tried() -> None:
    space = Simulation().space()
    some = with_switches(space, {"adaround": True, "first_op_float": False})
    tried = labels(search("basic", space=some))
    assert "all switches" in tried
    assert [label for label in tried if label.removeprefix("no ") in SWITCHES] == [f"no {s}" for s in SWITCHES[2:]]
    every = with_switches(space, dict.fromkeys(SWITCHES, True))
    assert not {"all switches", *SWITCHES} & set(labels(search("basic", space=every)))


def test_blocks_are_the_users_if_given() -> None:
    strategy = search("basic", blocks=[["blocks.[01]"], [r".*\.fc1", "blocks.9:add"]])
    base = floats(strategy, "all switches")
    first = {call.name for call in strategy.graph.calls if call.block in ("blocks.0", "blocks.1")}
    assert floats(strategy, "blocks.[01] in bf16") == base | first
    second = {call.name for call in strategy.graph.calls if call.name.endswith(".fc1")} | {"blocks.9:add"}
    assert floats(strategy, r".*\.fc1, blocks.9:add in bf16") == base | second


def test_blocks_that_match_nothing_warn() -> None:
    with pytest.warns(UserWarning, match="encoder matches no call of this model"):
        search("basic", blocks=[["encoder"]])


@pytest.mark.parametrize("name", ["basic", "inc_auto"])
@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("encoder", "must be a list of lists"),
        (["encoder"], "must be a list of lists"),
        ([["("]], "must be a regular expression"),
        ([[3]], "must be a regular expression"),
    ],
)
def test_what_is_no_block_is_refused(name: str, blocks: Any, message: str) -> None:
    sim = Simulation()
    with pytest.raises(OptionError, match=message):
        make(name, sim, sim.space(), blocks=blocks)


def test_the_frameworks_default_is_plain() -> None:
    space = with_alphas(Simulation().space(approach="auto"), 0.5)
    space = replace(space, model=replace(space.model, values={**space.model.values, "equalization": (True, False)}))
    assert space.default().transforms == (Transform.EQUALIZATION,)
    plain = framework_default(space.narrow({"alpha.fc1": [0.5, "off"]}))
    assert not plain.smoothing and not plain.transforms
    weighted = [plain.config(call.name) for call in space.graph.calls if call.op.has_weight]
    assert {config.approach for config in weighted} == {Approach.STATIC}
    assert {str(config.activation.algorithm) for config in weighted} == {"minmax"}
    assert {str(config.weight.algorithm) for config in weighted} == {"minmax"}
    assert {config.weight.granularity for config in weighted} == {Granularity.PER_CHANNEL}
    assert {config.rounding for config in weighted} == {Rounding.NEAREST}


def test_the_impact_of_calls_is_told_by_the_trials() -> None:
    sim = Simulation()
    history = found("basic", 5).history
    told = {impact.call: impact for impact in impacts(history)}
    assert set(FALLBACK[7:]) <= set(told)
    for impact in told.values():
        assert math.isclose(impact.gain, sim.loss[impact.call], rel_tol=0.5)  # by up to 1.4 where ranges are minmax
    gains = [impact.gain for impact in impacts(history)]
    assert gains == sorted(gains, reverse=True)
    assert impacts(history[:1]) == ()


# inc_auto


def test_inc_auto_is_the_default_then_conservative_then_basic() -> None:
    assert (
        labels(found("inc_auto", 5))
        == [
            "default",
            *labels(found("conservative", 5)),
            "framework default",
            "all switches",
            *MODEL_WISE[1:15],  # its first is the default
            *labels(found("basic", 5))[20:],
        ]
    )


def test_inc_auto_goes_on_where_the_default_passes() -> None:
    strategy = found("inc_auto", 0)
    assert labels(strategy)[:5] == ["default", *labels(found("conservative", 0)), "framework default"]
    assert len(strategy.history) == BUDGET


# mse, mse_v2, hawq_v2


def test_mse_puts_calls_in_float_in_the_order_of_their_error() -> None:
    strategy = found("mse", 5)
    counts = (30, 15, 7, 3, 5, 4)
    assert labels(strategy) == [*MODEL_WISE[:5], *[f"{count} calls in bf16 by mse" for count in counts]]
    base = min(strategy.history[:5], key=lambda record: record.loss).recipe
    order = rank(Simulation().costs(MSE(), base))
    assert floats(strategy, "5 calls in bf16 by mse") == set(order[:5])


def test_mse_goes_one_by_one_where_trials_suffice() -> None:
    assert labels(search("mse", trials=130))[5:] == [f"{count} calls in bf16 by mse" for count in range(1, 6)]


def test_mse_goes_on_with_the_types_where_one_passes() -> None:
    assert labels(found("mse", 0))[:19] == MODEL_WISE
    assert len(found("mse", 0).history) == BUDGET


def test_mse_v2_falls_back_until_it_passes_then_reverts_until_it_fails() -> None:
    class Misled(Simulation):
        """A harmless call seems the worst until all that falls back has done so."""

        def costs(self, sensitivity: Any, recipe: Recipe, calls: Any = None, floats: Any = ()) -> dict[str, float]:
            found = super().costs(sensitivity, recipe, calls, floats)
            return found if calls == floats else found | {"blocks.0.conv": 1.0} if "blocks.0.conv" in found else found

    order = rank(Simulation().costs(MSEv2(), Simulation().space().default()))
    strategy = search("mse_v2", Misled())
    assert labels(strategy) == [
        *MODEL_WISE[:2],
        "blocks.0.conv in bf16 too",
        *[f"{call} in bf16 too" for call in order[:5]],
        "blocks.0.conv back in int8",
        f"{order[4]} back in int8",
    ]
    assert [record.feasible for record in strategy.history][-3:] == [True, True, False]


def test_mse_v2_ranks_with_those_float_that_fell_back() -> None:
    sim = Simulation()
    asked: list[tuple[set[str], set[str]]] = []

    class Watched(Simulation):
        def costs(self, sensitivity: Any, recipe: Recipe, calls: Any = None, floats: Any = ()) -> dict[str, float]:
            asked.append((set(calls), set(floats)))
            assert sensitivity == MSEv2(confidence_batches=3)
            return sim.costs(sensitivity, recipe, calls, floats)

    search("mse_v2", Watched(), confidence_batches=3)
    every = {call.name for call in sim.graph.calls}
    falling = [(calls, floats) for calls, floats in asked if calls != floats]
    assert all(calls == every - floats for calls, floats in falling)
    assert [len(floats) for _, floats in falling] == list(range(len(falling)))
    assert len(asked) > len(falling)  # those of the reverts


def test_mse_v2_ends_where_nothing_passes() -> None:
    graph = make_graph([make_call(f"fc{i}", OpType.LINEAR) for i in range(4)])
    sim = Simulation(graph=graph, sensitive=4, tolerance=0.0)
    strategy = make("mse_v2", sim, build_space(graph, CAPABILITIES), 500)
    tried = [config["label"] for config in drive(strategy, sim, trials=500)]
    precisions = [label.split()[2] for label in tried[2:]]
    assert precisions == ["bf16"] * 3 + ["fp32"] * 3  # with all four there is no int8 left to try


def test_mse_v2_refuses_no_batches() -> None:
    sim = Simulation()
    with pytest.raises(OptionError, match="confidence_batches"):
        make("mse_v2", sim, sim.space(), confidence_batches=0)


def test_hawq_v2_puts_calls_in_float_in_the_order_of_the_trace() -> None:
    asked: list[Any] = []

    class Weighted(Simulation):
        def costs(self, sensitivity: Any, recipe: Recipe, calls: Any = None, floats: Any = ()) -> dict[str, float]:
            asked.append(sensitivity)
            found = super().costs(sensitivity, recipe, calls, floats)
            return {name: cost for name, cost in found.items() if self.graph[name].op.has_weight}

    strategy = search("hawq_v2", Weighted(tolerance=0.0, sensitive=60), trials=150, hawq_v2_loss=torch.nn.L1Loss())
    in_float = [f"{count} calls in bf16 by hawq_v2" for count in range(1, 60)]
    assert labels(strategy)[:60] == ["all in int8", *in_float]
    assert [str(sensitivity.loss) for sensitivity in asked] == ["L1Loss()"]
    by_count = [floats(strategy, label) for label in in_float]
    has_weight = [
        {strategy.graph[call].op.has_weight for call in after - before} for before, after in pairwise(by_count)
    ]
    assert has_weight == [{True}] * 39 + [{False}] * 19  # those of no trace come last


def test_hawq_v2_needs_a_loss_and_labels() -> None:
    with pytest.raises(OptionError, match="strategy_kwargs={'hawq_v2_loss': torch.nn.functional.cross_entropy}"):
        strategies.get("hawq_v2")
    with pytest.raises(OptionError, match="must be a function"):
        strategies.get("hawq_v2", hawq_v2_loss="cross_entropy")
    prepared = raysq.prepare(torch.nn.Linear(4, 2).eval(), [torch.randn(8, 4)], backend="reference")
    with pytest.raises(CalibrationError, match="labels"):
        strategies.get("hawq_v2", hawq_v2_loss=torch.nn.functional.cross_entropy).bind(
            prepared.space, source=prepared.source
        )
