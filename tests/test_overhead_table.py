"""The script that writes the table of overheads: what it computes beside measuring."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def script(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("overhead")


def test_a_row_holds_medians_and_the_median_share(script: ModuleType) -> None:
    timed = [0.5, 0.4, 0.06, 0.01, 0.01, 0.02]
    rejected = [0.5, 0.0, 0.45, 0.01, 0.01, 0.03]
    measured = {"name": "net", "backend": "onednn", "split": [timed, timed, rejected], "timed": 2}
    assert script.row(measured) == (
        "| net | `onednn` | 3 (2) | 1.00 | 500 | 400 | 60 | 10 | 10 | 20 | **10.0%** | 10% |"
    )


def test_parts_have_a_heading_each(script: ModuleType) -> None:
    assert (
        len(script.HEADINGS)
        == script.row({"name": "net", "backend": "ipex", "split": [[1.0] * len(script.PARTS)], "timed": 0}).count("|")
        - 1
    )
