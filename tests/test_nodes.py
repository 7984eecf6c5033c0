"""A search on several nodes: none that goes takes a finished trial with it, one that joins late works along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What came of the searches of nodes_run.py."""
    env = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-W", "ignore", HERE / "nodes_run.py", tmp_path_factory.mktemp("nodes")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    searches: Found = json.loads(done.stdout.splitlines()[-1])
    return searches


def named(found: Found, search: str) -> list[str]:
    """The nodes of a search's evaluations, by their names in nodes_run.py."""
    names = {node_id: name for name, node_id in found["ids"].items()}
    return [names[node] for node in found[search]["nodes"]]


@pytest.mark.parametrize("search", ["alone", "moved", "late", "refused", "scored"])
def test_each_trial_ended_once_and_was_written(found: Found, search: str) -> None:
    trials = found[search]["trials"]
    assert sorted(trials) == list(range(len(trials)))
    assert all(found[search]["written"])
    assert not any(found[search]["reasons"])


def test_a_lost_node_costs_no_trial(found: Found) -> None:
    assert set(named(found, "moved")) == {"first", "second"}  # the one that joined took over from the one that went
    assert len(found["moved"]["trials"]) == len(found["alone"]["trials"])


def test_on_several_nodes_recipes_and_costs_are_those_of_one(found: Found) -> None:
    assert found["moved"]["recipes"] == found["alone"]["recipes"]
    assert found["moved"]["costs"] == found["alone"]["costs"]


def test_a_node_that_joins_late_works_along(found: Found) -> None:
    assert set(named(found, "late")) == {"second", "third"}


@pytest.mark.parametrize("search", ["alone", "moved", "late"])
def test_told_the_journal_a_searcher_proposes_the_same_again(found: Found, search: str) -> None:
    assert found[search]["replayed"]


def test_nodes_without_a_latency_slot_run_nothing_where_another_has_one(found: Found) -> None:
    assert set(named(found, "refused")) == {"marked"}


def test_or_score_only(found: Found) -> None:
    nodes, stages = named(found, "scored"), found["scored"]["stages"]
    assert stages.count("timed") == nodes.count("marked") > 0
    assert stages.count("evaluated") == len(nodes) - nodes.count("marked") > 0


def test_each_trial_tells_the_instruction_sets_that_it_ran_on(found: Found) -> None:
    assert len(set(found["late"]["isa"])) == 1 and all(found["late"]["isa"])
