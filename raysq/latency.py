"""Paired timing: two models run in turn in one process, so that what disturbs one disturbs the other too.

The estimator is the median of the pairs' ratios, `docs/latency.md` says why.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from raysq.errors import OptionError
from raysq.result import Ratio

__all__ = ["Latency", "Timing", "alone", "pair", "ratio_of", "threads"]

Clock = Callable[[], float]
Model = Callable[..., Any]

WARMUP_RUNS = 3  # oneDNN Graph compiles its partitions in the first two calls
PATIENCE_S = 5.0  # a warm-up that takes longer is cut to two runs
SAMPLE_S = 1e-3  # a sample repeats a call until it lasts this long: the clock and the scheduler blur less
MISSES = 0.02  # of an interval at a fixed number of pairs; who stops at the first narrow one misses with up to 0.05
MIN_PAIRS = 7  # the fewest whose range misses the median that rarely: 2 / 2**7 = 0.016
MAX_PAIRS = 1000
ROUGH = 0.1  # of the ratio; a wider interval says little, so timing goes on,
EXTENSION = 4  # up to so many times the budget
HOPELESS = 20.0  # an int8 model this many times slower hit a reference kernel (8 s a call were seen): stop early


@dataclass(frozen=True)
class Latency:
    """How latency is measured: interleaved pairs of fp32 and int8 until the ratio is sharp or time is up.

    Attributes:
        budget_s: seconds a timing in a trial should take, > 0; up to four times as many where the ratio stays unclear.
        final_budget_s: seconds for the timing of the winner, > 0.
        ci_width: stop as soon as the 95 % interval of the ratio is narrower than this share of it, > 0.

    Raises:
        OptionError: a value that is not positive.
    """

    budget_s: float = 1.0
    final_budget_s: float = 3.0
    ci_width: float = 0.02

    def __post_init__(self) -> None:
        for name in ("budget_s", "final_budget_s", "ci_width"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"`Latency.{name}` must be positive, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Timing:
    """What a paired timing saw, in milliseconds.

    Attributes:
        candidate_ms: median of the candidate.
        reference_ms: median of the reference.
        ratio: median of candidate / reference over the pairs, with its 95 % interval.
        pairs: every pair (candidate, reference).
        hopeless: whether the candidate was so slow that timing ended early; the interval is then all that was seen.
    """

    candidate_ms: float
    reference_ms: float
    ratio: Ratio
    pairs: tuple[tuple[float, float], ...]
    hopeless: bool = False


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads, >= 1, inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pair(
    candidate: Model,
    reference: Model,
    *,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    num_threads: int,
    latency: Latency,
    deciding: bool = False,
    clock: Clock = time.perf_counter,
) -> Timing:
    """Time two models on the same inputs until their ratio is known well enough, or time is up.

    At least seven pairs are taken, whatever the budget, unless the candidate turns out hopeless. Where the interval is
    still wider than a tenth of the ratio, up to four times the budget is spent, unless it is about a decision.

    Args:
        candidate: the model in question.
        reference: what it is compared with.
        args: positional inputs of both.
        kwargs: keyword inputs of both.
        num_threads: threads of deployment, >= 1.
        latency: the budget in seconds, and the relative width of the interval that is good enough.
        deciding: all that matters is which of both is faster: end as soon as the interval excludes 1.
        clock: seconds, as `time.perf_counter`.
    """

    def sample(model: Model, calls: int) -> float:
        begin = clock()
        for _ in range(calls):
            model(*args, **kwargs)
        return (clock() - begin) / calls * 1e3

    with threads(num_threads), torch.no_grad():
        begin = clock()
        slow, fast = _warm_up(sample, candidate, clock), _warm_up(sample, reference, clock)
        if slow > HOPELESS * fast:  # or it just lost the core, as long as others were served
            slow = min(slow, _warm_up(sample, candidate, clock))
        if slow > HOPELESS * fast:
            return _timing([(slow, fast)], hopeless=True)
        calls = [max(1, math.ceil(SAMPLE_S * 1e3 / max(ms, 1e-6))) for ms in (slow, fast)]
        pairs: list[tuple[float, float]] = []
        while len(pairs) < MAX_PAIRS:
            if len(pairs) % 2:
                fast, slow = sample(reference, calls[1]), sample(candidate, calls[0])
            else:
                slow, fast = sample(candidate, calls[0]), sample(reference, calls[1])
            pairs.append((slow, fast))
            if len(pairs) < MIN_PAIRS:
                continue
            ratio = ratio_of(pairs)
            spent, width = clock() - begin, (ratio.high - ratio.low) / ratio
            patience = 1 if deciding or width < ROUGH else EXTENSION
            decided = deciding and not ratio.low <= 1 <= ratio.high
            if decided or width < latency.ci_width or spent > patience * latency.budget_s:
                break
        return _timing(pairs)


def alone(
    model: Model,
    *,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    num_threads: int,
    budget_s: float = 0.2,
    clock: Clock = time.perf_counter,
) -> float:
    """Return the median milliseconds of one model after warm-up, from at least three samples."""
    with threads(num_threads), torch.no_grad():
        for _ in range(WARMUP_RUNS):
            model(*args, **kwargs)
        begin = clock()
        seen: list[float] = []
        while len(seen) < 3 or clock() - begin < budget_s:
            start = clock()
            model(*args, **kwargs)
            seen.append((clock() - start) * 1e3)
        return statistics.median(seen)


def ratio_of(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """Return the median of a / b over pairs of positive times, with a distribution-free 95 % interval.

    The k-th smallest and k-th largest of n ratios enclose the true median with probability
    1 - 2 P(Binomial(n, 1/2) < k), whatever their distribution. k is such that this is at least 98 %, of which 95 %
    are left to who looks after each pair and stops as soon as the interval is narrow. Below seven pairs no k reaches
    that: the interval is then the range that was seen.
    """
    ratios = sorted(a / b for a, b in pairs)
    k = _rank(len(ratios))
    return Ratio(statistics.median(ratios), ratios[k - 1], ratios[len(ratios) - k])


@functools.cache
def _rank(n: int) -> int:
    """Return the largest k >= 1 with P(Binomial(n, 1/2) < k) <= MISSES / 2, or 1."""
    below, k = 0.0, 0
    while (below := below + math.comb(n, k) * 0.5**n) <= MISSES / 2:
        k += 1
    return max(k, 1)


def _warm_up(sample: Callable[[Model, int], float], model: Model, clock: Clock) -> float:
    """Return milliseconds of the fastest of the first calls."""
    begin = clock()
    seen: list[float] = []
    while len(seen) < WARMUP_RUNS and (len(seen) < 2 or clock() - begin <= PATIENCE_S):
        seen.append(sample(model, 1))
    return min(seen)


def _timing(pairs: list[tuple[float, float]], hopeless: bool = False) -> Timing:
    slow, fast = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Timing(slow, fast, ratio_of(pairs), tuple(pairs), hopeless)
