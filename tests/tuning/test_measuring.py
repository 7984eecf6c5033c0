"""Sensitivities over Ray tasks are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import raysq
from raysq.errors import CalibrationError
from raysq.sensitivity_cache import FILE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


def test_costs_are_the_same_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("raysq.sensitivity_table.SHARE", 2)
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(7)]).eval()
    calib = list(torch.randn(2, 8, 16))
    alone = raysq.sensitivity(model, calib, "mse_v2", backend="reference")
    spread = raysq.sensitivity(model, calib, "mse_v2", backend="reference", parallel=2, cache=tmp_path)
    assert list(spread["call"]) == list(alone["call"])
    assert spread["cost"].to_numpy() == pytest.approx(alone["cost"].to_numpy(), rel=1e-5, abs=1e-12)
    assert len((tmp_path / FILE).read_bytes().splitlines()) == 7


def test_what_a_task_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysq.sensitivity_table.SHARE", 1)

    class OfFive(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.view(5, 8))

    with pytest.raises(CalibrationError, match="a batch of one"):
        raysq.sensitivity(
            OfFive(nn.Linear(8, 8), nn.Linear(8, 2)), [torch.randn(5, 8)], "probe", backend="reference", parallel=True
        )
