"""A predicted ratio orders recipes as their multiply-accumulates do."""

import pytest

from raysq.graph import Call, ModelGraph, OpType
from raysq.prediction import predicted_ratio
from raysq.recipe import Precision


def call(name, macs, groups=1, weight_shape=(8, 8)):
    return Call(name, OpType.CONV2D, "", "", (), (), (), None, weight_shape, groups, macs, None, None)


GRAPH = ModelGraph(
    (call("big", 900), call("small", 100), call("deep", 50, 8, (8, 1, 3, 3)), call("free", 0)), (), (), (), {}
)


@pytest.mark.parametrize(
    ("faster", "slower"),
    [
        ({"big": Precision.INT8}, {}),
        ({"big": Precision.INT8}, {"small": Precision.INT8}),
        ({"big": Precision.INT8}, {"big": Precision.BF16}),
        ({"big": Precision.BF16}, {"big": Precision.FP32}),
        ({}, {"deep": Precision.INT8}),  # depthwise convolutions are slower in int8
    ],
)
def test_order(faster, slower):
    assert predicted_ratio(GRAPH, faster) < predicted_ratio(GRAPH, slower)


def test_all_fp32_is_one():
    assert predicted_ratio(GRAPH, {}) == pytest.approx(1)


def test_no_work_is_one():
    assert predicted_ratio(ModelGraph((call("free", 0),), (), (), (), {}), {"free": Precision.INT8}) == 1
