"""A BERT, tuned on all nodes of a Ray cluster, or on this machine where there is none.

It is made from a configuration and trained for a few seconds on a task of its own, so nothing is downloaded: which of
two marks, somewhere in a sentence of random tokens, comes first. Run it as `python examples/distributed_bert.py`; on a
cluster the same file: `ray job submit --working-dir examples -- python distributed_bert.py --count 4`. It needs
transformers: `pip install transformers`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import raysq

TOKENS, LENGTH, WIDTH, LAYERS, HEADS = 64, 32, 128, 4, 4
MARKS = (1, 2)
BATCH = 32
STEPS = 100
HELD_OUT = 1024  # sentences


class Classifier(nn.Module):
    """Transformers' BertModel with a head: token ids and a mask to the logits of two classes."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        try:
            from transformers import BertConfig, BertModel
        except ImportError as exc:
            raise SystemExit("this example needs transformers: pip install transformers") from exc
        config = BertConfig(
            vocab_size=TOKENS,
            hidden_size=WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # both (batch, LENGTH)
        """Return logits, (batch, 2)."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits: Tensor = self.head(hidden[:, 0])
        return logits


Batch = tuple[Tensor, Tensor]


def sentences(count: int, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """Return (ids, mask) and labels: sentences of several lengths, each with both marks, and which comes first."""
    ids = torch.randint(len(MARKS) + 1, TOKENS, (count, LENGTH), generator=generator)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (count, 1), generator=generator)
    places = torch.rand(count, LENGTH // 2 - 1, generator=generator).argsort(1)[:, :2] + 1
    labels = (places[:, 0] > places[:, 1]).long()
    ids.scatter_(1, places, torch.tensor(MARKS).expand(count, 2))
    mask = (torch.arange(LENGTH) < lengths).long()
    return (ids * mask, mask), labels


def train(model: nn.Module, steps: int, generator: torch.Generator) -> None:
    """Train for so many steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch, labels = sentences(4 * BATCH, generator)
        loss = nn.functional.cross_entropy(model(*batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def workload(
    layers: int = LAYERS, steps: int = STEPS, held_out: int = HELD_OUT
) -> tuple[nn.Module, list[Batch], Callable[[Any], float]]:
    """Train the model; return it, calibration batches, and the function that scores it."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Classifier(layers)
    train(model, steps, generator)
    calib = [sentences(BATCH, generator)[0] for _ in range(4)]
    held = [sentences(BATCH, generator) for _ in range(held_out // BATCH)]

    def accuracy(candidate: Any) -> float:
        right = 0
        with torch.no_grad():
            for batch, labels in held:
                right += int((candidate(*batch).argmax(-1) == labels).sum())
        return right / (len(held) * BATCH)

    return model.eval(), calib, accuracy


def main(arguments: list[str] | None = None, **sizes: int) -> raysq.Result:
    """Train, search on as many slots as are wanted, and print which node did what."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, help="trials at once; default: as many as there is room for")
    parser.add_argument("--max-trials", type=int, default=20)
    parser.add_argument("--num-threads", type=int, default=1)
    options = parser.parse_args(arguments)
    model, calib, accuracy = workload(**sizes)
    result = raysq.tune(
        model,
        calib,
        accuracy,
        tolerance=0.01,
        max_trials=options.max_trials,
        num_threads=options.num_threads,
        workers=raysq.Workers(count=options.count),
    )
    print(result.dataframe().groupby(["node", "cpu"]).size().to_string())
    print(f"accuracy {result.accuracy:.4f} of {result.baseline.accuracy:.4f}, {result.speedup:.2f}x the fastest fp32")
    return result


if __name__ == "__main__":
    main()
