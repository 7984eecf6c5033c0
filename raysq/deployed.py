"""The two faces of a traced model: flat tensors inside, the original forward's arguments and output class outside."""

from __future__ import annotations

import copy
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from raysq.errors import ModelError
from raysq.structure import AttributeDict, Description, describe, find_class, has_tensor, match, rebuild

__all__ = ["Deployed", "Flattened"]

SIGNATURE_VERSION = 1


def _forward_signature(model: torch.nn.Module) -> inspect.Signature:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):  # a ScriptModule's forward has none
        return inspect.Signature(
            [
                inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
                inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
            ]
        )


def _one_or_tuple(tensors: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


class Flattened(torch.nn.Module):
    """A model as a function of positional tensors, which is what `torch.jit.trace` takes.

    Args:
        model: called as `model(*args, **kwargs)`.
        args: positional example inputs, any nesting of tensors and constants.
        kwargs: keyword example inputs.

    Attributes:
        model: the wrapped model.
        example: the tensors of the example inputs, in the order that `forward` takes them.

    Raises:
        ModelError: the inputs don't fit the model's signature, or hold something else than tensors and constants.

    Example:
        >>> flat = Flattened(model, (x,), {"mask": mask})
        >>> traced = torch.jit.trace(flat, flat.example)
        >>> Deployed(traced, flat.signature())(x, mask=mask)
    """

    def __init__(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.example: tuple[Tensor, ...] = ()
        self._objects: dict[str, Any] = {}
        self._output: dict[str, Description] = {}
        declared = _forward_signature(model)
        try:
            bound = declared.bind(*args, **(kwargs or {}))
        except TypeError as exc:
            raise ModelError(f"the example inputs don't fit forward{declared}: {exc}.") from exc
        self._parameters_ = []
        for parameter in declared.parameters.values():
            entry: Description = {"name": parameter.name, "kind": parameter.kind.name}
            if parameter.name in bound.arguments:
                value = bound.arguments[parameter.name]
                tensors, entry["example"] = describe(value, f"input {parameter.name!r}", self._objects)
                self.example += tuple(tensors)
            elif parameter.default is not inspect.Parameter.empty:
                entry["default"] = _describe_default(parameter.default)
            self._parameters_.append(entry)
        if not self.example:
            raise ModelError("the example inputs hold no tensor; pass those that the model is called with.")

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the model; returns one tensor, or a flat tuple of them."""
        leaves = iter(tensors)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        by_name = False  # positional parameters after one that was left out are passed by name
        for parameter in self._parameters_:
            kind = parameter["kind"]
            if "example" not in parameter:
                by_name = True
                continue
            value = rebuild(parameter["example"], leaves, self._objects)
            if kind == "VAR_POSITIONAL":
                args += value
            elif kind == "VAR_KEYWORD":
                kwargs.update(value)
            elif kind == "POSITIONAL_ONLY" or (kind == "POSITIONAL_OR_KEYWORD" and not by_name):
                args.append(value)
            else:
                kwargs[parameter["name"]] = value
        outputs, self._output["description"] = describe(
            self.model(*args, **kwargs), "the model's output", self._objects, omit=True
        )
        if not outputs:
            raise ModelError("the model's output holds no tensor, so there is nothing to deploy.")
        return _one_or_tuple(outputs)

    @property
    def objects(self) -> Mapping[str, Any]:
        """Classes and constants of inputs and output that a signature can only name."""
        return self._objects

    def signature(self) -> Description:
        """Return how the model is called and what it returns, as plain JSON; runs it once if it hasn't been."""
        if not self._output:
            with torch.no_grad():
                self(*self.example)
        dtypes = [p.dtype for p in self.model.parameters() if p.dtype.is_floating_point]
        return {
            "version": SIGNATURE_VERSION,
            "parameters": self._parameters_,
            "output": self._output["description"],
            "dtype": str(dtypes[0] if dtypes else torch.float32).removeprefix("torch."),
            **_describe_config(getattr(self.model, "config", None)),
        }


def _describe_default(value: Any) -> Description:
    try:
        return describe(value, "default")[1]
    except ModelError:
        return {"kind": "repr", "text": repr(value)}


def _describe_config(config: Any) -> Description:
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, dict):
        return {}
    cls = type(config)
    return {"config": json.loads(json.dumps(values, default=str)), "config_class": f"{cls.__module__}:{cls.__qualname__}"}


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

    def __init__(
        self,
        call: Callable[..., Any],
        signature: Mapping[str, Any],
        *,
        objects: Mapping[str, Any] | None = None,
        config: Any = None,
    ) -> None:
        super().__init__()
        if signature["version"] > SIGNATURE_VERSION:
            raise ModelError(
                f"the model's signature has version {signature['version']}, this raysq reads up to "
                f"{SIGNATURE_VERSION}. Install a newer raysq."
            )
        self.__dict__["_call"] = call  # not registered: its weights stay as they are, whoever else holds them
        self._declared = json.loads(json.dumps(dict(signature)))
        self._objects = dict(objects or {})
        self._binder = inspect.Signature(
            [
                inspect.Parameter(
                    entry["name"],
                    inspect._ParameterKind[entry["kind"]],
                    default=None if "default" in entry else inspect.Parameter.empty,
                )
                for entry in self._declared["parameters"]
            ]
        )
        dtype = getattr(torch, self._declared["dtype"])
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
        try:
            bound = self._binder.bind(*args, **kwargs).arguments
            tensors: list[Tensor] = []
            for entry in self._declared["parameters"]:
                name, fixed = entry["name"], entry.get("example", entry.get("default"))
                where = f"input {name!r}"
                if name in bound and fixed is None:  # *args or **kwargs that the example left empty
                    _refuse_extras(entry["kind"], bound[name])
                elif name in bound:
                    tensors += match(fixed, bound[name], where)
                elif "example" in entry and has_tensor(fixed):
                    raise TypeError(f"{where} is missing")
        except TypeError as exc:
            raise TypeError(f"{exc}. This model was traced with the inputs {self._traced_with()}.") from None
        return tuple(tensors)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on the original forward's arguments."""
        with torch.no_grad():
            outputs = self._call(*self.flatten(*args, **kwargs))
        leaves = iter((outputs,) if isinstance(outputs, Tensor) else outputs)
        return rebuild(self._declared["output"], leaves, self._objects)

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
            if isinstance(target, str | torch.device) and torch.device(target) != self.device:
                raise ModelError(f"this int8 model runs on the CPU only, got .to({str(target)!r}).")
            if isinstance(target, torch.dtype) and target != self.dtype:
                raise ModelError(f"a deployed model's precision is fixed when it is built, got .to({target}).")
        return self

    def cpu(self) -> Self:
        """Return itself."""
        return self

    def float(self) -> Self:
        """Return itself if its dtype is float32."""
        return self.to(torch.float32)

    def _apply(self, *_: Any, **__: Any) -> Self:
        raise ModelError("a deployed model's device and precision are fixed when it is built: it runs on the CPU.")


def _refuse_extras(kind: str, given: Any) -> None:
    if kind == "VAR_KEYWORD":
        extras = [f"{name!r}" for name, value in given.items() if value is not None]
    else:
        extras = [f"number {index}" for index, value in enumerate(given) if value is not None]
    if extras:
        raise TypeError(f"unexpected input {', '.join(extras)}")


def _load_config(values: dict[str, Any], class_name: str) -> Any:
    if re.match(r"transformers\.", class_name):
        cls = find_class(class_name, ())
        if cls is not None:
            return cls.from_dict(values)
    return _attributes(values)


def _attributes(value: Any) -> Any:
    if isinstance(value, dict):
        return AttributeDict({key: _attributes(item) for key, item in value.items()})
    return [_attributes(item) for item in value] if isinstance(value, list) else value
