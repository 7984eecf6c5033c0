"""A strategy proposes recipes; it is a Ray Tune searcher, in `raysq.tune` and in anyone's own Tuner."""

from __future__ import annotations

import logging
import pickle
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from ray.tune.search import Searcher

from raysq.errors import OptionError
from raysq.goal import Goal
from raysq.recipe import Recipe
from raysq.result import Stage, Status, TrialRecord
from raysq.space import SearchSpace
from raysq.tuning.records import record

if TYPE_CHECKING:
    from raysq.op_times import OpTimes
    from raysq.sensitivities import Sensitivity
    from raysq.source import Source

__all__ = ["BARRIER", "History", "Proposal", "Steps", "Strategy"]

METRIC = "latency_ratio"
MAX_DUPLICATES = 50  # as many proposals in a row that were made before: the strategy has nothing new to say

log = logging.getLogger("raysq")


@dataclass(frozen=True)
class Proposal:
    """A recipe to try, and what the strategy calls it."""

    recipe: Recipe
    label: str


class Barrier(Enum):
    """What a strategy yields to wait until all that it proposed has ended."""

    WAIT = "wait"


BARRIER: Final = Barrier.WAIT
Steps = Iterator[Proposal | Barrier]

Costs = Callable[["Sensitivity", Recipe, "Sequence[str] | None", Collection[str]], dict[str, float]]


class History(Sequence[TrialRecord]):
    """What has ended so far, in that order; it grows while the strategy looks at it.

    Args:
        goal: whose cost makes one feasible record better than another; None: `Goal()`, the fastest.

    Attributes:
        proposed: how many trials the strategy has made, those that still run included.
    """

    def __init__(self, goal: Goal | None = None) -> None:
        self._cost = (goal or Goal()).cost
        self.proposed = 0
        self._records: list[TrialRecord] = []
        self._by_recipe: dict[str, TrialRecord] = {}

    def __getitem__(self, index: Any) -> Any:
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def append(self, record: TrialRecord) -> None:
        """Add a trial that ended."""
        self._records.append(record)
        self._by_recipe.setdefault(record.recipe.digest, record)

    def of(self, recipe: Recipe) -> TrialRecord | None:
        """Return how a recipe did, None if it has not ended.

        One without an int8 call needs no trial: it is what int8 is measured against, and no candidate.
        """
        return self._by_recipe.get(recipe.digest) or (None if recipe.int8_calls else _all_float(recipe))

    def loss(self, recipe: Recipe) -> float:
        """Return what a recipe lost, infinite where that is unknown; an estimate where its evaluation ended early."""
        record = self.of(recipe)
        return float("inf") if record is None else record.loss

    def feasible(self, recipe: Recipe) -> bool:
        """Whether a recipe was tried and met the goal."""
        record = self.of(recipe)
        return record is not None and record.feasible

    @property
    def best(self) -> TrialRecord | None:
        """The feasible record of the lowest cost, the earliest of equals; None if there is none.

        One whose latency is a prediction, from a node that doesn't time, is better than none, and than no other.
        """
        feasible = (r for r in self._records if r.feasible)
        return min(feasible, key=lambda r: (r.ratio is None, self._cost(r)), default=None)

    @property
    def closest(self) -> TrialRecord | None:
        """The finished record with the smallest loss, the earliest of equals."""
        return min((r for r in self._records if r.status is Status.FINISHED), key=lambda r: r.loss, default=None)


def _all_float(recipe: Recipe) -> TrialRecord:
    return TrialRecord(
        trial=-1,
        recipe=recipe,
        config={},
        status=Status.FINISHED,
        stage=Stage.BUILD,
        accuracy_drop=0.0,
        latency_ratio=1.0,
        size_ratio=1.0,
        memory_ratio=1.0,
        reason="no call runs in int8",
    )


