"""The conductor: duplicates, the end of a search, replay."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from driving import ARGUMENTS
from optuna.samplers import RandomSampler
from ray import cloudpickle
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from simulation import Simulation

from raysq import strategies
from raysq.result import TrialRecord
from raysq.run import Entry, WarmStart
from raysq.strategies.base import BARRIER, Proposal, Strategy
from raysq.tuning.capacity import Room
from raysq.tuning.conductor import Conductor
from raysq.tuning.records import LOST, record


def conductor(
    sim: Simulation, inner: Searcher | str = "auto", trials: int = 40, seed: int = 0, **kwargs: Any
) -> Conductor:
    space = sim.space()
    searcher = (
        strategies.get(inner, **ARGUMENTS.get(inner, {})).bind(space, sim.goal, trials, seed, costs=sim.costs)
        if isinstance(inner, str)
        else inner
    )
    return Conductor(searcher, space, sim.goal, trials, **kwargs)


def drive(conductor: Conductor, sim: Simulation, slots: int = 1, stop_after: int | None = None) -> list[Entry]:
    """Run trials as Ray Tune would, the oldest ending first; return what a journal would hold."""
    running: list[tuple[str, dict[str, Any]]] = []
    finished, ids = False, count()
    while not finished or running:
        if stop_after is not None and len(conductor.history) >= stop_after:
            break
        suggestion = None
        if not finished and len(running) < slots:
            trial_id = f"ray-{next(ids)}"
            suggestion = conductor.suggest(trial_id)
            finished = suggestion == Searcher.FINISHED
            assert suggestion is not None or running  # it may wait only for what is running
        if isinstance(suggestion, dict):
            running.append((trial_id, suggestion))
            continue
        if running:
            trial_id, config = running.pop(0)
            result = sim.run(conductor.space.recipe(config))
            conductor.on_trial_complete(trial_id, result, error=result["status"] == "failed")
    return list(conductor._entries)


def test_a_lost_trial_is_suggested_again() -> None:
    sim = Simulation()
    search = conductor(sim, trials=2, max_failures=1)
    lost = search.suggest("a")
    search.on_trial_complete("a", error=True)
    assert search.tries_again(0)
    assert search.suggest("b") == lost
    assert not search.tries_again(0)
    search.on_trial_complete("b", error=True)  # it had its second try
    assert [r.reason for r in search.history] == [LOST]
    assert search.suggest("c")["trial"] == 1


def test_the_search_ends_only_after_those_that_run() -> None:
    sim = Simulation()
    search = conductor(sim, trials=1, max_failures=1)
    lost = search.suggest("a")
    assert search.suggest("b") is None
    search.on_trial_complete("a", error=True)
    assert search.suggest("c") == lost
    search.on_trial_complete("c", sim.run(search.space.recipe(lost)))
    assert search.suggest("d") == Searcher.FINISHED
    assert search.why_over() == "all 1 trials were made"


def test_an_error_with_a_report_is_no_loss() -> None:
    search = conductor(Simulation(), max_failures=1)
    search.suggest("a")
    search.on_trial_complete("a", {"status": "failed", "reason": "it did"}, error=True)
    assert [r.reason for r in search.history] == ["it did"]


class Stutterer(Searcher):
    """Suggests the same few points for ever."""

    def __init__(self, points: list[dict[str, Any]]) -> None:
        super().__init__(metric="latency_ratio", mode="min")
        self.points = points
        self.asked = 0
        self.told: dict[str, tuple[dict[str, Any] | None, bool]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any]:
        self.asked += 1
        return self.points[(self.asked - 1) % len(self.points)]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.told[trial_id] = (result, error)


TWO = [{"linear.algorithm": "mse"}, {"linear.algorithm": "kl"}]


def test_a_recipe_runs_once_and_the_searcher_hears_of_it_each_time() -> None:
    sim, inner = Simulation(), Stutterer([TWO[0], TWO[0], TWO[1]])
    drive(conductor(sim, inner), sim)
    assert len({r.recipe.digest for r in conductor(sim, inner).history}) == 0
    assert len(inner.told) == inner.asked  # each question is answered, duplicates at once


def test_a_searcher_that_repeats_itself_ends_the_search() -> None:
    sim = Simulation()
    subject = conductor(sim, Stutterer(TWO))
    assert len(drive(subject, sim)) == 2
    assert "nothing more" in subject.why_over()


def test_a_duplicate_of_a_running_trial_is_answered_when_that_ends() -> None:
    sim, inner = Simulation(), Stutterer([TWO[0]])
    subject = conductor(sim, inner)
    first = subject.suggest("a")
    assert subject.suggest("b") is None  # nothing new as long as the first is running
    asked = inner.asked
    assert subject.suggest("b") is None
    assert inner.asked == asked  # and it isn't asked again before something changes
    subject.on_trial_complete("a", sim.run(subject.space.recipe(first)))
    assert len(inner.told) == asked


def test_configs_carry_number_and_completions_seen() -> None:
    sim = Simulation()
    subject = conductor(sim, "random")
    first, second = subject.suggest("a"), subject.suggest("b")
    subject.on_trial_complete("a", sim.run(subject.space.recipe(first)))
    third = subject.suggest("c")
    assert [(c["trial"], c["seen"]) for c in (first, second, third)] == [(0, 0), (1, 0), (2, 1)]


def test_no_more_run_than_there_is_room_for_as_it_changes() -> None:
    sim, rooms = Simulation(), [Room(1), Room(1), Room(2, ("n1", "n2")), Room(0)]
    subject = conductor(sim, "random", room=lambda: rooms[0])
    first = subject.suggest("a")
    assert "avoid" not in first
    rooms.pop(0)
    assert subject.suggest("b") is None
    rooms.pop(0)
    second = subject.suggest("b")
    assert second["avoid"] == "n1,n2"
    assert subject.space.recipe(second) != subject.space.recipe(first)
    rooms.pop(0)
    subject.on_trial_complete("a", sim.run(subject.space.recipe(first)))
    assert subject.suggest("c") is None
    subject.on_trial_complete("b", sim.run(subject.space.recipe(second)))
    assert isinstance(subject.suggest("c"), dict)  # one waits, so that Ray sees that a node is wanted
    assert "avoid" not in subject.history[1].config


def test_what_was_timed_is_better_than_any_prediction() -> None:
    sim = Simulation()
    subject = conductor(sim, "random")
    configs = [subject.suggest(name) for name in "abc"]
    results = [sim.run(subject.space.recipe(config)) for config in configs]
    for name, result, ratio, predicted in zip("abc", results, (0.3, 0.9, 0.2), (True, False, True), strict=True):
        ends = {"latency_ratio": ratio, "latency_ratio_low": ratio, "latency_ratio_high": ratio}
        stage = "evaluated" if predicted else "timed"
        passed = {"feasible": True, "accuracy_drop": 0.0, "latency_predicted": predicted, "stage": stage}
        subject.on_trial_complete(name, {**result, **ends, **passed})
        best = subject.history.best
        assert best is not None and best.trial == {"a": 0, "b": 1, "c": 1}[name]


def test_stop_at_first_ends_at_the_first_feasible() -> None:
    sim = Simulation()
    entries = drive(conductor(sim, "auto", stop_at_first=True), sim)
    assert [entry.record.feasible for entry in entries].index(True) == len(entries) - 1


def test_the_search_ends_on_a_plateau_only_after_something_was_feasible() -> None:
    sim = Simulation(sensitive=0)
    point = {"linear.algorithm": "mse"}
    many = Stutterer([{**point, "float_calls.mse": k} for k in range(40)])  # each slower than the one before
    subject = conductor(sim, many)
    assert len(drive(subject, sim)) == 11  # the default, and ten that were not faster
    hopeless = Simulation(sensitive=0, tolerance=0.0)
    assert len(drive(conductor(hopeless, "random", trials=30), hopeless)) == 30


def test_max_trials_ends_the_search() -> None:
    sim = Simulation()
    subject = conductor(sim, "random", trials=5)
    assert len(drive(subject, sim)) == 5
    assert subject.why_over() == "all 5 trials were made"


@pytest.mark.parametrize("name", [kind.name for kind in strategies.ALL])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_killed_run_goes_on_as_if_it_had_not_been(name: str, slots: int) -> None:
    sim = Simulation(seed=3)
    whole = drive(conductor(sim, name, trials=15), sim, slots=slots)
    part = drive(conductor(sim, name, trials=15), sim, slots=slots, stop_after=11)
    resumed = conductor(sim, name, trials=15)
    resumed.replay(part)
    drive(resumed, sim, slots=slots)
    tried = [record.recipe.digest for record in resumed.history]
    assert len(set(tried)) == len(tried)  # nothing runs twice
    if slots == 1:
        assert tried == [entry.record.recipe.digest for entry in whole]
    assert tried[:11] == [entry.record.recipe.digest for entry in part]


def test_a_replay_of_a_replay_is_the_same() -> None:
    sim = Simulation(seed=3)
    once = drive(conductor(sim, trials=25), sim, slots=3, stop_after=9)
    second = conductor(sim, trials=25)
    second.replay(once)
    twice = drive(second, sim, slots=3, stop_after=15)
    third = conductor(sim, trials=25)
    third.replay(twice)
    assert [r.recipe.digest for r in third.history] == [r.recipe.digest for r in second.history]
    numbers = [r.trial for r in third.history]
    assert numbers == [r.trial for r in second.history] and sorted(numbers) == list(range(len(numbers)))
    assert len({r.recipe.digest for r in third.history}) == len(numbers) > len(once)


def test_what_another_searcher_tried_is_not_tried_again() -> None:
    sim = Simulation(seed=3)
    earlier = drive(conductor(sim, "random", trials=10), sim)
    resumed = conductor(sim, "auto", trials=25)
    resumed.replay(earlier)
    drive(resumed, sim)
    tried = [record.recipe.digest for record in resumed.history]
    assert len(set(tried)) == len(tried)
    assert tried[:10] == [entry.record.recipe.digest for entry in earlier]


def test_rays_snapshot_of_a_search_has_neither_model_nor_searcher() -> None:
    assert not vars(pickle.loads(cloudpickle.dumps(conductor(Simulation()))))


@pytest.mark.parametrize(("result", "error"), [(None, True), ({"latency_ratio": float("nan")}, False), ({}, False)])
def test_failures_are_told_as_errors(result: dict[str, Any] | None, error: bool) -> None:
    inner = Stutterer(TWO)
    subject = conductor(Simulation(), inner)
    subject.suggest("a")
    subject.on_trial_complete("a", result, error)
    assert inner.told == {"00000": (None, True)}
    assert subject.history[0].reason


def test_a_plain_optuna_search_is_bound_and_sees_infeasible_trials_behind_feasible_ones() -> None:
    sim = Simulation(sensitive=2)
    inner = OptunaSearch(sampler=RandomSampler(seed=1))
    subject = conductor(sim, inner, trials=20)
    drive(subject, sim)
    told: dict[bool, list[float]] = {True: [], False: []}
    for trial in inner._ot_study.trials:
        ended = subject.history.of(subject.space.recipe(trial.params))
        assert ended is not None
        told[ended.feasible].append(trial.value)
    assert max(told[True]) < min(told[False])


# warm start


def started(sim: Simulation, known: int = 6) -> WarmStart:
    """What a search by chance found: this many results, and three more recipes."""
    entries = drive(conductor(sim, "random", trials=known + 3), sim)
    numbered = [replace(e.record, trial=i - known) for i, e in enumerate(entries[:known])]
    return WarmStart(tuple(Entry(r, seen=0) for r in numbered), tuple(e.record.recipe for e in entries[known:]))


def tried(subject: Conductor) -> list[str]:
    return [record.recipe.digest for record in subject.history]


def test_recipes_of_a_warm_start_run_before_the_searcher_is_asked() -> None:
    sim, inner = Simulation(seed=3), Stutterer(TWO)
    start = started(sim, known=0)
    subject = conductor(sim, inner, warm_start=start)
    running = {str(i): subject.suggest(str(i)) for i in range(3)}
    assert [config["label"] for config in running.values()] == ["warm start"] * 3
    assert [subject.space.recipe(config) for config in running.values()] == list(start.recipes)
    for trial_id in ("0", "1", "2"):
        assert subject.suggest("more") is None
        assert inner.asked == 0
        subject.on_trial_complete(trial_id, sim.run(subject.space.recipe(running[trial_id])))
    assert subject.suggest("more")["label"] == "Stutterer"


def test_results_of_a_warm_start_are_not_measured_again_and_count_as_no_trial() -> None:
    sim = Simulation(seed=3)
    start = started(sim)
    subject = conductor(sim, "random", trials=12, warm_start=start)  # the same seed would suggest the same
    entries = drive(subject, sim)
    assert len(entries) == 12
    assert [entry.record.trial for entry in entries] == list(range(12))
    assert all(entry.seen <= entry.record.trial for entry in entries)
    assert len(set(tried(subject))) == 6 + 12
    assert subject.history[:6] == [entry.record for entry in start.entries]


@pytest.mark.parametrize("slots", [1, 3])
def test_a_strategy_learns_what_the_warm_start_knows_and_tries(slots: int) -> None:
    sim = Simulation(seed=3)
    subject = conductor(sim, "auto", trials=10, warm_start=started(sim))
    drive(subject, sim, slots=slots)
    assert isinstance(subject.inner, Strategy)
    assert [r.recipe.digest for r in subject.inner.history] == tried(subject)


def test_optuna_learns_what_the_warm_start_knows_and_tries() -> None:
    sim = Simulation(seed=3)
    inner = strategies.ConstrainedOptuna(sim.space(), sim.goal, RandomSampler(seed=1))
    drive(conductor(sim, inner, trials=5, warm_start=started(sim)), sim)
    assert len(inner._ot_study.trials) == 6 + 5


@pytest.mark.parametrize(("name", "kwargs"), [("nsga2", {}), ("tpe", {"fallback": True})])
def test_a_sampler_within_a_strategy_learns_of_the_warm_start(
    name: str, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sim, learned = Simulation(seed=3), set()
    learn = strategies.ConstrainedOptuna.learn

    def noted(self: strategies.ConstrainedOptuna, config: Any, ended: TrialRecord) -> None:
        learned.add(ended.recipe.digest)
        learn(self, config, ended)

    monkeypatch.setattr(strategies.ConstrainedOptuna, "learn", noted)
    start = started(sim)
    inner = strategies.get(name, **kwargs).bind(sim.space(), sim.goal, 5)
    drive(conductor(sim, inner, trials=5, warm_start=start), sim)
    given = {*digests_of(start), *(entry.record.recipe.digest for entry in start.entries)}
    assert learned == given - {sim.space().default().digest}  # that one it suggests, and is told


def test_with_stop_at_first_a_known_feasible_recipe_ends_the_search_at_once() -> None:
    sim = Simulation(sensitive=0)
    start = started(sim)
    assert any(entry.record.feasible for entry in start.entries)
    assert conductor(sim, "auto", stop_at_first=True, warm_start=start).suggest("a") == Searcher.FINISHED


def test_known_results_are_no_plateau() -> None:
    sim = Simulation(sensitive=0)
    point = {"linear.algorithm": "mse"}
    slower = Stutterer([{**point, "float_calls.mse": k} for k in range(40)])
    start = started(sim, known=20)
    best = min(entry.record.latency_bound for entry in start.entries if entry.record.feasible)
    entries = drive(conductor(sim, slower, warm_start=WarmStart(start.entries)), sim)
    assert min(entry.record.latency_bound for entry in entries) > best
    assert len(entries) == 10  # none was faster than what was known


@pytest.mark.parametrize("name", [kind.name for kind in strategies.ALL])
def test_every_strategy_is_resumed_after_a_warm_start(name: str) -> None:
    sim = Simulation(seed=3)
    start = started(sim, known=3)
    whole = conductor(sim, name, trials=8, warm_start=start)
    part = drive(whole, sim, stop_after=3 + 6)
    resumed = conductor(sim, name, trials=8, warm_start=start)
    resumed.replay(part)
    drive(whole, sim)
    drive(resumed, sim)
    assert tried(resumed) == tried(whole)


@pytest.mark.parametrize("ended", [1, 2, 5])
def test_a_run_killed_within_its_warm_start_goes_on_with_the_rest_of_it(ended: int) -> None:
    sim = Simulation(seed=3)
    start = started(sim)
    part = drive(conductor(sim, warm_start=start), sim, slots=3, stop_after=6 + ended)
    resumed = conductor(sim, warm_start=start)
    resumed.replay(part)
    drive(resumed, sim, slots=3, stop_after=6 + 8)
    assert tried(resumed)[6:9] == digests_of(start)
    assert len(set(tried(resumed))) == len(tried(resumed))  # nothing runs twice


def digests_of(start: WarmStart) -> list[str]:
    return [recipe.digest for recipe in start.recipes]


def test_a_barrier_holds_back_until_all_ended() -> None:
    class Two(Strategy):
        name = "two"

        def next_recipe(self, history: Any) -> Any:
            for value in ("mse", "kl"):
                yield Proposal(self.space.recipe({"linear.algorithm": value}), value)
            yield BARRIER
            yield Proposal(self.space.recipe({"linear.algorithm": "minmax"}), f"after {len(history)}")

    sim = Simulation()
    subject = conductor(sim, Two().bind(sim.space(), sim.goal))
    first, second = subject.suggest("a"), subject.suggest("b")
    assert subject.suggest("c") is None
    subject.on_trial_complete("b", sim.run(subject.space.recipe(second)))
    assert subject.suggest("c") is None
    subject.on_trial_complete("a", sim.run(subject.space.recipe(first)))
    assert subject.suggest("c")["label"] == "after 2"


def test_a_record_and_its_result_are_inverse() -> None:
    from raysq.tuning.records import to_result

    sim = Simulation()
    once = record(0, {"label": "x"}, sim.run(sim.space().default()))
    assert record(0, {"label": "x"}, to_result(once)) == once
