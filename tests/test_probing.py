"""A probe finds what of the default recipe a backend can't build, builds wrong, or doesn't fuse."""

import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from raysq.errors import BackendError
from raysq.graph import OpType
from raysq.inspection import deployable
from raysq.kernels import reference
from raysq.kernels.executed import NOT_FUSED
from raysq.observation import observe
from raysq.probing import probe
from raysq.recipe import Recipe
from raysq.source import Source
from raysq.space import SearchSpace, build_space


class Net(nn.Module):
    """A residual sum between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.fc1(x))
        return self.fc2(h + x)


class Flawed:
    """The reference backend with a flaw in what it builds."""

    name = "flawed"

    def __init__(self, flaw: Callable[[list[OpType], Any], Any]) -> None:
        self._flaw = flaw
        self.builds = 0

    def build(self, source: Source, recipe: Recipe) -> Any:
        self.builds += 1
        built = reference.Engine().build(source, recipe)
        return self._flaw([source.graph[name].op for name in recipe.int8_calls], built)


def replaced(built: Any, model: Any = None, left: Mapping[str, str] | None = None) -> Any:
    return SimpleNamespace(
        backend=Flawed.name, model=model or built.model, left_in_float=left or {}, executed=built.executed
    )


def fails(op: OpType) -> Callable[[list[OpType], Any], Any]:
    def flaw(ops: list[OpType], built: Any) -> Any:
        if op in ops:
            raise BackendError("no primitive")
        return replaced(built)

    return flaw


def errs(*wrong: OpType) -> Callable[[list[OpType], Any], Any]:
    def flaw(ops: list[OpType], built: Any) -> Any:
        return replaced(built, lambda x: built.model(x) * (10 if set(wrong) & set(ops) else 1))

    return flaw


def crawls(*slow: OpType) -> Callable[[list[OpType], Any], Any]:
    def flaw(ops: list[OpType], built: Any) -> Any:
        def model(x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.15 if set(slow) & set(ops) else 0)
            return built.model(x)

        return replaced(built, model)

    return flaw


def idle(*names: str) -> Callable[[list[OpType], Any], Any]:
    return lambda ops, built: replaced(built, left=dict.fromkeys(names, NOT_FUSED))


@pytest.fixture(scope="module")
def given() -> tuple[SearchSpace, Source]:
    torch.manual_seed(0)
    example = (torch.randn(8, 16),)
    model, graph = deployable(Net().eval(), example, {})
    source = Source(model, graph, observe(model, graph, [(example, {})]), example)
    return build_space(graph, reference.Engine().capabilities()), source


@pytest.mark.parametrize(
    ("flaw", "left", "reason"),
    [
        (lambda ops, built: replaced(built), set(), ""),
        (fails(OpType.ADD), {"add"}, "int8 add fails in this model: no primitive"),
        (errs(OpType.ADD), {"add"}, "int8 add computes something else than the recipe says, on this CPU"),
        (idle("fc2"), {"fc2"}, NOT_FUSED),
        (errs(OpType.ADD, OpType.LINEAR), set(), ""),  # no single kind is to blame: the scores decide
    ],
    ids=["sound", "fails", "errs", "idle", "errs all over"],
)
def test_what_does_not_work_loses_int8(given: Any, flaw: Any, left: set[str], reason: str) -> None:
    space, source = given
    named = {name: "add" if source.graph[name].op is OpType.ADD else name for name in space.options}
    probed = probe(space, source, Flawed(flaw))
    assert {named[name] for name in probed.left_in_float} == left
    assert set(probed.left_in_float.values()) == ({reason} if reason else set())
    for name, configs in probed.space.options.items():
        assert any(c.is_int8 for c in configs) == (named[name] not in left)


def test_int8_that_errs_all_over_is_warned_of(given: Any, caplog: pytest.LogCaptureFixture) -> None:
    probe(*given, Flawed(errs(OpType.ADD, OpType.LINEAR)))
    assert "int8 as a whole computes something else than the recipe says" in caplog.text


def test_a_sound_backend_is_built_once(given: Any) -> None:
    engine = Flawed(lambda ops, built: replaced(built))
    assert probe(*given, engine).build_s > 0
    assert engine.builds == 1


def test_a_backend_that_builds_nothing_is_an_error(given: Any) -> None:
    def flaw(ops: list[OpType], built: Any) -> Any:
        raise BackendError("no primitive")

    with pytest.raises(BackendError, match="no primitive"):
        probe(*given, Flawed(flaw))


def test_where_everything_is_idle_the_space_stays(given: Any) -> None:
    space, source = given
    probed = probe(space, source, Flawed(idle(*space.options)))
    assert probed.space is space and probed.left_in_float == {}


def test_a_kind_that_crawls_stays_in_float(given: Any) -> None:
    space, source = given
    engine = Flawed(crawls(OpType.ADD))
    found = probe(space, source, engine)
    assert {name: source.graph[name].op for name in found.left_in_float} == {"add": OpType.ADD}
    assert "reference kernel" in found.left_in_float["add"]
    assert {source.graph[name].op for name in found.space.default().int8_calls} == {OpType.LINEAR}
    assert engine.builds == 2
