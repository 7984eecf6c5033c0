"""Which backend a search runs on, and what a recipe becomes on another."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import raysq
from raysq.capabilities import Capabilities, OpCapability
from raysq.errors import OptionError
from raysq.kernels import base
from raysq.recipe import FP32, Approach, OpConfig, Precision, QuantDType, Recipe, Scheme, TensorConfig, Transform
from raysq.rivals import carried, seeded

INT8 = OpConfig(Precision.INT8)
S8 = OpConfig(Precision.INT8, activation=TensorConfig(QuantDType.S8, Scheme.SYMMETRIC))


class Mixed(nn.Module):
    """A convolution, a product of activations and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8 * 6, 10)

    def forward(self, x):
        y = self.conv(x).flatten(2)
        return self.fc(torch.matmul(y, y.transpose(1, 2))[:, :, :6].flatten(1))


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    return raysq.prepare(Mixed(), [x], backend="reference").source


def engine(name, *kinds, unseen=(), approaches=(Approach.STATIC,), **options):
    """Return a backend with int8 kernels for some kinds of calls."""
    u8, s8 = ((QuantDType.U8, Scheme.AFFINE),), ((QuantDType.S8, Scheme.SYMMETRIC),)
    whole = base.get("reference").capabilities().ops
    granularities = next(iter(whole.values())).granularities
    capability = OpCapability((Precision.INT8, Precision.FP32), approaches, u8, s8, granularities)
    capabilities = Capabilities(name, dict.fromkeys(kinds, capability), (), False, **options)
    found = SimpleNamespace(name=name, capabilities=lambda: capabilities)
    if unseen:
        found.unseen = lambda source: dict.fromkeys(unseen, "it can't be seen")
    return found


def names(engines):
    return [each.name for each in engines]


def test_the_search_runs_on_the_first_that_has_kernels_for_most_of_the_work(source):
    graph = source.graph
    few, all_kinds = engine("few", "linear"), engine("all", "conv2d", "linear", "matmul")
    most = engine("most", "conv2d", "matmul")
    assert sum(c.macs for c in graph.calls if c.op == "linear") < 0.1 * sum(c.macs for c in graph.calls)
    static = (Approach.STATIC,)
    assert names(seeded([few, all_kinds], graph, static)) == ["all", "few"]
    assert names(seeded([few, most, all_kinds], graph, static)) == ["most", "few", "all"]
    dynamic = engine("dynamic", "linear", approaches=(Approach.DYNAMIC,))
    assert names(seeded([all_kinds, dynamic], graph, (Approach.DYNAMIC,))) == ["dynamic", "all"]
    assert names(seeded([few, all_kinds], graph, ())) == ["few", "all"], "nothing to tell them apart by"


def test_a_recipe_keeps_what_the_other_backend_can_run(source):
    conv, product, linear = (call.name for call in source.graph.calls)
    recipe = Recipe({conv: INT8, product: INT8, linear: S8}, transforms=(Transform.BIAS_CORRECTION,))
    rival = engine("rival", "conv2d", "linear")
    assert carried(recipe, source, rival) == recipe.with_ops({product: FP32, linear: FP32})
    assert carried(recipe, source, engine("blind", "conv2d", unseen=[conv])).int8_calls == ()
    assert carried(recipe, source, engine("plain", "conv2d", transforms=())).transforms == ()
    everything = base.get("reference")
    assert carried(recipe, source, everything) == recipe


def test_a_group_is_smoothed_where_all_of_it_may_be(source):
    group = next(name for name, each in source.graph.groups.items() if source.graph[each.calls[0]].op == "linear")
    recipe = Recipe({}, smoothing={group: 0.5})
    assert carried(recipe, source, engine("any", "linear")).smoothing == {group: 0.5}
    assert carried(recipe, source, engine("conv only", "linear", smooths=("Conv2d",))).smoothing == {}


def test_one_model_is_not_built_on_all_backends():
    with pytest.raises(OptionError, match="compares backends"):
        raysq.quantize(nn.Linear(4, 4), [torch.ones(2, 4)], backend="auto")
