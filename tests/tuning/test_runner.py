"""A search through real Ray: nothing that goes wrong in a trial, a worker or the driver costs more than it must."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray import cloudpickle, tune
from ray.air._internal import usage

from raysq import strategies
from raysq.errors import OptionError
from raysq.goal import Goal
from raysq.job import Job
from raysq.journal import Journal, read
from raysq.latency import MIN_PAIRS, Latency
from raysq.prepared import MACHINE
from raysq.result import Stage, Status
from raysq.run import Header
from raysq.tuning.runner import _is_forsaken, run
from raysq.workers import Workers

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.slow

GOAL = Goal(tolerance=0.01)


@pytest.fixture
def journal(tmp_path, baseline):
    with Journal.create(tmp_path / "journal.jsonl", Header({"model": "m"}, {}, {}, "reference", baseline)) as journal:
        yield journal


@pytest.fixture
def search(cluster, prepared, baseline):
    """Run a short search with one slot, so that the n-th evaluation is the n-th trial's."""

    def start(eval_fn, *, trials=4, workers=Workers(), slots=1, **options):  # noqa: B008  # frozen
        searcher = strategies.get("random", fallback=True).bind(prepared.space, GOAL, trials, seed=0)
        return run(
            Job(prepared, eval_fn, GOAL, Latency(budget_s=0.01), baseline),
            workers=replace(workers, count=slots),
            searcher=searcher,
            max_trials=trials,
            **{"verbose": 0, **options},
        )

    return start


def test_no_integration_is_imported_to_count_callbacks(search, monkeypatch):
    counted = []
    monkeypatch.setattr(usage, "_count_callbacks", lambda callbacks: counted.append(callbacks))  # imports wandb
    counting = usage.tag_callbacks
    assert len(search(scores(0.9), trials=1)) == 1
    assert not counted
    assert usage.tag_callbacks is counting


def scores(*values):
    """Return an eval_fn that gives these scores in turn, the last for ever; an exception is raised."""
    left = list(values)

    def eval_fn(model):
        value = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(value, Exception):
            raise value
        return value

    return eval_fn


def marker(directory, kills):
    """Return an eval_fn whose process is killed at its second evaluation, this many times."""

    def eval_fn(model):
        calls = len(list(directory.iterdir()))
        (directory / str(calls)).touch()
        if 1 <= calls <= kills:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    return eval_fn


def test_records_and_journal_agree(search, journal):
    records = search(scores(1.0), journal=journal, slots=2)
    entries = read(journal.path)[1]
    assert [entry.record for entry in entries] == records
    assert sorted(r.trial for r in records) == [0, 1, 2, 3]
    assert len({r.recipe.digest for r in records}) == 4
    timed = [entry for entry in entries if entry.record.stage is Stage.TIMED]
    assert timed
    assert all(len(entry.pairs) >= MIN_PAIRS and entry.record.ratio for entry in timed)
    assert all(entry.environment.keys() == set(MACHINE) and entry.environment["threads"] == 1 for entry in entries)
    assert all(entry.seen <= entry.record.trial for entry in entries)


def test_infeasible_trials_are_not_timed(search):
    first, second, *_ = search(scores(1.0, 0.5, 1.0))
    assert (second.feasible, second.stage, second.ratio) == (False, Stage.EVALUATED, None)
    assert second.reason.startswith("loses 0.5")
    assert first.status is second.status is Status.FINISHED


@pytest.mark.parametrize("bad", [ValueError("bad input"), float("nan"), "text"], ids=["raises", "NaN", "text"])
def test_a_trial_that_fails_is_a_failed_record(search, journal, bad):
    records = search(scores(1.0, bad, 1.0), journal=journal)
    assert [r.status for r in records] == [Status.FINISHED, Status.FAILED, Status.FINISHED, Status.FINISHED]
    assert "eval_fn" in records[1].reason
    assert not records[1].feasible
    assert read(journal.path)[1][1].record == records[1]


def test_lost_worker_is_tried_again_on_a_fresh_one(search, tmp_path):
    records = search(marker(tmp_path, kills=1))
    assert [r.status for r in records] == [Status.FINISHED] * 4
    assert len(list(tmp_path.iterdir())) == 5  # one evaluation more than trials


def test_worker_lost_again_costs_that_trial_only(search, tmp_path):
    records = search(marker(tmp_path, kills=2))
    assert sorted(r.status for r in records) == ["failed", "finished", "finished", "finished"]
    lost = next(r for r in records if r.status is Status.FAILED)
    assert "worker was lost" in lost.reason
    assert lost.recipe.ops  # what it tried is known all the same


