"""How many trials the cluster has room for, as nodes come and go, and what an autoscaler is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ray import tune
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raysq.errors import OptionError
from raysq.tuning.machines import Machines, Node, alive
from raysq.tuning.unsaved import Unsaved
from raysq.workers import OtherCpus, Workers

__all__ = ["Capacity", "Room", "reservation", "slots"]

LOOK_EVERY_S = 1.0  # Ray asks for suggestions ten times a second; a look takes 0.6 ms
LAUNCHED = Path("~/ray_bootstrap_config.yaml")  # `ray up` leaves it on a head node; Ray Tune knows autoscalers by it
FIRST_NODE_S = 900.0  # a cloud's machine boots and installs in 3 to 10 minutes


@dataclass(frozen=True)
class Room:
    """What the cluster offers at a moment.

    Attributes:
        slots: how many trials fit at once.
        avoid: ids of nodes that run none, sorted.
    """

    slots: float
    avoid: tuple[str, ...] = ()


class Capacity(Unsaved):
    """Looks at the nodes of the running cluster now and then.

    What `Workers.count` wants and no node offers is asked of an autoscaler: by placement groups that wait, since
    these end with the process, which `ray.autoscaler.sdk.request_resources` doesn't. Trials are not proposed ahead of
    their slots: one that waits would know nothing of what others have found meanwhile.

    Args:
        cpus: of a trial.
        workers: how many trials at once, on which nodes, and how long the first may wait for one.
        isa: instruction sets of the machine that the search is for.
        say: shows a line to the user.
    """

    def __init__(self, cpus: int, workers: Workers, isa: tuple[str, ...], say: Callable[[str], None]) -> None:
        self._cpus = cpus
        self._workers = workers
        self._say = say
        self._machines = Machines(isa)
        self._room = Room(0)
        self._looked = -LOOK_EVERY_S
        self._asked: list[PlacementGroup] = []
        self.memory = 0

    def reserve(self, memory: int) -> None:
        """Let each trial reserve bytes of memory, so that fewer run at once where it is scarce; before the first look.

        None where it was said how many run at once, and no more than the smallest node has: one always fits.
        """
        if self._workers.count is None:
            self.memory = min(memory, min((_memory_of(n) for n in alive() if _cpus_of(n) >= self._cpus), default=0))

    def memory_offered(self) -> int:
        """Return how many bytes the nodes that run trials have for them."""
        return sum(_memory_of(node) for node in self._sorted()[0] if _cpus_of(node) >= self._cpus)

    def room(self) -> Room:
        """Return what there is, at most `Workers.count` slots."""
        if time.monotonic() - self._looked >= LOOK_EVERY_S:
            fit, others = self._sorted()
            avoid = tuple(sorted(node["NodeID"] for node in others))
            if set(avoid) - set(self._room.avoid):
                self._say(
                    f"nodes whose CPU isn't like this machine's, or that lack a latency slot, run no trial: "
                    f"{len(avoid)}. `Workers(other_cpus=...)` says otherwise."
                )
            count = self._workers.count
            self._room = Room(min(_fitting(fit, self._cpus, self.memory), count or 1_000_000), avoid)
            self._ask(max(0, (count or 1) - int(self._room.slots)))
            self._looked = time.monotonic()
        return self._room

    def wait(self) -> int:
        """Return the number of slots as soon as there is one.

        Raises:
            OptionError: there is none, and none comes within `Workers.wait_s`.
        """
        patience = self._workers.wait_s
        if patience is None:
            patience = FIRST_NODE_S if LAUNCHED.expanduser().exists() else 0.0
        end = time.monotonic() + patience
        if not self.room().slots and patience:
            self._say(f"no node has room for a trial of {self._cpus} CPUs; waiting up to {patience:.0f} s for one")
        while not self.room().slots:
            fit, others = self._sorted()
            undecided = len(fit) + len(others) < len(alive())
            if time.monotonic() >= end and not undecided:
                if _fitting(others, self._cpus, self.memory):
                    raise OptionError(
                        "the only nodes with room for a trial have another CPU than this machine, which the search is "
                        "for, or lack a latency slot. Start it on a node like those that shall be deployed on "
                        "(`ray job submit --entrypoint-resources '{\"latency_slot\": 0.001}'`), or let them score: "
                        '`Workers(other_cpus="accuracy")`.'
                    )
                slots(self._cpus)
            time.sleep(LOOK_EVERY_S)
        return int(self._room.slots)

    def close(self) -> None:
        """Ask for nothing any more."""
        self._ask(0)

    def _sorted(self) -> tuple[list[Node], list[Node]]:
        """Return the nodes that run trials and those that don't."""
        nodes = alive()
        return (nodes, []) if self._workers.other_cpus is not OtherCpus.REFUSE else self._machines.split(nodes)

    def _ask(self, wanted: int) -> None:
        """Have so many placement groups wait; one that found its place is given back, for the trial that takes it."""
        waiting: list[PlacementGroup] = []
        for group in self._asked:
            if len(waiting) >= wanted or group.wait(timeout_seconds=0):
                remove_placement_group(group)
            else:
                waiting.append(group)
        request = reservation(self._cpus, self._room.avoid, self.memory)
        missing = range(wanted - len(waiting))
        self._asked = waiting + [request.to_placement_group() for _ in missing]  # type: ignore[no-untyped-call]


def reservation(cpus: int, avoid: Iterable[str] = (), memory: int = 0) -> tune.PlacementGroupFactory:
    """Return what a trial reserves: CPUs and bytes of memory of a node that is none of those to avoid."""
    bundle: dict[str, float] = {"CPU": cpus, **({"memory": memory} if memory else {})}
    if not avoid:
        return tune.PlacementGroupFactory([bundle])
    elsewhere = {"ray.io/node-id": f"!in({','.join(avoid)})"}
    return tune.PlacementGroupFactory([bundle], bundle_label_selector=[elsewhere])


def slots(cpus: int) -> int:
    """Return how many trials of `cpus` CPUs fit on the nodes of the running cluster.

    Raises:
        OptionError: not a single one.
    """
    nodes = alive()
    room = _fitting(nodes, cpus)
    if not room:
        raise OptionError(
            f"a trial reserves {cpus} CPUs and the largest Ray node offers {max(map(_cpus_of, nodes), default=0)}. "
            "Lower `num_threads` or `Workers.cpus_per_trial`; where larger nodes will join, say how long a search may "
            "wait for one: `Workers(wait_s=600)`."
        )
    return room


def _fitting(nodes: Iterable[Node], cpus: int, memory: int = 0) -> int:
    return sum(min([_cpus_of(n) // cpus, *([_memory_of(n) // memory] if memory else [])]) for n in nodes)


def _cpus_of(node: Node) -> int:
    return int(node["Resources"].get("CPU", 0))


def _memory_of(node: Node) -> int:
    return int(node["Resources"].get("memory", 0))
