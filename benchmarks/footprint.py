"""The memory of a process and of all that it started, sampled from outside: pages that are shared count once."""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Footprint", "family", "open_files", "pss", "resident", "role", "watched"]

EVERY_S = 0.25
ROLES = ("driver", "workers", "Ray")  # the process itself, Ray's actors that run trials, and what else Ray starts
WORKER = "ray::raysq"  # what an actor calls itself once it runs trials; before, it is one of Ray's


@dataclass
class Footprint:
    """The largest sum of proportional set sizes that was seen, and how it was made up.

    Attributes:
        peak: bytes of all processes together.
        parts: bytes of each role at that moment.
        peaks: the largest number of bytes of each role, whenever that was.
    """

    peak: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))

    def see(self, parts: Mapping[str, int]) -> None:
        """Take a sample."""
        self.peaks = {role: max(self.peaks[role], parts[role]) for role in ROLES}
        if sum(parts.values()) > self.peak:
            self.peak, self.parts = sum(parts.values()), dict(parts)


def pss(pid: int) -> int:
    """Return a process's share of the memory in bytes: pages that n processes map count as 1 / n; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def resident(pid: int) -> int:
    """Return how many bytes of a process are resident."""
    return resource.getpagesize() * int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def open_files(pid: int) -> int:
    """Return how many file descriptors a process holds."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def watched(command: Sequence[str], at_most: int | None = None) -> Footprint:
    """Run a command, and return the memory of all its processes at its peak.

    Args:
        command: what to run.
        at_most: bytes; where it takes more it is ended.

    Raises:
        SystemExit: it failed, or took more.
    """
    found = Footprint()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            found.see(_parts(process.pid))
            if at_most is not None and found.peak > at_most:
                process.terminate()
                raise SystemExit(f"{' '.join(command)} takes more than {at_most / 2**30:.1f} GiB: {found}")
            time.sleep(EVERY_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return found


def _parts(pid: int) -> dict[str, int]:
    parts = dict.fromkeys(ROLES, 0)
    for member in family(pid):
        parts[role(member, pid)] += pss(member)
    return parts


def role(member: int, pid: int) -> str:
    """Return which of ROLES a process has in the family of another."""
    if member == pid:
        return "driver"
    try:
        command = Path(f"/proc/{member}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        command = ""
    return "workers" if command.startswith(("ray::QuantTrial", WORKER)) else "Ray"
