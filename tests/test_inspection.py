"""What inspecting a model finds, whatever way it is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raysq.errors import ModelError
from raysq.graph import OpType
from raysq.inspection import deployable
from raysq.intercept import Interceptor, Operands, Site
from raysq.smoothquant.groups import Producer
from raysq.weight import weight_of


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.fc(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight)
        return torch.matmul(y, y.transpose(0, 1)) @ torch.ones(2, 2)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.conv(x))
        y += x
        return y.relu_()


class Aliased(nn.Module):
    """Reads a tensor under another name after it was changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        z = y
        y.add_(1.0)
        return z


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if float(x.sum()) > 0 else self.b(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


@pytest.mark.parametrize(
    ("model", "shape", "names"),
    [
        (Twice(), (2, 8), ["fc", "fc#2"]),
        (Tied(), (2, 8), ["a", "b"]),
        (Functional(), (2, 8), ["linear", "matmul", "matmul#2"]),
        (InPlace(), (1, 4, 3, 3), ["conv", "add"]),
        (Branching(), (2, 8), None),
        (nn.Linear(8, 8), (2, 8), ["linear"]),
    ],
)
def test_calls_have_names_and_the_model_stays_what_it_computes(model, shape, names) -> None:
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.ones(shape)
    copy, graph = deployable(model, (x,), {})
    assert names is None or [call.name for call in graph.calls] == names
    assert torch.allclose(copy(x.clone()), model(x.clone()), atol=1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_tied_weight_has_the_name_in_the_module_that_reads_it() -> None:
    graph = deployable(Tied().eval(), (torch.randn(2, 8),), {})[1]
    assert [call.weight for call in graph.calls] == ["a.weight", "b.weight"]  # each can be changed for itself


def test_a_weight_that_is_rows_of_a_parameter_or_lies_transposed_is_read_as_such() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.square, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.zeros(8))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            x = nn.functional.linear(self.attention(x, y, y, need_weights=False)[0], self.square[:, :8].t())
            x = torch.addmm(self.bias, x.flatten(0, 1), self.square)
            return nn.functional.linear(x[:, :4], self.square[:, :4])  # columns of one are no weight of their own

    model = Reads().eval()
    graph = deployable(model, (torch.randn(2, 3, 8), torch.randn(2, 5, 8)), {})[1]
    read = [(call.weight, call.weight_start, call.weight_transposed) for call in graph.calls if call.weight_shape]
    assert read == [
        ("attention.in_proj_weight", 0, False),
        ("attention.in_proj_weight", 8, False),
        ("attention.out_proj.weight", 0, False),
        ("square", 0, True),
        ("square", 0, True),
        (None, 0, False),
    ]
    assert weight_of(graph.calls[1], model.attention.in_proj_weight.detach().numpy()).shape == (16, 8)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("padding", "size"), [("valid", 3), ("same", 3), ("same", 4)])
def test_padding_that_is_named_is_spelled_out(padding, size) -> None:
    model = nn.Conv2d(2, 4, size, padding=padding, dilation=(1, 2)).eval()
    x = torch.randn(2, 2, 9, 9)
    seen: list[Operands] = []

    def keep(_: Site, operands: Operands) -> torch.Tensor:
        seen.append(operands)
        return operands.run(operands.activations, operands.weights)

    with torch.no_grad(), Interceptor(model, keep):
        assert torch.equal(model(x), nn.functional.conv2d(x, model.weight, model.bias, 1, padding, (1, 2)))
    assert seen[0].window is not None
    assert isinstance(seen[0].window.padding, str) == (size == 4)  # an odd number of zeros has no symmetric form


def test_in_place_ops_that_are_read_under_another_name_stay() -> None:
    graph = deployable(Aliased().eval(), (torch.randn(2, 8),), {})[1]
    assert not graph.out_of_place
    assert "in place" in graph.left_in_float["add_"]


