"""Which of the best trials wins: measured again, by the goal's cost, and confirmed where the goal has a split."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from raysq import fingerprint
from raysq.baseline import outputs
from raysq.conclusion import CONFIRMED_AT_MOST, conclude
from raysq.errors import EvaluationError, NoFeasibleRecipe
from raysq.goal import Goal, Objective
from raysq.job import Job
from raysq.latency import Latency, Timing
from raysq.recipe import OpConfig, Precision, Recipe
from raysq.result import Baseline, Ratio, Stage, Status, TrialRecord

EXAMPLE = (torch.ones(1),)
BASELINE = Baseline(
    1.0,
    {"accuracy": 1.0, "recall": 1.0},
    1.0,
    "jit",
    {},
    size_bytes=100,
    confirm_accuracy=0.8,
    confirm_metrics={"accuracy": 0.8, "recall": 0.8},
)
MACHINE = {"cpu": "Zen", "isa": "avx2", "threads": 1, "governor": None}
RECALL = {"recall": Goal(0.01)}


class Model(nn.Module):
    """Knows its own scores on both splits, and how fast it is."""

    def __init__(self, number, ratio, accuracy=1.0, confirmed=0.8, recall=0.8, size=1.0):
        super().__init__()
        self.number, self.ratio, self.accuracy, self.confirmed = number, ratio, accuracy, confirmed
        self.recall, self.size = recall, size

    def forward(self, x):
        return x + self.number


def recipe(number):
    return Recipe({f"fc{number}": OpConfig(Precision.INT8)})


def trial(model):
    feasible = model.accuracy >= 0.99
    return TrialRecord(
        trial=model.number,
        recipe=recipe(model.number),
        config={},
        status=Status.FINISHED,
        stage=Stage.TIMED,
        accuracy=model.accuracy,
        accuracy_drop=1 - model.accuracy,
        worst_drop=1 - model.accuracy,
        feasible=feasible,
        latency_ratio=model.ratio,
        ratio=Ratio(model.ratio, model.ratio - 0.05, model.ratio + 0.05),
        size_ratio=model.size,
        int8_calls=1,
        digest=fingerprint.of_tensors(outputs(model, EXAMPLE, {})),
    )


class Engine:
    """Builds the planted models, and counts."""

    def __init__(self, models):
        self.models = {recipe(model.number): model for model in models}
        self.built = []

    def float_forms(self):
        return (BASELINE.form,)

    def build_float(self, source, form):
        return self._built(None)

    def build(self, source, wanted):
        self.built.append(self.models[wanted].number)
        return self._built(self.models[wanted])

    def _built(self, model):
        return SimpleNamespace(model=model, executed={}, left_in_float={})


def concluded(models, goal, trials=None, eval_fn=lambda model: model.accuracy, engine=None):
    def time(model, reference, latency):
        ratio = model.ratio
        return Timing(ratio, 1.0, Ratio(ratio, ratio - 0.01, ratio + 0.01), ())

    prepared = SimpleNamespace(
        source=SimpleNamespace(args=EXAMPLE, kwargs={}),
        time=time,
        left_in_float={},
        rivals=(),
        environment=MACHINE,
        timed_inputs=["torch.float32 (1,)"],
    )
    found = [trial(model) for model in models] if trials is None else trials
    return conclude(Job(prepared, eval_fn, goal, Latency(), BASELINE), engine or Engine(models), found, Path("journal"))


def winner(result):
    return result.model.number


FAST, SLOWER, SLOWEST = Model(0, 0.4), Model(1, 0.43), Model(2, 0.8)


class Failing(Engine):
    """An engine on which some models can't be built any more."""

    def __init__(self, models, *failing):
        super().__init__(models)
        self.failing = failing

    def build(self, source, wanted):
        if self.models[wanted] in self.failing:
            raise RuntimeError("could not execute a primitive")
        return super().build(source, wanted)


