"""An evaluation whose items are drawn in random order, so that a hopeless recipe costs a small part of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from raysq import fingerprint
from raysq.calibration_data import LABEL_KEYS, arguments
from raysq.checks import check_whole
from raysq.errors import EvaluationError, OptionError
from raysq.rejection import Rejection
from raysq.scores import ACCURACY, Bounds, Part, gathered, per_item

__all__ = ["Evaluation"]

BATCH_SIZE = 32
CAME = "what `Evaluation.metric` returns"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Items and their metric, an `eval_fn` of which a trial uses no more than it takes to see that it fails.

    The score is the mean over all items. Items are drawn in an order that is random, but the same for every model; a
    trial ends once its loss against the fp32 model, item by item, exceeds the goal's tolerance at `error_rate`. What
    passes, and the model that `raysq.tune` returns, is scored whole. So is each model where the goal has other metrics.
    A metric that is no mean over items, such as mAP or a correlation, goes to `eval_fn` as a plain function.

    Attributes:
        items: anything with `len` and an index, such as a Dataset, each an input with its label; or a DataLoader,
            whose dataset, batches and worker processes are taken, and whose order isn't.
        metric: takes the model's output and the batch, and returns a score for each item, (n,), or a dict of them.
        batch_size: items that the model is given at once, >= 1; None: `items` are batches already. Those are drawn
            whole, and count as one each, which takes several times as many items, unless `shuffled`.
        inputs: takes a batch and returns the model's inputs, a tuple for positional, a dict for keyword arguments.
            None: all but the last of a tuple or list, which is the label; a dict without "label" and "labels";
            anything else as it is.
        collate: makes a list of items a batch; None: as DataLoader does.
        bounds: what each item's score lies in, such as (0, 1); None: [0, 1] if the metric returns booleans, else
            nothing is known, and every model is scored whole. Of losses, (0, math.inf) says enough.
        error_rate: probability at most, in (0, 0.5), with which a recipe that holds the goal is rejected.
        stop_passing: whether a trial also ends once it holds the goal, at that error rate, with an estimate of its
            score; not where accuracy is an objective.
        shuffled: with `batch_size=None`: whether items were dealt to the batches at random.
        seed: of the order, >= 0.
        num_workers: processes that read the items, as DataLoader's.

    Raises:
        EvaluationError: `items` or `metric` can't be used.
        OptionError: a value out of its range.

    Example:
        >>> eval_fn = Evaluation(dataset, lambda output, batch: output.argmax(1) == batch[1])  # doctest: +SKIP
    """

    items: Any
    metric: Callable[[Any, Any], Any]
    _: KW_ONLY
    batch_size: int | None = BATCH_SIZE
    inputs: Callable[[Any], Any] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    bounds: Bounds | None = None
    error_rate: float = 0.01
    stop_passing: bool = False
    shuffled: bool = False
    seed: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name, value in _of_loader(self).items() if isinstance(self.items, DataLoader) else ():
            object.__setattr__(self, name, value)
        _check_items(self.items)
        for name in ("metric", "inputs", "collate"):
            if not callable(getattr(self, name)) and (name == "metric" or getattr(self, name) is not None):
                raise EvaluationError(f"`Evaluation.{name}` must be a function, got {getattr(self, name)!r}.")
        if self.batch_size is not None:
            check_whole("Evaluation.batch_size", self.batch_size, 1, ", or None where `items` are batches")
        check_whole("Evaluation.seed", self.seed, 0)
        check_whole("Evaluation.num_workers", self.num_workers, 0)
        if self.shuffled is True and self.batch_size is not None:
            raise OptionError(
                "`shuffled` says how items came into batches that `items` holds: it goes with `batch_size=None`. Items "
                "that are drawn one by one need no order of yours."
            )
        object.__setattr__(self, "bounds", replace(self.rejection, shuffled=self.shuffled).bounds)  # all checked

    @property
    def rejection(self) -> Rejection:
        """When it ends early; the order is random, whatever order the items have."""
        return Rejection(self.bounds, self.error_rate, True, self.stop_passing)

    def parts(self, model: Any) -> Generator[Part]:
        """Score a model, one batch after another.

        Raises:
            EvaluationError: a batch that can't be scored.
        """
        order = np.random.default_rng(self.seed).permutation(len(self.items))
        loader: DataLoader[Any] = DataLoader(
            self.items,
            self.batch_size,
            sampler=order.tolist(),
            collate_fn=self.collate or (_as_it_is if self.batch_size is None else None),
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),  # the global one is the user's
        )
        left = len(order)
        for batch in loader:
            args, kwargs = arguments(_inputs(batch) if self.inputs is None else self.inputs(batch))
            expected = None if self.batch_size is None else min(self.batch_size, left)
            left -= expected or 0
            yield self._part(self.metric(model(*args, **kwargs), batch), expected)

    def __call__(self, model: Any) -> float | dict[str, float]:
        """Return the whole score, of a metric that returns a dict all of them."""
        with torch.no_grad():
            units = gathered(self.parts(model), self.rejection.stated)
        means = {name: of.mean for name, of in units.items()}
        return means[ACCURACY] if list(means) == [ACCURACY] else means

    def digest(self) -> str:
        """Return what tells it from another, in any process."""
        functions = [None if f is None else fingerprint.of_function(f) for f in (self.metric, self.inputs)]
        return fingerprint.of_text(
            functions, len(self.items), self.batch_size, self.shuffled, self.seed, self.rejection
        )

    def _part(self, returned: Any, expected: int | None) -> Part:
        named = returned if isinstance(returned, Mapping) else {ACCURACY: returned}
        if not named:
            raise EvaluationError(f"{CAME} must not be an empty dict.")
        found = {str(name): per_item(scores, CAME, self.rejection.stated, expected) for name, scores in named.items()}
        sizes = {len(values) for values, _ in found.values()}
        if len(sizes) > 1 or not min(sizes):
            raise EvaluationError(f"{CAME} must be a score of each metric for each item; got {sizes} of them.")
        boolean = frozenset(name for name, (_, boolean) in found.items() if boolean)
        sums = {name: values for name, (values, _) in found.items()}
        if self.batch_size is not None or self.shuffled:
            return Part(sums, np.ones(min(sizes), np.int64), boolean)
        return Part({name: values.sum(keepdims=True) for name, values in sums.items()}, np.array([*sizes]), boolean)


