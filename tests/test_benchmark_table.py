"""The script that writes the README's table: what it computes beside running the search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
MEASURED = {
    "name": "net",
    "fp32": 0.8,
    "default": 0.6,
    "default_ratio": 0.5,
    "tuned": 0.796,
    "ratio": [0.4, 0.39, 0.41],
    "to_bf16": None,
    "trials": 5,
    "seconds": 12.3,
}


@pytest.fixture
def script(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    """The script as a module."""
    return benchmark_script("workload_table")


def test_row_gives_losses_relative_to_fp32(script: ModuleType) -> None:
    row = script.row(MEASURED)
    assert row.startswith("| net | 0.8000 | 0.6000 (25.00%) | 0.500 | 0.7960 (0.50%) | **0.400** [0.390, 0.410] |")
    assert row.count("|") == len(script.HEADINGS) + 1


def test_table_replaces_what_stands_between_the_readmes_marks(script: ModuleType, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme)
    for content in ("second", "first"):  # what was there before makes no difference
        script.publish(content, tmp_path / "README.md", script.BEGIN, script.END)
    before, after = readme.split(script.BEGIN)[0], readme.split(script.END)[1]
    assert (tmp_path / "README.md").read_text() == f"{before}{script.BEGIN}\n\nfirst\n\n{script.END}{after}"