def test_stop_at_first_ends_with_the_first_that_holds_and_says_so(search, capsys):
    records = search(scores(0.5, 1.0), trials=10, stop_at_first=True, verbose=2)
    assert [r.feasible for r in records][-1] is True
    assert len(records) < 10
    printed = "".join(capsys.readouterr())
    assert "the search ended: a feasible recipe was found" in printed
    assert "Failed to fetch metrics" not in printed  # Ray looks for files that its loggers would have written


def test_timeout_ends_the_search(search):
    def slow(model):
        time.sleep(1.0)
        return 1.0

    assert len(search(slow, trials=50, timeout_s=4.0)) < 50


def test_users_callbacks_are_called(search):
    class Counter(tune.Callback):
        ended = 0

        def on_trial_complete(self, iteration, trials, trial, **info):
            self.ended += 1

    counter = Counter()
    search(scores(1.0), callbacks=[counter])
    assert counter.ended == 4


def test_resumed_search_repeats_no_trial(search, journal):
    first = search(scores(1.0), journal=journal)
    earlier = read(journal.path)[1][:3]
    again = search(scores(1.0), earlier=earlier)
    assert again[:3] == [entry.record for entry in earlier]
    assert [r.recipe for r in again] == [r.recipe for r in first]  # the fourth is the one that was left


def test_no_room_says_what_to_lower(search):
    with pytest.raises(OptionError, match="cpus_per_trial"):
        search(scores(1.0), workers=Workers(cpus_per_trial=64))


def test_a_ray_of_the_users_own_stays(search):
    search(scores(1.0), trials=1)
    assert ray.is_initialized()


DRIVER = """
import sys, time
from pathlib import Path
from ray import cloudpickle
from raysq import strategies
from raysq.goal import Goal
from raysq.job import Job
from raysq.journal import Journal
from raysq.run import Header
from raysq.latency import Latency
from raysq.workers import Workers
from raysq.tuning.runner import run

directory = Path(sys.argv[1])
prepared, baseline = cloudpickle.loads((directory / "prepared.pkl").read_bytes())

def eval_fn(model):
    time.sleep(0.3)
    return 1.0

header = Header({"model": "m"}, {}, {}, "reference", baseline)
with Journal.create(directory / "journal.jsonl", header) as journal:
    job = Job(prepared, eval_fn, Goal(), Latency(budget_s=0.01), baseline)
    searcher = strategies.get("random", fallback=True).bind(prepared.space, Goal(), 200)
    records = run(job, workers=Workers(), searcher=searcher, max_trials=200, journal=journal, verbose=int(sys.argv[2]))
print("kept", len(records))
"""


class Driver:
    """A search in a process of its own, whose descendants are known by a variable in their environment."""

    def __init__(self, directory, verbose=0):
        self.mark = f"RAYSQ_TEST_MARK={directory}"
        self.journal = directory / "journal.jsonl"
        env = {**os.environ, "RAYSQ_TEST_MARK": str(directory), "PYTHONPATH": str(Path(__file__).parents[2])}
        env.pop("RAY_ADDRESS", None)
        script = directory / "driver.py"
        script.write_text(textwrap.dedent(DRIVER))
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", script, directory, str(verbose)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.wait_for(lambda: self.finished() >= 2 or self.process.poll() is not None)

    def finished(self):
        return self.journal.read_bytes().count(b"\n") - 1 if self.journal.exists() else 0

    def left_behind(self):
        """Command lines of the processes that carry the mark."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80])
            except OSError:
                continue
        return found

    def wait_for(self, condition, within=120):
        end = time.monotonic() + within
        while not condition() and time.monotonic() < end:
            time.sleep(0.1)


@pytest.fixture
def driver(tmp_path, prepared, baseline):
    (tmp_path / "prepared.pkl").write_bytes(cloudpickle.dumps((prepared, baseline)))
    started = []

    def start(**options):
        started.append(Driver(tmp_path, **options))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()


def test_a_ray_that_was_killed_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert not _is_forsaken()  # none is remembered
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (tmp_path / "ray/ray_current_cluster").write_text(f"127.0.0.1:{port}")
        assert not _is_forsaken()
    assert _is_forsaken()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    assert not _is_forsaken()  # the user's own word


def test_interrupted_driver_keeps_what_ended_and_leaves_no_process(driver):
    search = driver()
    search.process.send_signal(signal.SIGINT)
    out, err = search.process.communicate(timeout=120)
    assert f"kept {search.finished()}" in out, err
    search.wait_for(lambda: not search.left_behind(), within=60)
    assert search.left_behind() == []


def test_silent_is_silent(driver):
    search = driver(verbose=0)
    search.process.send_signal(signal.SIGINT)
    out, err = search.process.communicate(timeout=120)
    assert out == f"kept {search.finished()}\n"
    assert [text for text in err.splitlines() if "SIGINT" not in text and "interrupt" not in text.lower()] == []
