"""Stands between Ray Tune and a searcher: no recipe runs twice, the search ends in time, a killed one goes on."""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.tune.search import Searcher

from raysq.errors import SpaceError
from raysq.goal import Goal
from raysq.recipe import Recipe
from raysq.result import Status, TrialRecord
from raysq.run import Entry, WarmStart
from raysq.space import SearchSpace, flatten
from raysq.strategies.base import MAX_DUPLICATES, METRIC, History, Strategy
from raysq.strategies.following import penalised, teach, tell
from raysq.strategies.optuna_searcher import ConstrainedOptuna
from raysq.tuning.capacity import Room
from raysq.tuning.domains import domains
from raysq.tuning.records import record, to_result
from raysq.tuning.unsaved import Unsaved

__all__ = ["Conductor"]

MIN_PATIENCE = 10  # trials; below that a plateau is no news
WARM_START = "warm start"  # label of the trials that repeat recipes of earlier runs
HOPELESS = 5  # trials; where as many of the first fail for one and the same reason, it isn't the recipe's fault

NOTHING = WarmStart()

log = logging.getLogger("raysq")


@dataclass(frozen=True)
class _Point:
    """What the inner searcher suggested."""

    config: Mapping[str, Any]
    recipe: Recipe
    label: str


@dataclass(frozen=True)
class _Running:
    """A trial that Ray Tune has not ended yet."""

    trial: int
    seen: int
    point: _Point


