"""A run as its journal has it: a header, an entry for each trial, what is best, how long it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raysq.goal import Goal
from raysq.recipe import Recipe
from raysq.result import Baseline, TrialRecord

if TYPE_CHECKING:
    from raysq.op_times import OpTimes

__all__ = ["Entry", "Header", "Run", "WarmStart"]


@dataclass(frozen=True)
class Entry:
    """One finished trial, and what its record doesn't hold.

    Attributes:
        record: the trial.
        seen: how many trials had completed when this one was suggested: what replay needs.
        pairs: raw milliseconds (candidate, reference) of its timing, () if it wasn't timed.
        environment: "cpu", "isa", "threads" and "governor" of the worker.
        ended_s: seconds from the begin of the search, or of its resumed part, to the end of the trial.
    """

    record: TrialRecord
    seen: int
    pairs: tuple[tuple[float, float], ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    ended_s: float | None = None


@dataclass(frozen=True)
class WarmStart:
    """What earlier runs spare this one.

    Attributes:
        entries: results that are not measured again; their trials are numbered below 0.
        recipes: what is tried first, in this order.
    """

    entries: tuple[Entry, ...] = ()
    recipes: tuple[Recipe, ...] = ()


@dataclass(frozen=True)
class Header:
    """What a run is about; a journal is continued only by a run whose fingerprints are the same.

    Attributes:
        fingerprints: digests of "model", "calibration", "evaluation".
        arguments: what `raysq.tune` was asked, as plain data.
        versions: of raysq, torch, ray and the backend.
        backend: its name.
        baseline: what int8 is measured against.
        warm_start: what it began with, so that it is resumed without the runs that this came from.
        op_times: of single calls, where they were measured: a strategy that reads them must see the same again.
        calls: name of each call, in execution order, to its "op", "macs", "group" (of calls that are smoothed alike),
            "rank" (1: int8 costs it most) and "sensitivity" (how much that is), for people who read the run later.
    """

    fingerprints: Mapping[str, str]
    arguments: Mapping[str, Any]
    versions: Mapping[str, str]
    backend: str
    baseline: Baseline
    warm_start: WarmStart = field(default_factory=WarmStart)
    op_times: OpTimes | None = None
    calls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What a journal holds.

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
        return min((r for r in self.records if r.feasible and r.ratio is not None), key=self.cost, default=None)

    def cost(self, record: TrialRecord) -> float:
        """Return what the search made small; it counts the upper end of a latency's interval."""
        return Goal(objectives=self.header.arguments.get("objectives", {"latency": 1.0})).cost(record)

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
            if base + entry.ended_s < last:  # in older journals a resumed run's clock begins anew
                base = last
            last = base + entry.ended_s
            found.append(last)
        return found
