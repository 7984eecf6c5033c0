"""How long a trial may work before it counts as hanging; waiting for its turn doesn't count."""

from __future__ import annotations

import faulthandler
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, wait
from contextlib import contextmanager
from typing import TextIO, TypeVar

from raysq.tuning.last_words import place

__all__ = ["Deadline", "Hanging"]

T = TypeVar("T")

HEARTBEAT_S = 5.0  # between two looks at the clock
GRACE_S = 60.0  # what a process that can't even look at the clock gets on top
LONGEST_S = 1e6  # for the interpreter's watchdog, which takes no more than some months


class Hanging(Exception):
    """A trial worked for longer than it may; what it runs can't be stopped but with its process."""


class Deadline:
    """Waits for what a trial does in its thread, no longer than the trial may work.

    What holds the interpreter's lock (a regular expression that backtracks for ever) keeps anyone from looking at the
    clock. So the interpreter's own watchdog, which needs no lock, ends such a process a minute later.

    Args:
        limit_s: seconds of work, > 0, or inf.
        clock: seconds.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        self._owner: int | None = None
        self._paused_at: float | None = None
        self.begin()

    def begin(self, words: TextIO | None = None) -> None:
        """Begin to count anew.

        Args:
            words: where the watchdog writes what it ended; None: standard error.
        """
        self._begun = self._clock()
        self._waited_s = 0.0
        self._words = words or sys.__stderr__

    @property
    def left_s(self) -> float:
        """Seconds of work that are left."""
        return self._begun + self.limit_s + self.waited_s - self._clock()

    @property
    def waited_s(self) -> float:
        """Seconds that were not counted."""
        paused_at = self._paused_at
        return self._waited_s + (0.0 if paused_at is None else self._clock() - paused_at)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Don't count what the trial's own thread waits for in here; other threads change nothing."""
        if threading.get_ident() != self._owner or self._paused_at is not None:
            yield
            return
        self._paused_at = self._clock()
        try:
            yield
        finally:
            self._waited_s, self._paused_at = self.waited_s, None

    def run(self, thread: Executor, function: Callable[[], T]) -> T:
        """Return what the function returns.

        Args:
            thread: of the trial.
            function: what it does next.

        Raises:
            Hanging: the trial worked for too long; the thread goes on.
        """

        def owned() -> T:
            self._owner = threading.get_ident()
            return function()

        self._arm()  # first: this thread may never be given the lock again
        try:
            future = thread.submit(owned)
            while True:
                if wait([future], min(max(self.left_s, 0.0), HEARTBEAT_S)).done:
                    return future.result()
                if self.left_s <= 0:
                    raise Hanging(self._verdict())
                self._arm()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        if self._words is not None and self.limit_s < math.inf:
            seconds = min(max(self.left_s, 0.0) + GRACE_S, LONGEST_S)
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._words)

    def _verdict(self) -> str:
        frame = sys._current_frames().get(self._owner or 0)
        at = place([(f.filename, f.lineno or 0, f.name) for f in reversed(traceback.extract_stack(frame))])
        return (
            f"it worked for longer than the {self.limit_s:.4g} s that a trial may take{at}. If it doesn't hang there, "
            "but needs longer, raise `Workers.trial_timeout_s`."
        )