def test_an_lstm_over_packed_sequences_stays_in_float_and_says_so() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return self.fc(nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])

    graph = deployable(Packed().eval(), (torch.randn(2, 5, 8), torch.tensor([5, 3])), {})[1]
    assert [call.name for call in graph.calls] == ["fc"]
    assert graph.left_in_float == {"lstm:lstm": "an LSTM over packed sequences has no int8 kernel"}


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x, w: torch.tensordot(x, w, 1), "tensordot has no int8 kernel"),
        (lambda x, w: torch.gru_cell(x, x, w.repeat(3, 1), w.repeat(3, 1)), "a single step of a recurrent network"),
        (lambda x, w: torch.addmm(x, x, w, beta=2), "called with these arguments it has no int8 kernel"),
        (lambda x, w: torch.matmul(x, w[0]), "called with these arguments it has no int8 kernel"),
    ],
)
def test_a_product_that_has_no_int8_kernel_says_so(function, says) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(self.first(x), self.weight)

    graph = deployable(Net().eval(), (torch.randn(8, 8),), {})[1]
    assert [call.name for call in graph.calls] == ["first"]
    assert [reason.startswith(says) for reason in graph.left_in_float.values()] == [True]


def test_what_is_written_to_depends_on_what_is_written() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fixed, self.fc = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            room = torch.zeros(4, 8)
            fixed = self.fixed(room)
            room[:2] = x
            return self.fc(room) + fixed

    graph = deployable(Padded().eval(), (torch.randn(2, 8),), {})[1]
    assert graph.constant_calls == ("fixed",)


@pytest.mark.parametrize("fill", [torch.zeros_like, torch.ones_like, lambda x: x.new_full((4, 8), 2.0)])
def test_what_only_the_shape_of_an_input_is_read_for_is_told_apart(fill: Any) -> None:
    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x + self.first(fill(x)))

    graph = deployable(Filled().eval(), (torch.randn(4, 8),), {})[1]
    assert (graph.constant_calls, graph.filled_calls) == ((), ("first",))


def test_batch_norms_are_folded_within_rounding() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(6, 4))
    x = torch.randn(16, 3, 8, 8)
    for _ in range(3):
        model(x)
    model.eval()
    copy, graph = deployable(model, (x,), {})
    assert graph.folded == (("0", "1"),)
    assert isinstance(copy[1], nn.Identity)
    assert torch.allclose(copy(x), model(x), atol=1e-5)


def test_attention_shows_its_linear_layers() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    graph = deployable(model, (torch.randn(2, 5, 16),), {})[1]
    assert sum(call.op is OpType.LINEAR for call in graph.calls) == 8
    assert graph.blocks == ("layers.0", "layers.1")


def test_shared_inputs_blocks_and_producers() -> None:
    graph = deployable(nn.Sequential(Block(), Block()).eval(), (torch.randn(2, 8),), {})[1]
    assert graph.blocks == ("0", "1")
    assert graph.groups["0.up/0"].producers == (Producer(None, ("0.norm.weight", "0.norm.bias")),)
    assert graph.groups["0.down/0"].producers == (Producer("0.up", ("0.up.bias",)),)  # through ReLU
    assert graph["0.up"].macs == 2 * 8 * 16


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.ReLU(), "must have a call that can run in int8"),
        (nn.Linear(3, 4), "must run on the example inputs"),
        (nn.Linear(8, 8).double(), "must be fp32"),
        ("not a model", "torch.nn.Module"),
    ],
)
def test_a_model_that_cannot_be_used_says_why(model, says) -> None:
    with pytest.raises(ModelError, match=says):
        deployable(model, (torch.randn(2, 8),), {})


class Counting(nn.Module):
    """Replaces a buffer in each forward, and reads another as data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.position = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("table", torch.randn(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.fc(x) + self.position(self.table)


def test_buffers_that_are_replaced_or_read_as_data_do_not_stop_it() -> None:
    model = Counting()
    for _ in range(20):  # an address that was freed is taken again now and then
        _, graph = deployable(model, (torch.randn(3, 4),), {})
        assert [call.name for call in graph.calls] == ["fc", "position", "add"]
    assert model.calls == 0
