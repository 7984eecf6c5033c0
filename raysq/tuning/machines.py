"""Which nodes of the cluster have the CPU that a search is for: the one of the machine that started it.

Int8 sums saturate on a CPU without VNNI and not on one with it, and kernels differ: neither a time nor, to the last
digit, an accuracy of one kind tells of the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysq.kernels.cpu import among, instruction_sets

__all__ = ["LATENCY_SLOT", "Machines", "Node", "alive", "is_marked", "times"]

LATENCY_SLOT = "latency_slot"  # custom resource: where some node has it, those without are not for timings
Node = Mapping[str, Any]  # as `ray.nodes` tells of it


class Machines:
    """Learns the instruction sets of nodes, by a task that runs on each once; the node of this process needs none.

    Args:
        isa: what a node must have.
    """

    def __init__(self, isa: tuple[str, ...]) -> None:
        self._wanted = isa
        self._isa: dict[str, tuple[str, ...]] = {}
        self._asked: dict[str, Any] = {}

    def split(self, nodes: Iterable[Node]) -> tuple[list[Node], list[Node]]:
        """Return the nodes that are known to be alike, and those that are known not to be; no answer yet is neither."""
        nodes = list(nodes)
        self._learn(nodes)
        known = [node for node in nodes if node["NodeID"] in self._isa]
        fit = [n for n in known if times(self._isa[n["NodeID"]], self._wanted, is_marked(n, nodes))]
        return fit, [n for n in nodes if n not in fit and (n in known or not is_marked(n, nodes))]

    def _learn(self, nodes: Iterable[Node]) -> None:
        self._isa.setdefault(ray.get_runtime_context().get_node_id(), instruction_sets())
        for node in nodes:
            name = node["NodeID"]
            if name not in self._isa and name not in self._asked:
                there = NodeAffinitySchedulingStrategy(name, soft=False)
                self._asked[name] = _task().options(num_cpus=0, scheduling_strategy=there).remote()
        ready = ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=0)[0] if self._asked else []
        for name, answer in list(self._asked.items()):
            if answer in ready:
                try:
                    self._isa[name] = among(ray.get(answer))
                except ray.exceptions.RayError:  # the node is gone, or its worker: it is asked again if it is there
                    continue
                finally:
                    del self._asked[name]


def times(own: tuple[str, ...], wanted: tuple[str, ...], marked: bool) -> bool:
    """Whether a time on a node counts: it has the instruction sets that are wanted, and is marked for it."""
    return marked and set(own) == set(wanted)


def is_marked(node: Node, nodes: Iterable[Node]) -> bool:
    """Whether a node has a latency slot, or no node has one."""
    return LATENCY_SLOT in node["Resources"] or not any(LATENCY_SLOT in other["Resources"] for other in nodes)


def alive() -> list[Node]:
    """Return the nodes that are there now."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _task() -> Any:
    """Return what tells a node's flags; made here, it travels by value, and its process needn't import torch."""

    def flags() -> str:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")

    return ray.remote(flags)
