"""What oneDNN prints, read; and single calls timed inside of a real int8 model."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from raysq.kernels import base
from raysq.kernels.base import Profiling
from raysq.kernels.call_times import int8_times
from raysq.kernels.profile import Primitive, profile
from raysq.prepared import Prepared, prepare
from raysq.recipe import Precision
from raysq.source import Source

HEAD = "onednn_verbose,v1,primitive,exec,cpu"
INT8 = "src:u8:a::f0 wei:s8:a::f0 dst:f32:a::f0,attr"
FP32 = "src:f32:a::f0 wei:f32:a::f0 dst:f32:a::f0,attr"
CONV = "mb8_ic3oc24_ih32oh16kh3sh2dh0ph1_iw32ow16kw3sw2dw0pw1"
DEPTHWISE = "g24mb8_ic24oc24_ih16oh16kh3sh1dh0ph1_iw16ow16kw3sw1dw0pw1"
LINES = {
    f"{HEAD},convolution,jit,forward,{INT8},alg:direct,{CONV},0.5": Primitive(
        8 * 24 * 16 * 16 * 3 * 9, True, 0.5, "convolution", CONV
    ),
    f"{HEAD},convolution,brg,forward,{FP32},alg:direct,{DEPTHWISE},1e-05": Primitive(
        8 * 24 * 256 * 9, False, 1e-05, "convolution", DEPTHWISE
    ),
    f"{HEAD},matmul,gemm:jit,undef,{INT8},,8x256:256x10,0.02": Primitive(
        8 * 256 * 10, True, 0.02, "matmul", "8x256:256x10"
    ),
    f"{HEAD},matmul,gemm:jit,undef,{INT8},,2x4x8x16:2x4x16x8,0.02": Primitive(
        2 * 4 * 8 * 16 * 8, True, 0.02, "matmul", "2x4x8x16:2x4x16x8"
    ),
    f"{HEAD},inner_product,brg,forward,{FP32},,mb4ic16oc8,3": Primitive(
        4 * 16 * 8, False, 3.0, "inner_product", "mb4ic16oc8"
    ),
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_read(line: str) -> None:
    assert profile(lambda: None, _Printing(line)) == [LINES[line]]


@pytest.mark.parametrize(
    "line",
    [
        f"{HEAD},reorder,jit:uni,undef,src:f32:a::f0 dst:u8:a::f0,attr,,8x3x32x32,0.009",  # multiplies nothing
        "onednn_verbose,v1,info,oneDNN v3.7.2",
        "the user's own print, 1.0",
    ],
)
def test_what_is_no_product_is_passed_over(line: str) -> None:
    assert profile(lambda: None, _Printing(line)) == []


def test_a_convolution_of_each_channel_by_itself_is_depthwise() -> None:
    grouped = CONV.replace("mb8_ic3", "g3mb8_ic24")
    assert [Primitive(1, True, 1.0, "convolution", p).is_depthwise for p in (CONV, DEPTHWISE, grouped)] == [
        False,
        True,
        False,
    ]


class _Printing:
    """Prints a line at the level of file descriptors, as oneDNN does."""

    def __init__(self, line: str) -> None:
        self._line = line

    def __enter__(self) -> None:
        os.write(1, f"{self._line}\n".encode())

    def __exit__(self, *exc: object) -> None: ...


def test_standard_output_is_given_back_where_the_run_fails(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        profile(fail, nullcontext())
    print("seen", flush=True)
    assert "seen" in capfd.readouterr().out


class Net(nn.Module):
    """Convolutions of equal size one after the other, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.twin1, self.twin2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twin2(self.twin1(self.stem(x).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    torch.manual_seed(0)
    return prepare(Net().eval(), [torch.randn(4, 3, 16, 16)], backend="ipex", num_threads=1)


def test_primitives_go_to_the_calls_with_their_products_in_order(prepared: Prepared) -> None:
    calls = list(prepared.source.graph.calls)
    primitives = [Primitive(call.macs, True, float(i + 1)) for i, call in enumerate(calls)]
    in_float = Primitive(calls[0].macs, False, 0.0)
    slower = [Primitive(p.macs, True, p.ms + 1) for p in primitives]
    found = int8_times([[in_float, *primitives], slower], calls)
    assert found == {call.name: float(i + 1) for i, call in enumerate(calls)}


@pytest.mark.parametrize("name", ["ipex", "onednn"])
def test_every_call_that_runs_in_int8_is_timed(name: str, prepared: Prepared) -> None:
    engine = base.get(name)
    assert isinstance(engine, Profiling)
    source: Source = prepared.source
    recipe = prepared.space.default()
    times = engine.call_times(source, recipe)
    assert times.keys() == source.graph.by_name.keys()
    for name in recipe.int8_calls:
        assert times[name].ms.keys() >= {Precision.INT8, Precision.FP32}
        assert all(ms > 0 for ms in times[name].ms.values()) and times[name].entry_ms > 0
