"""SmoothQuant through torchao: a Llama-style model with outlier channels, trained, quantized, saved and loaded again.

Run it as `python examples/torchao_smoothquant.py`, where `pip install 'raysq[torchao]'` was run. It prints perplexity,
speed and size of fp32, of plain int8 and of smoothed int8.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization import quantize_

from raysq.torchao import SmoothQuantConfig, insert_smoothquant_observers_

TEXT = Path(__file__).resolve().parents[1] / "benchmarks" / "workloads" / "shakespeare.npz"
CHARACTERS, CONTEXT = 65, 128
WIDTH, HEADS, HIDDEN, LAYERS = 256, 4, 704, 2
BATCH, STEPS = 8, 150
CALIBRATION_BATCHES, TEST_BATCHES, TIMED_BATCHES = 8, 16, 4
ALPHA = 0.5
OUTLIERS, FACTORS = 0.02, (32.0, 64.0)  # share of the channels; powers of two, so that not a bit of the output changes
ROUNDS = 5  # of timing, in which the models take turns


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        frequencies = 10_000.0 ** -torch.arange(0, 1, 2 * HEADS / WIDTH)
        angles = torch.outer(torch.arange(CONTEXT), frequencies).repeat(1, 2)  # (time, channels of a head)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width)
        """Mix each position with those before it."""
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def rotated(self, x: Tensor) -> Tensor:  # (batch, heads, time, channels)
        """Turn pairs of channels by an angle that grows with the position."""
        first, second = x.chunk(2, -1)
        time_ = x.shape[-2]
        return x * self.get_buffer("cos")[:time_] + torch.cat((-second, first), -1) * self.get_buffer("sin")[:time_]


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map each position by itself."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """Attention, then the gated perceptron, each with a norm before it and a residual around."""

    def __init__(self) -> None:
        super().__init__()
        self.input_norm, self.post_attention_norm = nn.RMSNorm(WIDTH, eps=1e-5), nn.RMSNorm(WIDTH, eps=1e-5)
        self.attention, self.mlp = Attention(), GatedMLP()

    def forward(self, x: Tensor) -> Tensor:
        """Add what both find."""
        x = x + self.attention(self.input_norm(x))
        added: Tensor = x + self.mlp(self.post_attention_norm(x))
        return added


class Llama(nn.Module):
    """Predicts the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.head = nn.Linear(WIDTH, CHARACTERS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # (batch, time) -> (batch, time, characters)
        """Return the logits of the character after each position."""
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(ids))))
        return logits


def windows(ids: Tensor, starts: Tensor) -> Tensor:
    """Cut a window of CONTEXT + 1 characters at each start: (starts, CONTEXT + 1)."""
    return ids[starts[:, None] + torch.arange(CONTEXT + 1)]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean cross entropy of the characters that follow."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def trained(ids: Tensor) -> Llama:
    """Return a model after STEPS steps from a fixed seed."""
    torch.manual_seed(0)
    model = Llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model, windows(ids, torch.randint(len(ids) - CONTEXT, (BATCH,)))).backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False).eval()


def plant_outliers_(model: Llama) -> None:
    """Scale a few channels up where they are made and down where they are read, as they are in large models."""
    for block in model.blocks:
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        _move_(block.input_norm, attention.q_proj, attention.k_proj, attention.v_proj)
        _move_(block.post_attention_norm, mlp.gate_proj, mlp.up_proj)
        _move_(attention.v_proj, attention.o_proj)
        _move_(mlp.up_proj, mlp.down_proj)
    _move_(model.norm, model.head)


def _move_(maker: nn.RMSNorm | nn.Linear, *readers: nn.Linear) -> None:
    assert maker.weight is not None
    channels = torch.randperm(len(maker.weight))[: math.ceil(OUTLIERS * len(maker.weight))]
    factors = torch.tensor(FACTORS)[torch.randint(len(FACTORS), channels.shape)]
    maker.weight[channels] *= factors if maker.weight.ndim == 1 else factors[:, None]
    for reader in readers:
        reader.weight[:, channels] /= factors


def quantized(original: Llama, calib: list[Tensor], alpha: float | None, activation: str) -> tuple[Llama, int]:
    """Quantize a copy, save its state, load it into the original model; return that and the file's bytes."""
    model = copy.deepcopy(original)
    insert_smoothquant_observers_(model, alpha)
    for batch in calib:
        model(batch[:, :-1])
    quantize_(model, SmoothQuantConfig(activation))

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = copy.deepcopy(original)
    loaded.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(loaded(calib[0][:, :-1]), model(calib[0][:, :-1]))
    return loaded, file.getbuffer().nbytes


def perplexity(model: nn.Module, batches: list[Tensor]) -> float:
    """Return exp of the mean loss per character."""
    return math.exp(sum(loss(model, batch).item() for batch in batches) / len(batches))


def tokens_per_second(models: list[Llama], batches: list[Tensor]) -> list[float]:
    """Return each model's best speed over rounds in which they take turns."""
    best = [math.inf] * len(models)
    for _, (index, model) in itertools.product(range(ROUNDS), enumerate(models)):
        start = time.perf_counter()
        for batch in batches:
            model(batch[:, :-1])
        best[index] = min(best[index], time.perf_counter() - start)
    return [sum(batch[:, 1:].numel() for batch in batches) / seconds for seconds in best]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the variant.
        perplexity: on held-out text, per character.
        tokens_per_s: tokens per second that the model reads, in batches.
        size_bytes: of its saved state.
    """

    name: str
    perplexity: float
    tokens_per_s: float
    size_bytes: int


def table() -> list[Row]:
    """Train, plant outliers, quantize in four ways, measure."""
    with np.load(TEXT) as arrays:
        training, held_out = (torch.from_numpy(arrays[split].astype(np.int64)) for split in ("train", "test"))
    model = trained(training)
    plant_outliers_(model)
    calib = list(windows(training, torch.randint(len(training) - CONTEXT, (CALIBRATION_BATCHES * BATCH,))).split(BATCH))
    test = list(windows(held_out, torch.arange(TEST_BATCHES * BATCH) * CONTEXT).split(BATCH))

    state = io.BytesIO()
    torch.save(model.state_dict(), state)
    variants = {"fp32": (model, state.getbuffer().nbytes)}
    for (kind, alpha), activation in itertools.product([("int8", None), ("smoothed", ALPHA)], ["dynamic", "static"]):
        variants[f"{kind}, {activation}"] = quantized(model, calib, alpha, activation)
    speeds = tokens_per_second([variant for variant, _ in variants.values()], test[:TIMED_BATCHES])
    return [
        Row(name, perplexity(variant, test), speed, size)
        for (name, (variant, size)), speed in zip(variants.items(), speeds, strict=True)
    ]


def main() -> None:
    """Print the table."""
    print(f"training a Llama-style model for {STEPS} steps, less than a minute ...")
    print(f"{'':18} {'perplexity':>10} {'tokens/s':>10} {'MB':>6}")
    for row in table():
        print(f"{row.name:18} {row.perplexity:10.3f} {row.tokens_per_s:10,.0f} {row.size_bytes / 1e6:6.2f}")


if __name__ == "__main__":
    main()
