"""Alphas by the error of blocks that are replayed as the model called them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysq.graph import OpType
from raysq.inspection import deployable
from raysq.observation import observe
from raysq.recipe import OpConfig, Precision, Recipe, Transform
from raysq.smoothing import Smoothing
from raysq.smoothquant.alphas import tuned_alphas
from raysq.smoothquant.blockwise import _Block, refined_alphas
from raysq.source import Source

INT8 = OpConfig(Precision.INT8)


class Block(nn.Module):
    """Attention that a keyword masks, then a feed-forward."""

    def __init__(self, absorbing: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8) if absorbing else nn.Identity()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        with torch.no_grad():
            for weight in self.norm.parameters():
                weight[1] += 40

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        h = self.norm(x)
        scores = (self.q(h) @ self.k(h).mT).masked_fill(mask[:, None] == 0, -1e9)
        x = x + scores.softmax(-1) @ self.v(h)
        return x + self.fc2(F.gelu(self.fc1(x)))


class Model(nn.Module):
    def __init__(self, absorbing: bool = True) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 8), nn.Linear(8, 4)
        self.before = nn.LayerNorm(8)
        self.blocks = nn.ModuleList(Block(absorbing) for _ in range(2))
        with torch.no_grad():
            self.embedding.weight[:, 2] *= 40
            self.before.weight[3] *= 40
            self.before.weight[6] *= 40

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.before(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.head(x)


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 30, (3, 7), generator=generator)
    return tokens, (torch.arange(7) < torch.tensor([7, 5, 3])[:, None]).long()


def prepared(model: nn.Module, call: Any = inputs) -> Source:
    copy, graph = deployable(model.eval(), call(0), {})
    return Source(copy, graph, observe(copy, graph, [(call(i), {}) for i in range(2)]), call(0))


def all_int8(source: Source) -> Recipe:
    return Recipe({call.name: INT8 for call in source.graph.calls})


def error(source: Source, path: str, recipe: Recipe) -> float:
    """Return the error of a block all of whose calls run under a recipe."""
    inside = [call.name for call in source.graph.calls if call.name.startswith(path)]
    return _Block(source, path, recipe).error(dict(recipe.smoothing), inside)  # type: ignore[arg-type]


@pytest.fixture
def source() -> Source:
    torch.manual_seed(0)
    return prepared(Model())


def test_a_block_is_replayed_with_its_mask(source: Source) -> None:
    block = _Block(source, "blocks.0", Recipe({}))
    tokens, mask = inputs(0)
    assert len(block.inputs) == 6  # every sample of both batches
    assert sorted(int(kwargs["mask"].sum()) for _, kwargs in block.inputs) == [3, 3, 5, 5, 7, 7]
    # in fp32 the replay gives what the model had: a mask that was lost would change it
    assert block.error({}, []) == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        x = source.model.before(source.model.embedding(tokens))  # type: ignore[operator]
        wanted = source.model.blocks[0](x, mask=mask)  # type: ignore[index]
    first = next(
        out for out, (args, _) in zip(block._exact, block.inputs, strict=True) if torch.equal(args[0][0], x[0])
    )
    torch.testing.assert_close(first[0], wanted[0])


@pytest.mark.parametrize("absorbing", [True, False])
def test_alphas_of_a_block_err_least_at_its_output(absorbing: bool) -> None:
    """Compared with a loop that puts the alphas into the whole model and looks at the first block's output."""
    torch.manual_seed(0)
    source = prepared(Model(absorbing))
    recipe = Recipe({call.name: INT8 for call in source.graph.calls if call.op is OpType.LINEAR})
    name = "blocks.0.q/0"
    candidates = [0.5, 0.0, 0.25, 0.75, 1.0]
    found = refined_alphas(source, recipe, {name: 0.5}, {name: candidates})
    errors = []
    for alpha in candidates:
        ops = {n: c for n, c in recipe.ops.items() if n.startswith("blocks.0")}
        outer = observed(source, Recipe(ops, {name: alpha}))
        errors.append(
            float(sum((a - b).square().sum() for a, b in zip(outer, observed(source, Recipe({})), strict=True)))
        )
    assert found[name] == candidates[errors.index(min(errors))]
    assert min(errors) < 0.95 * max(errors)  # it does matter


def observed(source: Source, recipe: Recipe) -> list[Tensor]:
    """Return the outputs of the first block in the whole model, run under a recipe on the calibration data."""
    from raysq.insertion import Insertion
    from raysq.intercept import Interceptor
    from raysq.simulated import Simulated

    scaled = source.under(recipe)
    outputs: list[Tensor] = []
    hook = scaled.model.get_submodule("blocks.0").register_forward_hook(lambda _, __, out: outputs.append(out.clone()))
    for i in range(2):
        insertion = Insertion(scaled.planner.plan(recipe), Simulated())
        with torch.no_grad(), Interceptor(scaled.model, insertion):
            scaled.model(*inputs(i))
    hook.remove()
    return outputs


