"""One pass over the calibration data, from which every later question about ranges and errors is answered.

Memory: per activation, `ROW_BYTES` for rows, 32 KiB for the histogram and 12 bytes a channel; 256 MiB in all for
the kept items. A model with 200 activations stays below 0.7 GB whatever the amount of data.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping
from itertools import starmap
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raysq import fingerprint
from raysq.calibration_data import Batch, samples
from raysq.copies import state
from raysq.errors import CalibrationError
from raysq.graph import ModelGraph, activation_axis
from raysq.histogram import LIMIT, HistogramBuilder
from raysq.intercept import Interceptor, Operands, Site, Window
from raysq.kept_items import KeptItems
from raysq.stats import CalibrationStats, TensorStats
from raysq.structure import tensors_in

__all__ = ["observe"]

log = logging.getLogger("raysq")

ROWS = 512  # sampled positions per activation: the error of a layer's output is known to about 5 %
ROW_BYTES = 2 << 20
POSITIONS_PER_SAMPLE = 4
MOVING_CONSTANT = 0.01  # torch's MovingAverageMinMaxObserver


def observe(
    model: nn.Module,
    graph: ModelGraph,
    batches: Iterable[Batch | tuple[tuple[Any, ...], Mapping[str, Any]]],
    *,
    seed: int = 0,
) -> CalibrationStats:
    """Run every batch through the model once and return what its activations look like.

    Args:
        model: the deployable copy.
        graph: its calls.
        batches: calls of the model, batch axis 0, or their (args, kwargs) where there are no labels.
        seed: of the sampled rows and items.

    Raises:
        CalibrationError: no batch, or the model fails on one.
    """
    observer = _Observer(model, graph, seed)
    with torch.no_grad(), observer, Interceptor(model, observer.call, out_of_place=graph.out_of_place):
        for number, batch in enumerate(starmap(Batch, batches), start=1):
            observer.start(batch)
            args, kwargs = batch.args, batch.kwargs
            try:
                model(*args, **kwargs)
            except Exception as exc:
                shapes = [tuple(t.shape) for t in tensors_in((args, dict(kwargs)))]
                raise CalibrationError(
                    f"the model must run on all calibration batches, and fails on batch {number} (shapes {shapes}): "
                    f"{exc}"
                ) from exc
    return observer.finish()


class _Observer:
    """What is known about the activations so far; a context in which blocks tell their arguments."""

    def __init__(self, model: nn.Module, graph: ModelGraph, seed: int) -> None:
        self._graph = graph
        self._blocks = {path: model.get_submodule(path) for path in graph.blocks}
        self._random = np.random.default_rng(seed)
        self._tensors: dict[str, _Activation] = {}
        self._outputs: dict[str, _Channels] = {}
        self._batch: _Batch | None = None
        self._items = KeptItems(self._random)
        self._samples = self._batches = self._positions = 0
        self._hash = hashlib.sha256()
        self._unknown: set[str] = set()
        self._hooks: list[Any] = []

    def __enter__(self) -> _Observer:
        for path, block in self._blocks.items():

            def keep(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                self._items.keep_block(path, args, kwargs)

            self._hooks.append(block.register_forward_pre_hook(keep, with_kwargs=True))
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def start(self, batch: Batch) -> None:
        """Choose which samples and positions of the next batch are kept."""
        for tensor in tensors_in((batch.args, dict(batch.kwargs))):
            fingerprint.feed(self._hash, tensor)
        size = samples(batch)
        self._items.choose(batch, size)
        mask = _kept_tokens(batch.kwargs.get("attention_mask"), size)
        self._batch = _Batch(mask, *self._choose_positions(size, mask))
        self._samples += size
        self._batches += 1

    def _choose_positions(self, size: int, mask: Tensor | None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return slots among the rows, and for each its place in the batch as a share of it, padding left out."""
        count = size * POSITIONS_PER_SAMPLE
        items = np.repeat(np.arange(size), POSITIONS_PER_SAMPLE)
        place = self._random.random(count)
        if mask is not None:
            for i, index in enumerate(items):
                valid = np.flatnonzero(mask[index].numpy())
                if len(valid):
                    place[i] = (valid[int(place[i] * len(valid))] + 0.5) / mask.shape[1]
        order = self._positions + np.arange(count)
        slots = np.where(order < ROWS, order, (self._random.random(count) * (order + 1)).astype(np.int64))
        self._positions += count
        keep = slots < ROWS
        return slots[keep], ((items + place) / size)[keep]

    def call(self, site: Site, operands: Operands) -> Any:
        """Record the inputs and the output of a call, and compute it."""
        result = operands.run(operands.activations, operands.weights)
        known = self._graph.by_name.get(site.name)
        if known is None or len(known.tensors) != len(operands.activations):
            if site.name not in self._unknown:
                self._unknown.add(site.name)
                log.warning("%s runs on calibration data but not on the example inputs; it stays in float.", site.name)
            return result
        assert self._batch is not None
        for name, tensor in zip(known.tensors, operands.activations, strict=True):
            if self._batch.first_time(name, tensor):
                axis = activation_axis(site.op, tensor.dim())
                if name not in self._tensors:
                    self._tensors[name] = _Activation(tensor.shape[axis])
                self._tensors[name].add(tensor, axis, self._batch, operands.window)
        output = tensors_in(result)[0]
        axis = activation_axis(site.op, output.dim())
        values = self._batch.without_padding(output, axis)
        self._outputs.setdefault(site.name, _Channels(output.shape[axis])).add(values, axis)
        return result

    def finish(self) -> CalibrationStats:
        """Return the statistics of all batches."""
        if not self._samples:
            raise CalibrationError("calibration needs at least one batch, got none. Is the loader exhausted?")
        return CalibrationStats(
            tensors={name: activation.build() for name, activation in self._tensors.items()},
            outputs={name: channels.build() for name, channels in self._outputs.items()},
            items=tuple(self._items),
            samples=self._samples,
            batches=self._batches,
            fingerprint=self._hash.hexdigest()[:16],
        )


