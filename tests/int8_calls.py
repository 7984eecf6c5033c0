"""A small model per kind of call, and the recipe that asks for int8 in all of it: what tests of backends share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raysq.capabilities import Capabilities
from raysq.errors import BackendError
from raysq.inspection import deployable
from raysq.kernels import base
from raysq.observation import observe
from raysq.recipe import Approach, OpConfig, Precision, Recipe, TensorConfig
from raysq.source import Source

__all__ = ["MODELS", "engine", "int8_everywhere", "made", "source"]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.last((x + self.second(x)).relu())


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = (layer(x).view(2, 6, 2, 8).transpose(1, 2) for layer in (self.a, self.b))
        return torch.matmul(a, b.transpose(2, 3))  # oneDNN Graph fuses a `matmul` of 4 axes, and a `bmm` of 3


class Batched(Product):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self.a(x), self.b(x).transpose(1, 2))


class Attending(nn.Module):
    """Cross-attention, whose weights are rows of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = x.flip(1)
        return self.attention(x, memory, memory, need_weights=False)[0]


class Transposed(nn.Module):
    """A weight that lies as (in, out), as GPT-2's do, and is read both ways, as a tied decoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 32) / 4), nn.Parameter(torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.addmm(self.bias, x, self.weight).relu()
        return nn.functional.linear(nn.functional.linear(hidden, self.weight), self.weight.t())


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.last = nn.Conv2d(8, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.pool(self.conv(x).relu()))


class Averaged(Pooled):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(50, 32, mode="sum"), nn.Linear(32, 8)

    def forward(self, items: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bag(items, starts))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 32, num_layers=2, batch_first=True, bidirectional=True)
        with torch.no_grad():  # oneDNN reads both matrices of a layer with one scale: make them differ
            self.lstm.weight_hh_l0 *= 4
        self.fc = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(x)[0])


MODELS = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(8, 16, 3), nn.ReLU(), nn.Conv1d(16, 8, 3)), (2, 8, 20)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)), (2, 8, 12, 12)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(8, 16, 3), nn.ReLU(), nn.Conv3d(16, 8, 1)), (2, 8, 6, 6, 6)),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 8, 1)),
        (2, 16, 9, 9),
    ),
    "conv_transpose2d": (lambda: nn.Sequential(nn.ConvTranspose2d(8, 16, 3), nn.ReLU()), (2, 8, 6, 6)),
    "conv_transpose1d": (lambda: nn.Sequential(nn.ConvTranspose1d(8, 16, 3), nn.ReLU()), (2, 8, 20)),
    "conv_transpose3d": (lambda: nn.Sequential(nn.ConvTranspose3d(8, 16, 3), nn.ReLU()), (2, 8, 5, 5, 5)),
    "linear": (  # OpenVINO computes one of few rows in float
        lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)),
        (32, 32),
    ),
    "transposed weight": (Transposed, (16, 16)),
    "rows of a weight": (Attending, (2, 6, 16)),
    "matmul": (Product, (2, 6, 16)),
    "bmm": (Batched, (2, 6, 16)),
    "add": (Residual, (2, 8, 12, 12)),
    "max_pool": (Pooled, (2, 8, 12, 12)),
    "avg_pool": (Averaged, (2, 8, 12, 12)),
    "lstm": (Recurrent, (4, 10, 16)),
}


def engine(name: str) -> base.Backend:
    try:
        return base.get(name)
    except BackendError as exc:
        pytest.skip(str(exc))


def source(model: nn.Module, *inputs: torch.Tensor) -> Source:
    copy, graph = deployable(model.eval(), inputs, {})
    return Source(copy, graph, observe(copy, graph, [(inputs, {})]), inputs)


def made(kind: str) -> Source:
    torch.manual_seed(0)
    if kind == "embedding_bag":
        return source(Bags(), torch.randint(0, 50, (20,)), torch.tensor([0, 4, 9, 15]))
    build, shape = MODELS[kind]
    return source(build(), torch.rand(shape) - 0.5 if kind == "lstm" else torch.randn(shape))


def int8_everywhere(of: Source, capabilities: Capabilities, approach: Approach) -> Recipe:
    """Return the recipe that asks for int8 wherever a kernel takes it under this approach."""
    ops = {}
    for call in of.graph.calls:
        capability = capabilities.ops.get(call.op)
        if capability is None or approach not in capability.approaches:
            continue
        reduced = capabilities.reduce_range or approach is Approach.DYNAMIC
        activation = TensorConfig(*capability.activations[0], reduce_range=reduced)
        weight = TensorConfig(*capability.weights[0], capability.granularities[0]) if call.op.has_weight else None
        ops[call.name] = OpConfig(Precision.INT8, approach, activation, *([weight] if weight else []))
    return Recipe(ops)
