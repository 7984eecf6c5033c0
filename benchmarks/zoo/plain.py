"""Models of plain torch, each for something that makes a forward hard to quantize or to trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.base import Architecture, Specimen, tokens

__all__ = ["ALL"]

VOCABULARY, WIDTH = 500, 96


class Tagger(nn.Module):
    """A label for each token, from a recurrent network that reads both ways."""

    def __init__(self, network: Callable[..., nn.RNNBase], labels: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.network = network(WIDTH, WIDTH, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, labels)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits, (count, length, labels)."""
        return self.head(self.network(self.embedding(input_ids))[0])  # type: ignore[no-any-return]


class Recommender(nn.Module):
    """Like DLRM: bags of categories and dense features, their products pair by pair, a click rate."""

    pairs: Tensor

    def __init__(self, tables: int = 6, rows: int = 400, width: int = 32, dense: int = 13) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(rows, width, mode="sum") for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(dense, 128), nn.ReLU(), nn.Linear(128, width), nn.ReLU())
        pairs = tables * (tables + 1) // 2
        self.top = nn.Sequential(
            nn.Linear(width + pairs, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)
        )
        self.register_buffer("pairs", torch.tril_indices(tables + 1, tables + 1, -1), persistent=False)

    def forward(self, dense: Tensor, categories: Tensor, offsets: Tensor) -> Tensor:
        """Return the logit of each item, (count, 1); categories and offsets are (tables, …)."""
        x = self.bottom(dense)
        rows = [bag(categories[i], offsets[i]) for i, bag in enumerate(self.bags)]
        features = torch.stack([x, *rows], 1)
        products = torch.bmm(features, features.transpose(1, 2))
        return self.top(torch.cat([x, products[:, self.pairs[0], self.pairs[1]]], 1))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """A layer whose tokens each go through the expert that a router picks: which rows an expert gets, values decide."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (count, width)."""
        weight, chosen = self.router(x).softmax(-1).max(-1)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            result.index_add_(0, rows, weight[rows, None] * expert(x[rows]))
        return x + result


class Branching(nn.Module):
    """Control flow: how often a block runs is decided by an argument, which block by the values themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.calm, self.wild = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor, repeats: int = 2) -> Tensor:
        """Return (count, 10)."""
        for _ in range(repeats):
            x = x + self.block(x)
        return self.head(F.gelu(self.wild(x) if x.abs().max() > 1e3 else self.calm(x)))  # type: ignore[no-any-return]


class TwoTowers(nn.Module):
    """Reads a nested dict of tensors and returns one."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, WIDTH, 3, 2, 1), nn.ReLU())
        self.text = nn.Sequential(nn.Linear(64, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.heads = nn.ModuleDict({"match": nn.Linear(2 * WIDTH, 2), "topic": nn.Linear(2 * WIDTH, 16)})

    def forward(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Return {"scores": {head: logits}, "embedding": (count, 2 · width)}."""
        joined = torch.cat([self.image(sample["image"]).mean((2, 3)), self.text(sample["text"]["features"])], -1)
        return {"scores": {name: head(joined) for name, head in self.heads.items()}, "embedding": joined}


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's weight transposed, on an embedding that is its output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.encode = nn.Linear(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits, (count, length, vocabulary)."""
        hidden = F.relu(self.encode(self.embedding(input_ids)))
        return self.head(F.linear(hidden, self.encode.weight.t()))  # type: ignore[no-any-return]


class Siamese(nn.Module):
    """Compares two images that the same network has read."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(1024, WIDTH),
        )
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return (count, 8)."""
        return self.head((self.body(first) - self.body(second)).abs())  # type: ignore[no-any-return]


class AnyLength(nn.Module):
    """A transformer over sequences whose length and count differ from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 12)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits, (count, length, 12)."""
        x = self.embedding(input_ids)
        position = torch.arange(x.shape[1]).unsqueeze(1) / 10.0 ** torch.linspace(0, 3, WIDTH)
        return self.head(self.layers(x + position.sin()))  # type: ignore[no-any-return]


def _itself(output: Tensor) -> Tensor:
    return output


def _rows(width: int, count: int = 32) -> Callable[[int], Tensor]:
    return lambda number: torch.randn(count, width, generator=torch.Generator().manual_seed(number))


def _tagger(network: Callable[..., nn.RNNBase]) -> Specimen:
    return Specimen(Tagger(network).eval(), tokens(VOCABULARY, 32), _itself)


def _recommender() -> Specimen:
    def batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
        random = torch.Generator().manual_seed(number)
        categories = torch.randint(400, (6, 64 * 3), generator=random)  # three in each bag
        return torch.randn(64, 13, generator=random), categories, torch.arange(0, 64 * 3, 3).repeat(6, 1)

    return Specimen(Recommender().eval(), batch, _itself)


def _experts() -> Specimen:
    model = nn.Sequential(nn.Linear(64, WIDTH), Experts(), Experts(), nn.Linear(WIDTH, 10))
    return Specimen(model.eval(), _rows(64), _itself)


def _branching() -> Specimen:
    return Specimen(Branching().eval(), _rows(WIDTH), _itself)


def _two_towers() -> Specimen:
    def batch(number: int) -> dict[str, Any]:
        random = torch.Generator().manual_seed(number)
        image, text = torch.randn(8, 3, 32, 32, generator=random), torch.randn(8, 64, generator=random)
        return {"sample": {"image": image, "text": {"features": text}}}

    return Specimen(TwoTowers().eval(), batch, lambda output: output["scores"]["topic"])


def _tied() -> Specimen:
    return Specimen(Tied().eval(), tokens(VOCABULARY, 32), _itself)


def _siamese() -> Specimen:
    def batch(number: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(number)
        first, second = torch.randn(2, 16, 3, 32, 32, generator=random)
        return first, second

    return Specimen(Siamese().eval(), batch, _itself)


def _any_length() -> Specimen:
    def batch(number: int) -> dict[str, Tensor]:
        return tokens(VOCABULARY, 16 + 7 * (number % 5), count=4 + number % 3)(number)

    return Specimen(AnyLength().eval(), batch, _itself)


ALL = (
    Architecture("LSTM tagger", "torch", lambda: _tagger(nn.LSTM)),
    Architecture("GRU tagger", "torch", lambda: _tagger(nn.GRU)),
    Architecture("DLRM-like", "torch", _recommender),
    Architecture("experts, routed by value", "torch", _experts),
    Architecture("control flow", "torch", _branching),
    Architecture("dicts in and out", "torch", _two_towers),
    Architecture("tied weights", "torch", _tied),
    Architecture("module called twice", "torch", _siamese),
    Architecture("dynamic shapes", "torch", _any_length),
)
