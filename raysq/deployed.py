"""A traced model as users get it: the original forward's arguments in, its output class out."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from raysq.checks import is_whole
from raysq.errors import ModelError, shown
from raysq.flattened import SIGNATURE_VERSION, Flattened
from raysq.structure import (
    TRUSTED_PACKAGE,
    AttributeDict,
    Description,
    find_class,
    has_tensor,
    match,
    rebuild,
)

__all__ = ["Deployed", "Flattened"]

Outputs = Tensor | tuple[Tensor, ...]


@runtime_checkable
class Binding(Protocol):
    """A function of flat tensors that can run on given ones without copies."""

    def bound(self, *tensors: Tensor) -> Callable[[], Outputs]:
        """Return what reads these tensors where they lie, and may write its results where those of before lay."""


class Deployed(torch.nn.Module):
    """A traced model that is called like the original: its arguments in, its output class out, no gradients.

    It runs on the CPU, in the precision and with the constants that it was traced with. A keyword that wasn't part of
    the example inputs is refused with a TypeError, unless its value is None or its default.

    Args:
        call: takes the flat tensors and returns one, or a tuple of them; a ScriptModule.
        signature: as `Flattened.signature` returns it.
        objects: `Flattened.objects`, so that classes defined anywhere are found in this process.
        config: what `.config` returns; None reads it from the signature.

    Raises:
        ModelError: the signature was written by a newer version.
    """

    _call: Callable[..., Any]

    def __init__(
        self,
        call: Callable[..., Any],
        signature: Mapping[str, Any],
        *,
        objects: Mapping[str, Any] | None = None,
        config: Any = None,
    ) -> None:
        super().__init__()
        if not is_whole(signature["version"]) or not 1 <= signature["version"] <= SIGNATURE_VERSION:
            raise ModelError(
                f"the model's signature has version {shown(signature['version'])}, this raysq reads up to "
                f"{SIGNATURE_VERSION}. Install a newer raysq."
            )
        self.__dict__["_call"] = call  # not registered: its weights stay as they are, whoever else holds them
        self._declared = json.loads(json.dumps(dict(signature)))
        self._objects = dict(objects or {})
        self._binder = inspect.Signature([_parameter(entry) for entry in self._declared["parameters"]])
        self._plain = _plain(self._declared["parameters"])
        dtype = getattr(torch, self._declared["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ModelError(
                f"the model's signature must name torch's dtype, got {shown(self._declared['dtype'])}. Save it again."
            )
        self.anchor = torch.nn.Parameter(torch.zeros(1, dtype=dtype), requires_grad=False)
        if config is not None:
            self.config = copy.deepcopy(config)
        elif "config" in self._declared:
            self.config = _load_config(self._declared["config"], self._declared["config_class"])
        super().train(False)

    @classmethod
    def of(cls, call: Callable[..., Any], flattened: Flattened) -> Self:
        """Return what was traced from `flattened`, with the original's own config and classes."""
        config = getattr(flattened.model, "config", None)
        return cls(call, flattened.signature(), objects=flattened.objects, config=config)

    @classmethod
    def like(cls, other: Deployed) -> Self:
        """Return the same model, as this class."""
        return cls(other._call, other._declared, objects=other._objects, config=getattr(other, "config", None))

    @classmethod
    def load(cls, call: Callable[..., Any], signature: Mapping[str, Any]) -> Self:
        """Return a model from an artifact: nothing is unpickled, and only `transformers` is imported by name."""
        return cls(call, signature)

    def signature(self) -> Description:
        """Return how it is called and what it returns, as plain JSON; `load` takes it."""
        signature: Description = copy.deepcopy(self._declared)
        return signature

    def flatten(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return the flat tensors that the traced model takes for these arguments.

        Raises:
            TypeError: the arguments aren't those that it was traced with.
        """
        if len(args) == self._plain and not kwargs:  # binding takes as long as a small model
            for arg in args:
                if not isinstance(arg, Tensor):
                    break
            else:
                return args
        try:
            bound = self._binder.bind(*args, **kwargs).arguments
            tensors: list[Tensor] = []
            for entry in self._declared["parameters"]:
                name, traced = entry["name"], _traced(entry)
                if entry["kind"] == "VAR_KEYWORD" and name in bound:
                    bound[name] = _without_none(bound[name], traced["keys"])
                if name in bound:
                    tensors += match(traced, bound[name], f"input {name!r}")
                elif has_tensor(traced):
                    raise TypeError(f"input {name!r} is missing")
        except TypeError as exc:
            raise TypeError(f"{exc}. This model was traced with the inputs {self._traced_with()}.") from None
        return tuple(tensors)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on the original forward's arguments.

        Raises:
            TypeError: other arguments than those that it was traced with.
            RuntimeError: the traced forward fails on them.
        """
        tensors = self.flatten(*args, **kwargs)
        try:
            if torch.is_grad_enabled():  # asking costs a fraction of switching
                with torch.no_grad():
                    outputs = self._call(*tensors)
            else:
                outputs = self._call(*tensors)
        except RuntimeError as exc:
            raise RuntimeError(
                f"{str(exc).strip().splitlines()[-1]}\nThe model fails on inputs of shapes "
                f"{[tuple(t.shape) for t in tensors]}. It repeats what the original did on its example inputs: branches"
                " and sizes that depended on values or shapes there are fixed. Give it `example_inputs` like these, or "
                "write that part of the forward without them."
            ) from exc
        return self._rebuilt(outputs)

    def bound(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """Return what runs the model on these very tensors, again and again, where each microsecond counts.

        A run reads what the tensors hold by then, and may write its result over that of the run before. Where the
        engine can work on memory of others (OpenVINO), it costs the engine alone. One thread at a time may call it.

        Raises:
            TypeError: other arguments than those that the model was traced with.

        Example:
            >>> result = raysq.tune(model, calib, eval_fn)  # doctest: +SKIP
            >>> run = result.model.bound(x)  # doctest: +SKIP
            >>> scores = run()  # doctest: +SKIP
        """
        tensors = self.flatten(*args, **kwargs)
        if not isinstance(self._call, Binding):
            return partial(self.forward, *args, **kwargs)
        run = self._call.bound(*tensors)
        return lambda: self._rebuilt(run())

    def _rebuilt(self, outputs: Outputs) -> Any:
        if isinstance(outputs, Tensor):
            if self._declared["output"]["kind"] == "tensor":
                return outputs
            outputs = (outputs,)
        return rebuild(self._declared["output"], iter(outputs), self._objects)

    def _traced_with(self) -> str:
        return ", ".join(e["name"] for e in self._declared["parameters"] if "example" in e and has_tensor(e["example"]))

    @property
    def device(self) -> torch.device:
        """Where it runs: the CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the original's parameters."""
        return self.anchor.dtype

    def train(self, mode: bool = True) -> Self:
        """Change nothing; warns where training is asked for."""
        if mode:
            warnings.warn("a deployed model can't be trained; train() does nothing.", stacklevel=2)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return itself for the CPU and its own dtype.

        Raises:
            ModelError: another device or dtype.
        """
        for target in (*args, *kwargs.values()):
            is_index = isinstance(target, int) and not isinstance(target, bool)
            if is_index or (isinstance(target, str | torch.device) and torch.device(target).type != "cpu"):
                raise ModelError(
                    f"this int8 model runs on the CPU only, got .to({str(target)!r}). Move its inputs there."
                )
            if isinstance(target, torch.dtype) and target != self.dtype:
                raise ModelError(
                    f"a deployed model's precision is fixed when it is built, got .to({target}). Leave that out."
                )
        return self

    def cpu(self) -> Self:
        """Return itself."""
        return self

    def float(self) -> Self:
        """Return itself if its dtype is float32."""
        return self.to(torch.float32)

    def _apply(self, *_: Any, **__: Any) -> Self:
        raise ModelError(
            "a deployed model's device and precision are fixed when it is built: it runs on the CPU. Move its inputs "
            "there."
        )


def _parameter(entry: Description) -> inspect.Parameter:
    """Every plain parameter may be left out here: which ones may not is known from what was traced."""
    default = inspect.Parameter.empty if entry["kind"].startswith("VAR_") else None
    return inspect.Parameter(entry["name"], inspect._ParameterKind[entry["kind"]], default=default)


def _plain(parameters: list[Description]) -> int:
    """Return how many leading positional parameters are all that holds a tensor, each a bare one; -1 if not so."""
    holding = [p for p in parameters if has_tensor(_traced(p))]
    bare = all(p["kind"].startswith("POSITIONAL") and p.get("example") == {"kind": "tensor"} for p in holding)
    return len(holding) if bare and holding == parameters[: len(holding)] else -1


def _traced(parameter: Description) -> Description:
    """Return what a parameter was in the example: given, or left at its default."""
    described: Description = parameter["example"] if "example" in parameter else parameter["default"]
    return described


def _without_none(given: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None or name in known}


def _load_config(values: dict[str, Any], class_name: str) -> Any:
    if TRUSTED_PACKAGE.fullmatch(class_name.partition(":")[0]):
        cls = find_class(class_name)
        if hasattr(cls, "from_dict"):
            return cls.from_dict(values)
    return _attributes(values)


def _attributes(value: Any) -> Any:
    if isinstance(value, dict):
        return AttributeDict({key: _attributes(item) for key, item in value.items()})
    return [_attributes(item) for item in value] if isinstance(value, list) else value
