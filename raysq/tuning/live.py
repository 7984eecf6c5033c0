"""What a person sees while a search runs: a live table in a terminal, a line per trial elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from rich.console import Console
from rich.live import Live
from rich.table import Table

from raysq.goal import Goal
from raysq.result import Baseline, Status, TrialRecord

__all__ = ["Progress", "Say", "line", "opening", "said", "shown", "table"]

Say = Callable[[str], None]

NOTABLE_S = 10.0  # of waiting; less is what trials of one search cost each other
REFRESH_PER_S = 1  # the driver shares its cores with the trials


@dataclass
class Progress:
    """How a search stands; the one thing here that changes.

    Attributes:
        baseline: what int8 is measured against.
        goal: how much may be lost.
        max_trials: how many trials there will be at most, those of a resumed run included.
        timeout_s: seconds that the search may take, None for any.
        trial_s: seconds from one trial to the next, as expected before the first; None if that isn't known.
        records: trials that ended.
        known: trials of other runs that needn't be made here.
        running: ids of those that run.
        clock: seconds.
    """

    baseline: Baseline
    goal: Goal
    max_trials: int
    timeout_s: float | None = None
    trial_s: float | None = None
    records: list[TrialRecord] = field(default_factory=list)
    known: Sequence[TrialRecord] = ()
    running: set[str] = field(default_factory=set)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._begun = self.clock()
        self._resumed = len(self.records)

    @property
    def best(self) -> TrialRecord | None:
        """The feasible timed trial of the lowest cost."""
        timed = (r for r in (*self.known, *self.records) if r.feasible and r.ratio is not None)
        return min(timed, key=self.goal.cost, default=None)

    @property
    def spent_s(self) -> float:
        """Seconds since the search began, or was resumed."""
        return self.clock() - self._begun

    @property
    def seconds_left(self) -> float | None:
        """At most this many seconds more, as trials went so far, or as was expected before the first."""
        spent = self.spent_s
        done = len(self.records) - self._resumed
        bounds = [max(self.timeout_s - spent, 0.0)] if self.timeout_s is not None else []
        each = spent / done if done else self.trial_s
        if each is not None:
            bounds.append(each * max(self.max_trials - len(self.records), 0))
        return min(bounds, default=None)


def opening(progress: Progress) -> str:
    """Return what is known before the first trial: what int8 must hold and beat, and what the search may cost."""
    baseline, left = progress.baseline, progress.seconds_left
    trials = max(progress.max_trials - len(progress.records), 0)
    each = "" if progress.trial_s is None else f" of about {progress.trial_s:.1f} s"
    total = "" if left is None else f", {left:.0f} s in all at most"
    return (
        f"fp32 scores {baseline.accuracy:.4g} in {baseline.latency_ms:.3g} ms ({baseline.form}); "
        f"goal: {progress.goal}; up to {trials} trials{each}{total}"
    )


def line(progress: Progress, record: TrialRecord) -> str:
    """Return one line about a trial that ended."""
    parts = [f"trial {len(progress.records)}/{progress.max_trials}", record.label or f"#{record.trial}"]
    if record.accuracy is not None and record.accuracy_drop is not None:
        parts.append(f"accuracy {record.accuracy:.4g} ({progress.goal.criterion.shown(record.accuracy_drop)})")
    if record.ratio is not None:
        parts.append(f"latency {record.ratio.with_interval} of fp32")
    if record.waiting_s >= NOTABLE_S:
        parts.append(f"waited {record.waiting_s:.0f} s for others on this machine")
    if record.reason:
        parts.append(f"{'failed: ' if record.status is Status.FAILED else ''}{record.reason.splitlines()[0]}")
    return "  ".join(parts)


def table(progress: Progress) -> Table:
    """Return the live table: trials, the best so far, its accuracy against the goal, the time left."""
    best, left = progress.best, progress.seconds_left
    failed = sum(r.status is Status.FAILED for r in progress.records)
    grid = Table.grid(padding=(0, 2))
    counts = f"{len(progress.records)} of {progress.max_trials} done, {len(progress.running)} running"
    grid.add_row("trials", counts + (f", {failed} failed" if failed else ""))
    if best is not None and best.ratio is not None:
        grid.add_row("best", f"{1 / best.ratio:.2f}x faster than fp32 ({best.latency_ms:.3g} ms)  {best.label}")
        grid.add_row("accuracy", f"{best.accuracy:.4g} of {progress.baseline.accuracy:.4g}, allowed {progress.goal}")
    else:
        grid.add_row("best", "none holds the goal yet")
        grid.add_row("accuracy", f"fp32 {progress.baseline.accuracy:.4g}, allowed {progress.goal}")
    grid.add_row("time left", "unknown" if left is None else f"at most {left:.0f} s")
    if progress.records:
        grid.add_row("last", line(progress, progress.records[-1]))
    return grid


@contextmanager
def shown(progress: Progress, verbose: int, console: Console | None = None) -> Iterator[Callable[[TrialRecord], None]]:
    """Show progress inside the block; yields what to call for each trial that ended, after `progress` knows it.

    Args:
        progress: how the search stands.
        verbose: 0 shows nothing.
        console: where; default standard error.
    """
    console = console or Console(stderr=True)
    if not verbose:
        yield lambda record: None
        return
    say = said(verbose, console)
    say(opening(progress))
    if console.is_terminal:
        with Live(get_renderable=lambda: table(progress), console=console, refresh_per_second=REFRESH_PER_S):
            yield lambda record: None
    else:
        yield lambda record: say(line(progress, record))


def said(verbose: int, console: Console | None = None) -> Say:
    """Return what writes one line for a person to read, to standard error by default; nothing where verbose is 0."""
    if not verbose:
        return lambda text: None
    return partial((console or Console(stderr=True)).print, markup=False, highlight=False, soft_wrap=True)
