"""What the best recipes are on other backends: saved, loaded again, scored and timed; no real one is left out."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import raysq
from raysq.baseline import measure
from raysq.conclusion import conclude
from raysq.errors import BackendError, NoFeasibleRecipe
from raysq.finalists import COMPILED, Finalist, Finals, Standing
from raysq.goal import Goal, Objective
from raysq.job import Job
from raysq.kernels import base
from raysq.latency import Latency, Timing
from raysq.recipe import OpConfig, Precision, Recipe
from raysq.result import Ratio, Stage, Status, TrialRecord

X = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LATENCY = Latency(budget_s=0.02, final_budget_s=0.02)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(16 * 64, 10)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture(scope="module")
def job():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        labels = model(X).argmax(1)

    def agreement(candidate):
        return float((candidate(X).argmax(1) == labels).float().mean())

    prepared = replace(raysq.prepare(model, [X], backend="onednn", num_threads=1), rivals=())
    goal = raysq.Goal(0.3)
    baseline = measure(prepared, base.get("onednn"), model, agreement, goal, LATENCY)
    return Job(prepared, agreement, goal, LATENCY, baseline)


def trial(number, recipe):
    int8, ratio = len(recipe.int8_calls), Ratio(0.5, 0.5, 0.5)
    passing = {"accuracy": 1.0, "accuracy_drop": 0.0, "feasible": True}
    return TrialRecord(
        number, recipe, {}, Status.FINISHED, Stage.TIMED, latency_ratio=ratio, ratio=ratio, int8_calls=int8, **passing
    )


@pytest.fixture
def finals(job):
    return Finals(job, base.get("onednn"))


PACKAGES = {"ipex": "intel_extension_for_pytorch", "openvino": "openvino", "reference": "torch"}


@pytest.mark.parametrize("rival", PACKAGES)
def test_a_recipe_is_measured_on_another_backend_as_it_was_saved(job, finals, rival, tmp_path):
    pytest.importorskip(PACKAGES[rival])
    recipe = job.prepared.space.default()
    found = finals.carried([trial(0, recipe), trial(1, recipe)], base.get(rival))
    assert isinstance(found, Finalist)
    standing = found.standing(Goal(), holds=True)
    assert (standing.backend, standing.recipe, standing.int8_calls) == (rival, recipe.digest, 3)
    found.built.save(tmp_path)
    assert job.eval_fn(raysq.load(tmp_path)) == standing.accuracy < 1 + 1e-9
    assert found.trial.size_ratio == found.built.size_bytes / job.baseline.size_bytes
    assert found.timing.ratio == standing.latency_ratio


def test_a_rival_that_misses_the_goal_says_by_how_much(job):
    strict = replace(
        job, goal=raysq.Goal(0.0), eval_fn=lambda model: 1.0 if model is job.prepared.source.model else 0.5
    )
    found = Finals(strict, base.get("onednn")).carried([trial(0, job.prepared.space.default())], base.get("reference"))
    assert not isinstance(found, Finalist)
    assert (found.holds, found.accuracy, found.accuracy_drop) == (False, 0.5, 0.5)
    assert "loses 0.5" in found.reason and "loses 0.5" in str(found)


class Broken:
    """Like the reference, but one of its steps goes wrong."""

    name = "reference"

    def __init__(self, **wrong):
        self._real = base.get("reference")
        self._wrong = wrong

    def __getattr__(self, name):
        return self._wrong.get(name) or getattr(self._real, name)


@pytest.mark.parametrize(
    ("exc", "told"), [(BackendError("no kernel"), "no kernel"), (RuntimeError("odd\n..."), "RuntimeError: odd")]
)
def test_a_rival_that_fails_is_told_and_costs_nothing_else(job, finals, exc, told):
    def refuse(*_):
        raise exc

    wanted = [trial(0, job.prepared.space.default())]
    found = finals.carried(wanted, Broken(build=refuse))
    assert (found.holds, found.reason, found.latency_ratio) == (False, told, None)
    found = Finals(replace(job, eval_fn=refuse), base.get("onednn")).carried(wanted, base.get("reference"))
    assert not found.holds and told in found.reason
    nothing = finals.carried([trial(0, Recipe({}))], base.get("reference"))
    assert not nothing.holds and "no int8 kernel" in nothing.reason


def test_what_crawls_is_never_scored(job, monkeypatch):
    def never(model):
        raise AssertionError("it was scored")

    finals = Finals(replace(job, eval_fn=never), base.get("onednn"))
    slow = Timing(900.0, 1.0, Ratio(900.0, 800.0, 1000.0), (), hopeless=True)
    monkeypatch.setattr(finals, "_time", lambda model: slow)
    found = finals.carried([trial(0, job.prepared.space.default())], base.get("onednn"))
    assert not found.holds and "20 times as long" in found.reason


def test_what_crawls_is_never_returned(job, monkeypatch):
    slow = Timing(900.0, 1.0, Ratio(900.0, 800.0, 1000.0), (), hopeless=True)
    monkeypatch.setattr(Finals, "_time", lambda *_: slow)

    def never(model):
        raise AssertionError("it was scored")

    slow_here = replace(job, eval_fn=never)  # whose outputs differ here, so that it would be
    with pytest.raises(NoFeasibleRecipe, match="may have a fast one.*Take another `backend`") as caught:
        conclude(slow_here, base.get("onednn"), [trial(0, job.prepared.space.default())], Path("journal"))
    assert not caught.value.result.feasible


@pytest.mark.parametrize(("ratios", "winner"), [((0.5, 0.4), "reference"), ((0.4, 0.5), "onednn")])
def test_the_fastest_that_holds_wins_whichever_backend_it_is_on(job, monkeypatch, ratios, winner):
    left = iter(ratios)  # of the trial on its own backend, then of the rival's
    measured = Finals._time
    monkeypatch.setattr(Finals, "_time", lambda *a: replace(measured(*a), ratio=Ratio(next(left), 0.1, 0.9)))
    monkeypatch.setattr(Finals, "compiled", lambda self: Standing(COMPILED))
    contested = replace(job, prepared=replace(job.prepared, rivals=("reference",)))
    said = []
    found = trial(0, job.prepared.space.default())
    result = conclude(contested, base.get("onednn"), [found], Path("journal"), said.append)
    assert result.backend == winner and result.feasible and result.latency_ratio == 0.4
    table = pd.DataFrame(result.backends)
    assert list(table["backend"]) == ["onednn", "reference", COMPILED]
    assert list(table["holds"]) == [True, True, False]
    assert all(any(name in line for line in said) for name in table["backend"])


def test_torch_compile_is_a_line_of_the_table_and_its_failure_too(finals, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", lambda model, **_: refuse)
    assert finals.compiled().reason == "RuntimeError: no C++ compiler"
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    standing = finals.compiled()
    assert standing.latency_ratio is not None and not standing.holds and not standing.recipe


def test_memory_is_measured_where_it_counts(job):
    goal = raysq.Goal(0.3, objectives={Objective.LATENCY: 1, Objective.MEMORY: 1})
    found = Finals(replace(job, goal=goal), base.get("onednn")).carried(
        [trial(0, Recipe({"head": OpConfig(Precision.INT8)}))], base.get("reference")
    )
    assert isinstance(found, Finalist) and found.trial.memory_ratio > 0
    assert goal.cost(found.trial) == pytest.approx(found.timing.ratio + found.trial.memory_ratio)