def test_a_finalist_that_fails_drops_out():
    models = [SLOWER, FAST]
    assert winner(concluded(models, Goal(), engine=Failing(models, FAST))) == SLOWER.number
    models = [FAST, SLOWEST]  # SLOWEST would be no finalist
    assert winner(concluded(models, Goal(), engine=Failing(models, FAST))) == SLOWEST.number


def test_a_finalist_that_cannot_be_scored_drops_out():
    def eval_fn(model):
        if model.number == FAST.number:
            raise EvaluationError("one of them is nan.")
        return model.accuracy

    found = [early(FAST, 0.995), trial(SLOWER)]
    assert winner(concluded([FAST, SLOWER], Goal(), found, eval_fn)) == SLOWER.number


def test_where_every_finalist_fails_the_first_failure_is_told():
    models = [FAST, SLOWER]
    with pytest.raises(RuntimeError, match="primitive"):
        concluded(models, Goal(), engine=Failing(models, *models))


def test_the_closest_is_one_that_works():
    bad, worse = Model(3, 0.5, accuracy=0.9), Model(4, 0.5, accuracy=0.8)
    failed = replace(trial(bad), status=Status.FAILED, ratio=None, latency_ratio=None)
    models = [bad, worse]
    with pytest.raises(NoFeasibleRecipe) as caught:
        concluded(models, Goal(), [failed, trial(worse)], engine=Failing(models, bad))
    assert winner(caught.value.result) == worse.number
    with pytest.raises(NoFeasibleRecipe) as caught:
        concluded(models, Goal(), engine=Failing(models, bad))
    assert winner(caught.value.result) == worse.number


def test_the_fastest_that_holds_wins_and_nothing_is_confirmed_without_a_split():
    result = concluded([SLOWEST, SLOWER, FAST], Goal())
    assert (winner(result), result.feasible, result.confirmation) == (0, True, None)
    assert result.environment == {**MACHINE, "inputs": ["torch.float32 (1,)"]}


def test_only_those_that_may_be_the_best_are_built():
    engine = Engine([FAST, SLOWER, SLOWEST])
    concluded([FAST, SLOWER, SLOWEST], Goal(), engine=engine)
    assert engine.built == [0, 1]  # the intervals of these overlap


def untimed(model, predicted):
    return replace(trial(model), stage=Stage.EVALUATED, ratio=None, latency_ratio=predicted)


def test_what_was_scored_only_wins_by_being_timed_here():
    result = concluded([SLOWEST, SLOWER, FAST], Goal(), [trial(SLOWER), untimed(FAST, 0.9), untimed(SLOWEST, 0.1)])
    assert winner(result) == 0  # by neither prediction


def test_where_nothing_was_timed_the_predicted_are_timed_here():
    assert winner(concluded([SLOWER, FAST], Goal(), [untimed(SLOWER, 0.1), untimed(FAST, 0.9)])) == 0


def test_the_weights_pick_the_winner():
    models = [Model(0, 0.4, size=1.0), Model(1, 0.6, size=0.5)]
    assert winner(concluded(models, Goal())) == 0
    result = concluded(models, Goal(objectives={"latency": 1, "size": 1}))
    assert winner(result) == 1
    assert result.objectives == (Objective.LATENCY, Objective.ACCURACY, Objective.SIZE)


def test_a_model_that_computes_something_else_here_is_scored_again():
    elsewhere = replace(trial(FAST), digest="of another CPU")
    result = concluded([FAST, SLOWER], Goal(), [elsewhere, trial(SLOWER)], eval_fn=lambda model: 0.5)
    assert (winner(result), result.accuracy) == (1, 1.0)


def test_where_nothing_is_feasible_the_closest_is_in_the_error():
    with pytest.raises(NoFeasibleRecipe, match="closest loses 0.1") as caught:
        concluded([Model(0, 0.4, accuracy=0.8), Model(1, 0.5, accuracy=0.9)], Goal(confirm=lambda model: 1.0))
    assert (winner(caught.value.result), caught.value.result.confirmation) == (1, None)


