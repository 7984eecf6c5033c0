"""Which samples are kept, what of them, and that memory stays bounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from raysq import kept_items
from raysq.calibration_data import Batch
from raysq.inspection import deployable
from raysq.kept_items import BLOCK_ITEMS, ITEMS, KeptItems
from raysq.observation import observe


def kept(batches: list[Batch], seed: int = 0) -> list:
    items = KeptItems(np.random.default_rng(seed))
    for batch in batches:
        items.choose(batch, len(batch.args[0]))
        items.keep_block("block", (batch.args[0] * 10,), {})
    return list(items)


def numbered(count: int, size: int = 4) -> list[Batch]:
    return [
        Batch((part,), {}, {"class": part[:, 0].long()}) for part in torch.arange(float(count))[:, None].split(size)
    ]


def test_the_same_seed_keeps_the_same_items() -> None:
    first, second, other = (sorted(item.args[0].item() for item in kept(numbered(80), seed)) for seed in (0, 0, 1))
    assert len(first) == ITEMS
    assert first == second != other


def test_an_item_has_its_own_label_and_what_its_block_got() -> None:
    items = kept(numbered(80))
    assert all(item.args[0].shape == (1, 1) for item in items)
    assert all(item.target["class"].tolist() == item.args[0][0].tolist() for item in items)
    assert [len(item.blocks) for item in items] == [1] * BLOCK_ITEMS + [0] * (ITEMS - BLOCK_ITEMS)
    assert all(item.blocks["block"][0][0] == item.args[0] * 10 for item in items[:BLOCK_ITEMS])


@pytest.mark.parametrize("places", [ITEMS, BLOCK_ITEMS], ids=["all items", "those with blocks"])
def test_each_sample_is_kept_equally_often(places: int) -> None:
    """With 400 seeds a sample's share has a standard error of at most 0.025; 5 of these hold for all 48 but in 1e-4."""
    counts = np.zeros(48)
    for seed in range(400):
        for item in kept(numbered(48), seed)[:places]:
            counts[int(item.args[0].item())] += 1
    assert np.abs(counts / 400 - places / 48).max() < 0.125


def test_labels_come_through_a_calibration_pass() -> None:
    x = torch.randn(6, 8)
    copy, graph = deployable(nn.Linear(8, 3).eval(), (x,), {})
    items = observe(copy, graph, [Batch((x,), {}, x.sum(1))]).items
    assert all(np.allclose(item.target, item.args[0].sum(1)) for item in items)
    assert all(item.target is None for item in observe(copy, graph, [((x,), {})]).items)


@pytest.mark.parametrize(
    ("floats", "items", "blocks"),
    [(1000, ITEMS, BLOCK_ITEMS), (36, ITEMS, 4), (20, 19, 1), (1, 1, 1)],
    ids=["enough", "fewer blocks", "fewer items", "one at least"],
)
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, floats: int, items: int, blocks: int) -> None:
    monkeypatch.setattr(kept_items, "ITEM_BYTES", 4 * floats)
    found = kept([Batch(batch.args, {}) for batch in numbered(80)])
    assert len(found) == items  # an item has one float, and one more where it has a block's input
    assert [len(item.blocks) for item in found] == [1] * blocks + [0] * (items - blocks)