class Strategy(Searcher):
    """Base of all strategies: write `next_recipe`, and `traverse` where the way through it is another.

    Bound to a search before use. What it proposes twice, or without a call in int8, is passed over; a proposal that
    failed or gave NaN is in the history as failed. Saving keeps the calls that were made, restoring makes them again.

    Example:
        >>> class Halves(Strategy):
        ...     name = "halves"
        ...     def next_recipe(self, history):
        ...         yield Proposal(self.space.default(), "default")
        ...         yield BARRIER  # what follows sees how it did
    """

    name: ClassVar[str]
    measures_times: ClassVar[bool] = False  # whether it wants the times of single calls, which take seconds to measure

    def __init__(self) -> None:
        super().__init__(metric=METRIC, mode="min")
        self.goal = Goal()
        self._bound = False
        self._reset()

    @abstractmethod
    def next_recipe(self, history: History) -> Steps:
        """Yield proposals and barriers; returning ends the search.

        Run once per search, and only as far as proposals are wanted: with n slots up to n proposals are running
        when the next is asked for. `history` is live. `self.space`, `goal`, `max_trials`, `seed`, `graph` and
        `stats` are set, and `self.costs` measures sensitivities. Use no clock and no randomness but `self.seed`: the
        same results must give the same proposals.
        """

    def traverse(self, history: History) -> Steps:
        """Yield the proposals of the whole search: those of `next_recipe`.

        Override it to go through `next_recipe` in another way: several times, interleaved with another strategy, or
        only as long as something holds.
        """
        yield from self.next_recipe(history)

    def bind(
        self,
        space: SearchSpace,
        goal: Goal | None = None,
        max_trials: int = 50,
        seed: int = 0,
        source: Source | None = None,
        costs: Costs | None = None,
        times: OpTimes | None = None,
    ) -> Self:
        """Say what is searched; returns itself.

        Args:
            space: every recipe that may be tried.
            goal: what makes a recipe feasible; None: `Goal()`.
            max_trials: how many trials there will be at most, >= 1.
            seed: of all randomness.
            source: the model with its statistics, for strategies that look at them; `Prepared.source`.
            costs: measures sensitivities instead of `Sensitivity.scores` on the source: a simulation.
            times: of single calls, where they were measured.
        """
        self.space = space
        self.goal = goal or Goal()
        self.max_trials = max_trials
        self.seed = seed
        self.source = source
        self.graph = space.graph if source is None else source.graph
        self.stats = None if source is None else source.stats
        self._costs = costs
        self.times = times
        self.check()
        self._bound = True
        self._reset()
        return self

    def check(self) -> None:
        """Refuse what it can't search; called by `bind`, before any trial."""

    def costs(
        self,
        sensitivity: Sensitivity,
        recipe: Recipe,
        calls: Sequence[str] | None = None,
        floats: Collection[str] = (),
    ) -> dict[str, float]:
        """Return what int8 costs each call by a sensitivity, see `Sensitivity.scores`.

        Raises:
            OptionError: the strategy was bound without the model and its statistics.
        """
        if self._costs is not None:
            return self._costs(sensitivity, recipe, calls, floats)
        if self.source is None or not self.measures_costs:
            raise OptionError(
                f"strategy {self.name!r} looks at the model and its calibration data. Bind it with them: "
                "`strategy.bind(prepared.space, goal, source=prepared.source)`."
            )
        return sensitivity.scores(self.source, recipe, calls, floats)

    @property
    def measures_costs(self) -> bool:
        """Whether `costs` can be asked: it was bound with a model that has statistics."""
        return self._costs is not None or self.stats is not None

    @property
    def running(self) -> bool:
        """Whether a proposal has not ended yet."""
        return bool(self._running)

    def is_new(self, recipe: Recipe) -> bool:
        """Whether a recipe was not proposed yet."""
        return recipe.digest not in self._known

    def learn(self, record: TrialRecord) -> None:
        """Take a trial that it didn't propose into the history, such as one of an earlier run."""
        self._calls.append(("learn", record))
        self._known.add(record.recipe.digest)
        self.history.append(record)

    def _reset(self) -> None:
        self.history = History(self.goal)
        self._proposals: Steps | None = None
        self._running: dict[str, Proposal] = {}
        self._known: set[str] = set()
        self._waiting = False
        self._calls: list[tuple[Any, ...]] = []

    def suggest(self, trial_id: str) -> Any:
        """Return a flat config, None while the strategy waits, or FINISHED."""
        if not self._bound:
            raise OptionError(
                f"strategy {self.name!r} is not bound to a search. Call `strategy.bind(space, goal)` first."
            )
        if self._waiting and self._running:
            return None
        self._calls.append(("suggest", trial_id))
        if self._proposals is None:
            self._proposals = self.traverse(self.history)
        for _ in range(MAX_DUPLICATES):
            if self._waiting and self._running:
                return None
            self._waiting = False
            proposal = next(self._proposals, None)
            if proposal is None:
                return Searcher.FINISHED
            if isinstance(proposal, Barrier):
                self._waiting = True
            elif proposal.recipe.digest in self._known or not proposal.recipe.int8_calls:
                why = "was proposed before" if proposal.recipe.int8_calls else "has no call in int8"
                log.debug("%s: %s %s (%s)", self.name, proposal.label, why, proposal.recipe.digest)
            else:
                self._known.add(proposal.recipe.digest)
                self._running[trial_id] = proposal
                self.history.proposed += 1
                return {**self.space.config(proposal.recipe), "label": proposal.label}
        if self._running:
            return None
        log.debug("%s: %d proposals in a row were made before; it ends", self.name, MAX_DUPLICATES)
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Take a trial that ended into the history."""
        proposal = self._running.pop(trial_id, None)
        if proposal is None:
            return
        self._calls.append(("complete", trial_id, result, error))
        config = {"label": proposal.label}
        self.history.append(record(len(self.history), config, result, recipe=proposal.recipe, error=error))

    def save(self, checkpoint_path: str) -> None:
        """Write the calls that were made."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self._calls))

    def restore(self, checkpoint_path: str) -> None:
        """Make the saved calls again, on a strategy that is bound to the same search."""
        self._repeat(pickle.loads(Path(checkpoint_path).read_bytes()))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_proposals": None}  # a generator can't be pickled: the copy makes the calls again

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._repeat(state["_calls"])

    def _repeat(self, calls: list[tuple[Any, ...]]) -> None:
        self._reset()
        repeat: dict[str, Callable[..., object]] = {
            "suggest": self.suggest,
            "complete": self.on_trial_complete,
            "learn": self.learn,
        }
        for kind, *arguments in calls:
            repeat[kind](*arguments)
