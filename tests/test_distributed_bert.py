"""The example of a search on a cluster, on whatever Ray there is."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from pytest import CaptureFixture, MonkeyPatch

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parent.parent / "examples" / "distributed_bert.py"


@pytest.fixture
def example(monkeypatch: MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))  # workers import it by its name
    return importlib.import_module(EXAMPLE.stem)


def test_it_learns_and_is_tuned(
    cluster: None, example: ModuleType, tmp_path: Path, monkeypatch: MonkeyPatch, capsys: CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = example.main(["--max-trials", "2", "--count", "1"], layers=1, steps=40, held_out=256)
    assert result.baseline.accuracy > 0.7  # a guess has 0.5
    assert result.recipe.int8_calls
    assert "the fastest fp32" in capsys.readouterr().out
