"""Calibration data as batches of model arguments: what of a batch is an input, what is a label."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from raysq.errors import CalibrationError, OptionError
from raysq.flattened import forward_signature
from raysq.structure import tensors_in

__all__ = ["LABEL_KEYS", "Batch", "Calibration", "arguments", "peek", "samples"]

LABEL_KEYS = ("labels", "label")
SAY_WHICH = "calib=raysq.Calibration(loader, inputs=lambda b: b[0], target=lambda b: b[1])"


class Batch(NamedTuple):
    """One call of the model, and the label that came with it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any = None


@dataclass(frozen=True)
class Calibration:
    """Calibration data, and how to read it.

    Of a batch, a tuple or list is positional arguments, a dict is keyword arguments, anything else one argument.
    An item beyond what forward takes is a label, and so are the keys "labels" and "label".

    Attributes:
        data: an iterable of batches (a list, a DataLoader with or without labels), or a callable that runs the
            model on them: `lambda model: ...`. It is read once.
        inputs: takes a batch and returns the model's inputs; None decides by forward's signature.
        target: takes a batch and returns its label; labels serve sensitivities that need a loss.
        calib_samples: how many samples (not batches) to read, >= 1; None reads all.

    Raises:
        CalibrationError: `data` is neither.
        OptionError: `calib_samples` is out of its range.

    Example:
        >>> Calibration(loader, inputs=lambda b: b["image"], target=lambda b: b["class"], calib_samples=200)
    """

    data: Iterable[Any] | Callable[[torch.nn.Module], object]
    _: KW_ONLY
    inputs: Callable[[Any], Any] | None = None
    target: Callable[[Any], Any] | None = None
    calib_samples: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.data, Tensor | Mapping | str):
            raise CalibrationError(
                f"calibration data must be an iterable of batches, got one {type(self.data).__name__}. "
                "Put the batch into a list: `calib=[batch]`."
            )
        if isinstance(self.data, torch.utils.data.Dataset) and not hasattr(self.data, "__iter__"):
            raise CalibrationError(
                "calibration data must be an iterable of batches, got a Dataset, which gives single samples. "
                "Wrap it: `calib=torch.utils.data.DataLoader(dataset, batch_size=32)`."
            )
        if not callable(self.data) and not hasattr(self.data, "__iter__"):
            raise CalibrationError(
                "calibration data must be an iterable of batches, or a callable that runs the model; "
                f"got {type(self.data).__name__}."
            )
        count = self.calib_samples
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise OptionError(f"`calib_samples` must be a whole number of at least 1, got {count!r}.")

    @classmethod
    def of(cls, calib: Any) -> Calibration:
        """Return `calib` itself if it is a Calibration, else one that reads it."""
        return calib if isinstance(calib, cls) else cls(calib)

    def batches(self, model: torch.nn.Module) -> Iterator[Batch]:
        """Read the data once, as calls of `model`; the last batch is cut where `calib_samples` is reached.

        Raises:
            CalibrationError: there is no batch, or one that doesn't fit the model.
        """
        signature = forward_signature(model)
        left = self.calib_samples
        number = 0
        for number, batch in enumerate(self._raw(model, signature), start=1):
            _check(batch, signature, number)
            if left is None:
                yield batch
                continue
            batch = _cut(batch, left)
            left -= samples(batch)
            yield batch
            if left <= 0:
                return
        if number == 0:
            hint = (
                "The callable didn't call the model that it was given."
                if callable(self.data)
                else "An iterator can be read only once: pass a list or a DataLoader."
            )
            raise CalibrationError(f"calibration needs at least one batch, got none. {hint}")

    def _raw(self, model: torch.nn.Module, signature: inspect.Signature) -> Iterator[Batch]:
        if callable(self.data):
            yield from _recorded(self.data, model, self.calib_samples)
            return
        for raw in self.data:
            batch = _by_signature(raw, signature) if self.inputs is None else Batch(*arguments(self.inputs(raw)))
            yield batch if self.target is None else batch._replace(target=self.target(raw))


def peek(batches: Iterator[Batch]) -> tuple[Batch, Iterator[Batch]]:
    """Return the first batch, and all of them, the first included, without reading it twice."""
    first = next(batches)
    return first, itertools.chain([first], batches)


