"""What a person sees of a search that runs in Ray's dashboard, its metrics and its logs; a real one, from outside."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, browsing

from raysq.recipe import Recipe
from raysq.result import Ratio, Stage, Status, TrialRecord
from raysq.tuning import board, metrics

HERE = Path(__file__).parent
GRAFANA = HERE.parent / "docs" / "grafana" / "raysq.json"
PATIENCE_S = 200  # everything takes long where others compute too

DONE = TrialRecord(
    trial=12,
    recipe=Recipe({}),
    config={},
    status=Status.FINISHED,
    stage=Stage.TIMED,
    accuracy=0.5579,
    feasible=True,
    ratio=Ratio(0.32, 0.31, 0.33),
    int8_calls=23,
    label="alpha 0.5",
)
ID = DONE.recipe.digest[:4]
UNTIMED = replace(DONE, ratio=None, feasible=False, stage=Stage.EVALUATED, label="")


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (DONE, f"trial {ID} acc=0.5579 speedup=3.1x int8=23/25 (12: alpha 0.5)"),
        (UNTIMED, f"trial {ID} acc=0.5579 infeasible int8=23/25 (12)"),
        (
            replace(UNTIMED, items_scored=300, items=5000),
            f"trial {ID} acc=0.5579 rejected after 300 of 5000 items int8=23/25 (12)",
        ),
        (
            replace(UNTIMED, status=Status.FAILED, accuracy=None, reason="ValueError: a\n  b"),
            f"trial {ID} failed: ValueError: a b (12)",
        ),
        (
            replace(UNTIMED, status=Status.FAILED, accuracy=None, reason="x" * 1000),
            f"trial {ID} failed: {'x' * 89}… (12)",
        ),
    ],
    ids=["holds", "infeasible", "rejected", "failed", "failed at length"],
)
def test_a_trial_is_named_by_how_it_ended(record: TrialRecord, name: str) -> None:
    assert board.name_of(record, 25) == name


class Broken:
    """An actor that can't be reached."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("the GCS is gone")


@pytest.mark.parametrize("actor", [None, Broken()], ids=["none", "broken"])
def test_what_shows_a_run_never_fails_it(actor: object) -> None:
    shown = board.Board(actor)
    shown.begin(0, "build")
    shown.end(DONE, 25)
    shown.note("a line")
    shown.close()


def test_grafana_asks_for_metrics_that_exist() -> None:
    asked = set(re.findall(r"ray_(raysq_\w+)", GRAFANA.read_text()))
    assert asked == set(metrics.GAUGES)


# --- a run, looked at while its last trial is in its evaluation ---

pages = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: `apt-get install chromium`")


def until(found: Any, what: str) -> Any:
    """Return what `found` returns once it is true; what can't be asked yet isn't."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            if value := found():
                return value
            seen = repr(value)
        except (OSError, KeyError, StopIteration) as exc:
            seen = f"{exc!r} {exc.read().decode()[:2000] if isinstance(exc, urllib.error.HTTPError) else ''}"
        assert time.monotonic() < end, f"never seen: {what}, but {seen}"
        time.sleep(0.5)


def text(url: str) -> str:
    """Return what is served there."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())


