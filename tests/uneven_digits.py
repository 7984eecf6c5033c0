"""A small net for handwritten digits that int8 ruins where a weight has one scale, and that training repairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from raysq.recipe import Granularity, Recipe

__all__ = ["accuracy", "batches", "coarse", "fit", "trained_net"]

TRAINING_IMAGES = 1200


def batches(size: int = 64, *, held_out: bool = False) -> list[tuple[Tensor, Tensor]]:
    data = load_digits()
    part = slice(TRAINING_IMAGES, None) if held_out else slice(TRAINING_IMAGES)
    x, y = torch.from_numpy(data.data[part]).float() / 16, torch.from_numpy(data.target[part]).long()
    return list(zip(x.split(size), y.split(size), strict=True))


def trained_net() -> nn.Module:
    """The hidden channels differ in size, by factors that the next layer makes up for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    fit(20)(model)
    with torch.no_grad():
        sizes = torch.exp(2 * torch.randn(48))
        model[0].weight *= sizes[:, None]
        model[0].bias *= sizes
        model[2].weight /= sizes
    return model.eval()


def fit(epochs: int) -> Callable[[nn.Module], None]:
    def train_fn(model: nn.Module) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
        data = batches() * epochs
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(data))
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            decay.step()

    return train_fn


def accuracy(model: nn.Module) -> float:
    (x, y), *_ = batches(1000, held_out=True)
    return float((model(x).argmax(1) == y).float().mean())


def coarse(recipe: Recipe) -> Recipe:
    """The recipe with one scale for each weight."""
    weights = {n: replace(config.weight, granularity=Granularity.PER_TENSOR) for n, config in recipe.ops.items()}
    return recipe.with_ops({n: replace(config, weight=weights[n]) for n, config in recipe.ops.items()})
