"""What users get as `result.model`: the original's arguments in, its output class out."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from raysq.deployed import Deployed, Flattened
from raysq.errors import ModelError

X, MASK = torch.randn(2, 3), torch.ones(2, 3)


class Pair(NamedTuple):
    """A named tuple output."""

    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Scores:
    """A dataclass output with a field that isn't a tensor."""

    logits: Tensor
    loss: Tensor | None = None
    count: int = 7


class Masked(nn.Module):
    """Takes a mask and two constants beside its input."""

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, labels: Tensor | None = None) -> Any:
        return x * scale if mask is None else x * mask * scale


class Returns(nn.Module):
    """Returns what its function makes of the input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return self.function(self.linear(x))


class Nested(nn.Module):
    """Takes a dict and a list of tensors."""

    def forward(self, batch: dict[str, Tensor], parts: list[Tensor]) -> Tensor:
        return batch["a"] - batch["b"] + parts[0] * parts[1]


class Variadic(nn.Module):
    """Takes any inputs."""

    def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
        return args[0] - args[1] * kwargs.get("gain", 1.0)


def deploy(model: nn.Module, *args: Any, **kwargs: Any) -> Deployed:
    """Trace a model and wrap it."""
    flat = Flattened(model.eval(), args, kwargs)
    return Deployed.of(torch.jit.trace(flat, flat.example), flat)


def reloaded(deployed: Deployed) -> Deployed:
    """Send a deployed model through TorchScript's file format and JSON text."""
    buffer = io.BytesIO()
    torch.jit.save(deployed._call, buffer)
    buffer.seek(0)
    return Deployed.load(torch.jit.load(buffer), json.loads(json.dumps(deployed.signature())))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, MASK), {}),
        ((X,), {"mask": MASK}),
        ((), {"mask": MASK, "x": X}),
        ((X, MASK, 3.0), {}),
        ((X,), {"mask": MASK, "scale": 3.0}),
        ((X,), {"mask": MASK, "scale": None}),
        ((X, MASK), {"labels": None}),
    ],
)
def test_arguments_bind_by_the_original_signature(args: Any, kwargs: Any) -> None:
    deployed = deploy(Masked(), X, scale=3.0, mask=MASK)
    torch.testing.assert_close(deployed(*args, **kwargs), X * MASK * 3.0)


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((X, MASK), {"labels": X}, "'labels' is fixed to None"),
        ((X, MASK), {"target": X}, "unexpected keyword argument 'target'"),
        ((X,), {}, "'mask' is missing"),
        ((X, None), {}, "'mask' must be a tensor"),
        ((X, MASK, 2.0), {}, "'scale' is fixed to 3.0"),
        ((X, MASK, X), {}, "'scale' is fixed to 3.0"),
        ((X, MASK), {"x": X}, "multiple values"),
    ],
)
def test_other_arguments_are_refused_with_what_was_traced(args: Any, kwargs: Any, says: str) -> None:
    deployed = deploy(Masked(), X, MASK, 3.0)
    with pytest.raises(TypeError, match=says) as caught:
        deployed(*args, **kwargs)
    assert "traced with the inputs x, mask." in str(caught.value)


def test_parameter_skipped_by_the_example_is_passed_by_name() -> None:
    deployed = deploy(Masked(), X, labels=None)
    torch.testing.assert_close(deployed(X), X * 2)


def test_a_bound_run_reads_what_its_tensors_hold_by_then() -> None:
    deployed, x = deploy(Masked(), X, scale=3.0, mask=MASK), X.clone()
    run = deployed.bound(x, mask=MASK, scale=3.0)
    torch.testing.assert_close(run(), X * 3.0)
    x.neg_()
    torch.testing.assert_close(run(), -X * 3.0)
    with pytest.raises(TypeError, match="'mask' is missing"):
        deployed.bound(X)


def test_nested_inputs() -> None:
    deployed = deploy(Nested(), {"a": X, "b": MASK}, [X, MASK])
    expected = X - MASK + X * MASK
    torch.testing.assert_close(deployed({"b": MASK, "a": X}, parts=[X, MASK]), expected)
    with pytest.raises(TypeError, match="dict with exactly a, b, got one with a"):
        deployed({"a": X}, [X, MASK])
    with pytest.raises(TypeError, match="list of 2 items, got 1"):
        deployed({"a": X, "b": MASK}, [X])


def test_variadic_forward() -> None:
    deployed = deploy(Variadic(), X, MASK, gain=0.5)
    torch.testing.assert_close(deployed(X, MASK, gain=0.5, labels=None), X - MASK * 0.5)
    with pytest.raises(TypeError, match="labels"):
        deployed(X, MASK, gain=0.5, labels=X)


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y,
        lambda y: (y, y + 1),
        lambda y: [y, (y + 1, None)],
        lambda y: {"out": y, "count": 3, "none": None},
        lambda y: Pair(y, y + 1),
        lambda y: Scores(y),
    ],
    ids=["tensor", "tuple", "list", "dict", "named tuple", "dataclass"],
)
def test_output_class_is_the_original_one_also_after_loading(function: Any) -> None:
    model = Returns(function)
    deployed = deploy(model, X)
    for candidate in (deployed, reloaded(deployed)):
        with torch.no_grad():
            assert type(candidate(X)) is type(model(X))
            assert repr(candidate(X)) == repr(model(X))


