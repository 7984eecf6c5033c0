"""The script that compares int8 products with the machine's peak: what it computes beside measuring."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from raysq.kernels.profile import Primitive

GEMM = Primitive(100_000_000, True, 1.0, "matmul", "100x1000:1000x1000")  # 0.2 TOPS
DEPTHWISE = Primitive(1_000_000, True, 0.5, "convolution", "g8mb1_ic8oc8")
SMALL = Primitive(1000, True, 0.01, "inner_product", "mb1ic10oc100")
FLOAT = Primitive(1000, False, 0.25, "matmul", "1x10:10x100")


@pytest.fixture
def script(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("limit")


def test_equal_products_share_a_line_and_small_ones_too(script: ModuleType) -> None:
    table = script.table("net, ipex", [DEPTHWISE, GEMM, SMALL, GEMM, FLOAT], model_ms=5.0, peak=0.4)
    title, _, head, _, *rows = table.splitlines()
    assert title == "**net, ipex**, 5 ms" and all(row.count("|") == head.count("|") for row in rows)
    assert rows == [
        "| matrix product | `100x1000:1000x1000` | 2 | 2 | 40% | 0.200 | 50% |",
        "| depthwise convolution | `g8mb1_ic8oc8` | 1 | 0.5 | 10% | 0.004 | 1% |",
        "| others |  | 1 | 0.01 | 0% | 0.000 | 0% |",
        "| **all but depthwise** |  | 3 | 2.01 | 40% | 0.199 | 50% |",
        "| not int8 products | float products 0.25 ms | | 2.49 | 50% | | |",
    ]


def test_the_fastest_time_of_each_product_counts(script: ModuleType) -> None:
    slow = Primitive(GEMM.macs, True, 3.0, GEMM.kind, GEMM.problem)
    other = [SMALL]  # a run of other primitives: the first may compile, and time reference kernels
    assert script.fastest([other, [GEMM, DEPTHWISE], [slow, DEPTHWISE]]) == [GEMM, DEPTHWISE]


def test_the_peak_is_what_a_product_reaches(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "_ms", lambda run: (run(), 0.5)[1])
    assert script.peak_tops(64) == pytest.approx(2 * 64**3 / 0.5e-3 / 1e12)
