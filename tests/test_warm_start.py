"""What a new run takes from earlier ones: results where they would only be repeated, recipes from all else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulation import CAPABILITIES, Simulation, make_call, make_graph

from raysq.errors import OptionError, RecipeError, ResumeError
from raysq.goal import Goal
from raysq.graph import OpType
from raysq.journal import Journal
from raysq.probing import CRAWLING
from raysq.recipe import OpConfig, Precision, Recipe
from raysq.result import Baseline, TrialRecord
from raysq.run import Entry, Header, WarmStart
from raysq.space import SearchSpace, build_space
from raysq.tuning.records import record
from raysq.warm_start import MOST, EarlierRun, gather, read

SIM = Simulation()
SPACE = SIM.space()
HERE = {"cpu": "Zen", "isa": "avx512_vnni", "threads": 2, "governor": "performance"}
HEADER = Header(
    fingerprints={"model": "m", "calibration": "c", "evaluation": "e"},
    arguments={"latency_inputs": ["torch.float32 (1, 8)"], "seed": 0},
    versions={"raysq": "1", "torch": "2.8", "ray": "2.50"},
    backend="ipex",
    baseline=Baseline(0.9, {"accuracy": 0.9}, 5.0, "ipex", {"ipex": 5.0}),
)


def trial(number: int, config: dict[str, Any], **changes: Any) -> TrialRecord:
    """A trial of the simulation, scored as `eval_fn` would."""
    ended = record(number, {"label": f"trial {number}"}, SIM.run(SPACE.recipe(config)))
    return replace(ended, **{"metrics": {"accuracy": ended.accuracy}, **changes})


TRIALS = [trial(i, {"float_calls.mse": k}) for i, k in enumerate((0, 2, 5, 6, 8, 10, 20, 30))]
ENTRIES = tuple(Entry(ended, seen=i, environment=HERE) for i, ended in enumerate(TRIALS))
FEASIBLE = [ended.feasible for ended in TRIALS]


def begun(
    entries: tuple[Entry, ...] = ENTRIES,
    header: Header = HEADER,
    environment: dict[str, Any] = HERE,
    space: SearchSpace = SPACE,
    goal: Goal = SIM.goal,
) -> WarmStart:
    """Return what the run of HEADER takes from another."""
    return gather([EarlierRun(Path("earlier"), header, entries)], HEADER, environment, space, goal).warm_start


def digests(recipes: Any) -> list[str]:
    return [recipe.digest for recipe in recipes]


def known(start: WarmStart) -> list[str]:
    return digests(entry.record.recipe for entry in start.entries)


def test_the_trials_of_these_tests_are_of_both_kinds() -> None:
    assert FEASIBLE == [False, False, True, True, True, True, True, True]


# what is taken


def test_a_run_of_the_same_gives_its_results_and_nothing_is_left_to_try() -> None:
    start = begun()
    assert known(start) == digests(ended.recipe for ended in TRIALS)
    assert start.recipes == ()
    assert [entry.record.trial for entry in start.entries] == list(range(-8, 0))  # this run's begin at 0
    assert [entry.record.label for entry in start.entries] == [ended.label for ended in TRIALS]


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprints": {**HEADER.fingerprints, "model": "other"}},
        {"fingerprints": {**HEADER.fingerprints, "calibration": "other"}},
        {"fingerprints": {**HEADER.fingerprints, "evaluation": "other"}},
        {"fingerprints": {**HEADER.fingerprints, "training": "w"}},
        {"backend": "reference"},
        {"versions": {**HEADER.versions, "openvino": "2026"}},
        {"versions": {**HEADER.versions, "torch": "2.9"}},
        {"arguments": {"latency_inputs": ["torch.float32 (8, 8)"]}},
        {"baseline": replace(HEADER.baseline, form="jit")},
        {
            "baseline": replace(HEADER.baseline, accuracy=0.8, metrics={"accuracy": 0.8})
        },  # the same function, on other data
    ],
    ids=[
        "model",
        "calibration",
        "evaluation",
        "trained weights",
        "backend",
        "openvino",
        "torch",
        "timed inputs",
        "fp32 form",
        "fp32 score",
    ],
)
def test_a_run_of_something_else_gives_its_best_recipes(change: dict[str, Any]) -> None:
    start = begun(header=replace(HEADER, **change))
    fastest = sorted((t for t in TRIALS if t.feasible), key=lambda t: t.latency_bound)
    assert start.entries == ()
    assert digests(start.recipes) == digests(t.recipe for t in fastest[:MOST])


def test_a_run_is_measured_against_the_fp32_form_of_what_it_starts_from_if_that_is_as_fast() -> None:
    other = replace(HEADER.baseline, form="jit", forms_ms={"ipex": 5.2, "jit": 5.0}, size_bytes=7)
    earlier = EarlierRun(Path("earlier"), replace(HEADER, baseline=replace(HEADER.baseline, size_bytes=9)), ENTRIES)
    same = gather([earlier], replace(HEADER, baseline=other), HERE, SPACE, SIM.goal)
    assert (same.baseline.form, same.baseline.latency_ms, same.baseline.size_bytes) == ("ipex", 5.2, 9)
    assert len(same.warm_start.entries) == len(ENTRIES)
    faster = replace(HEADER, baseline=replace(other, forms_ms={"ipex": 5.5, "jit": 5.0}))
    anew = gather([earlier], faster, HERE, SPACE, SIM.goal)
    assert anew.baseline == faster.baseline
    assert anew.warm_start.entries == () and len(anew.warm_start.recipes) == MOST


def test_what_does_not_bear_on_results_may_differ() -> None:
    other = replace(
        HEADER,
        arguments={**HEADER.arguments, "seed": 7},
        versions={**HEADER.versions, "ray": "3"},
        fingerprints={**HEADER.fingerprints, "confirmation": "of the winner only"},
    )
    assert len(begun(header=other).entries) == len(ENTRIES)


def test_of_a_run_in_which_nothing_passed_the_closest_come_first() -> None:
    other = replace(HEADER, backend="reference")
    start = begun(ENTRIES[:2], header=other)
    assert digests(start.recipes) == digests([TRIALS[1].recipe, TRIALS[0].recipe])  # the second loses less


@pytest.mark.parametrize("change", [{"cpu": "other"}, {"threads": 4}, {"governor": "powersave"}])
def test_times_of_another_machine_are_not_taken_but_scores_are(change: dict[str, Any]) -> None:
    start = begun(environment={**HERE, **change})
    assert known(start) == digests(ended.recipe for ended in TRIALS if not ended.feasible)
    assert set(start.recipes) <= {ended.recipe for ended in TRIALS if ended.feasible}
    assert len(start.recipes) == MOST


def test_scores_of_another_instruction_set_are_not_taken() -> None:
    assert begun(environment={**HERE, "isa": "avx2"}).entries == ()  # int8 saturates elsewhere


def test_results_are_judged_by_the_goal_of_this_run() -> None:
    strict = begun(goal=Goal(tolerance=0.0))
    assert len(strict.entries) == len(ENTRIES)  # none passes any more, and that needs no timing
    assert not any(entry.record.feasible for entry in strict.entries)
    assert all("loses" in entry.record.reason for entry in strict.entries)
    lenient = begun(goal=Goal(tolerance=0.9))
    assert all(entry.record.feasible for entry in lenient.entries)
    missing = [ended.recipe for ended in TRIALS if not ended.feasible]  # pass now, but were never timed
    assert set(known(lenient)).isdisjoint(digests(missing))
    assert set(lenient.recipes) == set(missing)


@pytest.mark.parametrize(
    ("goal", "found"),
    [
        # what counts now, (accuracy, feasible) of trials that all score f1 0.5 of 0.8
        (Goal(0.01), {(t.accuracy, t.feasible) for t in TRIALS}),
        (Goal(0.01, metric="f1"), {(0.5, False)}),
        (Goal(0.01, others={"f1": Goal(0.1)}), {(t.accuracy, False) for t in TRIALS}),
        (Goal(0.01, objectives={"latency": 1, "memory": 1}), {(t.accuracy, False) for t in TRIALS if not t.feasible}),
    ],
    ids=["the same", "another metric", "one more metric", "memory, which no trial measured"],
)
def test_what_the_goal_of_this_run_counts_decides(goal: Goal, found: set[tuple[float, bool]]) -> None:
    header = replace(HEADER, baseline=replace(HEADER.baseline, metrics={"accuracy": 0.9, "f1": 0.8}))
    changes = [{"metrics": {"accuracy": t.accuracy, "f1": 0.5}, "memory_ratio": None} for t in TRIALS]
    entries = [replace(e, record=replace(e.record, **c)) for e, c in zip(ENTRIES, changes, strict=True)]
    start = gather([EarlierRun(Path("earlier"), header, tuple(entries))], header, HERE, SPACE, goal).warm_start
    assert {(entry.record.accuracy, entry.record.feasible) for entry in start.entries} == found
    assert begun(goal=Goal(0.01, metric="f1")).entries == ()  # where it wasn't kept, all is measured anew


def test_what_the_space_forbids_now_does_not_win_by_an_old_result() -> None:
    narrowed = SPACE.narrow({"float_dtype": "fp32"})
    start = begun(space=narrowed)
    assert known(start) == [TRIALS[0].recipe.digest]  # the only one without a call in bf16
    assert all(narrowed.config(recipe) for recipe in start.recipes)  # raises outside the space


def test_what_crawled_is_infeasible_under_any_goal() -> None:
    slow = replace(ENTRIES[0], record=replace(ENTRIES[0].record, feasible=False, reason=CRAWLING))
    (found,) = (e.record for e in begun((slow,), goal=Goal(tolerance=0.9)).entries)
    assert (found.feasible, found.reason) == (False, CRAWLING)


def test_a_trial_that_failed_is_no_result() -> None:
    lost = replace(ENTRIES[2], record=record(2, {}, None, recipe=TRIALS[2].recipe, error=True))
    start = begun((lost, *ENTRIES[3:]))
    assert TRIALS[2].recipe.digest not in {*known(start), *digests(start.recipes)}


def test_several_sources_add_up() -> None:
    other = replace(HEADER, backend="reference")
    recipe = SPACE.recipe({"linear": "float"})
    sources = [recipe, EarlierRun(Path("a"), HEADER, ENTRIES[:3]), EarlierRun(Path("b"), other, ENTRIES[1:6])]
    start = gather(sources, HEADER, HERE, SPACE, SIM.goal).warm_start
    assert len(start.entries) == 3
    assert start.recipes[0] == recipe
    assert set(digests(start.recipes)).isdisjoint(known(start))  # what is known isn't tried


def test_a_source_that_has_nothing_for_this_model_is_refused() -> None:
    other = build_space(make_graph([make_call("head", OpType.LINEAR)]), CAPABILITIES)
    with pytest.raises(ResumeError, match="earlier has nothing for this model.*head"):
        begun(space=other)


# where it is read from


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with Journal.create(tmp_path / "run" / "journal.jsonl", HEADER) as journal:
        for entry in ENTRIES:
            journal.append(entry)
    return tmp_path / "run"


def test_a_run_is_read_by_its_directory_or_journal(run: Path) -> None:
    journal = run / "journal.jsonl"
    assert read(run) == read(str(run)) == read(journal) == (EarlierRun(journal, HEADER, ENTRIES),)


def test_recipes_are_read_from_files_directories_and_as_they_are(tmp_path: Path) -> None:
    recipe = SPACE.default()
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert read([tmp_path, tmp_path / "recipe.json", recipe]) == (recipe,) * 3


def test_nothing_is_nothing() -> None:
    assert read(None) == ()
    assert gather((), HEADER, HERE, SPACE, SIM.goal) == HEADER


def test_what_a_run_was_spared_it_passes_on(tmp_path: Path) -> None:
    spared = WarmStart(begun().entries[:5], (SPACE.default(),))
    with Journal.create(tmp_path / "journal.jsonl", replace(HEADER, warm_start=spared)) as journal:
        journal.append(ENTRIES[7])
    (source,) = read(tmp_path)
    start = gather([source], HEADER, HERE, SPACE, SIM.goal).warm_start
    assert known(start) == digests(TRIALS[i].recipe for i in (0, 1, 2, 3, 4, 7))


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("nowhere", None, ResumeError, "nothing at .*nowhere"),
        ("journal.jsonl", "", ResumeError, "holds no header"),
        ("journal.jsonl", "{\n", ResumeError, "line 1 is damaged"),
        ("journal.jsonl", '{"schema": 1}\n', ResumeError, "line 1 is not what raysq wrote"),
        ("recipe.json", "{", RecipeError, "recipe.json must hold a recipe"),
        ("recipe.json", '{"inputs": []}', RecipeError, "recipe.json must hold a recipe.*'inputs'"),
        ("model.pt", "\x00", ResumeError, "model.pt holds no header"),
    ],
)
def test_what_is_no_source_is_refused(
    name: str, content: str | None, error: type[Exception], says: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=says):
        read(tmp_path / name)


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"neither journal\.jsonl nor recipe\.json"):
        read(tmp_path)


def test_a_run_without_a_result_is_refused(tmp_path: Path) -> None:
    Journal.create(tmp_path / "journal.jsonl", HEADER).close()
    with pytest.raises(ResumeError, match="nothing to start from"):
        read(tmp_path)


@pytest.mark.parametrize("given", [3, {"path": "x"}, [None], OpConfig(Precision.INT8)])
def test_another_kind_of_value_is_refused(given: Any) -> None:
    with pytest.raises(OptionError, match="`warm_start` must be the directory or journal"):
        read(given)


def test_a_recipe_of_another_model_is_carried_over() -> None:
    recipe = Recipe({"blocks.0.fc1": OpConfig(Precision.INT8), "elsewhere": OpConfig(Precision.INT8)})
    (first,) = gather([recipe], HEADER, HERE, SPACE, SIM.goal).warm_start.recipes
    assert first.int8_calls == ("blocks.0.fc1",)


def test_an_evaluation_that_ended_early_settles_its_own_goal_only() -> None:
    early = tuple(
        replace(e, record=replace(e.record, items_scored=100, items=1000, reason="stopped after 100 of 1000 items"))
        if not e.record.feasible
        else e
        for e in ENTRIES
    )
    same = replace(HEADER, arguments={**HEADER.arguments, "goal": str(SIM.goal)})
    start = begun(early, same)
    assert known(start) == digests(ended.recipe for ended in TRIALS)
    assert start.entries[0].record.reason == "stopped after 100 of 1000 items"  # as it was
    other = begun(early, replace(HEADER, arguments={**HEADER.arguments, "goal": "another"}))
    assert known(other) == digests(ended.recipe for ended in TRIALS if ended.feasible)
    assert digests(other.recipes) == digests(ended.recipe for ended in TRIALS[1::-1])  # tried first instead
