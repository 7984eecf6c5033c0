"""The demo's workload, and the demo from start to end."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

import raysq
from raysq import demo


@pytest.fixture(scope="module")
def workload() -> Any:
    return demo.workload()


def test_workload_learns_the_digits(workload: Any) -> None:
    model, calib, accuracy = workload
    assert accuracy(model) > 0.95
    assert next(iter(calib))[0].shape == (demo.BATCH, 1, 8, 8)


@pytest.mark.slow
def test_demo_ends_with_a_measured_ratio(
    workload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "workload", lambda: workload)
    monkeypatch.setattr(raysq, "tune", partial(raysq.tune, latency=raysq.Latency(0.02, 0.02)))
    assert demo.main(["--max-trials", "3", "--out", str(tmp_path / "out")]) == 0
    assert "of the fastest fp32's time" in capsys.readouterr().out
