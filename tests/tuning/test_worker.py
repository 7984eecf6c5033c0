"""A search point goes through build, score and timing; whatever goes wrong is a failed report with its reason."""

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from raysq import Evaluation, memory
from raysq.goal import Goal
from raysq.job import Job
from raysq.kernels import reference
from raysq.latency import Latency
from raysq.recipe import Precision, Recipe
from raysq.result import Stage, Status
from raysq.scores import Units
from raysq.tuning.records import record, to_result
from raysq.tuning.stopper import AccuracyConstraintStopper
from raysq.tuning.turns import Turns
from raysq.tuning.worker import Worker

KEYS = {
    *("accuracy", "accuracy_drop", "worst_drop", "baseline_accuracy", "feasible", "int8_calls", "metrics"),
    *("latency_ratio", "latency_ratio_low", "latency_ratio_high", "latency_ms", "latency_predicted", "speedup"),
    *("size_bytes", "size_ratio", "memory_ratio", "peak_memory_bytes", "build_s", "eval_s", "timing_s"),
    *("waiting_s", "overhead_s"),
    *("recipe", "digest", "stage", "status", "reason", "node", "label", "done"),
}
CALLS = ["0", "2", "4"]
ALL_FLOAT = {"op/" + name: "fp32" for name in CALLS}


@pytest.fixture
def worker(prepared, baseline):
    def make(eval_fn=lambda model: 1.0, engine=None, goal=None, times=True):
        base = replace(baseline, metrics={"accuracy": 1.0, "recall": 0.5}, size_bytes=100_000)
        job = Job(prepared, eval_fn, goal or Goal(), Latency(budget_s=0.01), base)
        return Worker(job, engine or reference.Engine(), times=times)

    return make


def test_two_reports(worker):
    trial = worker()
    trial.begin({"label": "default"})
    first, second = trial.advance(), trial.advance()
    assert KEYS <= set(first) == set(second)
    assert (first["stage"], first["done"], first["latency_predicted"]) == ("evaluated", False, True)
    assert (second["stage"], second["done"], second["latency_predicted"]) == ("timed", True, False)
    assert second["latency_ratio_low"] <= second["latency_ratio"] <= second["latency_ratio_high"]
    assert len(json.loads(second["pairs"])) >= 6
    assert (first["int8_calls"], first["feasible"], first["label"]) == (3, True, "default")
    assert json.loads(first["metrics"]) == {"accuracy": 1.0}
    assert first["peak_memory_bytes"] > 10**7


def test_where_times_dont_count_the_score_is_the_last_report(worker):
    trial = worker(times=False)
    trial.begin({})
    only = trial.advance()
    assert (only["stage"], only["done"], only["feasible"]) == ("evaluated", True, True)
    kept = record(0, {}, only)
    assert (kept.status, kept.ratio, kept.isa) == (Status.FINISHED, None, only["isa"])


def test_reports_are_records(worker, prepared):
    trial = worker()
    trial.begin({})
    trial.advance()
    kept = record(0, {}, trial.advance())
    assert (kept.status, kept.stage, kept.recipe) == (Status.FINISHED, Stage.TIMED, prepared.space.default())
    assert kept.ratio is not None


def test_the_seconds_of_a_trial_add_up(worker):
    def eval_fn(model):
        time.sleep(0.05)
        return 1.0

    trial = worker(eval_fn)
    begun = time.perf_counter()
    trial.begin({})
    first = trial.advance()
    time.sleep(0.05)  # nobody asks for the timing yet
    second = trial.advance()
    took = time.perf_counter() - begun
    spent = {name: second[name] for name in ("build_s", "eval_s", "timing_s", "overhead_s")}
    assert (first["timing_s"], second["eval_s"]) == (0.0, first["eval_s"])
    assert all(value > 0 for value in spent.values())
    assert spent["eval_s"] >= 0.05 and spent["overhead_s"] >= 0.05
    assert sum(spent.values()) <= took
    assert sum(spent.values()) >= 0.1 + spent["build_s"] + spent["timing_s"]
    kept = record(0, {}, second)
    assert {name: getattr(kept, name) for name in spent} == spent == {name: to_result(kept)[name] for name in spent}


def test_waiting_for_others_is_told_apart(worker):
    """Another program's timing stands for those of this search's other workers."""
    trial = worker(lambda model: float(model(torch.zeros(1, 16)).shape[0]))
    others = Turns(trial._turns.directory)
    begun = time.perf_counter()
    trial.begin({})
    with ThreadPoolExecutor(1) as thread:
        with others.alone():
            built = thread.submit(trial.advance)
            time.sleep(0.3)
        built.result()
        with others.shared():
            timed = thread.submit(trial.advance)
            time.sleep(0.3)
        report = timed.result()
    took = time.perf_counter() - begun
    spent = [report[name] for name in ("build_s", "eval_s", "timing_s", "overhead_s")]
    assert report["waiting_s"] >= 0.3
    assert 0 < sum(spent) <= took - report["waiting_s"]


