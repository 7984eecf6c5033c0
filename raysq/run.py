"""A run as its journal has it: what was tried, what is best, how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raysq.goal import Goal
from raysq.journal import Entry, Header
from raysq.result import TrialRecord

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """A run as its journal has it.

    Attributes:
        header: what it is about.
        entries: the trials that ended.
        winner: digest of the recipe that `raysq.tune` returned; None, or that of no trial (it was carried to another
            backend, or trained): the best one of the trials.
    """

    header: Header
    entries: Sequence[Entry]
    winner: str | None = None

    @property
    def records(self) -> list[TrialRecord]:
        """The trials, those of a warm start first."""
        return [entry.record for entry in (*self.header.warm_start.entries, *self.entries)]

    @property
    def best(self) -> TrialRecord | None:
        """The trial that won: the cheapest that holds the goal, unless the winner is known."""
        won = [r for r in self.records if r.recipe.digest == self.winner]
        if won:
            return won[0]
        goal = Goal(objectives=self.header.arguments.get("objectives", {"latency": 1.0}))
        return min((r for r in self.records if r.feasible and r.ratio is not None), key=goal.cost, default=None)

    @property
    def least(self) -> float | None:
        """The score that must be kept, or the most that a loss may be; None in journals of older versions."""
        given = self.header.arguments
        if "tolerance" not in given:
            return None
        goal = Goal(given["tolerance"], given["criterion"], given["higher_is_better"])
        accuracy = self.header.baseline.accuracy
        allowed = goal.allowed(accuracy)
        return accuracy - allowed if goal.higher_is_better else accuracy + allowed

    @property
    def ended_s(self) -> list[float | None]:
        """Seconds from the begin of the run to the end of each trial, pauses of a resumed run left out."""
        base = last = 0.0
        found: list[float | None] = []
        for entry in self.entries:
            if entry.ended_s is None:
                found.append(None)
                continue
            if base + entry.ended_s < last:  # a resumed run's clock begins anew
                base = last
            last = base + entry.ended_s
            found.append(last)
        return found
