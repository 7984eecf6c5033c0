"""What the samples of a batch share, such as an additive mask, sends no int8 kernel of IPEX to its reference."""

import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import raysq
from raysq.kernels import base
from raysq.kernels.broadcasts import set_apart
from raysq.recipe import Precision
from raysq.rivals import carried

BATCH, LENGTH, WIDTH, HEADS = 8, 128, 64, 4
MANY_TIMES = 20.0  # measured on AVX2 where the product takes the mask in: 1.4 s against 4 ms


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.full((1, 1, LENGTH, LENGTH), -1e4).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(x.shape[0], LENGTH, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS) + self.mask
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape[0], LENGTH, WIDTH))


class Gate(nn.Module):
    """Squeezes what a convolution returns into a gate per sample and channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze = nn.Conv2d(16, 32, 3, padding=1), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.squeeze(x.mean((2, 3)))[:, :, None, None].sigmoid()


class Experts(nn.Module):
    """Weighs its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x).sigmoid() * self.expert(x) + self.expert(x)


class HalfStep(nn.Module):
    """Adds half of what a feed-forward returns, as Conformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.norm(h + 0.5 * self.down(self.up(self.norm(h)).relu()))


def seconds(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        model(x), model(x)
        begun = time.perf_counter()
        model(x)
    return time.perf_counter() - begun


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "shape", "set_apart_calls"),
    [
        (Attention, (BATCH, LENGTH, WIDTH), {"matmul"}),
        (Attention, (1, LENGTH, WIDTH), {"matmul"}),  # a batch of one, as where the model is deployed at others
        (Gate, (BATCH, 16, 24, 24), {"conv"}),
        (Gate, (1, 16, 24, 24), {"conv"}),
        (Experts, (BATCH * LENGTH, WIDTH), {"expert"}),
        (HalfStep, (BATCH, LENGTH, WIDTH), {"down"}),
    ],
)
def test_products_are_fast_and_in_int8(
    make: type[nn.Module], shape: tuple[int, ...], set_apart_calls: set[str]
) -> None:
    pytest.importorskip("intel_extension_for_pytorch")
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    prepared = raysq.prepare(model, [x], backend="ipex", num_threads=1, smoothing=False)
    assert set_apart(prepared.source.graph) == set_apart_calls
    assert not prepared.left_in_float.keys() & set_apart_calls
    recipe = carried(
        raysq.prepare(model, [x], backend="reference", smoothing=False).space.default(),
        prepared.source,
        base.get("ipex"),
    )
    built = base.get("ipex").build(prepared.source, recipe)
    assert all(built.executed[name] is Precision.INT8 for name in set_apart_calls)
    more = torch.cat([x] * (BATCH // len(x) or 1))
    assert seconds(built.model, more) < MANY_TIMES * seconds(model, more)
    with torch.no_grad():
        wanted = model(more)
        assert (built.model(more) - wanted).square().mean() < 0.01 * wanted.var()


@pytest.mark.parametrize(
    ("operand", "is_apart"),
    [
        ((), False),
        ((1,), False),
        ((WIDTH,), False),  # one per channel
        ((1, 1, WIDTH), False),
        ((4, LENGTH, WIDTH), False),
        ((LENGTH, 1), True),
        ((4, 1, 1), True),
        ((1, LENGTH, WIDTH), True),  # shared by the batch
    ],
)
@pytest.mark.parametrize("function", [torch.add, torch.mul, torch.div, lambda a, b: (2 * a).relu() - b])
def test_what_has_no_fast_kernel_is_set_apart(operand: tuple[int, ...], function: Any, is_apart: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.operand = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(operand))

        def forward(self, x: Tensor) -> Tensor:
            return function(self.fc(x), self.operand)

    graph = raysq.inspect(Net().eval(), torch.randn(4, LENGTH, WIDTH))
    assert set_apart(graph) == ({"fc"} if is_apart else set())


@pytest.mark.parametrize("function", [torch.round, torch.neg, lambda y: y.clamp_min(0.1), lambda y: 1 / y])
def test_what_lies_between_is_taken_in_too(function: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.operand = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(LENGTH, 1))

        def forward(self, x: Tensor) -> Tensor:
            return function(self.fc(x)) * self.operand

    assert set_apart(raysq.inspect(Net().eval(), torch.randn(4, LENGTH, WIDTH))) == {"fc"}


@pytest.mark.parametrize(
    ("function", "is_apart"),
    [
        (lambda h, y: h + y, False),
        (lambda h, y: y.relu() * 2 + 1, False),
        (lambda h, y: 0.5 * (h + y).relu(), False),
        (lambda h, y: h - 0.5 * y, False),
        (lambda h, y: h * (0.5 * y), False),
        (lambda h, y: h + nn.functional.dropout(y, training=False), False),
        (lambda h, y: h + 0.5 * y, True),
        (lambda h, y: torch.add(h, y, alpha=0.5), True),
        (lambda h, y: y.add(h), False),
        (lambda h, y: h.add_(y), False),
        (lambda h, y: y.relu() + h, True),
        (lambda h, y: h.sigmoid() * y + h, True),
        (lambda h, y: h.add_(y.tanh()), True),
        (lambda h, y: h + nn.functional.dropout(y, training=False) * 2, True),
    ],
)
@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: nn.Linear(WIDTH, WIDTH), (4, WIDTH)), (lambda: nn.Conv1d(16, 16, 1), (4, 16, 9))]
)
def test_what_is_changed_before_a_sum_is_set_apart_from_matrix_products(
    function: Any, is_apart: bool, make: Any, shape: tuple[int, ...]
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.product = make(), make()

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x).roll(1)  # which no kernel takes in
            return function(h, self.product(h.clone()))

    found = set_apart(raysq.inspect(Net().eval(), torch.randn(shape)))
    assert found == ({"product"} if is_apart and len(shape) == 2 else set())


def test_gates_of_a_value_by_itself_are_followed_once_each() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            for _ in range(40):  # 2 ** 40 ways through
                y = y * y.sigmoid()
            return y

    assert set_apart(raysq.inspect(Net().eval(), torch.randn(4, WIDTH))) == set()


def test_a_residual_grows_with_the_batch_and_a_bias_by_position_does_not() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.bias, self.held = nn.Embedding(LENGTH, WIDTH), torch.ones(1, LENGTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            position = self.bias(torch.arange(LENGTH)[None])  # the same for all inputs
            return self.c(self.b(x + self.a(x)) + position) + self.held

    assert set_apart(raysq.inspect(Net().eval(), torch.randn(1, LENGTH, WIDTH))) == {"b", "c"}
