"""What goes wrong under a search, in a worker or in the driver, costs no more than it must; nothing is left running."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle, tune
from torch import nn

import raysq
from raysq import journal
from raysq.errors import ResumeError, StorageError
from raysq.result import Stage, Status
from raysq.run import Entry

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import test modules
pytestmark = pytest.mark.slow

X = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))
OPTIONS = {
    "backend": "reference",
    "strategy": "random",
    "num_threads": 1,
    "max_concurrent_trials": 1,
    "latency": raysq.Latency(0.02, 0.02),
    "verbose": 0,
}


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


# --- a worker is lost ---


def test_a_killed_worker_costs_nothing_but_a_second_try(cluster: None, tmp_path: Path) -> None:
    driver = os.getpid()
    killed = tmp_path / "killed"

    def eval_fn(model: nn.Module) -> float:
        done = journal_of(tmp_path).read_bytes().count(b"\n") - 1 if os.getpid() != driver else 0
        if done >= 2 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    result = raysq.tune(mlp(), [X], eval_fn, max_trials=5, storage_path=tmp_path, name="run", **OPTIONS)

    assert killed.exists()
    assert [t.status for t in result.trials] == [Status.FINISHED] * 5
    assert sorted(t.trial for t in result.trials) == list(range(5))


class KillsBetweenTrials(tune.Callback):
    """Kills the worker that reported a trial before it is handed the next one, then pending for Ray Tune."""

    def __init__(self) -> None:
        self.killed: list[int] = []

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if len(self.killed) < 2:
            self.killed.append(trial.last_result["pid"])
            os.kill(self.killed[-1], signal.SIGKILL)


def test_a_worker_killed_between_trials_costs_no_trial(cluster: None, tmp_path: Path) -> None:
    callback = KillsBetweenTrials()
    result = raysq.tune(
        mlp(), [X], lambda model: 1.0, max_trials=3, callbacks=[callback], storage_path=tmp_path, name="run", **OPTIONS
    )
    assert len(set(callback.killed)) == 2
    assert [(t.trial, t.status) for t in result.trials] == [(n, Status.FINISHED) for n in range(3)]


def journal_of(directory: Path) -> Path:
    return directory / "run" / "journal.jsonl"


# --- a trial hangs, crashes, or fills the memory ---


def nth(directory: Path, n: int, fault: Callable[[nn.Module], object]) -> Callable[[nn.Module], float]:
    """Return an evaluation whose n-th recipe (its trial's number is n - 1) has a fault whenever it is scored."""
    driver = os.getpid()

    def eval_fn(model: nn.Module) -> float:
        model(X)
        ended = journal_of(directory).read_bytes().count(b"\n") - 1 if os.getpid() != driver else -1
        if ended == n - 1:
            (directory / f"worker.{os.getpid()}").touch()
            fault(model)
        return 1.0

    return eval_fn


def workers_of(directory: Path) -> list[int]:
    """Process ids of the workers that came to the fault."""
    return [int(path.suffix[1:]) for path in directory.glob("worker.*")]


def hangs(model: nn.Module) -> None:
    time.sleep(3600)


def hangs_inside(model: nn.Module) -> None:
    """Hang in a forward: the lock that trials of a node share is held."""
    handle = model.register_forward_hook(lambda *_: time.sleep(3600))
    model(X)
    handle.remove()


def aborts(model: nn.Module) -> None:
    os.abort()


def reads_nowhere(model: nn.Module) -> None:
    ctypes.string_at(0)


def is_killed(model: nn.Module) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def allocates(model: nn.Module) -> None:
    torch.empty(1 << 55)


def lists(model: nn.Module) -> None:
    bytearray(1 << 55)


def exits(model: nn.Module) -> None:
    sys.exit(3)


@pytest.mark.parametrize(
    ("fault", "tries", "reason"),
    [
        (hangs, 1, r"longer than the 15 s that a trial may take at .*py:\d+ in hangs\. .*`Workers\.trial_timeout_s`"),
        (hangs_inside, 1, r"longer than the 15 s that a trial may take at .*py:\d+ in"),
        (aborts, 2, r"its worker was lost 2 times .*: Aborted at .*py:\d+ in aborts"),
        (reads_nowhere, 2, r"its worker was lost 2 times .*: Segmentation fault at .*py:\d+ in reads_nowhere"),
        (is_killed, 2, r"its worker was lost 2 times .*: it was killed without a word: .*`max_concurrent_trials`"),
        (allocates, 1, r"can't allocate memory: .*Memory ran out: lower `max_concurrent_trials`"),
        (lists, 1, r"MemoryError.*Memory ran out: lower `max_concurrent_trials`"),
        (exits, 1, r"SystemExit: 3"),
    ],
)
def test_a_fault_costs_its_trial_only(
    cluster: None, tmp_path: Path, fault: Callable[[nn.Module], object], tries: int, reason: str
) -> None:
    result = raysq.tune(
        mlp(),
        [X],
        nth(tmp_path, 2, fault),
        max_trials=4,
        storage_path=tmp_path,
        name="run",
        workers=raysq.Workers(trial_timeout_s=15),
        **OPTIONS,
    )

    assert [t.status for t in result.trials] == [Status.FINISHED, Status.FAILED, Status.FINISHED, Status.FINISHED]
    assert re.search(reason, result.trials[1].reason.replace("\n", " ")), result.trials[1].reason
    assert [t.trial for t in result.trials] == list(range(4))
    assert [entry.record for entry in journal.read(journal_of(tmp_path))[1]] == list(result.trials)
    assert len(workers_of(tmp_path)) == tries
    if fault not in (allocates, lists, exits):  # these are exceptions: their worker goes on
        wait_for(lambda: not any(map(alive, workers_of(tmp_path))))
        assert not any(map(alive, workers_of(tmp_path)))


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_nobody_waits_for_a_trial_that_hangs_longer_than_it_may(cluster: None, tmp_path: Path) -> None:
    driver = os.getpid()

    def eval_fn(model: nn.Module) -> float:
        if os.getpid() != driver:
            try:
                (tmp_path / "first").open("x").close()
            except FileExistsError:
                return 1.0
            hangs_inside(model)
        return 1.0

    result = raysq.tune(
        mlp(),
        [X],
        eval_fn,
        max_trials=5,
        storage_path=tmp_path,
        name="run",
        workers=raysq.Workers(trial_timeout_s=20),
        **{**OPTIONS, "max_concurrent_trials": 2},
    )

    failed = [t for t in result.trials if t.status is Status.FAILED]
    assert len(failed) == 1 and "longer than the 20 s" in failed[0].reason  # that the others wait for it isn't counted
    assert all(t.stage is Stage.TIMED for t in result.trials if t not in failed)


# --- the disk is full ---


def test_a_full_disk_ends_the_search_and_what_was_finished_is_resumed(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = journal.Journal.append

    def full(self: journal.Journal, entry: Entry) -> None:
        if self.path.read_bytes().count(b"\n") > 2:
            with open("/dev/full", "rb+", buffering=0) as device:
                append(journal.Journal(self.path, device), entry)
        append(self, entry)

    run = {"max_trials": 4, **OPTIONS}
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "append", full)
        with pytest.raises(StorageError, match="No space left .* make room, then go on with `resume="):
            raysq.tune(mlp(), [X], one, storage_path=tmp_path, name="run", **run)
    done = [entry.record for entry in journal.read(journal_of(tmp_path))[1]]
    result = raysq.tune(mlp(), [X], one, resume=tmp_path / "run", **run)

    assert len(done) == 2
    assert list(result.trials[:2]) == done
    assert [t.trial for t in result.trials] == list(range(4))


# --- the driver is killed ---

DRIVER = """
import json, os, sys, time
from pathlib import Path

import torch
from torch import nn

import raysq

directory, resume = Path(sys.argv[1]), len(sys.argv) > 2
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
x = torch.randn(128, 16)
driver = os.getpid()


def eval_fn(candidate):
    if os.getpid() != driver:
        with open(directory / f"evaluations.{driver}", "a") as file:
            file.write("trial\\n")
        time.sleep(0.5)
    return float(-(candidate(x) - model(x)).abs().mean()) + 2.0


result = raysq.tune(
    model, [x], eval_fn, tolerance=0.5, backend="reference", strategy="tpe", num_threads=1, max_concurrent_trials=1,
    max_trials=9, latency=raysq.Latency(0.02, 0.02), verbose=0, storage_path=directory, name="run",
    resume=directory / "run" if resume else None,
)
print(json.dumps([t.recipe.digest for t in result.trials]))
"""


class Driver:
    """A process that runs a search; its descendants are known by a variable in their environment."""

    def __init__(self, directory: Path, mark: str, *arguments: str) -> None:
        self.mark = f"RAYSQ_TEST_MARK={directory}/{mark}".encode()
        env = {**os.environ, "RAYSQ_TEST_MARK": f"{directory}/{mark}", "OMP_NUM_THREADS": "1"}
        env.pop("RAY_ADDRESS", None)
        script = directory / "driver.py"
        script.write_text(DRIVER)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", script, directory, *arguments],
            env=env,
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def left_behind(self) -> list[str]:
        """Command lines of the processes that carry the mark."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark + b"\0" in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80])
            except OSError:
                continue
        return found


def wait_for(condition: Callable[[], object], within: float = 120.0) -> None:
    end = time.monotonic() + within
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A search whose driver was killed, and what continued it."""
    directory = tmp_path_factory.mktemp("killed")
    path = journal_of(directory)
    first = Driver(directory, "first")
    started = []
    try:
        wait_for(lambda: (path.exists() and path.read_bytes().count(b"\n") > 3) or first.process.poll() is not None)
        started = first.left_behind()
        first.process.send_signal(signal.SIGKILL)
        first.process.communicate()
        entries = journal.read(path)[1]
        second = Driver(directory, "second", "resume")
        out, err = second.process.communicate(timeout=240)
        evaluations = directory / f"evaluations.{second.process.pid}"
        yield SimpleNamespace(
            first=first,
            second=second,
            started=started,
            entries=entries,
            out=out,
            err=err,
            path=path,
            evaluated=evaluations.read_text().count("trial") if evaluations.exists() else 0,
        )
    finally:
        first.process.kill()
        first.process.communicate()


def test_a_killed_search_goes_on(killed: SimpleNamespace) -> None:
    assert killed.second.process.returncode == 0, killed.err
    assert 3 <= len(killed.entries) < 9


def test_no_finished_trial_is_lost(killed: SimpleNamespace) -> None:
    done = [entry.record for entry in killed.entries]
    assert [entry.record for entry in journal.read(killed.path)[1]][: len(done)] == done
    assert json.loads(killed.out)[: len(done)] == [record.recipe.digest for record in done]


def test_no_finished_trial_is_repeated(killed: SimpleNamespace) -> None:
    digests = json.loads(killed.out)
    assert len(digests) == len(set(digests)) == 9
    assert killed.evaluated == 9 - len(killed.entries)


def test_the_numbers_of_trials_go_on(killed: SimpleNamespace) -> None:
    numbers = [entry.record.trial for entry in journal.read(killed.path)[1]]
    assert sorted(numbers) == list(range(9))  # the trial that was running is the one that is made up for


def test_a_search_that_ended_leaves_no_process(killed: SimpleNamespace) -> None:
    wait_for(lambda: not killed.second.left_behind(), within=30)
    assert killed.second.left_behind() == []


def test_a_killed_driver_leaves_no_process(killed: SimpleNamespace) -> None:
    assert any("raylet" in line for line in killed.started)  # the mark works
    wait_for(lambda: not killed.first.left_behind())  # Ray's agents try for 60 s to reach the dead head node
    assert killed.first.left_behind() == []


# --- resume is refused ---


def one(model: nn.Module) -> float:
    return 1.0


@pytest.fixture(scope="module")
def ended(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ended")
    raysq.tune(mlp(), [X], one, max_trials=1, storage_path=directory, name="run", **OPTIONS)
    return directory / "run"


@pytest.mark.parametrize(
    ("differs", "same", "arguments"),
    [
        ("model", ("calibration", "evaluation"), {"model": mlp(seed=1)}),
        ("calibration", ("model", "evaluation"), {"calib": [X + 1]}),
        ("evaluation", ("model", "calibration"), {"eval_fn": lambda model: 1.0}),
    ],
)
def test_resume_with_something_else_says_what(ended: Path, differs: str, same: Any, arguments: Any) -> None:
    with pytest.raises(ResumeError) as caught:
        raysq.tune(**{"model": mlp(), "calib": [X], "eval_fn": one, "resume": ended, **OPTIONS, **arguments})
    message = str(caught.value)
    assert f"{differs}:" in message and "leave out `resume`" in message
    assert not any(f"{name}:" in message for name in same)


@pytest.mark.parametrize(
    ("arguments", "differs"),
    [
        ({"tolerance": 0.3}, "goal: .*there, at most 30.000% relative loss now"),
        ({"backend": "onednn"}, "backend: reference there, onednn now"),
        ({"num_threads": 2}, "num_threads: 1 there, 2 now"),
    ],
)
def test_trials_that_were_judged_otherwise_are_for_a_warm_start(
    ended: Path, arguments: dict[str, Any], differs: str
) -> None:
    with pytest.raises(ResumeError, match=f"{differs}.*`warm_start`"):
        raysq.tune(mlp(), [X], one, **{**OPTIONS, "resume": ended, **arguments})


def test_a_refused_resume_leaves_the_journal_as_it_was(ended: Path) -> None:
    before = (ended / "journal.jsonl").read_bytes()
    with pytest.raises(ResumeError):
        raysq.tune(mlp(seed=1), [X], one, resume=ended, **OPTIONS)
    assert (ended / "journal.jsonl").read_bytes() == before


def test_a_resumed_run_that_was_complete_measures_nothing_again(ended: Path) -> None:
    again = raysq.tune(mlp(), [X], one, max_trials=1, resume=ended, **OPTIONS)
    assert list(again.trials) == [entry.record for entry in journal.read(ended / "journal.jsonl")[1]]


# --- Ray is the user's ---


def test_a_ray_that_was_running_stays(ended: Path) -> None:
    assert ray.is_initialized()
