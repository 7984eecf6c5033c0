"""The shift of the output against its closed form and against torch's convolutions on whole images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raysq.arithmetic import Grid, qparams
from raysq.bias_correction import output_shift
from raysq.graph import Call, OpType
from raysq.layer import outputs, rounded, tensor

LINEAR = Call("c", OpType.LINEAR, "c", "", ("c/0",), ((1, 7),), (1, 4), "w", (4, 7), 1, 0, None, None)
COARSE = Grid(0, 15, symmetric=False)  # 4 bits: shifts that can't be missed


def coarse(x: Tensor) -> Tensor:
    return rounded(x, qparams(float(x.min()), float(x.max()), COARSE))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_is_the_difference_of_the_mean_outputs(generator):
    x, weight = torch.randn(200, 7, generator=generator) + 1, torch.randn(4, 7, generator=generator)
    shift = output_shift(LINEAR, x, coarse(x), weight, coarse(weight))
    expected = x.double().mean(0) @ weight.double().T - coarse(x).double().mean(0) @ coarse(weight).double().T
    np.testing.assert_allclose(shift, expected.numpy(), rtol=1e-6, atol=1e-9)
    assert np.abs(shift).max() > 0.01


@pytest.mark.parametrize(
    ("op", "groups", "weight", "row"),
    [
        (OpType.LINEAR, 1, (4, 7), (7,)),
        (OpType.CONV2D, 1, (4, 3, 3, 3), (3, 3, 3)),
        (OpType.CONV1D, 2, (4, 3, 5), (6, 5)),
        (OpType.CONV2D, 6, (6, 1, 3, 3), (6, 3, 3)),
    ],
)
def test_once_added_the_mean_error_is_zero_to_rounding(op, groups, weight, row, generator):
    call = replace(LINEAR, op=op, groups=groups, weight_shape=weight)
    x, w = torch.rand(300, *row, generator=generator), torch.randn(weight, generator=generator)
    before = outputs(call, x, w) - outputs(call, coarse(x), coarse(w))  # (groups, n, outputs)
    shift = tensor(output_shift(call, x, coarse(x), w, coarse(w))).reshape(groups, 1, -1)
    assert (before - shift).mean(1).abs().max() < 1e-6
    assert (before - shift).square().sum() < before.square().sum()


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups", "within"),
    [
        (2, 2, 0, 1, 1e-5),  # places tile the output: exact
        (2, 2, 0, 3, 1e-5),
        (3, 2, 0, 1, 1e-5),  # places overlap: each still adds to every input's output
        (2, 3, 0, 1, 1e-5),  # gaps that only the bias reaches
        (4, 2, 1, 1, 0.1),  # what falls off the border is counted
    ],
)
def test_of_a_transposed_convolution_is_the_mean_over_output_positions(kernel, stride, padding, groups, within):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(6, 9, kernel, stride, padding, groups=groups, bias=False).requires_grad_(False)
    images, weight = torch.rand(5, 6, 16, 16), layer.weight
    exact = layer(images)
    error = exact - functional.conv_transpose2d(
        coarse(images), coarse(weight), stride=stride, padding=padding, groups=groups
    )
    call = replace(
        LINEAR,
        op=OpType.CONV_TRANSPOSE2D,
        groups=groups,
        weight_shape=tuple(weight.shape),
        input_shapes=(tuple(images.shape),),
        output_shape=tuple(exact.shape),
    )
    rows = images.movedim(1, -1).reshape(-1, 6, 1, 1)  # every position is sampled
    shift = output_shift(call, rows, coarse(images).movedim(1, -1).reshape(-1, 6, 1, 1), weight, coarse(weight))
    expected = error.double().mean((0, 2, 3)).numpy()
    assert np.abs(shift - expected).max() < within * np.abs(expected).max()


def test_is_zero_where_nothing_is_rounded(generator):
    x, weight = torch.randn(50, 7, generator=generator), torch.randn(4, 7, generator=generator)
    np.testing.assert_array_equal(output_shift(LINEAR, x, x, weight, weight), np.zeros(4))


@pytest.mark.parametrize("rows", [torch.zeros(0, 7), torch.ones(5, 3)])
def test_is_zero_without_rows_that_fit(rows, generator):
    weight = torch.randn(4, 7, generator=generator)
    shift = output_shift(LINEAR, rows, rows, weight, coarse(weight))
    np.testing.assert_array_equal(shift, np.zeros(4, np.float32))
    assert shift.dtype == np.float32
