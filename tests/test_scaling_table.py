"""The script that writes the table of nodes: what it computes beside searching."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
ONE = {"count": 1, "ended_s": [10.0, 12.0, 14.0], "passed": [False, True, True]}
TWO = {"count": 2, "ended_s": [12.0, 11.0, 13.0], "passed": [True, False, True]}


@pytest.fixture
def script(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("scaling")


def test_rates_leave_out_the_first_trial_which_waits_for_its_worker(script: ModuleType) -> None:
    assert script.row(ONE, ONE) == "| 1 | 3 (2) | 0.50 | **1.00** | 12.0 |"
    assert script.row(TWO, ONE) == "| 2 | 3 (2) | 1.00 | **2.00** | 12.0 |"
    assert script.row(ONE, ONE).count("|") == len(script.HEADINGS) + 1


def test_a_search_that_finds_nothing_says_so(script: ModuleType) -> None:
    assert script.row({**ONE, "passed": [False] * 3}, ONE).endswith("| none |")


def test_nodes_of_one_machine_are_called_that(script: ModuleType) -> None:
    assert "one machine with 2 cores" in script.table("net", [ONE], None, 2)
    assert "one machine" not in script.table("net", [ONE], "auto", 2)


def test_the_page_has_the_marks(script: ModuleType) -> None:
    assert script.END in (ROOT / "docs" / "scaling.md").read_text().partition(script.BEGIN)[2]
