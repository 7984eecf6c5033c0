"""Room for trials: what is said of nodes decides which run trials and which time them."""

from __future__ import annotations

import copy
import threading

import pytest
from ray import cloudpickle

from raysq.arguments import workers_of
from raysq.errors import OptionError
from raysq.tuning.capacity import Capacity, reservation
from raysq.tuning.machines import LATENCY_SLOT, is_marked, times
from raysq.workers import OtherCpus, Workers

VNNI = ("avx2", "avx512f", "avx512_vnni")
PLAIN = {"Resources": {"CPU": 4.0}}
MARKED = {"Resources": {"CPU": 4.0, LATENCY_SLOT: 1.0}}


@pytest.mark.parametrize(
    ("own", "wanted", "marked", "expected"),
    [
        (VNNI, VNNI, True, True),
        (VNNI[::-1], VNNI, True, True),
        (("avx2",), VNNI, True, False),  # its int8 sums may saturate
        (VNNI, ("avx2",), True, False),  # faster than what is deployed on
        (VNNI, VNNI, False, False),
    ],
)
def test_a_time_counts_from_the_same_cpu_on_a_node_that_is_marked(own, wanted, marked, expected):
    assert times(own, wanted, marked) is expected


def test_latency_slots_count_where_some_node_has_one():
    assert is_marked(PLAIN, [PLAIN, PLAIN])
    assert is_marked(MARKED, [PLAIN, MARKED])
    assert not is_marked(PLAIN, [PLAIN, MARKED])


def test_reservations_are_one_unless_nodes_are_avoided():
    assert reservation(2) == reservation(2) != reservation(2, ["a"])
    assert hash(reservation(2, ["a"])) == hash(reservation(2, ["a"]))  # Ray Tune looks up reusable workers by it


def test_ray_can_write_the_searcher_that_knows_it():
    lock = threading.RLock()
    capacity = Capacity(1, Workers(), VNNI, say=lambda text: lock.acquire())  # as a screen holds one
    assert copy.deepcopy(capacity) is capacity
    assert cloudpickle.loads(cloudpickle.dumps(capacity.room))


def test_how_many_at_once_is_said_once():
    assert workers_of(None, None) == Workers()
    assert workers_of(Workers(max_failures=3), 2) == Workers(max_failures=3, count=2)
    with pytest.raises(OptionError, match="give one"):
        workers_of(Workers(count=2), 2)


def test_other_cpus_are_read_from_text():
    assert Workers(other_cpus="accuracy").other_cpus is OtherCpus.ACCURACY
    assert Workers().other_cpus is OtherCpus.REFUSE


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ({"other_cpus": "acuracy"}, "Did you mean 'accuracy'"),
        ({"count": 0}, "Workers.count"),
        ({"count": 1.5}, "Workers.count"),
        ({"wait_s": -1}, "Workers.wait_s"),
    ],
)
def test_workers_out_of_range_are_refused(option, name):
    with pytest.raises(OptionError, match=name):
        Workers(**option)
