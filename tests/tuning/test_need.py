"""The memory of a search, said before it begins: what it counts, when it warns, and how it limits the workers."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from raysq.tuning import capacity, need
from raysq.tuning.need import GIB, Need, needed
from raysq.tuning.shipping import pack
from raysq.workers import Workers

NEED = Need(here=2 * GIB, shared=GIB, worker=3 * GIB)


def node(name: str, cpus: int, memory: int) -> dict:
    return {"NodeID": name, "Resources": {"CPU": float(cpus), "memory": float(memory)}}


def looking(monkeypatch: pytest.MonkeyPatch, nodes: list[dict], workers: Workers, memory: int) -> capacity.Capacity:
    """Return the capacity of a cluster that has reserved its memory; every node has the CPU that is wanted."""
    monkeypatch.setattr(capacity, "alive", lambda: nodes)
    found = capacity.Capacity(2, workers, (), say=print)
    monkeypatch.setattr(found, "_sorted", lambda: (nodes, []))
    monkeypatch.setattr(found, "_ask", lambda wanted: None)
    found.reserve(memory)
    return found


def test_shared_tensors_count_once_and_all_that_is_sent_is_in_the_object_store():
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    model[1].weight = model[0].weight
    held = torch.zeros(1000)
    prepared = SimpleNamespace(source=SimpleNamespace(model=model), engine="ipex")
    job = SimpleNamespace(prepared=prepared)
    found = needed(job, pack((model, held)))
    assert found.worker == need.PROCESS + need.MOST_COPIES * 256 * 256 * 4
    assert 0 <= found.shared - (256 * 256 * 4 + 4000) < 4096  # the rest is the pickle
    assert found.here > need.RAY


def test_a_line_says_where_the_memory_goes():
    assert NEED.line(2) == (
        "memory: about 9.0 GiB at most: 2.0 here and in Ray's own processes, 1.0 in its object store, "
        "3.0 in each of 2 workers"
    )


@pytest.mark.parametrize(
    ("workers", "room", "advice"),
    [(1, 3 * GIB, None), (2, 5 * GIB, "`max_concurrent_trials` to 1"), (1, 2 * GIB, "evaluate in smaller batches")],
)
def test_too_little_is_warned_of_with_what_to_do(workers, room, advice, caplog):
    with caplog.at_level(logging.WARNING, "raysq"):
        NEED.warn(workers, room)
    assert [advice in record.getMessage() for record in caplog.records] == ([] if advice is None else [True])


@pytest.mark.parametrize(
    ("nodes", "workers", "slots"),
    [
        ([node("a", 8, 100 * GIB)], Workers(), 4),  # the CPUs decide
        ([node("a", 8, 7 * GIB)], Workers(), 2),  # the memory does
        ([node("a", 8, 2 * GIB)], Workers(), 1),  # one runs in any case
        ([node("a", 8, 7 * GIB)], Workers(count=3), 3),  # as the user says
        ([node("head", 0, GIB), node("a", 8, 7 * GIB)], Workers(), 2),  # a node without CPUs runs none
    ],
)
def test_as_many_trials_run_at_once_as_have_memory(monkeypatch, nodes, workers, slots):
    found = looking(monkeypatch, nodes, workers, 3 * GIB)
    assert found.room().slots == slots
    assert bool(found.memory) is (workers.count is None)


def test_a_trial_reserves_its_memory():
    bundles = capacity.reservation(2, memory=GIB).bundles
    assert bundles == [{"CPU": 2, "memory": GIB}]
    assert capacity.reservation(2).bundles == [{"CPU": 2}]