@pytest.mark.parametrize(
    ("config", "accuracy", "feasible", "reason"),
    [
        ({}, 1.0, True, ""),
        ({}, 0.99, True, ""),  # a drop of exactly the tolerance
        ({}, 0.98, False, "loses 0.02"),
        (ALL_FLOAT, 1.0, False, "no call runs in int8"),
    ],
)
def test_feasible(worker, config, accuracy, feasible, reason):
    trial = worker(lambda model: accuracy)
    trial.begin(config)
    report = trial.advance()
    assert report["feasible"] is feasible
    assert reason in report["reason"]
    assert report["status"] == "finished"


@pytest.mark.parametrize(
    ("recall", "feasible", "reason"), [(0.5, True, ""), (0.4, False, "loses 0.1 of recall, allowed is at most 0.05")]
)
def test_every_metric_of_the_goal_must_hold(worker, recall, feasible, reason):
    goal = Goal(others={"recall": Goal(0.05, "absolute")})
    trial = worker(lambda model: {"accuracy": 1.0, "recall": recall}, goal=goal)
    trial.begin({})
    report = trial.advance()
    assert (report["feasible"], report["accuracy_drop"]) == (feasible, 0.0)
    assert report["reason"].startswith(reason)
    kept = record(0, {}, report)
    assert goal.holds(kept.loss) is feasible


def test_size_is_a_ratio_to_the_fastest_fp32_form(worker):
    trial = worker()
    trial.begin({})
    kept = record(0, {}, trial.advance())
    assert kept.size_ratio == kept.size_bytes / 100_000
    assert kept.memory_ratio is None  # not among the objectives


def test_memory_is_measured_where_it_is_an_objective(worker, monkeypatch):
    monkeypatch.setattr(memory, "growth", lambda model, args, kwargs: next(grown))
    grown = iter([1000, 400, 2500])  # the fp32 form once, then each candidate
    trial = worker(goal=Goal(objectives={"latency": 1, "memory": 0.5}))
    ratios = []
    for _ in range(2):
        trial.begin({})
        ratios.append(record(0, {}, trial.advance()).memory_ratio)
    assert ratios == [0.4, 2.5]


def raises(model):
    raise ValueError("no such file")


class Broken(reference.Engine):
    def build(self, source, recipe):
        raise MemoryError("out of scratchpads")


class Crawling(reference.Engine):
    """Its candidates take a while, its fp32 form doesn't."""

    def build(self, source, recipe):
        built = super().build(source, recipe)
        built.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
        executed = dict.fromkeys(built.executed, Precision.INT8)
        return SimpleNamespace(model=built.model, executed=executed, size_bytes=1, backend="onednn")


class Untimeable(reference.Engine):
    def build_float(self, source, form):
        raise RuntimeError("no such form")


@pytest.mark.parametrize(
    ("eval_fn", "engine", "config", "advances", "stage", "reason"),
    [
        (raises, None, {}, 1, "build", "ValueError: no such file"),
        (lambda model: math.nan, None, {}, 1, "build", "must be finite"),
        (lambda model: None, None, {}, 1, "build", "must return a number"),
        (lambda model: 1.0, Broken(), {}, 1, "build", "MemoryError: out of scratchpads"),
        (lambda model: 1.0, None, {"linear.scheme": "odd"}, 1, "build", "linear.scheme"),
        (lambda model: 1.0, Untimeable(), {}, 2, "evaluated", "no such form"),
    ],
)
def test_failures_are_reports(worker, eval_fn, engine, config, advances, stage, reason):
    trial = worker(eval_fn, engine)
    trial.begin(config)
    for _ in range(advances):
        report = trial.advance()
    assert (report["status"], report["done"], report["feasible"], report["stage"]) == ("failed", True, False, stage)
    assert report["latency_ratio"] == math.inf  # no searcher takes it for good
    assert reason in report["reason"]
    trial.begin({})  # the worker goes on
    assert trial.advance()["stage"] in ("evaluated", "build")


def test_what_is_timed_as_hopeless_is_infeasible_and_searchers_learn_how_slow_it_is(worker):
    trial = worker(engine=Crawling())
    trial.begin({})
    assert trial.advance()["feasible"]
    report = trial.advance()
    assert (report["status"], report["stage"], report["feasible"]) == ("finished", "timed", False)
    assert "20 times as long as in fp32" in report["reason"]
    assert 20 < report["latency_ratio"] < math.inf


def test_same_recipe_same_digest(worker, prepared):
    trial = worker()
    digests = []
    for config in ({}, {}, ALL_FLOAT):
        trial.begin(config)
        digests.append(trial.advance()["digest"])
    assert digests[0] == digests[1] != digests[2]


