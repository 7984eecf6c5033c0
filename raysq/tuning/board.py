"""What Ray's dashboard shows of a run: a named task for each trial that ended, and one for each phase that runs.

The dashboard lists tasks and actors, and knows nothing of trials: their actors are used again and keep the name of
their first. So an actor that computes nothing stands for the run, and its tasks are the trials and their phases. That
is one idle process, where a task of its own for each trial would make Ray start a process for each, beside a timing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysq.result import Status, TrialRecord

__all__ = ["Board", "name_of", "opened"]

DIGITS = 4  # of a recipe's digest; the trial's number stands there too
REASON = 90  # characters of a failed trial's reason
LAST_WORDS_S = 2.0  # for what was sent to the board and isn't shown yet

log = logging.getLogger("raysq")


class Board:
    """A handle to the board of a run, in the driver and in workers; it never raises, waits for nothing.

    Args:
        actor: what the tasks run on; None: nothing is shown.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def begin(self, trial: int, phase: str) -> None:
        """Show that a trial has come to its next phase."""
        self._show("phase", phase, trial)

    def end(self, record: TrialRecord, calls: int) -> None:
        """Show a trial that ended.

        Args:
            record: the trial.
            calls: how many calls of the model could run in int8.
        """
        failed = record.status is Status.FAILED
        self._show("trial", name_of(record, calls), record.trial, record.reason if failed else "")

    def note(self, text: str) -> None:
        """Show a line that is no trial."""
        self._show("note", text)

    def close(self) -> None:
        """End what is still shown as running, and the process."""
        with suppress(Exception):  # gone already, or never there
            ray.wait([self._actor.close.remote()], timeout=LAST_WORDS_S)
            ray.kill(self._actor)

    def _show(self, kind: str, name: str, *arguments: object) -> None:
        if self._actor is None:
            return
        try:  # nobody fetches what it returns, so it returns nothing: Ray would print what no one has seen fail
            getattr(self._actor, kind).options(name=name, num_returns=0).remote(*arguments)
        except Exception as exc:  # noqa: BLE001  # a run goes on without what shows it
            log.debug("not shown in the dashboard: %s", exc)


@contextmanager
def opened(run: str) -> Iterator[Board]:
    """Have a board inside the block; Ray is connected.

    Args:
        run: what the actor is called.
    """
    board = Board(None)
    try:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        board = Board(ray.remote(_actor()).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote(run))
    except Exception as exc:  # noqa: BLE001  # as below
        log.debug("the run is not shown in the dashboard: %s", exc)
    try:
        yield board
    finally:
        board.close()


def name_of(record: TrialRecord, calls: int) -> str:
    """Return what a trial's task is called, such as "trial 7f3a acc=0.5579 speedup=3.1x int8=23/25 (12: alpha 0.5)".

    Args:
        record: the trial.
        calls: how many calls of the model could run in int8.
    """
    parts = [f"trial {record.recipe.digest[:DIGITS]}"]
    if record.status is Status.FAILED:
        reason = " ".join(record.reason.split())
        parts.append(f"failed: {reason if len(reason) <= REASON else reason[: REASON - 1] + '…'}")
    else:
        parts.append(f"acc={record.accuracy:.4f}")
        if record.ratio is not None:
            parts.append(f"speedup={1 / record.ratio:.1f}x")
        elif record.estimated:
            parts.append(f"rejected after {record.items_scored} of {record.items} items")
        elif not record.feasible:
            parts.append("infeasible")
        parts.append(f"int8={record.int8_calls}/{calls}")
    return " ".join([*parts, f"({record.trial}: {record.label})" if record.label else f"({record.trial})"])


def _actor() -> type[Any]:
    """Return the actor's class; made here, it travels by value, and its process needn't import torch."""
    import asyncio

    class Trials:
        """Stands for a run; what it returns, raises and waits for is what the dashboard shows."""

        def __init__(self, run: str) -> None:
            self.run = run
            self.running: dict[int, asyncio.Event] = {}

        async def phase(self, trial: int) -> None:
            """Last until the trial's next phase begins, or it ends."""
            self.over(trial)
            self.running[trial] = asyncio.Event()
            await self.running[trial].wait()

        async def trial(self, trial: int, failure: str) -> None:
            """Fail as the trial did."""
            self.over(trial)
            if failure:
                raise RuntimeError(failure)

        async def note(self) -> None:
            """Do nothing."""

        async def close(self) -> None:
            """End all phases."""
            for trial in list(self.running):
                self.over(trial)

        def over(self, trial: int) -> None:
            """End a phase."""
            if trial in self.running:
                self.running.pop(trial).set()

        def __repr__(self) -> str:
            return self.run

    Trials.__qualname__ = Trials.__name__  # what the dashboard shows
    return Trials