def _kept_tokens(mask: Any, size: int) -> Tensor | None:
    """Return which tokens an attention mask (batch, length) keeps; None where it is none, as an additive one."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != size:
        return None
    kept = mask.bool()
    return kept if bool(kept.any()) and bool((mask == kept).all()) else None


class _Batch:
    """What of the current batch is kept, and which of its activations were counted already."""

    def __init__(
        self,
        mask: Tensor | None,
        slots: NDArray[np.int64],
        places: NDArray[np.float64],
    ) -> None:
        self.mask, self.slots, self.places = mask, slots, places
        self._counted: dict[str, tuple[Tensor, int]] = {}

    def first_time(self, name: str, tensor: Tensor) -> bool:
        """Whether this tensor, with these values, was not yet counted under this name."""
        known, version = self._counted.get(name, (None, 0))
        self._counted[name] = tensor, state(tensor)
        return known is not tensor or version != state(tensor)

    def without_padding(self, tensor: Tensor, axis: int) -> Tensor:
        """Return the values of tokens that are not padding, channels still along `axis`."""
        if self.mask is not None and axis == -1 and tensor.shape[:-1] == self.mask.shape:
            return tensor[self.mask]
        return tensor


class _Channels:
    """Smallest and largest value and mean per channel.

    Where batches differ in how many there are, such as positions of sequences, all get those of the whole.
    """

    def __init__(self, channels: int) -> None:
        self._varies = False
        self.low = torch.full((channels,), math.inf)
        self.high = torch.full((channels,), -math.inf)
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._count = torch.zeros(channels, dtype=torch.float64)

    def add(self, values: Tensor, axis: int) -> tuple[float, float]:
        """Count values and return the smallest and the largest of them, (inf, -inf) for none."""
        if not values.numel():
            return math.inf, -math.inf
        if values.shape[axis] != len(self.low):
            self._varies = True
            values, axis = values.reshape(-1, 1), -1
        others = [d for d in range(values.dim()) if d != axis % values.dim()]
        if not others:
            values, others = values[None], [0]
        low, high = values.amin(others), values.amax(others)
        if bool((torch.maximum(-low, high) <= LIMIT).all()):  # so written, a NaN fails too
            self._sum += values.sum(others).double()
            self._count += values.numel() // values.shape[axis]
        else:
            usable = values.abs() <= LIMIT
            low = values.where(usable, math.inf).amin(others)
            high = values.where(usable, -math.inf).amax(others)
            self._sum += values.where(usable, 0.0).sum(others).double()
            self._count += usable.sum(others)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        return float(low.min()), float(high.max())

    def build(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        if self._varies:
            self.low.fill_(self.low.min())
            self.high.fill_(self.high.max())
            self._sum.fill_(self._sum.mean())
            self._count.fill_(self._count.mean())
        mean = (self._sum / self._count.clamp_min(1)).float()
        return self.low.numpy(), self.high.numpy(), mean.numpy()


class _Activation:
    """Everything that is kept of one activation."""

    def __init__(self, channels: int) -> None:
        self._channels = _Channels(channels)
        self._histogram = HistogramBuilder()
        self._moving: tuple[float, float] | None = None
        self._rows: dict[int, NDArray[np.float32]] = {}
        self._slots = ROWS

    def add(self, tensor: Tensor, axis: int, batch: _Batch, window: Window | None) -> None:
        values = batch.without_padding(tensor, axis)
        low, high = self._channels.add(values, axis)
        self._histogram.add(values)
        if low <= high:
            old = self._moving or (low, high)
            self._moving = (old[0] + MOVING_CONSTANT * (low - old[0]), old[1] + MOVING_CONSTANT * (high - old[1]))
        self._sample(tensor, axis, batch, window)

    def _sample(self, tensor: Tensor, axis: int, batch: _Batch, window: Window | None) -> None:
        wanted = batch.slots < self._slots
        if not wanted.any() or not tensor.numel():
            return
        slots, places = batch.slots[wanted], batch.places[wanted]
        if window is not None and len(window.kernel) > 0 and math.prod(window.kernel) > 1:
            rows = _receptive_fields(tensor, window, places)
        else:
            flat = tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis])
            rows = flat[torch.from_numpy((places * len(flat)).astype(np.int64))]
            if window is not None:
                rows = rows.reshape(*rows.shape, *window.kernel)
        data = rows.float().nan_to_num(0.0, LIMIT, -LIMIT).numpy()
        if len(data):
            self._slots = min(self._slots, max(32, ROW_BYTES // max(1, data[0].nbytes)))
        for slot, row in zip(slots.tolist(), data, strict=True):
            if slot < self._slots:
                self._rows[slot] = row.copy()

    def build(self) -> TensorStats:
        low, high, mean = self._channels.build()
        moving = self._moving or (0.0, 0.0)
        shapes = {row.shape for row in self._rows.values()}
        rows = [self._rows[slot] for slot in sorted(self._rows)] if len(shapes) == 1 else []
        stacked = np.stack(rows) if rows else np.zeros((0, len(low)), np.float32)
        return TensorStats(low, high, mean, *moving, self._histogram.build(), stacked)


def _receptive_fields(tensor: Tensor, window: Window, places: NDArray[np.float64]) -> Tensor:
    """Return what the convolution reads at each place, (n, C, *kernel)."""
    axes = len(window.kernel)
    reach = [d * (k - 1) for k, d in zip(window.kernel, window.dilation, strict=True)]
    if isinstance(window.padding, str):
        before = [r // 2 if window.padding == "same" else 0 for r in reach]
        after = [r - b if window.padding == "same" else 0 for r, b in zip(reach, before, strict=True)]
    else:
        before = after = list(window.padding)
    outputs = [
        (n + b + a - r - 1) // s + 1
        for n, b, a, r, s in zip(tensor.shape[2:], before, after, reach, window.stride, strict=True)
    ]
    numbers = (places * tensor.shape[0] * math.prod(outputs)).astype(np.int64)
    item, *corner = np.unravel_index(numbers, (tensor.shape[0], *outputs))
    read = []  # per spatial axis, the positions that each field reads, broadcast against the other axes
    inside = torch.ones(len(numbers), *window.kernel, dtype=torch.bool)
    for axis, (n, b, start) in enumerate(zip(tensor.shape[2:], before, corner, strict=True)):
        taps = np.arange(window.kernel[axis]) * window.dilation[axis]
        position = torch.from_numpy(start[:, None] * window.stride[axis] - b + taps)
        shape = [len(numbers), *(len(taps) if a == axis else 1 for a in range(axes))]
        inside &= ((position >= 0) & (position < n)).reshape(shape)
        read.append(position.clamp(0, n - 1).reshape(shape))
    sample = torch.from_numpy(item).reshape(-1, *[1] * axes)
    fields = tensor.movedim(1, -1)[(sample, *read)]  # (n, *kernel, C)
    return (fields * inside[..., None]).movedim(-1, 1)
