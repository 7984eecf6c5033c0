"""What is known of an architecture: how it is made, what it reads, and what of its output counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Architecture", "Specimen", "images", "last_hidden", "logits", "settled", "tokens"]

SETTLING_BATCHES = 8  # for the statistics of batch norms


@dataclass(frozen=True)
class Specimen:
    """A model with random weights, and inputs for it.

    Attributes:
        model: fp32, in eval mode.
        batch: returns random inputs by the number of the batch, as `raysq.tune` takes them.
        compared: takes what the model returns; returns the tensor that fidelity is of, features along its last axis.
    """

    model: nn.Module
    batch: Callable[[int], Any]
    compared: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Architecture:
    """An entry of the zoo.

    Attributes:
        name: in the table, and for the command line.
        package: that its classes are from.
        make: returns the same weights at every call.
    """

    name: str
    package: str
    make: Callable[[], Specimen]


def images(size: int, count: int = 4) -> Callable[[int], Tensor]:
    """Return what makes batches of images, (count, 3, size, size): noise on a colour and a gradient of their own."""

    def batch(number: int) -> Tensor:
        random = torch.Generator().manual_seed(number)
        colour = torch.randn(count, 3, 1, 1, generator=random)
        slope = torch.randn(count, 3, 1, 1, generator=random) * torch.linspace(-1, 1, size)
        return colour + slope + torch.randn(count, 3, size, size, generator=random)

    return batch


def tokens(vocabulary: int, length: int, count: int = 8, name: str = "input_ids") -> Callable[[int], dict[str, Tensor]]:
    """Return what makes batches of token ids, (count, length), by keyword."""

    def batch(number: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(number)
        return {name: torch.randint(5, vocabulary, (count, length), generator=random)}  # below 5 are special tokens

    return batch


def logits(output: Any) -> Tensor:
    """Return the logits of a transformers model's output."""
    return output.logits  # type: ignore[no-any-return]


def last_hidden(output: Any) -> Tensor:
    """Return the last hidden state of a transformers model's output."""
    return output.last_hidden_state  # type: ignore[no-any-return]


def settled(model: nn.Module, batch: Callable[[int], Any]) -> nn.Module:
    """Return the model in eval mode, its batch norms with the statistics of random inputs, as training leaves them.

    With the initial ones the activations of a deep network with random weights fade or explode.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    model.train()
    with torch.no_grad():
        for number in range(-SETTLING_BATCHES, 0):  # numbers that neither calibration nor evaluation has
            model(batch(number))
    return model.eval()