def test_a_norm_before_the_blocks_may_absorb_what_the_first_one_divides() -> None:
    # the kept inputs are not divided: in the replay the division is a multiplication at the calls
    torch.manual_seed(0)

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).tanh() * self.b(x)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.other = nn.LayerNorm(8), Gate(), Gate()

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(self.norm(x)).tanh())

    source = prepared(Stack(), lambda seed: (torch.randn(6, 8) * (seed + 1),))
    group = source.graph.groups["one.a/0"]
    assert source.graph.blocks == ("one", "other") and group.producers
    assert error(source, "one", Recipe({}, {"one.a/0": 0.7})) == pytest.approx(0, abs=1e-10)
    # nor are they equalized
    assert error(source, "one", Recipe({}, {"one.a/0": 0.7}, (Transform.EQUALIZATION,))) == pytest.approx(0, abs=1e-10)


def test_ties_go_to_the_first_candidate(source: Source) -> None:
    floats = Recipe({})  # nothing runs in int8: every alpha errs alike, up to rounding
    name = "blocks.1.fc1/0"
    assert refined_alphas(source, floats, {name: 0.4}, {name: [0.3, 0.3]}) == {name: 0.3}


def test_groups_outside_of_blocks_keep_their_alpha(source: Source) -> None:
    alphas = {"head/0": 0.9}
    assert refined_alphas(source, all_int8(source), alphas, {"head/0": [0.1, 0.2]}) == alphas


def test_without_kept_inputs_the_alphas_stay(source: Source) -> None:
    assert source.stats is not None
    bare = replace(source, stats=replace(source.stats, items=()))
    recipe = all_int8(source)
    layerwise = tuned_alphas(source, Smoothing(), recipe)
    assert tuned_alphas(bare, Smoothing(enable_blockwise_loss=True), recipe) == layerwise


@pytest.mark.slow
def test_blockwise_alphas_lose_no_more_at_the_blocks_than_layerwise_ones(source: Source) -> None:
    recipe = all_int8(source)
    layerwise = tuned_alphas(source, Smoothing(alpha_step=0.25), recipe)
    blockwise = tuned_alphas(source, Smoothing(alpha_step=0.25, enable_blockwise_loss=True), recipe)
    assert layerwise.keys() == blockwise.keys()
    for path in source.graph.blocks:
        inside = {n for n in layerwise if n.startswith(f"{path}.")}
        before, after = (
            error(source, path, recipe.with_smoothing({n: a for n, a in found.items() if n in inside}))
            for found in (layerwise, blockwise)
        )
        assert after <= before * (1 + 1e-6)


class Cache:
    """As those of transformers: filled by the block that gets it."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def get_seq_length(self) -> int:
        return len(self.seen)


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = self.a(x)
        if cache is not None:
            cache.seen.append(x)
            x = torch.cat(cache.seen, dim=1)
        return self.b(x.tanh()).mean(dim=1, keepdim=True)


class Stack(nn.Module):
    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList((Strict if strict else Cached)() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, Cache())
        return x


class Strict(Cached):
    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        if cache is None:
            raise ValueError("no cache")
        return super().forward(x, cache)


def test_a_key_value_cache_is_not_replayed_as_the_model_left_it() -> None:
    source = prepared(Stack(), lambda seed: (torch.randn(3, 5, 8),))
    block = _Block(source, "blocks.0", Recipe({}))
    assert len(block.inputs) == 6
    assert block.error({}, ()) == 0


def test_a_block_that_fails_by_itself_keeps_its_alphas(caplog: pytest.LogCaptureFixture) -> None:
    source = prepared(Stack(strict=True), lambda seed: (torch.randn(3, 5, 8),))
    alphas = {"blocks.0.a/0": 0.2}
    assert refined_alphas(source, all_int8(source), alphas, {"blocks.0.a/0": [0.1, 0.9]}) == alphas
    assert "no cache" in caplog.text


def test_a_sum_of_the_block_itself_is_quantized_in_the_replay(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[str] = []
    settle = _Block.settle
    monkeypatch.setattr(_Block, "settle", lambda *args: (settled.extend(args[2]), settle(*args))[1])
    refined_alphas(source, all_int8(source), {}, {})
    assert {"blocks.0:add", "blocks.1:matmul", "blocks.1.fc2"} <= set(settled)