def test_class_that_cannot_be_found_becomes_a_dict_with_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = deploy(Returns(Scores), X)
    monkeypatch.delitem(sys.modules, __name__)  # as in a process that doesn't have the model's code
    output = reloaded(deployed)(X)
    assert list(output) == ["logits", "loss", "count"]
    assert output.count == 7
    assert output[0] is output.logits is output["logits"]
    with pytest.raises(AttributeError, match="no field 'other'"):
        _ = output.other


@pytest.mark.parametrize("name", ["subprocess:Popen", "os:system", "antigravity:Anything"])
def test_signature_cannot_name_code_to_run(name: str) -> None:
    deployed = deploy(Returns(Scores), X)
    signature = deployed.signature()
    signature["output"]["class"] = name
    output = Deployed.load(deployed._call, signature)(X)
    assert type(output).__name__ == "AttributeDict"
    assert "antigravity" not in sys.modules


def test_it_behaves_like_an_eval_mode_module() -> None:
    deployed = deploy(Returns(lambda y: y), X)
    assert deployed.eval() is deployed
    assert deployed.to("cpu") is deployed.to(torch.device("cpu"), torch.float32) is deployed
    assert (deployed.device, deployed.dtype) == (torch.device("cpu"), torch.float32)
    assert next(deployed.parameters()).device == torch.device("cpu")
    assert not any(p.requires_grad for p in deployed.parameters())
    assert not deployed(X).requires_grad
    assert not hasattr(deployed, "config")
    with pytest.warns(UserWarning, match="can't be trained"):
        assert deployed.train() is deployed
    assert not deployed.training


@pytest.mark.parametrize(
    "move", [lambda m: m.to("cuda"), lambda m: m.to(0), lambda m: m.half(), lambda m: m.to(torch.bfloat16)]
)
def test_moving_it_is_refused(move: Any) -> None:
    with pytest.raises(ModelError, match="CPU|precision"):
        move(deploy(Returns(lambda y: y), X))


@pytest.mark.parametrize(
    ("model", "args", "says"),
    [
        (Masked(), (X, MASK, 1.0, None, 5), "don't fit forward"),
        (Masked(), (object(),), "input 'x' must be made of tensors"),
        (Masked(), (1.0,), "no tensor"),
    ],
)
def test_inputs_that_cannot_be_traced(model: nn.Module, args: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        Flattened(model, args)


@pytest.mark.parametrize("function", [lambda y: None, lambda y: {1, 2}])
def test_outputs_that_cannot_be_deployed(function: Any) -> None:
    with pytest.raises(ModelError, match="output"):
        Flattened(Returns(function), (X,)).signature()


def test_the_wrapped_model_keeps_its_gradients() -> None:
    model = Returns(lambda y: y)
    flat = Flattened(model, (X,))
    Deployed.of(flat, flat)
    assert all(p.requires_grad for p in model.parameters())


def bert(**kwargs: Any) -> nn.Module:
    """A tiny Hugging Face classifier with random weights."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(intermediate_size=16, attn_implementation="eager", **sizes, **kwargs)
    return transformers.BertForSequenceClassification(config).eval()


def test_hugging_face_evaluation_runs_unchanged() -> None:
    model = bert(num_labels=3)
    batch = {"input_ids": torch.randint(0, 50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    deployed = deploy(model, **batch)

    def eval_fn(m: Any) -> Tensor:
        m.eval()
        m.to("cpu")
        assert m.config.num_labels == 3
        with torch.no_grad():
            output = m(**{k: v.to(m.device) for k, v in batch.items()}, return_dict=None)
        assert output[0] is output.logits is output["logits"]
        assert output.loss is None
        return output.logits

    for candidate in (deployed, reloaded(deployed)):
        torch.testing.assert_close(eval_fn(candidate), eval_fn(model))
        assert type(candidate(**batch)) is type(model(**batch))
    with pytest.raises(TypeError, match="traced with the inputs input_ids, attention_mask"):
        deployed(**batch, labels=torch.zeros(2, dtype=torch.long))


def test_key_value_cache_is_left_out_of_the_output() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 50, (2, 6))
    deployed = deploy(model, ids)
    output = deployed(ids)
    torch.testing.assert_close(output.logits, model(ids).logits.detach())
    assert output.past_key_values is None


def test_a_size_that_was_fixed_by_tracing_is_explained() -> None:
    flat = Flattened(Returns(lambda y: y + torch.zeros(2, 3)), (X,))
    deployed = Deployed.of(torch.jit.trace(flat, flat.example), flat)
    with pytest.raises(RuntimeError, match=r"must match the size(?s:.*)shapes \[\(5, 3\)\](?s:.*)example inputs"):
        deployed(torch.randn(5, 3))
