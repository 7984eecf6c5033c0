"""Which whole samples of the calibration data are kept, and what of them: a uniform sample within a memory limit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from raysq.calibration_data import Batch
from raysq.stats import Item

__all__ = ["KeptItems"]

ITEMS = 32  # whole samples: sensitivities replay the model on them
BLOCK_ITEMS = 8  # of these, how many come with what each block got
ITEM_BYTES = 256 << 20


class KeptItems:
    """A seeded uniform sample of what was seen so far; so are the first of them, which hold their blocks' inputs too.

    Where they take more than `ITEM_BYTES`, fewer hold the inputs of blocks, and then fewer are kept.
    """

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random
        self._items: list[Item] = []
        self._limit, self._block_limit = ITEMS, BLOCK_ITEMS
        self._seen = self._size = 0
        self._fresh: dict[int, int] = {}

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def choose(self, batch: Batch, size: int) -> None:
        """Take samples of the next batch in: algorithm R of Vitter 1985, the first ones shuffled.

        Shuffled, because otherwise the first places would go to the first samples more often.
        """
        chosen: list[Item | int] = list(self._items)
        for index in range(size):
            place = int(self._random.integers(self._seen + index + 1))
            if len(chosen) < self._limit:
                chosen.append(index)
                chosen[-1], chosen[place] = chosen[place], index
            elif place < self._limit:
                chosen[place] = index
        self._fresh = {place: c for place, c in enumerate(chosen) if isinstance(c, int)}
        self._items = [_item(batch, c, size) if isinstance(c, int) else c for c in chosen]
        self._seen += size
        self._size = size
        if self._fresh:
            self._fit()

    def keep_block(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep what a block gets for the samples of this batch that were chosen; of several times the first."""
        wanted = {p: i for p, i in self._fresh.items() if p < self._block_limit and path not in self._items[p].blocks}
        for place, index in wanted.items():
            inputs = _sample(args, index, self._size), _sample(dict(kwargs), index, self._size)
            item = self._items[place]
            self._items[place] = replace(item, blocks={**item.blocks, path: inputs})
        if wanted:
            self._fit()

    def _fit(self) -> None:
        while True:
            later = self._items[self._block_limit :]
            self._items[self._block_limit :] = [replace(item, blocks={}) for item in later]
            if sum(map(_nbytes, self._items)) <= ITEM_BYTES or self._limit == 1:
                return
            if self._block_limit > 1:
                self._block_limit -= 1
            else:
                self._limit -= 1
                del self._items[self._limit :]
                self._fresh = {place: index for place, index in self._fresh.items() if place < self._limit}


def _item(batch: Batch, index: int, size: int) -> Item:
    args, kwargs, target = (_sample(part, index, size) for part in (batch.args, dict(batch.kwargs), batch.target))
    return Item(args, kwargs, {}, target)


def _sample(tree: Any, index: int, size: int) -> Any:
    """Return one sample of every batched tensor, as numpy; what isn't batched is kept whole."""

    def pick(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() and value.shape[0] % size == 0:
            share = value.shape[0] // size
            value = value[index * share : (index + 1) * share]
        kept = value.detach().clone()
        return kept if kept.dtype == torch.bfloat16 else kept.numpy()  # numpy has no bf16

    return tree_map(pick, tree)


def _nbytes(item: Item) -> int:
    tree = (item.args, dict(item.kwargs), dict(item.blocks), item.target)
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, np.ndarray))
