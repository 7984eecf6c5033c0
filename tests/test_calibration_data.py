"""What of a calibration batch is an input and what a label, and how much of the data is read."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from raysq.calibration_data import Batch, Calibration, peek, samples
from raysq.errors import CalibrationError, OptionError

X, Y, Z = torch.arange(8.0).view(4, 2), torch.arange(4), torch.ones(4, 2)


class One(nn.Module):
    """One input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Two(nn.Module):
    """Two required inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x


class Flag(nn.Module):
    """One input and a flag, which no tensor can be."""

    def forward(self, x: Tensor, probabilities: bool = False) -> Tensor:
        return x


class Optional(nn.Module):
    """A second input that may be left out."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


class Variadic(nn.Module):
    """Any number of inputs."""

    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0]


class Labelled(nn.Module):
    """Takes its labels, as Hugging Face models do."""

    def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return x


def read(model: nn.Module, data: Any, **kwargs: Any) -> list[Batch]:
    """All batches."""
    return list(Calibration(data, **kwargs).batches(model))


@pytest.mark.parametrize(
    ("model", "batch", "args", "kwargs", "target"),
    [
        (One(), X, (X,), {}, None),
        (One(), (X,), (X,), {}, None),
        (One(), [X, Y], (X,), {}, Y),
        (Flag(), (X, Y), (X,), {}, Y),
        (Two(), (X, Z), (X, Z), {}, None),
        (Two(), (X, Z, Y), (X, Z), {}, Y),
        (Optional(), X, (X,), {}, None),
        (Optional(), (X, Z, Y), (X, Z), {}, Y),
        (Variadic(), X, (X,), {}, None),
        (One(), {"x": X, "label": Y}, (), {"x": X}, Y),
        (Labelled(), {"x": X, "mask": Z, "labels": Y}, (), {"x": X, "mask": Z}, Y),
        (Labelled(), UserDict({"x": X}), (), {"x": X}, None),
    ],
)
def test_inputs_and_label_by_signature(model: nn.Module, batch: Any, args: Any, kwargs: Any, target: Any) -> None:
    (found,) = read(model, [batch])
    assert [id(a) for a in found.args] == [id(a) for a in args]
    assert {k: id(v) for k, v in found.kwargs.items()} == {k: id(v) for k, v in kwargs.items()}
    assert found.target is target


@pytest.mark.parametrize("model", [Optional(), Variadic(), Labelled()])
def test_ambiguous_pair_is_refused_with_the_line_to_write(model: nn.Module) -> None:
    with pytest.raises(CalibrationError) as caught:
        read(model, [(X, Y)])
    assert "calib=raysq.Calibration(loader, inputs=lambda b: b[0], target=lambda b: b[1])" in str(caught.value)


@pytest.mark.parametrize("inputs", [lambda b: b[0], lambda b: (b[0],), lambda b: {"x": b[0]}])
def test_that_line_settles_it(inputs: Any) -> None:
    (found,) = read(Optional(), [(X, Y)], inputs=inputs, target=lambda b: b[1])
    assert [*found.args, *found.kwargs.values()] == [X]
    assert found.target is Y


@pytest.mark.parametrize(
    ("model", "data", "says"),
    [
        (One(), [], "at least one batch, got none"),
        (One(), lambda model: None, "didn't call the model"),
        (One(), [(X, Y, Z)], "3 items doesn't fit"),
        (Two(), [X], "missing a required argument: 'y'"),
        (One(), [{"x": X, "extra": Y}], "takes no 'extra'"),
        (Labelled(), [{"mask": X}], "missing a required argument: 'x'"),
        (One(), [X.to("meta")], "Move it"),
        (One(), [[1, 2]], "holds no tensor"),
    ],
)
def test_data_that_does_not_fit(model: nn.Module, data: Any, says: str) -> None:
    with pytest.raises(CalibrationError, match=says):
        read(model, data)


@pytest.mark.parametrize("data", [X, {"x": X}, "digits", 5, TensorDataset(X)])
def test_what_is_not_an_iterable_of_batches(data: Any) -> None:
    with pytest.raises(CalibrationError, match="iterable of batches"):
        Calibration(data)


@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_calib_samples_out_of_range(count: Any) -> None:
    with pytest.raises(OptionError, match="calib_samples"):
        Calibration([X], calib_samples=count)


@pytest.mark.parametrize(("count", "sizes"), [(None, [4, 4, 2]), (3, [3]), (4, [4]), (6, [4, 2]), (99, [4, 4, 2])])
def test_calib_samples_counts_samples_and_cuts_the_last_batch(count: int | None, sizes: list[int]) -> None:
    loader = DataLoader(TensorDataset(torch.randn(10, 2), torch.arange(10)), batch_size=4)
    for data in (loader, lambda model: [model(x) for x, _ in loader]):
        assert [samples(batch) for batch in read(One(), data, calib_samples=count)] == sizes
    assert [len(batch.target) for batch in read(One(), loader, calib_samples=count)] == sizes


def test_cut_leaves_what_has_no_batch_axis() -> None:
    (found,) = read(Two(), [(X, torch.ones(1, 2))], calib_samples=2)
    assert [tuple(a.shape) for a in found.args] == [(2, 2), (1, 2)]


def test_no_batch_is_read_beyond_what_is_needed() -> None:
    pulled = []

    def data() -> Iterator[Tensor]:
        for index in range(5):
            pulled.append(index)
            yield X

    assert len(read(One(), data(), calib_samples=8)) == 2
    assert pulled == [0, 1]


def test_peek_reads_nothing_twice() -> None:
    first, batches = peek(Calibration(iter([X, Z])).batches(One()))
    assert first.args[0] is X
    assert [batch.args[0] for batch in batches] == [X, Z]


def test_callable_runs_the_model_and_leaves_no_hook() -> None:
    model = One()
    outputs = []
    found = read(model, lambda m: outputs.extend([m(X), m(x=Z)]))
    assert [(len(b.args), list(b.kwargs)) for b in found] == [(1, []), (0, ["x"])]
    assert outputs == [X, Z]
    assert not model._forward_pre_hooks


def test_of_keeps_a_calibration_as_it_is() -> None:
    calibration = Calibration([X], calib_samples=2)
    assert Calibration.of(calibration) is calibration
    assert Calibration.of([X]) == Calibration([X])
