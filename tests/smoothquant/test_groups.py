"""In fp32 a scaled model computes what the original does, however it is written, absorbed or multiplied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from raysq.errors import RecipeError
from raysq.inspection import deployable
from raysq.kernels.reference import Engine
from raysq.observation import observe
from raysq.recipe import Recipe, Transform
from raysq.source import Source

ROUNDING = 5e-4  # relative to the largest output; scales of e^±6 leave some 1e-6


class Net(nn.Module):
    """A forward given as a function of its parts."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class LlamaNorm(nn.Module):
    """As in Hugging Face's Llama."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(torch.float32)


def norm(size: int = 8) -> nn.LayerNorm:
    return shaken(nn.LayerNorm(size))


def linear(inputs: int = 8, outputs: int = 8) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def shaken(module: Any) -> Any:
    """Give every parameter and statistic of a norm a value of its own."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2.0)
    return module


def prepared(model: nn.Module, *args: Tensor) -> Source:
    copy, graph = deployable(model, args, {})
    return Source(copy, graph, observe(copy, graph, [(args, {})]), args)


def outputs(model: Any, args: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [t.detach() for t in tree_leaves(model(*args)) if isinstance(t, Tensor)]


def hostile(source: Source, seed: int) -> dict[str, float | tuple[float, ...]]:
    rng = np.random.default_rng(seed)
    return {n: tuple(np.exp(rng.normal(0, 2, g.channels)).tolist()) for n, g in source.graph.groups.items()}


def assert_unchanged(
    model: nn.Module, source: Source, recipe: Recipe, *inputs: tuple[Tensor, ...], absorb: bool = True
) -> None:
    built = Engine().build(replace(source, absorb=absorb), recipe).model
    for args in inputs:
        for exact, same in zip(outputs(model, args), outputs(built, args), strict=True):
            torch.testing.assert_close(same, exact, rtol=0, atol=ROUNDING * float(exact.abs().max()))


def check(model: nn.Module, *args: Tensor, seed: int = 0) -> Source:
    """Compare under hostile scales, absorbed and not, and equalized; return the source."""
    model.eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    source = prepared(model, *args)
    assert_unchanged(model, source, Recipe({}, hostile(source, seed)), args)
    assert_unchanged(model, source, Recipe({}, hostile(source, seed)), args, absorb=False)
    assert_unchanged(model, source, Recipe({}, transforms=(Transform.EQUALIZATION,)), args)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    return source


def absorbing(source: Source) -> set[str]:
    """Return the calls whose smoothing is free."""
    return {call for group in source.graph.groups.values() if group.producers for call in group.calls}


# ---- random models -----------------------------------------------------------------------------------------------

TOKENS = (
    "linear",
    "layer_norm",
    "rms_norm",
    "relu",
    "gelu",
    "leaky",
    "gated",
    "add",
    "attend",
    "cross",
    "twice",
    "tied",
)
IMAGES = (
    *("conv", "strided", "1x1", "depthwise", "grouped", "transposed", "batch_norm", "group_norm", "relu", "relu6"),
    *("leaky", "add", "squeeze", "pool", "average", "conv_bn"),
)
TOKEN_OPS = (*TOKENS, "functional", "slices", "in place", "mT", "kept", "half")


class Random(nn.Module):
    """Draws its layers; a stack of earlier activations feeds residual sums and extra outputs."""

    def __init__(self, ops: list[str], channels: int, kept: int) -> None:
        super().__init__()
        self.ops, self.kept = ops, kept
        self.parts = nn.ModuleDict()
        for number, op in enumerate(ops):
            self.parts.update({f"{number}_{n}": part for n, part in enumerate(self._make(op, channels))})
        tied = [p for n, p in self.parts.items() if ops[int(n.split("_")[0])] == "tied"]
        for layer in tied[1:]:
            layer.weight = tied[0].weight
        self.packed = parameter(3 * channels, channels)

    def _make(self, op: str, c: int) -> list[nn.Module]:
        makers: dict[str, Callable[[], list[nn.Module]]] = {
            "linear": lambda: [linear(c, c)],
            "functional": lambda: [linear(c, c)],
            "half": lambda: [linear(c, c)],
            "tied": lambda: [linear(c, c)],
            "twice": lambda: [linear(c, c)],
            "layer_norm": lambda: [norm(c)],
            "rms_norm": lambda: [LlamaNorm(c)],
            "gated": lambda: [linear(c, c), linear(c, c), linear(c, c)],
            "attend": lambda: [nn.MultiheadAttention(c, 2, batch_first=True)],
            "cross": lambda: [nn.MultiheadAttention(c, 2, batch_first=True)],
            "conv": lambda: [nn.Conv2d(c, c, 3, padding=1)],
            "strided": lambda: [nn.Conv2d(c, c, 3, padding=1, stride=2), nn.Conv2d(c, c, 1, stride=2)],
            "1x1": lambda: [nn.Conv2d(c, c, 1)],
            "depthwise": lambda: [nn.Conv2d(c, c, 3, padding=1, groups=c)],
            "grouped": lambda: [nn.Conv2d(c, c, 3, padding=1, groups=2)],
            "transposed": lambda: [nn.ConvTranspose2d(c, c, 3, padding=1)],
            "batch_norm": lambda: [shaken(nn.BatchNorm2d(c))],
            "conv_bn": lambda: [nn.Conv2d(c, c, 1), shaken(nn.BatchNorm2d(c))],
            "group_norm": lambda: [shaken(nn.GroupNorm(2, c))],
            "squeeze": lambda: [nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)],
        }
        return makers.get(op, list)()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        seen, results = [x], []
        for number, op in enumerate(self.ops):
            part = [p for n, p in self.parts.items() if n.startswith(f"{number}_")]
            earlier = next((s for s in seen[-3::-1] if s.shape == x.shape), x)
            if op == "kept" or number == self.kept:
                results.append(x)
            x = self._run(op, part, x, earlier)
            seen.append(x)
        return (x.flatten(1), *results)

    def _run(self, op: str, part: list[Any], x: Tensor, earlier: Tensor) -> Tensor:
        if op == "add":
            return x + earlier
        if op == "in place":
            y = x * 0.5
            y += earlier
            return y.relu_()
        if op in ("relu", "gelu"):
            return getattr(F, op)(x)
        if op == "relu6":
            return F.relu6(x)
        if op == "leaky":
            return F.leaky_relu(x, 0.1)
        if op == "gated":
            return part[2](F.silu(part[0](x)) * part[1](x))
        if op == "attend":
            return part[0](x, x, x, need_weights=False)[0]
        if op == "cross":
            return part[0](x, earlier, earlier, need_weights=False)[0]
        if op == "twice":
            return part[0](part[0](x).relu())
        if op == "functional":
            return F.linear(x, part[0].weight, part[0].bias)
        if op == "slices":
            q, k, v = self.packed.chunk(3)
            return F.linear(x, q) + F.linear(x, k) * F.linear(earlier, v).sigmoid()
        if op == "mT":
            return x + 0.1 * (x @ x.mT @ x)
        if op == "half":
            return part[0](x.view(*x.shape[:-1], 2, -1).flatten(-2))
        if op == "strided":
            return part[0](x).relu() + part[1](x)
        if op == "squeeze":
            return x * part[1](part[0](F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        if op == "pool":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        if op == "average":
            return F.avg_pool2d(x, 3, stride=1, padding=1)
        for layer in part:
            x = layer(x)
        return x


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["tokens", "images"])
def test_a_random_model_computes_the_same_under_any_scales(kind: str, data: st.DataObject) -> None:
    names, shape = (TOKEN_OPS, (5, 8)) if kind == "tokens" else (IMAGES, (8, 6, 6))
    ops = [
        ("linear" if kind == "tokens" else "conv"),
        *data.draw(st.lists(st.sampled_from(names), min_size=2, max_size=7)),
    ]
    seed, kept = data.draw(st.integers(0, 999)), data.draw(st.integers(-9, len(ops)))
    torch.manual_seed(seed)
    model = Random([*ops, ops[0]], 8, kept).eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    first, same_size, other_size = ((torch.randn(n, *shape),) for n in (3, 3, 2))
    source = prepared(model, *first)
    rng = np.random.default_rng(seed)
    smoothing = {
        name: scales if rng.random() < 0.6 else float(rng.choice([0, 0.3, 0.5, 1]))
        for name, scales in hostile(source, seed).items()
    }
    transforms = (Transform.EQUALIZATION,) if rng.random() < 0.5 else ()
    recipe = Recipe({}, smoothing, transforms)
    assert_unchanged(model, source, recipe, same_size, other_size, absorb=bool(seed % 3))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


# ---- what is absorbed --------------------------------------------------------------------------------------------

X, IMAGE = (4, 6, 8), (3, 8, 8, 8)


def q_k_v(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return m.q(h) + m.k(h) * m.v(h).sigmoid()


ABSORBED = {
    "LayerNorm": (lambda: Net(lambda m, x: m.fc(m.norm(x)), norm=norm(), fc=linear()), X, {"fc"}),
    "Llama's norm": (lambda: Net(lambda m, x: m.fc(m.norm(x)), norm=LlamaNorm(8), fc=linear()), X, {"fc"}),
    "a norm of parameters by other names": (
        lambda: Net(lambda m, x: m.fc(F.layer_norm(x, (8,), m.g, m.b)), g=parameter(8), b=parameter(8), fc=linear()),
        X,
        {"fc"},
    ),
    "torch's RMSNorm": (lambda: Net(lambda m, x: m.fc(m.norm(x)), norm=shaken(nn.RMSNorm(8)), fc=linear()), X, {"fc"}),
    "BatchNorm": (
        lambda: Net(lambda m, x: m.c(m.norm(x)), norm=shaken(nn.BatchNorm2d(8)), c=nn.Conv2d(8, 4, 1)),
        IMAGE,
        {"c"},
    ),
    "GroupNorm": (
        lambda: Net(lambda m, x: m.c(m.norm(x).relu()), norm=shaken(nn.GroupNorm(2, 8)), c=nn.Conv2d(8, 4, 3)),
        IMAGE,
        {"c"},
    ),
    "through ReLU": (lambda: nn.Sequential(linear(), nn.ReLU(), linear()), X, {"2"}),
    "through pooling": (
        lambda: nn.Sequential(nn.Conv2d(8, 6, 3), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(6, 4, 1)),
        (3, 8, 10, 10),
        {"3"},
    ),
    "through interpolation": (
        lambda: Net(
            lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2)), a=nn.Conv2d(8, 6, 1), b=nn.Conv2d(6, 4, 1)
        ),
        IMAGE,
        {"b"},
    ),
    "times a number": (lambda: Net(lambda m, x: m.fc(m.a(x) * 0.5), a=norm(), fc=linear()), X, {"fc"}),
    "into a transposed convolution": (
        lambda: nn.Sequential(nn.Conv2d(8, 6, 1), nn.LeakyReLU(), nn.ConvTranspose2d(6, 4, 3, groups=2)),
        IMAGE,
        {"2"},
    ),
    "out of one": (
        lambda: nn.Sequential(nn.ConvTranspose2d(8, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 4, 1)),
        IMAGE,
        {"2"},
    ),
    "through a depthwise one": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)),
        IMAGE,
        {"1", "2"},
    ),
    "of three that share it": (lambda: Net(q_k_v, norm=norm(), q=linear(), k=linear(), v=linear()), X, {"q", "k", "v"}),
    "a gated product": (
        lambda: Net(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)), a=linear(), b=linear(), c=linear()),
        X,
        {"c"},
    ),
    "a gated product by way of a ReLU": (
        lambda: Net(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x).relu()), a=linear(), b=linear(), c=linear()),
        X,
        {"c"},
    ),
    "viewed as rows": (lambda: Net(lambda m, x: m.fc(m.a(x).reshape(-1, 8)), a=norm(), fc=linear()), X, {"fc"}),
    "flattened": (
        lambda: nn.Sequential(nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(6, 5)),
        IMAGE,
        {"3"},
    ),
    "a residual stream": (
        lambda: Net(
            lambda m, x: (lambda s: m.d((s + m.c(m.b(s).relu())).relu()))(m.a(x).relu()),
            **{name: nn.Conv2d(8, 8, 1) for name in "abcd"},
        ),
        IMAGE,
        {"b", "c", "d"},
    ),
    "a tied weight under its other name": (
        lambda: tied(Net(lambda m, x: F.linear(m.norm(x), m.b.weight), norm=norm(), a=linear(), b=linear())),
        X,
        {"linear"},
    ),
}