def samples(batch: Batch) -> int:
    """Return the number of samples: the size of axis 0 of the first input that has one."""
    return next((leaf.shape[0] for leaf in tensors_in((batch.args, batch.kwargs)) if leaf.ndim), 1)


def _cut(batch: Batch, count: int) -> Batch:
    total = samples(batch)
    if total <= count:
        return batch

    def cut(leaf: Any) -> Any:
        return leaf[:count] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == total else leaf

    cut_batch: Batch = Batch(*tree_map(cut, tuple(batch)))
    return cut_batch


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments: of a tuple or list, of a dict, of anything else the one."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence):
        return tuple(inputs), {}
    return (inputs,), {}


def _by_signature(raw: Any, signature: inspect.Signature) -> Batch:
    args, kwargs = arguments(raw)
    if kwargs:
        return _dict_batch(kwargs, signature)
    if len(args) < 2:
        return Batch(args, {})
    return _tuple_batch(args, signature)


def _dict_batch(given: dict[str, Any], signature: inspect.Signature) -> Batch:
    parameters = signature.parameters.values()
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    targets = {key: value for key, value in given.items() if key in LABEL_KEYS}
    inputs = {key: value for key, value in given.items() if key not in LABEL_KEYS}
    unknown = [key for key in inputs if key not in names]
    if unknown and not takes_any:
        raise CalibrationError(
            f"a dict batch is passed by keyword, but forward{signature} takes no {', '.join(map(repr, unknown))}. "
            "Say what is an input: `calib=raysq.Calibration(loader, inputs=lambda b: ...)`, returning a dict for "
            "keyword, a tuple for positional arguments."
        )
    return Batch((), inputs, next(iter(targets.values()), None))


def _tuple_batch(given: tuple[Any, ...], signature: inspect.Signature) -> Batch:
    """The last item is a label if forward has no place for it, an input if forward requires it; else who knows."""
    slots = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in slots)
    possible = sum(not isinstance(p.default, bool | str) for p in slots)  # a flag is no place for a tensor
    endless = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    if len(given) == required:
        return Batch(given, {})
    if len(given) == possible + 1 and not endless:
        return Batch(given[:-1], {}, given[-1])
    if len(given) < required or (len(given) > possible and not endless):
        raise CalibrationError(
            f"a batch of {len(given)} items doesn't fit forward{signature}. Say what is an input: `{SAY_WHICH}`."
        )
    raise CalibrationError(
        f"a batch of {len(given)} items could be {len(given)} inputs of forward{signature}, or inputs and a label. "
        f"Say which: `{SAY_WHICH}`; where all are inputs: `calib=raysq.Calibration(loader, inputs=lambda b: b)`."
    )


def _check(batch: Batch, signature: inspect.Signature, number: int) -> None:
    try:
        signature.bind(*batch.args, **batch.kwargs)
    except TypeError as exc:
        raise CalibrationError(
            f"calibration batch {number} doesn't fit forward{signature}: {exc}. Say what is an input: `{SAY_WHICH}`."
        ) from exc
    tensors = tensors_in((batch.args, batch.kwargs))
    if not tensors:
        raise CalibrationError(
            f"calibration batch {number} holds no tensor. Convert it: "
            "`calib=raysq.Calibration(data, inputs=lambda b: torch.as_tensor(b))`."
        )
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise CalibrationError(
                f"calibration batch {number} is on {tensor.device}; raysq runs on the CPU. Move it: "
                "`calib=raysq.Calibration(loader, inputs=lambda b: b.cpu())`."
            )


class _EnoughError(Exception):
    """Ends the user's loop once as many samples as asked for were recorded."""


def _recorded(run: Callable[[torch.nn.Module], object], model: torch.nn.Module, limit: int | None) -> Iterator[Batch]:
    """Record what a callable passes to the model, which it runs for real so that loops on its output work."""
    seen: list[Batch] = []

    def record(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if limit is not None and sum(map(samples, seen)) >= limit:
            raise _EnoughError
        seen.append(Batch(args, dict(kwargs)))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with torch.no_grad():
            run(model)
    except _EnoughError:
        pass
    finally:
        handle.remove()
    yield from seen
