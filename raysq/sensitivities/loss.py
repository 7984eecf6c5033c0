"""A user's loss of outputs against labels: how it is called, what it must return, and its gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from raysq.errors import CalibrationError, ModelError, OptionError
from raysq.sensitivities.simulation import to_tensors

if TYPE_CHECKING:
    from raysq.graph import ModelGraph
    from raysq.stats import Item

__all__ = ["Loss", "check_labels", "check_loss", "differentiable", "gradients", "loss_of"]

Loss = Callable[..., Tensor]

CRITERION = torch.nn.CrossEntropyLoss()  # what INC gives to a loss that takes three arguments


def check_loss(loss: object) -> None:
    """Make sure that a loss can be called.

    Raises:
        OptionError: it can't be, or takes other than two or three arguments.
    """
    if not callable(loss):
        raise OptionError(f"`loss` must be a function of (output, target), got {loss!r}.")
    _takes_criterion(loss)


def check_labels(items: Sequence[Item], sensitivity: str) -> None:
    """Make sure that each item has a label.

    Raises:
        CalibrationError: one has none; the message says how to give them.
    """
    if any(item.target is None for item in items):
        raise CalibrationError(
            f"sensitivity {sensitivity!r} needs calibration data with labels for its loss. Give batches of (x, y), or "
            "say what the label is: `raysq.Calibration(loader, inputs=lambda b: b['image'], target=lambda b: "
            "b['class'])`."
        )


def loss_of(loss: Loss, output: Any, item: Item) -> Tensor:
    """Return the loss of what the model returned for an item.

    Raises:
        OptionError: it isn't one finite number that was computed from the output.
    """
    target = to_tensors(item.target)
    value = loss(output, target, CRITERION) if _takes_criterion(loss) else loss(output, target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise OptionError(f"`loss` must return a tensor of one number, got {shown}. Take its mean: `loss.mean()`.")
    if not value.requires_grad:
        raise OptionError(
            "`loss` must have a gradient: compute it from the model's output by torch functions, without `.item()`, "
            "`.numpy()` or `torch.no_grad()`, in the model too."
        )
    if not value.isfinite():
        raise OptionError(f"`loss` must be finite, got {value.item()} for a calibration sample.")
    return value.reshape(())


@contextmanager
def differentiable(graph: ModelGraph) -> Iterator[None]:
    """Record gradients inside the block, with kernels that can be differentiated twice."""
    recurrent = any(node.function == "lstm" for node in graph.nodes)
    before = torch.backends.mkldnn.set_flags(_enabled=False)[0] if recurrent else None  # oneDNN's LSTM can't
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if recurrent:
            torch.backends.mkldnn.set_flags(_enabled=before)


def gradients(value: Tensor, of: Sequence[Tensor], *, again: bool = False) -> list[Tensor]:
    """Return the gradients of a number, zeros where it doesn't depend on a tensor.

    Args:
        value: one number.
        of: tensors that it was computed from.
        again: whether the gradients will be differentiated too.

    Raises:
        ModelError: something in the model has no derivative.
    """
    if not value.requires_grad:
        return [torch.zeros_like(t) for t in of]
    try:
        found = torch.autograd.grad(value, of, retain_graph=True, create_graph=again, allow_unused=True)
    except RuntimeError as exc:
        raise ModelError(
            f"the loss can't be differentiated through this model: {exc}. Sensitivities 'mse', 'mse_v2' and 'probe' "
            "need no gradient."
        ) from exc
    return [torch.zeros_like(t) if g is None else g for t, g in zip(of, found, strict=True)]


def _takes_criterion(loss: Loss) -> bool:
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # written in C
        return False
    for count in (2, 3):
        try:
            signature.bind(*[None] * count)
        except TypeError:
            continue
        return count == 3
    raise OptionError(f"`loss` must take (output, target) or (output, target, criterion), got {signature}.")
