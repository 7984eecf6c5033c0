"""What earlier runs and recipes spare a new run: results that aren't measured again, recipes that are tried first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from raysq import evaluation, journal, storage
from raysq.errors import EvaluationError, OptionError, RecipeError, ResumeError, SpaceError
from raysq.goal import Goal
from raysq.probing import CRAWLING
from raysq.quantized import RECIPE_FILE
from raysq.recipe import Recipe
from raysq.result import Baseline, Stage, Status, TrialRecord
from raysq.run import Entry, Header, WarmStart
from raysq.space import SearchSpace
from raysq.transfer import adapted

__all__ = ["EarlierRun", "gather", "read"]

MOST = 5  # recipes of a run that are tried first: a tenth of the default budget
READ = (journal.FILE, RECIPE_FILE)  # what a directory may hold, the better source first
FEW = 5  # calls that a message names
TIE = 1.05  # fp32 forms within this of the fastest are as fast: by chance one or the other wins
KERNELS = ("raysq", "torch", "intel-extension-for-pytorch", "openvino")  # whose versions decide what a recipe runs as


@dataclass(frozen=True)
class EarlierRun:
    """An earlier run, as its journal tells.

    Attributes:
        path: of the journal; or the URL that it was read from.
        header: what it was about.
        entries: its finished trials, what it was itself spared included.
    """

    path: Path | str
    header: Header
    entries: tuple[Entry, ...]


Origin = EarlierRun | Recipe


def read(given: Any) -> tuple[Origin, ...]:
    """Return what is meant by the argument `warm_start`.

    Args:
        given: a run's directory or journal, a recipe, its file, a directory that `save` wrote, the URL of one of these,
            or a list of such.

    Raises:
        OptionError: something else.
        ResumeError: there is nothing, or a journal that is damaged or holds no trial.
        RecipeError: a file that holds no recipe.
        StorageError: a URL that can't be read.
    """
    items = given if isinstance(given, list | tuple) else [] if given is None else [given]
    return tuple(map(_read, items))


def _read(item: Any) -> Origin:
    if isinstance(item, Recipe):
        return item
    if not isinstance(item, str | Path):
        raise OptionError(
            "`warm_start` must be the directory or journal of a run, a recipe or its file, or a list of these; got "
            f"{type(item).__name__}."
        )
    with storage.read(item, READ.__contains__) as path:
        found = _of(path)
    return replace(found, path=item) if isinstance(found, EarlierRun) and storage.is_url(item) else found


def _of(path: Path) -> Origin:
    if path.is_dir():
        files = [path / name for name in READ]
        path = next((file for file in files if file.exists()), path)
    if not path.is_file():
        what = f"neither {journal.FILE} nor {RECIPE_FILE} in" if path.is_dir() else "nothing at"
        raise ResumeError(f"there is {what} {path}. `warm_start` takes the directory of an earlier run, or a recipe.")
    return _recipe(path) if path.suffix == ".json" else _run(path)


def _recipe(path: Path) -> Recipe:
    try:
        return Recipe.from_json(path.read_bytes())
    except (OSError, RecipeError) as exc:
        raise RecipeError(f"{path} must hold a recipe, as `save` writes it: {exc}") from exc


def _run(path: Path) -> EarlierRun:
    header, entries = journal.read(path)
    entries = (*header.warm_start.entries, *entries)
    if not any(entry.record.status is Status.FINISHED for entry in entries):
        raise ResumeError(f"no trial of {path} came to a result, so there is nothing to start from. Leave it out.")
    return EarlierRun(path, header, entries)


def gather(
    sources: Sequence[Origin], present: Header, environment: Mapping[str, Any], space: SearchSpace, goal: Goal
) -> Header:
    """Return the header of a run with what sources spare it.

    A run of the same model (after training, if any), calibration data and evaluation, on the same backend, in the same
    versions, with an equal fp32 score, gives results. The present goal judges them; taken are those that were timed on
    such a CPU with as many threads, and those that needn't be timed. This run is then measured against the same fp32
    form, if that is as fast as any; if it isn't, nothing is comparable. Of all else come recipes, as close as the space
    has them, those of a run by promise: the feasible by latency, then the closest to its goal.

    Args:
        sources: from `read`.
        present: of the run that begins.
        environment: its "cpu", "isa", "threads" and "governor".
        space: what it searches.
        goal: what it makes of a loss.

    Raises:
        ResumeError: a source has nothing in common with the space.
    """
    comparable = [s for s in sources if isinstance(s, EarlierRun) and _scores_alike(s.header, present, goal)]
    baseline = next((b for s in comparable if (b := _against(s.header.baseline, present.baseline))), present.baseline)
    known: dict[str, Entry] = {}
    first: dict[Recipe, None] = {}
    for source in sources:
        settled = {}
        if isinstance(source, EarlierRun) and source in comparable and source.header.baseline.form == baseline.form:
            same_goal = source.header.arguments.get("goal") == str(goal)
            settled = _settled(source.entries, baseline, environment, space, goal, same_goal)
        promising = [source] if isinstance(source, Recipe) else _promising(source.entries, settled, goal)
        found = dict.fromkeys(filter(None, (adapted(recipe, space) for recipe in promising)))
        if not settled and not found:
            where = "the recipe" if isinstance(source, Recipe) else source.path
            raise ResumeError(
                f"{where} has nothing for this model: no call that it runs in int8 may do so here. Those that may are "
                f"{_shown(call for call, configs in space.options.items() if any(c.is_int8 for c in configs))}."
            )
        known = {**settled, **known}
        first.update(islice(found.items(), MOST))
    numbered = enumerate(known.values(), -len(known))  # below 0: this run counts its own from 0
    entries = tuple(replace(entry, record=replace(entry.record, trial=number)) for number, entry in numbered)
    recipes = tuple(recipe for recipe in first if recipe.digest not in known)
    return replace(present, baseline=baseline, warm_start=WarmStart(entries, recipes))


def _against(earlier: Baseline, present: Baseline) -> Baseline | None:
    """Return the present baseline with the fp32 form of an earlier one; None if that is slower than the fastest."""
    latency_ms = present.forms_ms.get(earlier.form)
    if latency_ms is None or latency_ms > TIE * present.latency_ms:
        return None
    return replace(present, form=earlier.form, latency_ms=latency_ms, size_bytes=earlier.size_bytes)


def _scores_alike(earlier: Header, present: Header, goal: Goal) -> bool:
    """Whether a recipe scores the same in both runs, and is timed with the same inputs."""
    there, here = (_score(header.baseline.metrics, goal) for header in (earlier, present))
    if there is None or here is None:
        return False
    return (
        all(there.metrics[name] == here.metrics[name] for name in (here.primary, *goal.others))  # else: other data
        and _of_scores(earlier) == _of_scores(present)
        and earlier.backend == present.backend
        and all(earlier.versions.get(name) == present.versions.get(name) for name in KERNELS)
        and earlier.arguments.get("latency_inputs") == present.arguments.get("latency_inputs")
    )


def _of_scores(header: Header) -> dict[str, str]:
    """Return the digests of what a trial's score depends on: all but the split that confirms the winner."""
    return {name: digest for name, digest in header.fingerprints.items() if name != "confirmation"}


