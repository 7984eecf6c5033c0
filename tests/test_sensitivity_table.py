"""The table of `raysq.sensitivity`, and what its cache saves."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from sensitivities.models import Residual, recipe_of
from torch import nn

import raysq
from raysq.errors import CalibrationError, OptionError, StorageError
from raysq.recipe import FP32, Recipe
from raysq.sensitivities import MSEv2, get, rank
from raysq.sensitivity_cache import FILE
from raysq.source import Source


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def calib(labels: int = 3) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 16, generator=generator), torch.randint(labels, (8,), generator=generator)) for _ in range(2)
    ]


ask = partial(raysq.sensitivity, backend="reference")


@dataclass(frozen=True)
class Counting:
    """Notes which calls it was asked for, and dies of one of them."""

    name: ClassVar[str] = "counting"
    one_pass: ClassVar[bool] = False

    weight: float = 1.0
    asked: ClassVar[list[str]] = []
    deadly: ClassVar[set[str]] = set()

    def scores(
        self, source: Source, recipe: Recipe, calls: Sequence[str] | None = None, floats: Collection[str] = ()
    ) -> dict[str, float]:
        assert calls is not None
        if self.deadly & set(calls):
            raise KeyboardInterrupt
        self.asked.extend(calls)
        return {call: self.weight * len(call) for call in calls if call != "last"}


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setattr(Counting, "asked", [])
    monkeypatch.setattr(Counting, "deadly", set())
    monkeypatch.setattr("raysq.sensitivity_table.SHARE", 2)
    return Counting()


def test_a_row_per_call_the_most_sensitive_first(model: nn.Module) -> None:
    table = ask(model, calib(), "mse_v2")
    prepared = raysq.prepare(model, calib(), backend="reference")
    costs = MSEv2().scores(prepared.source, prepared.space.default())
    assert tuple(table["call"]) == rank(costs)
    assert table.set_index("call")["cost"].to_dict() == costs
    assert list(table.columns) == ["call", "op", "block", "cost", "share", "macs"]
    assert table["share"].sum() == pytest.approx(1)
    assert (table["share"] >= 0).all()  # of a negative cost too
    first = table.set_index("call").loc["first"]
    assert (first["op"], first["macs"]) == ("linear", 8 * 16 * 16)


def test_another_recipe_may_leave_calls_out(model: nn.Module) -> None:
    prepared = raysq.prepare(model, calib(), backend="reference")
    recipe = recipe_of(prepared.source).with_ops({"left": FP32})
    assert set(ask(model, calib(), recipe=recipe)["call"]) == set(prepared.source.graph.by_name) - {"left"}


def test_labels_reach_the_loss(model: nn.Module) -> None:
    table = ask(model, calib(), "hawq_v2", method_kwargs={"loss": F.cross_entropy, "max_passes": 1})
    assert set(table["call"]) == {"first", "left", "right", "last"}
    with pytest.raises(CalibrationError, match="labels"):
        ask(model, [x for x, _ in calib()], "hawq_v2", method_kwargs={"loss": F.cross_entropy})


def test_what_is_known_is_not_measured_again(model: nn.Module, counting: Counting, tmp_path: Path) -> None:
    first = ask(model, calib(), counting, cache=tmp_path)
    assert len(counting.asked) == 5
    again = ask(model, calib(), counting, cache=tmp_path)
    assert len(counting.asked) == 5  # "last", for which there is no cost, included
    assert again.equals(first)
    assert "last" not in set(first["call"])


@pytest.mark.parametrize("change", ["model", "data", "labels", "recipe", "seed", "argument", "method"])
def test_another_question_is_measured(model: nn.Module, counting: Counting, tmp_path: Path, change: str) -> None:
    ask(model, calib(), counting, cache=tmp_path)
    given: dict[str, Any] = {"model": model, "calib": calib(), "method": counting}
    prepared = raysq.prepare(model, calib(), backend="reference")
    given |= {
        "model": {"model": Residual().eval()},
        "data": {"calib": [(x + 1, y) for x, y in calib()]},
        "labels": {"calib": [(x, y * 2) for x, y in calib()]},
        "recipe": {"recipe": prepared.space.default().with_ops({"left": FP32})},
        "seed": {"seed": 1},
        "argument": {"method": Counting(weight=2.0)},
        "method": {"method": "mse"},
    }[change]
    before = len(counting.asked)
    table = ask(**given, cache=tmp_path)
    assert len(counting.asked) - before == {"recipe": 4, "method": 0}.get(change, 5)
    assert len(table) == {"recipe": 3, "method": 5}.get(change, 4)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (F.cross_entropy, F.nll_loss),
        (partial(F.cross_entropy, label_smoothing=0.1), partial(F.cross_entropy, label_smoothing=0.2)),
        (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.2)),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), nn.CrossEntropyLoss(weight=torch.ones(3))),
    ],
    ids=["functions", "partial", "settings", "tensors"],
)
def test_another_loss_is_another_question(model: nn.Module, tmp_path: Path, one: Any, other: Any) -> None:
    for loss, lines in ((one, 5), (one, 5), (other, 10)):
        ask(model, calib(), "fisher", method_kwargs={"loss": loss}, cache=tmp_path)
        assert len((tmp_path / FILE).read_bytes().splitlines()) == lines


def test_a_killed_run_goes_on_with_what_is_left(
    model: nn.Module, counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(model, calib(), counting)
    counting.asked.clear()
    monkeypatch.setattr(Counting, "deadly", {"last"})
    with pytest.raises(KeyboardInterrupt):
        ask(model, calib(), counting, cache=tmp_path)
    done = list(counting.asked)
    assert done
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"question": {"model": "torn')
    monkeypatch.setattr(Counting, "deadly", set())
    assert ask(model, calib(), counting, cache=tmp_path).equals(whole)
    assert len(counting.asked) == 5  # none of them twice
    lines = (tmp_path / FILE).read_text().splitlines()
    assert [json.loads(line)["call"] for line in lines] == counting.asked


def test_a_damaged_line_is_named(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{}\nnonsense\n")
    with pytest.raises(StorageError, match="line 1 is damaged: KeyError.*Remove that line"):
        ask(model, calib(), cache=tmp_path)


def test_a_cache_that_cannot_be_written_is_an_error(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Pass another `cache`"):
        ask(model, calib(), cache=tmp_path / "file")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "msev2"}, "unknown sensitivity 'msev2'.*Did you mean 'mse_v2'"),
        ({"method": MSEv2}, "must be a name or a Sensitivity"),
        ({"method": MSEv2(), "method_kwargs": {"confidence_batches": 3}}, "give an instance its own arguments"),
        ({"method_kwargs": {"loss": F.cross_entropy}}, "sensitivity 'mse' takes no arguments, got 'loss'"),
        ({"method": "probe", "method_kwargs": {"item": 3}}, "unknown argument.* Did you mean 'items'"),
        ({"method": "hawq_v2"}, "'hawq_v2' needs the loss"),
        ({"parallel": 0}, "`parallel` must be True, False or a whole number of at least 1, got 0"),
        ({"parallel": "yes"}, "`parallel` must be"),
    ],
)
def test_arguments_that_cannot_be_used(model: nn.Module, given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ask(model, calib(), **given)


def test_calibration_is_needed(model: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="pass `calib`"):
        ask(model, None, approach="dynamic", example_inputs=(torch.randn(1, 16),))


def test_named_ones_take_their_arguments() -> None:
    assert get("mse_v2", confidence_batches=4) == MSEv2(4)
