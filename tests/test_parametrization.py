"""Computed weights become plain ones in the copy that is quantized, and stay computed in the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from raysq.inspection import deployable
from raysq.parametrization import bake
from raysq.tuning import shipping


def _older(name: str) -> Callable[[nn.Module], nn.Module]:
    def apply(module: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch recommends the newer ones
            return getattr(nn.utils, name)(module)

    return apply


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "older weight norm": _older("weight_norm"),
    "older spectral norm": _older("spectral_norm"),
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
}


@pytest.fixture(params=COMPUTED)
def model(request) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3))
    for index in (0, 3):
        COMPUTED[request.param](model[index])
    model(torch.randn(16, 4, 9))  # leaves tensors of an autograd graph in the modules, as training does
    return model.eval()


def test_the_copy_computes_the_same_from_plain_weights(model: nn.Module) -> None:
    x = torch.randn(2, 4, 9)
    wanted = model(x).detach()
    before = copy.deepcopy(model.state_dict())
    deployed, graph = deployable(model, (x,), {})
    assert torch.allclose(deployed(x), wanted, atol=1e-5)
    assert [(call.name, call.weight) for call in graph.calls] == [("0", "0.weight"), ("3", "3.weight")]
    assert graph.folded == (("0", "1"),)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(p, nn.Parameter) for p in (model[0].weight, model[3].weight))  # still computed
    assert torch.equal(model(x), wanted)


def test_the_copy_can_be_sent_to_workers(model: nn.Module) -> None:
    deployed = deployable(model, (torch.randn(2, 4, 9),), {})[0]
    sent = shipping.unpack(shipping.pack_model(deployed))
    assert all(torch.equal(tensor, sent.state_dict()[name]) for name, tensor in deployed.state_dict().items())


def test_a_plain_module_is_left_as_it_is() -> None:
    linear = nn.Linear(3, 4)
    weight = linear.weight
    assert bake(linear) is linear
    assert linear.weight is weight