def tied(model: Net) -> Net:
    model.b.weight = model.a.weight  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("make, shape, free", ABSORBED.values(), ids=list(ABSORBED))
def test_is_absorbed(make: Callable[[], nn.Module], shape: tuple[int, ...], free: set[str]) -> None:
    torch.manual_seed(0)
    assert absorbing(check(make(), torch.randn(shape))) == free


def test_the_stream_of_a_residual_net_is_one_group() -> None:
    make, shape, _ = ABSORBED["a residual stream"]
    groups = prepared(make().eval(), torch.randn(shape)).graph.groups
    assert [g.calls for g in groups.values() if g.producers] == [("b", "d"), ("c",)]
    assert groups["b/0"].results == ("a", "c", "add")


# ---- counter-examples --------------------------------------------------------------------------------------------


def relu_product(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = m.a(x)
    r = h.relu()
    return m.fc(h * r), m.b(r)


def inside_twice(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.fc(m.a(x))
    return m.b(y), torch.matmul(y, m.fc.weight.T)


def returned(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = m.a(x)
    return m.fc(h), h


@dataclass
class Both:
    result: Tensor
    hidden: Tensor


NOT_ABSORBED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "through ReLU6 (INC folds it)": (lambda: nn.Sequential(linear(), nn.ReLU6(), linear()), X),
    "through GELU": (lambda: nn.Sequential(linear(), nn.GELU(), linear()), X),
    "that the model returns too": (lambda: Net(returned, a=norm(), fc=linear()), X),
    "returned as a view": (lambda: Net(lambda m, x: [t.view(-1, 8) for t in returned(m, x)], a=norm(), fc=linear()), X),
    "returned in a class": (lambda: Net(lambda m, x: Both(*returned(m, x)), a=norm(), fc=linear()), X),
    "of a sum with what isn't divided (INC folds it)": (
        lambda: Net(lambda m, x: m.fc(m.a(x)) + m.a(x) + x, a=norm(), fc=linear()),
        X,
    ),
    "read through .mT": (lambda: Net(lambda m, x: m.fc(m.a(x)) @ m.a(x).mT, a=norm(), fc=linear()), X),
    "read transposed": (
        lambda: Net(lambda m, x: (lambda h: m.fc(h) @ h.mT)(m.a(x)), a=norm(), fc=linear()),
        X,
    ),
    "of an activation times its ReLU": (lambda: Net(relu_product, a=norm(), fc=linear(), b=linear()), X),
    "of an activation times itself": (lambda: Net(lambda m, x: m.fc(m.a(x).square()), a=norm(), fc=linear()), X),
    "the larger of two": (
        lambda: Net(lambda m, x: m.c(torch.maximum(m.a(x), m.b(x))), a=linear(), b=linear(), c=linear()),
        X,
    ),
    "pooled over its channels": (
        lambda: Net(lambda m, x: m.b(F.avg_pool1d(m.a(x), 3, 1, 1)), a=linear(), b=linear()),
        X,
    ),
    "pooled without a batch axis": (
        lambda: Net(lambda m, x: m.b(F.max_pool2d(m.a(x), 3, 1, 1)), a=nn.Conv1d(6, 6, 1), b=nn.Conv1d(6, 5, 1)),
        X,
    ),
    "viewed in other rows": (
        lambda: Net(lambda m, x: m.b(m.a(x).reshape(8, 6, 4)), a=nn.Conv1d(6, 6, 1), b=nn.Conv1d(6, 5, 1)),
        X,
    ),
    "divided with rounding": (
        lambda: Net(lambda m, x: m.b(m.a(x).div(0.5, rounding_mode="floor")), a=linear(), b=linear()),
        X,
    ),
    "cast to integers": (lambda: Net(lambda m, x: m.b(m.a(x).to(torch.int32) * 0.5), a=linear(), b=linear()), X),
    "a norm's bias alone": (
        lambda: Net(lambda m, x: m.fc(F.layer_norm(x, (8,), None, m.bias)), bias=parameter(8), fc=linear()),
        X,
    ),
    "a norm whose weight is computed": (
        lambda: Net(
            lambda m, x: m.fc(F.layer_norm(x, (8,), 1 + m.g, m.b)), g=parameter(8), b=parameter(8), fc=linear()
        ),
        X,
    ),
    "statistics that are parameters": (
        lambda: Net(
            lambda m, x: m.c(F.batch_norm(x, m.mean, m.var, m.weight, m.bias)),
            **dict(mean=parameter(8), weight=parameter(8), bias=parameter(8), var=nn.Parameter(torch.ones(8))),
            c=nn.Conv2d(8, 4, 1),
        ),
        IMAGE,
    ),
    "a factor along another axis": (
        lambda: Net(lambda m, x: m.c(F.relu6(m.d(x)) * m.p), p=parameter(8), **two()),
        IMAGE,
    ),
    "a layer's computed bias": (
        lambda: Net(lambda m, x: m.b(F.linear(x, m.a.weight, m.a.bias * 2)), a=linear(), b=linear()),
        X,
    ),
}


def two() -> dict[str, nn.Module]:
    return {"c": nn.Conv2d(8, 4, 1), "d": nn.Conv2d(8, 8, 1)}


@pytest.mark.parametrize("make, shape", NOT_ABSORBED.values(), ids=list(NOT_ABSORBED))
def test_is_not_absorbed(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    source = prepared(make().eval(), torch.randn(shape))
    assert absorbing(source) <= {"d"}


@pytest.mark.parametrize("make, shape", NOT_ABSORBED.values(), ids=list(NOT_ABSORBED))
def test_what_is_not_absorbed_is_multiplied(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    source = prepared(model, x)
    recipe = Recipe({}, hostile(source, 0))
    built = Engine().build(source, recipe).model
    with torch.no_grad():
        wanted, got = model(x), built(x)
    pairs = [(wanted, got)] if isinstance(wanted, Tensor) else []
    if isinstance(wanted, Both):
        pairs = [(wanted.result, got.result), (wanted.hidden, got.hidden)]
    for exact, same in pairs or zip(wanted, got, strict=True):
        torch.testing.assert_close(same, exact, rtol=0, atol=ROUNDING * float(exact.abs().max()))


def embedding_head(m: Any, tokens: Tensor) -> Tensor:
    return m.head(m.norm(m.embedding(tokens)))


def rows_overlap(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = m.a(x)
    return F.linear(h, m.w[:4]), F.linear(h, m.w)


SHARED_WEIGHTS: dict[str, Callable[[], Net]] = {
    "a matmul reads it too": lambda: Net(inside_twice, a=norm(), fc=linear(), b=linear()),
    "a sum reads it too": lambda: Net(lambda m, x: m.fc(m.a(x))[0, :6] + m.fc.weight[:6], a=norm(), fc=linear()),
    "its norm is computed": lambda: Net(lambda m, x: m.fc(m.a(x)) / m.fc.weight.norm(), a=norm(), fc=linear()),
    "it is returned transposed": lambda: Net(lambda m, x: (m.fc(m.a(x)), m.fc.weight.T), a=norm(), fc=linear()),
    "rows overlap": lambda: Net(rows_overlap, a=norm(), w=parameter(8, 8)),
    "both ways round": lambda: Net(
        lambda m, x: (lambda h: F.linear(h, m.w) + F.linear(h, m.w.T))(m.a(x)), a=norm(), w=parameter(8, 8)
    ),
    "a module called on two inputs": lambda: Net(lambda m, x: m.fc(m.a(x)) + m.fc(x), a=norm(), fc=linear()),
}


@pytest.mark.parametrize("make", SHARED_WEIGHTS.values(), ids=list(SHARED_WEIGHTS))
def test_a_weight_that_something_else_reads_is_left_alone(make: Callable[[], Net]) -> None:
    torch.manual_seed(0)
    source = check(make(), torch.randn(X))
    assert not {"fc", "linear", "linear#2"} & {call for group in source.graph.groups.values() for call in group.calls}


def test_a_head_tied_to_the_embedding_is_left_alone() -> None:
    torch.manual_seed(0)
    model = Net(embedding_head, embedding=nn.Embedding(20, 8), norm=norm(), head=nn.Linear(8, 20, bias=False))
    model.head.weight = model.embedding.weight  # type: ignore[union-attr]
    source = check(model, torch.randint(0, 20, (3, 5)))
    # its own module holds the weight under its own name: the copy gets one apart from the embedding
    scaled = source.under(Recipe({}, hostile(source, 0))).model
    assert torch.equal(scaled.get_parameter("embedding.weight"), model.embedding.weight)  # type: ignore[union-attr]


def test_an_activation_read_along_two_axes_is_scaled_along_the_first() -> None:
    model = Net(lambda m, x: (lambda h: (m.c(h), m.fc(h)))(x.relu()), c=nn.Conv1d(6, 5, 1), fc=linear())
    assert [g.calls for g in check(model, torch.randn(X)).graph.groups.values()] == [("c",)]


def test_a_call_is_in_one_group_only() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = m.a(x), m.b(x)
        return m.c(a * b), m.d(a)  # the product could be divided by way of either factor

    groups = check(Net(forward, a=linear(), b=linear(), c=linear(), d=linear()), torch.randn(X)).graph.groups.values()
    calls = [call for group in groups for call in group.calls]
    assert sorted(calls) == ["a", "b", "c", "d"]


# ---- what no record sees -----------------------------------------------------------------------------------------


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {"a scripted function": scripted, "vmap": torch.vmap(torch.sin)}


@pytest.mark.parametrize("function", UNSEEN.values(), ids=list(UNSEEN))
def test_a_reader_that_is_not_recorded_makes_the_scales_computed(
    function: Callable[[Tensor], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = m.norm(x)
        return m.fc(h), function(h)

    model, x = Net(forward, norm=norm(), fc=linear()).eval(), torch.randn(X)
    source = prepared(model, x)
    assert_unchanged(model, source, Recipe({}, hostile(source, 0)), (x,))
    assert "can't be absorbed" in caplog.text


def test_scales_that_change_the_model_raise() -> None:
    model, x = Net(lambda m, x: F.linear(m.norm(x), m.copied[0]), norm=norm(), fc=linear()).eval(), torch.randn(X)
    model.copied = [model.fc.weight]  # type: ignore[union-attr]
    source = prepared(model, x)
    with pytest.raises(RecipeError, match="change what the model computes in fp32"):
        source.under(Recipe({}, hostile(source, 0)))


def test_an_activation_that_is_written_to_absorbs_nothing() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            h[:, 0] = 1.0
            return self.linear(h)

    (group,) = deployable(Model().eval(), (torch.randn(3, 8),), {})[1].groups.values()
    assert not group.producers
