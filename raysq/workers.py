"""Workers says where trials run, how many at once, and what happens to those that get lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from raysq.checks import check_whole
from raysq.errors import OptionError, unknown

__all__ = ["OtherCpus", "Workers"]


class OtherCpus(StrEnum):
    """What nodes do whose CPU isn't like that of the machine that the search is for."""

    REFUSE = "refuse"
    ACCURACY = "accuracy"
    TIME = "time"


@dataclass(frozen=True)
class Workers:
    """Where trials run.

    Attributes:
        cpus_per_trial: CPUs that Ray reserves for a trial, >= 1; None: as many as threads.
        max_failures: how often a trial whose worker was lost is tried again on a fresh one, >= 0.
        count: how many trials run at once at most, >= 1; an autoscaler is asked for that many. None: as many as there
            is room for, as nodes come and go.
        wait_s: seconds that a search waits for the first node with room for a trial, >= 0; None: 900 on a cluster that
            `ray up` launched, else 0.
        other_cpus: what nodes do that have other instruction sets than the machine that calls `raysq.tune`, or that
            lack the resource "latency_slot" where some node has it. "refuse": nothing. "accuracy": they score only;
            what holds there is not timed before the end of the search, and scored again if its outputs differ. Without
            VNNI int8 sums may saturate, so a recipe can fail there that would hold here. "time": they time too, against
            the form of fp32 that is fastest here.
        trial_timeout_s: seconds that a trial may work, waiting for others left out; then it has failed, and its worker
            is replaced. None: 20 times as long as building and scoring the model took, 600 at least; inf: any time.

    Raises:
        OptionError: a value out of its range.
    """

    cpus_per_trial: int | None = None
    max_failures: int = 1
    count: int | None = None
    wait_s: float | None = None
    other_cpus: OtherCpus = OtherCpus.REFUSE
    trial_timeout_s: float | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "other_cpus", OtherCpus(self.other_cpus))
        except ValueError as exc:
            raise OptionError(unknown("other_cpus", self.other_cpus, [c.value for c in OtherCpus])) from exc
        check_whole("Workers.max_failures", self.max_failures, 0)
        for name in ("cpus_per_trial", "count"):
            if getattr(self, name) is not None:
                check_whole(f"Workers.{name}", getattr(self, name), 1)
        if self.wait_s is not None and not 0 <= self.wait_s < math.inf:
            raise OptionError(f"`Workers.wait_s` must be a number of seconds of at least 0, got {self.wait_s!r}.")
        limit = self.trial_timeout_s
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0):
            raise OptionError(f"`Workers.trial_timeout_s` must be a positive number of seconds or None, got {limit!r}.")