class Conductor(Unsaved, Searcher):
    """Any Ray Tune searcher over a search space, conducted.

    A recipe that ran is answered from the history, and the searcher is asked again. Failed trials and NaN are told
    as errors. A searcher that knows nothing of accuracy sees infeasible trials behind all feasible ones. Configs
    carry "label", "trial" (its number) and "seen" (how many trials had ended when it was suggested) beside the point,
    and "avoid", ids of nodes, where there are such.

    With a warm start, results of earlier runs are in the history from the beginning, and recipes of theirs run before
    the searcher is asked at all; strategies and `ConstrainedOptuna` learn both.

    The search ends (`why_over` says why) when the searcher does, when it suggests nothing new, after `max_trials`, at
    the first feasible recipe with `stop_at_first`, when none of the last max(10, max_trials / 4) trials was better
    beyond its confidence interval, or when the first five trials fail for one reason.

    A trial that was lost before it began is suggested once more: Ray Tune tries again only what runs already.

    Args:
        inner: a bound `Strategy`, or any searcher; one without a space of its own gets `space`.
        space: what is searched.
        goal: what makes a recipe feasible.
        max_trials: how many trials there will be at most, >= 1.
        stop_at_first: end at the first feasible recipe.
        warm_start: what earlier runs spare this one; the results don't count among the trials.
        room: tells how many trials may run now, and where not; where none may, one waits for its slot.
        max_failures: how often a trial that Ray gave up without a result is suggested again, >= 0.

    Raises:
        SpaceError: a foreign searcher for a space that holds a single recipe.
    """

    def __init__(
        self,
        inner: Searcher,
        space: SearchSpace,
        goal: Goal,
        max_trials: int = 50,
        *,
        stop_at_first: bool = False,
        warm_start: WarmStart = NOTHING,
        room: Callable[[], Room] = lambda: Room(math.inf),
        max_failures: int = 0,
    ) -> None:
        super().__init__(metric=METRIC, mode="min")
        self.inner = inner
        self.space = space
        self.max_trials = max_trials
        self.stop_at_first = stop_at_first
        self.history = History(goal)
        self._ended = ""
        self._goal = goal
        self._room = room
        self._max_failures = max_failures
        self._view: Callable[[TrialRecord], dict[str, Any]] = to_result
        if not isinstance(inner, Strategy | ConstrainedOptuna):
            if not space.dimensions:
                raise SpaceError(
                    "the space holds a single recipe, so there is nothing to search. Use `raysq.quantize`."
                )
            self._view = partial(penalised, goal=goal)
            inner.set_search_properties(METRIC, "min", domains(space))
        self._asked = 0  # of the inner searcher, duplicates included
        self._suggested = 0
        self._ready: deque[_Running] = deque()  # suggested in an earlier run, but not ended there
        self._waiting: dict[str, list[str]] = {}  # recipe to the inner trials that wait for its result
        self._running: dict[str, _Running] = {}
        self._again: deque[_Running] = deque()  # lost, and to be tried again
        self._losses: Counter[int] = Counter()  # of each trial
        self._entries: list[Entry] = []
        self._repeating_at = -1  # length of the history when the inner searcher had nothing new
        self._to_beat = (True, math.inf)  # of the last recipe that was better beyond doubt: predicted, estimated cost
        self._improved_at = 0
        self._first = deque(warm_start.recipes)
        self._opening: set[str] = set()  # those of them that run
        for entry in warm_start.entries:
            self._remember(entry.record)
            self._teach(entry.record)
        self._improved_at = self._begun = len(self.history)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Keep to what it was made with."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """Return a config that was not tried yet, None while it waits for a slot or the inner searcher, or FINISHED."""
        room = self._room()
        if len(self._running) >= max(1, room.slots):
            return None
        running = self._again.popleft() if self._again else self._next()
        if running is None:
            return None if self._running or not self._ended else Searcher.FINISHED  # one that runs may yet be lost
        self._running[trial_id] = running
        point = running.point
        log.debug(
            "trial %d: %s, %d calls in int8 (%s)",
            running.trial,
            point.label,
            len(point.recipe.int8_calls),
            point.recipe.digest,
        )
        extra = {"label": point.label, "trial": running.trial, "seen": running.seen}
        return {**point.config, **extra, **({"avoid": ",".join(room.avoid)} if room.avoid else {})}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keep it back: searchers learn how trials end, so that a replay tells them the same."""

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Take a trial that ended into the history, and tell the inner searcher."""
        running = self._running.pop(trial_id, None)
        if running is None:
            return
        if error and not result and self._losses[running.trial] < self._max_failures:
            self._losses[running.trial] += 1
            self._again.append(running)
            return
        point = running.point
        config = {**point.config, "label": point.label}
        ended = record(running.trial, config, result, recipe=point.recipe, error=error)
        self._finish(Entry(ended, running.seen))

    def tries_again(self, trial: int) -> bool:
        """Whether a trial, by its number, was lost and waits for another try."""
        return any(lost.trial == trial for lost in self._again)

    def replay(self, entries: Sequence[Entry]) -> None:
        """Bring a fresh conductor to where an earlier run ended.

        The inner searcher is asked and told in the order of that run. Where it suggests something else than it did
        (another version, other arguments), the rest goes to the history only, so that nothing runs twice.

        Args:
            entries: the finished trials of the earlier run, in the order in which they ended.
        """
        numbered = {entry.record.trial: entry for entry in entries}
        pending = deque(entries)
        following = True
        self._suggested = max(numbered, default=-1) + 1
        for number in range(max(numbered, default=-1) + 1):
            entry = numbered.get(number)  # None: it was running when the earlier run ended
            seen = entry.seen if entry else _seen_before(number, numbered)
            while pending and len(self._entries) < seen:
                self._finish(pending.popleft())
            point = self._ask() if following else None
            if entry is None and isinstance(point, _Point):
                self._ready.append(_Running(number, seen, point))
            if entry and following and (not isinstance(point, _Point) or point.recipe != entry.record.recipe):
                following = False
                log.debug("trial %d of the earlier run is not what the searcher suggests now", number)
                if isinstance(point, _Point):
                    self._ready.append(self._numbered(point))
        while pending:
            self._finish(pending.popleft())
        self._begun = len(self.history)

    def why_over(self) -> str:
        """Return why no trial will be suggested any more; "" while one may be."""
        if self._ended:
            return self._ended
        patience = max(MIN_PATIENCE, self.max_trials // 4)
        first = self.history[self._begun :][:HOPELESS]
        failures = {r.reason if r.status is Status.FAILED else None for r in first}
        if len(first) == HOPELESS and len(failures) == 1 and None not in failures:
            return f"the first {HOPELESS} trials failed alike"
        if self.stop_at_first and self.history.best is not None:
            return "a feasible recipe was found"
        if self._suggested >= self.max_trials and not self._ready:
            return f"all {self.max_trials} trials were made"
        if self.history.best is not None and len(self.history) - self._improved_at >= patience:
            return f"none of the last {patience} trials was better"
        return ""

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the journal has it all."""

    def _next(self) -> _Running | None:
        """Return a trial that was not suggested yet; None while there is none, or, as `why_over` says, never will."""
        while self._ready and self.history.of(self._ready[0].point.recipe):
            self._ready.popleft()
        self._ended = self.why_over()
        if self._ended:
            return None
        if self._ready:
            return self._ready.popleft()
        point = self._ask()
        if point == Searcher.FINISHED:
            self._ended = "the searcher has nothing more to suggest"
        return self._numbered(point) if isinstance(point, _Point) else None

    def _ask(self) -> Any:
        """Return a new `_Point`, None or FINISHED."""
        while self._first:
            recipe = self._first.popleft()
            if self.history.of(recipe) is None:
                self._opening.add(recipe.digest)
                return _Point(self.space.config(recipe), recipe, WARM_START)
        if self._opening:
            return None  # what the searcher suggests shall build on all of them
        if self._repeating_at == len(self.history) and self._waiting:
            return None
        for _ in range(MAX_DUPLICATES):
            inner_id = f"{self._asked:05d}"
            suggestion: Any = self.inner.suggest(inner_id)
            if suggestion is None or suggestion == Searcher.FINISHED:
                return suggestion
            self._asked += 1
            config = flatten(suggestion)
            recipe = self.space.recipe(config)
            known = self.history.of(recipe)
            if known is not None:
                log.debug("skipped: %s ran as trial %d", recipe.digest, known.trial)
                tell(self.inner, inner_id, known, self._view)
            elif recipe.digest in self._waiting:
                self._waiting[recipe.digest].append(inner_id)
            else:
                self._waiting[recipe.digest] = [inner_id]
                label = str(config.pop("label", type(self.inner).__name__))
                return _Point(config, recipe, label)
        self._repeating_at = len(self.history)
        return None if self._waiting else Searcher.FINISHED

    def _finish(self, entry: Entry) -> None:
        ended = entry.record
        self._entries.append(entry)
        self._remember(ended)
        for inner_id in self._waiting.pop(ended.recipe.digest, ()):
            tell(self.inner, inner_id, ended, self._view)
        if ended.recipe.digest in self._opening:
            self._opening.remove(ended.recipe.digest)
            self._teach(ended)

    def _remember(self, ended: TrialRecord) -> None:
        self.history.append(ended)
        predicted = ended.ratio is None
        if ended.feasible and (predicted, self._goal.cost(ended)) < self._to_beat:
            self._to_beat = predicted, self._goal.cost(ended.at(ended.latency_ratio))
            self._improved_at = len(self.history)

    def _teach(self, ended: TrialRecord) -> None:
        """Tell the inner searcher of a trial that it didn't suggest, if it can learn of such."""
        if isinstance(self.inner, Strategy):
            self.inner.learn(ended)
        elif isinstance(self.inner, ConstrainedOptuna):
            teach(self.inner, self.space, [ended])

    def _numbered(self, point: _Point) -> _Running:
        self._suggested += 1
        return _Running(self._suggested - 1, len(self._entries), point)


def _seen_before(number: int, numbered: Mapping[int, Entry]) -> int:
    """Guess how many trials had ended when one was suggested that never ended: one less than for the next."""
    after = next(numbered[n].seen for n in sorted(numbered) if n > number)
    before = next((numbered[n].seen for n in sorted(numbered, reverse=True) if n < number), 0)
    return max(before, after - 1)