class Watched:
    """A run in a process of its own."""

    def __init__(self, directory: Path, process: subprocess.Popen[str]) -> None:
        self.directory = directory
        self.process = process
        where = until(lambda: self._told(), "three trials")
        self.url, self.job = f"http://{where['url']}", where["job"]

    def _told(self) -> Any:
        assert self.process.poll() is None, self.process.communicate()
        return json.loads((self.directory / "where").read_text())

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """Return what the dashboard's state API lists."""
        return list(json.loads(text(f"{self.url}/api/v0/{kind}?detail=1&limit=1000"))["data"]["result"]["result"])

    def log_files(self, node: str) -> dict[str, list[str]]:
        """Return the files that raysq's workers wrote on a node, by their kind."""
        return dict(json.loads(text(f"{self.url}/api/v0/logs?node_id={node}&glob=raysq*"))["data"]["result"])

    def tasks(self, start: str) -> dict[str, dict[str, Any]]:
        """Return the tasks whose names begin so, by name."""
        return {task["name"]: task for task in self.listed("tasks") if task["name"].startswith(start)}


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    pytest.importorskip("aiohttp", reason="the dashboard needs the extra: pip install 'raysq[cluster]'")
    directory = Path(tempfile.mkdtemp(prefix="raysq-", dir="/tmp"))  # short, as Ray has sockets in it
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "TMPDIR": str(directory),
        "RAY_AUTH_MODE": "disabled",  # as behind a tunnel, where the token is asked for once
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(HERE.parent),
    }
    command = [sys.executable, str(HERE / "watched_run.py"), str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield Watched(directory, process)
    finally:
        (directory / "go").touch()
        process.communicate(timeout=PATIENCE_S)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.slow
def test_each_trial_that_ended_is_a_task(watched: Watched) -> None:
    trials = until(lambda: (t := watched.tasks("trial ")) and len(t) >= 3 and t, "three tasks")
    assert len(trials) == 3
    holds = next(name for name in trials if "speedup" in name)
    assert re.fullmatch(r"trial [0-9a-f]{4} acc=1\.0000 speedup=\d+\.\dx int8=\d/2 \(0: .*\)", holds)
    failed = next(name for name in trials if "failed" in name)
    assert re.fullmatch(r"trial [0-9a-f]{4} failed: .*RuntimeError: no such kernel.* \(1: .*\)", failed)
    rejected = next(name for name in trials if "rejected" in name)
    assert re.fullmatch(r"trial [0-9a-f]{4} acc=0\.0000 rejected after \d+ of 400 items int8=\d/2 \(2: .*\)", rejected)
    states = {name: task["state"] for name, task in trials.items()}
    assert states == {holds: "FINISHED", rejected: "FINISHED", failed: "FAILED"}


@pytest.mark.slow
def test_phases_are_tasks_that_last_as_long_as_they_do(watched: Watched) -> None:
    def running() -> list[str]:
        found = [task for task in watched.listed("tasks") if task["func_or_class_name"] == "Trials.phase"]
        return [task["name"] for task in found if task["state"] == "RUNNING"]

    until(lambda: running() == ["evaluate"], "the phase of the trial that waits, alone")
    found = watched.tasks("")
    assert {"build", "evaluate", "time"} < set(found)
    assert any(name.startswith("calibrate ") for name in found)


@pytest.mark.slow
def test_actors_are_named_by_model_and_slot(watched: Watched) -> None:
    names = until(lambda: {a["class_name"]: a["repr_name"] for a in watched.listed("actors")}, "actors")
    assert re.fullmatch(r"raysq Tiny @ \S+:\d+", names["QuantTrial"])
    assert names["Trials"] == "raysq watched: Tiny"


@pytest.mark.slow
def test_the_job_says_what_it_is_about(watched: Watched) -> None:
    job = next(job for job in json.loads(text(f"{watched.url}/api/jobs/")) if job["job_id"] == watched.job)
    assert job["metadata"] == {
        "run": "watched",
        "model": "Tiny",
        "goal": "at most 10.000% relative loss",
        "strategy": "random",
        "backend": "reference",
    }
    assert any(name.startswith("run watched, model Tiny, goal at most ") for name in watched.tasks("run "))


@pytest.mark.slow
def test_the_metrics_endpoint_serves_what_grafana_draws(watched: Watched) -> None:
    targets = json.loads((watched.directory / "ray" / "prom_metrics_service_discovery.json").read_text())[0]["targets"]
    wanted = set(metrics.GAUGES)

    def served() -> dict[str, float]:
        found = {}
        for target in targets:
            try:
                lines = text(f"http://{target}/metrics").splitlines()
            except (OSError, urllib.error.URLError):  # not all that are announced serve
                continue
            for line in lines:
                if known := re.match(r'ray_(raysq_\w+)\{.*?(?:phase="(\w+)",)?run="watched"\} (\S+)', line):
                    found[known[1] + (f" {known[2]}" if known[2] else "")] = float(known[3])
        return found

    found = until(
        lambda: (s := served()) and {n.split()[0] for n in s} == wanted and s["raysq_trials"] == 3 and s, "all"
    )
    assert found["raysq_failures"] == 1
    assert found["raysq_feasible_share"] == pytest.approx(1 / 3)
    assert found["raysq_best_latency_ratio"] > 0 and found["raysq_trials_per_minute"] > 0
    assert {name.split()[1] for name in found if " " in name} == {"calibrate", "build", "evaluate", "time"}
    assert all(found[f"raysq_phase_seconds {phase}"] > 0 for phase in ("calibrate", "build", "time"))


@pytest.mark.slow
def test_a_worker_logs_what_was_tried(watched: Watched) -> None:
    # the agent that serves logs answers with an error until it has started
    node = until(lambda: watched.listed("nodes"), "nodes")[0]["node_id"]
    listed = until(lambda: watched.log_files(node), "log files")
    names = [name for group in listed.values() for name in group]
    assert names and all(re.fullmatch(r"raysq-worker-\d+\.log", name) for name in names)
    file = f"{watched.url}/api/v0/logs/file?node_id={node}&lines=500&filename="
    lines = "".join(until(lambda name=name: text(file + name), name) for name in names)
    assert re.search(r"trial 0 \(.*\): recipe [0-9a-f]{16}; ", lines)
    assert re.search(r"trial 0 \(.*\): built in [\d.]+ s: \d calls in int8, \d in float", lines)
    assert re.search(r"trial 0 \(.*\): evaluated in [\d.]+ s: accuracy 1, loses 0: holds the goal", lines)
    assert re.search(r"trial 0 \(.*\): timed in [\d.]+ s: [\d.]+ \[[\d.]+, [\d.]+\] of fp32", lines)
    assert "trial 1" in lines and "RuntimeError: no such kernel" in lines and "Traceback" in lines
    assert re.search(r"trial 2 \(.*stopped after", lines)


@pytest.mark.slow
@pages
def test_a_browser_shows_the_trials_on_the_page_of_the_job(watched: Watched, tmp_path: Path) -> None:
    trials = until(lambda: (t := watched.tasks("trial ")) and len(t) >= 3 and t, "three tasks")
    with browsing(tmp_path) as page:
        page.open(f"{watched.url}/#/jobs/{watched.job}")
        heading = "[...document.querySelectorAll('h4')].find(e => e.textContent == 'Task Table')"
        page.until(f"!!{heading}", PATIENCE_S)
        page.get(f"{heading}.click()")
        label = "[...document.querySelectorAll('label')].find(e => e.textContent == 'Function or Class Name')"
        page.until(f"!!({label}) && document.body.innerText.includes('ACTOR_TASK')", PATIENCE_S)
        page.type(f"{label}.parentElement.querySelector('input')", "Trials.trial")
        for name in trials:
            page.until(f"document.body.innerText.includes({json.dumps(name)})", PATIENCE_S)


@pytest.mark.slow
def test_nothing_of_it_is_on_the_screen_of_the_user(watched: Watched) -> None:
    (watched.directory / "go").touch()  # the last test: the run goes on and ends
    out, err = watched.process.communicate(timeout=PATIENCE_S)
    assert watched.process.returncode == 0, err
    assert out.splitlines()[-1].endswith("journal.jsonl")
    assert "INFO" not in err and "recipe " not in err and "built in" not in err and "Traceback" not in err
    assert err.count("trial ") >= 4, "raysq's own lines"