def test_baseline_form_is_built_once_and_one_candidate_is_held(worker):
    engine = reference.Engine()
    built = []
    build_float = engine.build_float
    engine.build_float = lambda source, form: built.append(form) or build_float(source, form)
    trial = worker(engine=engine)
    for _ in range(2):
        trial.begin({})
        assert trial._candidate is None
        trial.advance()
        trial.advance()
    assert built == ["jit"]


def test_eval_fn_sees_the_built_model(worker, prepared):
    seen = []

    def eval_fn(model):
        seen.append(model(*prepared.source.args))
        return 1.0

    trial = worker(eval_fn)
    trial.begin({})
    trial.advance()
    exact = prepared.source.model(*prepared.source.args)
    assert not torch.equal(seen[0], exact)  # quantized ...
    assert torch.allclose(seen[0], exact, atol=0.2)  # ... slightly


def test_prediction_comes_from_what_really_runs(worker, prepared):
    class Refusing(reference.Engine):
        def build(self, source, recipe):
            built = super().build(source, Recipe({}))
            fp32 = {c.name: Precision.FP32 for c in source.graph.calls}
            return SimpleNamespace(backend="refusing", model=built.model, executed=fp32, left_in_float={}, size_bytes=1)

    trial = worker(engine=Refusing())
    trial.begin({})
    report = trial.advance()
    assert (report["latency_ratio"], report["int8_calls"], report["feasible"]) == (pytest.approx(1), 0, False)


def test_relative_loss_against_zero_is_a_failed_report(prepared, baseline):
    job = Job(prepared, lambda model: 1.0, Goal(), Latency(), replace(baseline, accuracy=0.0))
    trial = Worker(job, reference.Engine())
    trial.begin({})
    assert "absolute" in trial.advance()["reason"]


ROWS = torch.randn(2000, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def drawn(prepared, baseline):
    """A worker whose evaluation draws items, and how many it drew; `wrong` is the share of them that fail."""

    def make(wrong, known=True):
        drew = []

        def metric(output, batch):
            drew.append(len(output))
            return batch[1] >= wrong

        items = TensorDataset(ROWS, torch.linspace(0, 1, len(ROWS)))
        evaluation = Evaluation(items, metric, batch_size=20)
        scores = Units(np.ones(len(ROWS)), bounds=(0.0, 1.0)) if known else None
        job = Job(prepared, evaluation, Goal(), Latency(budget_s=0.01), replace(baseline, reference=scores))
        return Worker(job, reference_engine()), drew

    return make


def reference_engine():
    return reference.Engine()


def test_a_trial_that_fails_is_not_scored_to_the_end(drawn):
    trial, drew = drawn(0.3)
    trial.begin({})
    report = trial.advance()
    kept = record(0, {}, report)
    assert (kept.status, kept.stage, kept.feasible, kept.items) == (Status.FINISHED, Stage.EVALUATED, False, 2000)
    assert kept.items_scored == sum(drew) < 100
    assert kept.estimated and kept.accuracy_drop > 0.01 and 0 < kept.drop_std < 0.5
    assert report["reason"].startswith(f"stopped after {sum(drew)} of 2000 items: loses ")
    assert record(0, {}, to_result(kept), recipe=kept.recipe) == kept
    assert AccuracyConstraintStopper()("trial", report)


@pytest.mark.parametrize(
    ("wrong", "options"),
    [
        (0.0, {}),
        (0.3, {"known": False}),  # resumed from a journal of before
    ],
)
def test_all_else_is_scored_whole(drawn, wrong, options):
    trial, drew = drawn(wrong, **options)
    trial.begin({})
    kept = record(0, {}, trial.advance())
    assert kept.items_scored == kept.items == sum(drew) == 2000
    assert not kept.estimated and kept.accuracy == pytest.approx(1 - wrong, abs=1e-3)


def test_a_plain_function_says_nothing_of_items(worker):
    trial = worker()
    trial.begin({})
    kept = record(0, {}, trial.advance())
    assert (kept.items_scored, kept.items, kept.estimated) == (None, None, False)


def test_a_recipe_that_crawls_is_not_evaluated(worker):
    evaluated = []

    class Crawling(reference.Engine):
        def build(self, source, recipe):
            built = super().build(source, recipe)

            def model(*args, **kwargs):
                time.sleep(0.15)
                return built.model(*args, **kwargs)

            return replace(built, model=model, backend="crawling")

    trial = worker(lambda model: evaluated.append(model) or 1.0, Crawling())
    trial.begin({})
    report = trial.advance()
    assert (report["status"], report["done"], evaluated) == ("failed", True, [])
    assert "20 times as long as in fp32" in report["reason"]


def test_a_trial_has_its_own_thread(worker):
    seen = []
    trial = worker(lambda model: seen.append(threading.get_ident()) or 1.0)
    first = trial._thread
    trial.begin({})
    trial.advance(), trial.advance()
    assert seen[0] != threading.get_ident()
    assert first._shutdown  # with it went what oneDNN Graph kept of its kernels
