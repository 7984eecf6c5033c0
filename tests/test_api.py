"""What is public, what importing it costs, and a recipe that is replayed."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

import raysq

MODEL = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
CALIB = [torch.randn(4, 8)]


def test_public_names_are_pinned() -> None:
    assert raysq.__all__ == sorted(raysq.__all__)
    assert all(hasattr(raysq, name) for name in raysq.__all__)


def test_importing_raysq_brings_neither_ray_nor_ipex() -> None:
    code = "import raysq, sys; assert not {'ray', 'intel_extension_for_pytorch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_quantize_replays_a_recipe() -> None:
    first = raysq.quantize(MODEL, CALIB, backend="reference")
    again = raysq.quantize(MODEL, CALIB, recipe=first.recipe, backend="reference")
    assert torch.equal(first(CALIB[0]), again(CALIB[0]))
