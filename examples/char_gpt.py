"""A transformer: a character-level GPT, trained for a minute on Python's own reference text, then quantized.

Run it as `python examples/char_gpt.py`, or search with options: `raysq tune examples/char_gpt.py:workload`.
"""

from __future__ import annotations

import pydoc_data.topics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import raysq

CONTEXT, WIDTH, HEADS, LAYERS = 64, 128, 4, 4
BATCH = 16
TRAINING_S = 60.0
HELD_OUT = 20_000  # characters that accuracy is measured on


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("future", torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width)
        """Mix each position with those before it."""
        batch, time_, _ = x.shape
        q, k, v = (t.view(batch, time_, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / (WIDTH // HEADS) ** 0.5
        future = self.get_buffer("future")[:time_, :time_]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).reshape(batch, time_, WIDTH))
        return mixed


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Add what attention and perceptron find."""
        x = x + self.attention(self.norm1(x))
        added: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return added


class CharGPT(nn.Module):
    """Predicts the next character."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, WIDTH)
        self.position = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, ids: Tensor) -> Tensor:  # (batch, time) -> (batch, time, characters)
        """Return the logits of the character after each position."""
        x = self.token(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def workload(training_s: float = TRAINING_S) -> tuple[nn.Module, list[Tensor], Callable[[nn.Module], float]]:
    """Train the model; return it, calibration batches, and the function that scores it."""
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([alphabet[character] for character in text])
    training, held_out = ids[:-HELD_OUT], ids[-HELD_OUT:]
    torch.manual_seed(0)
    model = CharGPT(len(alphabet))
    train(model, training, training_s)

    calib = [windows(training, torch.randint(len(training) - CONTEXT, (BATCH,)))[:, :-1] for _ in range(8)]
    batches = windows(held_out, torch.arange(0, HELD_OUT - CONTEXT, CONTEXT)).split(BATCH)

    def accuracy(model: nn.Module) -> float:
        right = total = 0
        with torch.no_grad():
            for batch in batches:
                right += int((model(batch[:, :-1]).argmax(-1) == batch[:, 1:]).sum())
                total += batch[:, 1:].numel()
        return right / total

    return model.eval(), calib, accuracy


def windows(ids: Tensor, starts: Tensor) -> Tensor:
    """Cut a window of CONTEXT + 1 characters at each start: (starts, CONTEXT + 1)."""
    return ids[starts[:, None] + torch.arange(CONTEXT + 1)]


def train(model: nn.Module, ids: Tensor, seconds: float) -> None:
    """Train for so many seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        batch = windows(ids, torch.randint(len(ids) - CONTEXT, (BATCH,)))
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    """Train, search, and print the trials."""
    print(f"training a character-level GPT for {TRAINING_S:.0f} s ...")
    model, calib, accuracy = workload()
    result = raysq.tune(model, calib, accuracy, tolerance=0.01, max_trials=20)
    print(result.dataframe()[["trial", "status", "accuracy", "accuracy_drop", "latency_ratio", "feasible"]])
    print(f"accuracy {result.accuracy:.4f} of {result.baseline.accuracy:.4f}, {result.speedup:.2f}x the fastest fp32")
    result.save("raysq_runs/char_gpt")


if __name__ == "__main__":
    main()
