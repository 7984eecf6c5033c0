"""The script that measures what a rejected trial costs: what it computes beside running models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import raysq
from raysq import evaluation

ROOT = Path(__file__).resolve().parent.parent
FP32 = np.arange(1000) % 10 != 0
HALF = FP32 & (np.arange(1000) % 2 == 0)


@pytest.fixture
def script(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("early_rejection")


def test_scores_are_brought_to_a_loss_by_turning_lost_items(script: ModuleType) -> None:
    turned = script.brought_to(HALF, FP32, 42)
    assert FP32.sum() - turned.sum() == 42
    assert not (HALF & ~turned).any() and not (turned & ~FP32).any()


def test_recorded_scores_end_where_the_model_itself_does(script: ModuleType) -> None:
    items = TensorDataset(torch.from_numpy(HALF), torch.from_numpy(FP32))
    shares = script.items_taken(HALF, FP32, 3)
    for seed, share in enumerate(shares):
        eval_fn = raysq.Evaluation(items, lambda output, _: output, batch_size=script.BATCH, seed=seed)
        score = evaluation.evaluate(eval_fn, nn.Identity(), raysq.Goal(0.01), script.reference(FP32, seed))
        assert score.early is not None and score.early.seen == share * 1000 < 200
    assert (script.items_taken(FP32, FP32, 3) == 1).all()


def test_a_row_gives_shares_of_a_whole_evaluation(script: ModuleType) -> None:
    row = script.Row(0.05, "mse", np.array([0.1, 0.1, 0.4]), [0.12, 0.1])
    assert str(row) == "| 0.0500 | mse | 10.0% | 20.0% | 37.0% | 11.0% |"
    assert str(row).count("|") == len(script.HEADINGS) + 1


def test_the_page_has_the_marks(script: ModuleType) -> None:
    assert script.END in (ROOT / "docs" / "early-rejection.md").read_text().partition(script.BEGIN)[2]
