"""What goes through Ray's object store comes out equal, tied where it was tied, without copies of the weights."""

import functools
import importlib
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import ray
import torch
from torch import nn

from raysq.errors import EvaluationError, ModelError
from raysq.tuning.shipping import pack, pack_eval_fn, pack_model, unpack


def trip(value):
    return unpack(pack(value))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int8, torch.int64, torch.complex64],
)
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t,
        lambda t: t.t(),
        lambda t: t[:, ::2],
        lambda t: t[1],
        lambda t: t[0, 0],
        lambda t: t[:0],
        lambda t: t.expand(3, 4, 6),
    ],
    ids=["whole", "transposed", "strided", "part", "scalar", "empty", "expanded"],
)
def test_tensors(dtype, change):
    tensor = change(torch.arange(24).reshape(4, 6).to(dtype))
    back = trip(tensor)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


def test_channels_last_stays():
    back = trip(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    assert back.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_parameters(requires_grad):
    back = trip(nn.Parameter(torch.randn(3), requires_grad))
    assert type(back) is nn.Parameter
    assert back.requires_grad is requires_grad


def test_tied_parameters_stay_tied():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    back = trip(model)
    assert back["b"].weight is back["a"].weight


def test_small_part_of_something_big_travels_alone():
    packed = pack(torch.zeros(1_000_000)[:10])
    assert sum(b.nbytes for b in packed.buffers) == 40


def test_weights_are_not_copied():
    model = nn.Linear(1000, 1000)
    packed = pack(model)
    assert len(packed.payload) < 10_000
    assert unpack(packed).weight.data_ptr() == model.weight.data_ptr()


def test_buffers_may_be_written():
    model = nn.BatchNorm1d(4)
    before = model.running_mean.clone()
    trip(model).train()(torch.randn(8, 4))
    assert torch.equal(model.running_mean, before)


def test_model_runs_the_same():
    model = nn.TransformerEncoderLayer(16, 2, 32).eval()
    x = torch.randn(3, 2, 16)
    assert torch.equal(trip(model)(x), model(x))


def test_closures_and_numpy():
    data, weights = torch.randn(5), np.arange(5.0)
    back = trip(lambda: float((data * torch.from_numpy(weights.copy())).sum()))
    assert back() == float((data * torch.from_numpy(weights.copy())).sum())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("0.weird", threading.Lock()),
        ("0.weird", (i for i in ())),
        ("1.0.weird", open),  # noqa: SIM115  # picklable: the lock beside it is what can't be
    ],
)
def test_unpicklable_attribute_is_named(path, value):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    module, name = path.rsplit(".", 1)
    setattr(model.get_submodule(module), name, [value, threading.Lock()])
    with pytest.raises(ModelError, match=rf"`{path}` \(list\)"):
        pack_model(model)


def test_unpicklable_eval_fn():
    with pytest.raises(EvaluationError, match="lock"):
        pack_eval_fn(functools.partial(print, threading.Lock()))


def test_workers_map_the_weights(cluster):
    model = nn.Linear(2000, 2000)
    model.rounded = nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    reference = ray.put(pack(model))

    @ray.remote
    def work(packed):
        back = unpack(packed)
        writable = any(b.flags.writeable for b in packed.buffers if b.nbytes > 1000)
        memory = next(b for b in packed.buffers if b.nbytes == 16_000_000)
        mapped = back.weight.data_ptr() == memory.ctypes.data
        return writable, mapped, back(torch.ones(2000)).detach().numpy(), back.rounded.float().sum().item()

    writable, mapped, output, half = ray.get(work.remote(reference))
    assert not writable  # it is the store's own memory ...
    assert mapped  # ... and the weight lies in it
    np.testing.assert_allclose(output, model(torch.ones(2000)).detach().numpy(), rtol=1e-4, atol=1e-4)
    assert half == 10


def test_a_hook_that_reads_a_context_variable_travels(tmp_path, monkeypatch):
    source = (
        "from contextvars import ContextVar\n"
        "class Holder:\n    def __init__(self): self.variable = ContextVar('held', default=1)\n"
        "plain, held = ContextVar('plain', default=2), Holder()\n"
        "def install(module):\n"
        "    def hook(module, args, output): return output * plain.get() * held.variable.get()\n"
        "    module.register_forward_hook(hook)\n"
    )
    (tmp_path / "hooked.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    hooked = importlib.import_module("hooked")
    model = nn.Linear(4, 2).eval()
    hooked.install(model)
    again = unpack(pack_model(model))
    hooked.plain.set(3)
    x = torch.ones(1, 4)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_an_evaluation_may_hold_a_model_with_parametrizations():
    held = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 2, 3)), nn.ReLU()).eval()
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        assert torch.equal(unpack(pack_eval_fn(lambda _: held(x)))(None), held(x))
    assert nn.utils.parametrize.is_parametrized(held[0])


SEGMENTS = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    packed, x, wanted = pickle.load(file)
from raysq.tuning.shipping import unpack
model = unpack(packed)
with torch.no_grad():
    # where IPEX is imported it has kernels of its own: other last bits
    torch.testing.assert_close(model(x).logits, wanted)
"""


def test_a_model_that_reads_its_own_hidden_states_works_in_another_process(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    )
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x).logits  # installs hooks, which travel along
    (tmp_path / "model").write_bytes(pickle.dumps((pack_model(model), x, wanted)))
    subprocess.run([sys.executable, "-W", "ignore", "-c", SEGMENTS, tmp_path / "model"], check=True)
