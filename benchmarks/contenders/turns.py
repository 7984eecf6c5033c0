"""Times engines side by side: one process each, and one of them runs while the others wait."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from subprocess import PIPE, Popen
from typing import IO, Protocol, Self

__all__ = ["ContenderError", "Engine", "Process", "Timed", "busy_s", "interleaved"]

SAMPLE_S = 0.1  # a turn lasts about this long
MOST_CALLS = 1000  # in a turn
SETTLE_S = 0.3  # OpenMP's threads spin for 0.2 s after their work is done; with one thread nobody spins
Timed = dict[str, dict[str, list[float]]]


class ContenderError(Exception):
    """A process of a contender ended without an answer."""


class Engine(Protocol):
    """What can be timed in turns."""

    def sample(self, what: str, calls: int) -> float:
        """Return the median milliseconds of so many calls; nothing of it runs before or afterwards."""


class Process:
    """An engine in a process of its own; a context manager that ends it.

    Args:
        command: starts it; it answers as `process.take_turns` does.
        environment: its environment variables.
        log: file that gets its standard error.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("ab") as errors:
            self._process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=errors, text=True, env=dict(environment))

    def ready(self) -> Self:
        """Return it once it has loaded its model.

        Raises:
            ContenderError: it ended before.
        """
        self._answer()
        return self

    def sample(self, what: str, calls: int) -> float:
        """Return the median milliseconds of so many calls.

        Raises:
            ContenderError: it ended.
        """
        asked = _pipe(self._process.stdin)
        try:
            print(what, calls, file=asked, flush=True)
        except BrokenPipeError:
            raise self._ended() from None
        return float(self._answer())

    def cpu_s(self) -> float:
        """Return the seconds of CPU that it has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        _pipe(self._process.stdin).close()
        _pipe(self._process.stdout).close()
        self._process.wait()

    def _answer(self) -> str:
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise self._ended()
        return line

    def _ended(self) -> ContenderError:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return ContenderError(f"exit code {self._process.wait()}: {lines[-1] if lines else 'no message'}")


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def interleaved(
    engines: Mapping[str, Engine],
    what: Iterable[str],
    rounds: int,
    settle_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> Timed:
    """Return what → engine → milliseconds, one number per round.

    In each round every engine has one turn, and the next round begins with another engine: what disturbs the machine
    for longer than a round disturbs all.

    Args:
        engines: by name.
        what: what is timed of each, one after the other.
        rounds: >= 1.
        settle_s: seconds of rest before each turn.
        sleep: takes seconds.
    """
    times: Timed = {}
    names = list(engines)
    for one in what:
        calls = {name: _calls(engines[name].sample(one, 3)) for name in names}
        times[one] = {name: [] for name in names}
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                sleep(settle_s)
                times[one][name].append(engines[name].sample(one, calls[name]))
    return times


def _calls(ms: float) -> int:
    return min(MOST_CALLS, max(1, round(1000 * SAMPLE_S / ms)))


def busy_s(cores: Sequence[int]) -> float:
    """Return the seconds that some cores have worked since the machine started."""
    lines = {line.split()[0]: line.split()[1:] for line in Path("/proc/stat").read_text().splitlines()}
    fields = (map(int, lines[f"cpu{core}"]) for core in cores)
    ticks = sum(user + nice + system + irq + soft for user, nice, system, _, _, irq, soft, *_ in fields)
    return ticks / os.sysconf("SC_CLK_TCK")