def _settled(
    entries: Sequence[Entry],
    baseline: Baseline,
    environment: Mapping[str, Any],
    space: SearchSpace,
    goal: Goal,
    same_goal: bool,
) -> dict[str, Entry]:
    """Return the entries that the present run would only repeat, by the digest of their recipes.

    Evaluations that ended early did so for the goal that they had, and settle nothing for another.
    """
    found = {}
    for entry in entries:
        record = _judged(entry.record, baseline, goal)
        if record is None or (record.estimated and not same_goal):
            continue
        timed = record.stage is Stage.TIMED
        same = environment if timed else {"isa": environment["isa"]}  # what int8 saturates at depends on that
        ranked = timed and math.isfinite(goal.cost(record))
        if (record.feasible and not ranked) or any(entry.environment.get(key) != same[key] for key in same):
            continue
        try:
            config = space.config(record.recipe)
        except SpaceError:
            continue
        record = replace(record, config={**config, "label": record.label})
        found[record.recipe.digest] = Entry(record, seen=0, environment=entry.environment)
    return found


def _judged(record: TrialRecord, baseline: Baseline, goal: Goal) -> TrialRecord | None:
    """Return what the present goal makes of a trial; None if it has no score for it."""
    score = None if record.status is Status.FAILED else _score(record.metrics or {}, goal)
    if score is None:
        return None
    loss = evaluation.loss(score, baseline.accuracy, baseline.metrics, goal)
    if record.estimated:
        return record if loss.drop == record.accuracy_drop else None
    unfit = record.reason if record.reason == CRAWLING or not record.int8_calls else ""  # whatever the goal is
    return replace(
        record,
        accuracy=score.value,
        accuracy_drop=loss.drop,
        worst_drop=loss.worst_drop,
        feasible=goal.holds(loss.worst_drop) and not unfit,
        reason=loss.reason or unfit,
    )


def _score(metrics: Mapping[str, float], goal: Goal) -> evaluation.Score | None:
    try:
        return evaluation.evaluate(lambda _: metrics, None, goal)
    except EvaluationError:
        return None


def _promising(entries: Sequence[Entry], settled: Mapping[str, Entry], goal: Goal) -> Iterator[Recipe]:
    """Yield the recipes of a run that aren't settled: the feasible by cost, then the closest to its goal."""
    records = [entry.record for entry in entries if entry.record.status is Status.FINISHED]
    for record in sorted(records, key=lambda r: (not r.feasible, goal.cost(r) if r.feasible else r.loss)):
        if record.recipe.digest not in settled:
            yield record.recipe


def _shown(names: Iterable[str]) -> str:
    some = list(islice(names, FEW + 1))
    return ", ".join(some[:FEW]) + (", …" if len(some) > FEW else "")
