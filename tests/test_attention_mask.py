"""An additive mask before softmax sends IPEX's int8 product of q and k to a reference kernel: found, left in float."""

import math
import time

import pytest
import torch
from torch import Tensor, nn

import raysq
from raysq.kernels import base
from raysq.probing import settled
from raysq.recipe import Precision
from raysq.rivals import carried

pytestmark = pytest.mark.slow

BATCH, LENGTH, WIDTH, HEADS = 8, 128, 64, 4
MANY_TIMES = 20.0  # measured on AVX2: 1.4 s against 4 ms


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.full((1, 1, LENGTH, LENGTH), -1e4).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(BATCH, LENGTH, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS) + self.mask
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(BATCH, LENGTH, WIDTH))


def seconds(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        model(x)
        begun = time.perf_counter()
        model(x)
    return time.perf_counter() - begun


def test_only_the_products_are_left_in_float() -> None:
    pytest.importorskip("intel_extension_for_pytorch")
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(BATCH, LENGTH, WIDTH)
    begun = time.perf_counter()
    prepared = raysq.prepare(model, [x], backend="ipex", num_threads=1, smoothing=False)
    took = time.perf_counter() - begun
    fp32 = seconds(model, x)
    products = [name for name in prepared.left_in_float if "matmul" in name]
    if not products:
        pytest.skip("on this CPU the product takes less than a second, which a search can afford")
    assert "reference kernel" in prepared.left_in_float[products[0]]
    recipe = prepared.space.default()
    assert sorted(recipe.int8_calls) == ["out", "qkv"]
    built = base.get("ipex").build(prepared.source, recipe)
    assert [name for name, ran in built.executed.items() if ran is Precision.INT8] == ["qkv", "out"]
    assert seconds(built.model, x) < MANY_TIMES * fp32
    assert took < 60, "a few builds, no search"

    everything = raysq.prepare(model, [x], backend="reference", num_threads=1, smoothing=False).space.default()
    assert len(everything.int8_calls) > 2
    engine = base.get("ipex")
    found = settled(carried(everything, prepared.source, engine), prepared.source, engine)
    assert found.recipe.int8_calls == ("out", "qkv"), "nor does a recipe of another backend bring them back"