def test_where_nothing_was_scored_the_reasons_are_told():
    failed = TrialRecord(0, recipe(0), {}, Status.FAILED, Stage.BUILD, reason="no compiler")
    with pytest.raises(EvaluationError, match="no compiler"):
        concluded([], Goal(), [failed])


# confirmation


def confirm(model):
    return {"accuracy": model.confirmed, "recall": model.recall}


CONFIRMED = Goal(0.01, confirm=confirm)


def test_an_optimistic_winner_is_passed_over():
    lucky, honest = Model(0, 0.4, confirmed=0.7), Model(1, 0.43, confirmed=0.796)
    assert winner(concluded([lucky, honest], Goal(0.01))) == 0
    result = concluded([lucky, honest], CONFIRMED)
    assert (winner(result), result.feasible, result.accuracy) == (1, True, 1.0)
    found = result.confirmation
    assert (found.accuracy, found.baseline_accuracy, found.holds, found.tried) == (0.796, 0.8, True, 2)
    assert found.accuracy_drop == pytest.approx(0.005)
    assert str(found).startswith("accuracy 0.7960 of 0.8000 on the split that confirms: holds")


def test_the_other_metrics_must_hold_there_too():
    forgetful, honest = Model(0, 0.4, recall=0.7), Model(1, 0.43)
    result = concluded([forgetful, honest], Goal(0.01, others=RECALL, confirm=confirm))
    assert (winner(result), result.confirmation.tried) == (1, 2)


def test_slower_trials_are_tried_where_no_finalist_is_confirmed():
    lucky = [Model(i, 0.4, confirmed=0.7) for i in range(3)]
    engine = Engine([*lucky, SLOWEST := Model(3, 0.8), Model(4, 0.9)])
    result = concluded([*lucky, SLOWEST, Model(4, 0.9)], CONFIRMED, engine=engine)
    assert (winner(result), result.confirmation.tried) == (3, 4)
    assert 4 not in engine.built  # the search ends with the first that holds


def test_after_a_few_none_is_called_confirmed():
    lucky = [Model(i, 0.4 + i / 10, confirmed=0.7 + i / 100) for i in range(CONFIRMED_AT_MOST)]
    with pytest.raises(
        NoFeasibleRecipe, match=r"none of the 5 best .* on\n?.*`Goal.confirm` too; the closest"
    ) as caught:
        concluded([*lucky, Model(99, 1.5)], CONFIRMED)
    result = caught.value.result
    assert (winner(result), result.feasible) == (CONFIRMED_AT_MOST - 1, False)
    assert (result.confirmation.holds, result.confirmation.tried) == (False, CONFIRMED_AT_MOST)


def early(model, accuracy):
    """A trial of which only some items were scored, and what they promised."""
    scored = {"accuracy": accuracy, "accuracy_drop": 1 - accuracy, "worst_drop": 1 - accuracy}
    return replace(trial(model), **scored, feasible=accuracy >= 0.99, items_scored=10, items=100, drop_std=0.01)


def test_the_winner_is_scored_whole():
    seen = []
    result = concluded([FAST], Goal(), [early(FAST, 0.995)], eval_fn=lambda model: seen.append(model) or model.accuracy)
    assert seen == [FAST]
    assert (result.accuracy, result.accuracy_drop, result.feasible) == (1.0, 0.0, True)


def test_where_estimates_promised_too_much_the_next_is_taken():
    lucky = Model(0, 0.4, accuracy=0.98)
    result = concluded([lucky, SLOWEST], Goal(), [early(lucky, 0.995), trial(SLOWEST)])
    assert (winner(result), result.accuracy) == (2, 1.0)


def test_the_closest_of_those_that_ended_early_is_scored_whole():
    closest = Model(0, 0.4, accuracy=0.9)
    with pytest.raises(NoFeasibleRecipe, match=r"closest loses 0\.1\.") as caught:
        concluded([closest], Goal(), [early(closest, 0.8)])
    assert caught.value.result.accuracy == 0.9