def _of_loader(given: Evaluation) -> dict[str, Any]:
    """Return what is taken of a DataLoader."""
    loader: DataLoader[Any] = given.items
    whole = isinstance(loader.sampler, SequentialSampler) or (
        isinstance(loader.sampler, RandomSampler) and not loader.sampler.replacement
    )
    plain = loader.batch_size is not None or loader.batch_sampler is None
    if not hasattr(loader.dataset, "__getitem__") or not whole or not plain or loader.drop_last:
        raise EvaluationError(
            "of a DataLoader `Evaluation` draws the items of its dataset, all of them: it must have an index, and the "
            "loader no sampler of its own and no `drop_last`. Give the items themselves: "
            "`raysq.Evaluation(torch.utils.data.Subset(dataset, indices), metric, batch_size=...)`."
        )
    if given.batch_size != BATCH_SIZE or given.collate is not None or given.num_workers:
        raise OptionError(
            "a DataLoader has a batch size, a collate function and workers of its own: leave out `batch_size`, "
            "`collate` and `num_workers`, or give its dataset instead of it."
        )
    return {
        "items": loader.dataset,
        "batch_size": loader.batch_size,
        "collate": loader.collate_fn,
        "num_workers": loader.num_workers,
    }


def _check_items(items: Any) -> None:
    if isinstance(items, tuple | Mapping | str):
        raise EvaluationError(
            f"`Evaluation` takes items, each an input with its label; got one {type(items).__name__}. Join tensors "
            "into items: `raysq.Evaluation(torch.utils.data.TensorDataset(inputs, labels), metric)`."
        )
    if not hasattr(items, "__len__") or not hasattr(items, "__getitem__"):
        raise EvaluationError(
            "`Evaluation` draws its items in an order of its own, so they need `len` and an index; got "
            f"{type(items).__name__}. What can only be read in order goes to `raysq.Stream`."
        )
    if not len(items):
        raise EvaluationError("`Evaluation` got no item, and needs at least one to score.")


def _inputs(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in LABEL_KEYS}
    if isinstance(batch, tuple | list):
        return tuple(batch[:-1]) if len(batch) > 1 else tuple(batch)
    return batch


def _as_it_is(batch: Any) -> Any:
    return batch
