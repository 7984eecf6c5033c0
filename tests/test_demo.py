"""The demo's workload, and the demo from start to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysq import demo


def test_workload_learns_the_digits() -> None:
    model, calib, accuracy = demo.workload()
    assert accuracy(model) > 0.95
    assert next(iter(calib))[0].shape == (demo.BATCH, 1, 8, 8)


@pytest.mark.slow
def test_demo_ends_with_a_measured_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--max-trials", "3", "--out", str(tmp_path / "out")]) == 0
    assert "of the fastest fp32's time" in capsys.readouterr().out
