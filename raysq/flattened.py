"""A model as a function of flat tensors, and how its own arguments and output map to them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raysq.errors import ModelError
from raysq.structure import Description, describe, rebuild

__all__ = ["SIGNATURE_VERSION", "Flattened", "forward_signature"]

SIGNATURE_VERSION = 1


def forward_signature(model: torch.nn.Module) -> inspect.Signature:
    """Return the signature of a model's forward, without self; *args, **kwargs where it has none."""
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):  # a ScriptModule's forward has none
        return inspect.Signature(
            [
                inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
                inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
            ]
        )


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
        >>> from raysq.deployed import Deployed
        >>> flat = Flattened(model, (x,))
        >>> traced = torch.jit.trace(flat, flat.example)
        >>> y = Deployed(traced, flat.signature())(x)
    """

    def __init__(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.example: tuple[Tensor, ...] = ()
        self._objects: dict[str, Any] = {}
        self._output: dict[str, Description] = {}
        declared = forward_signature(model)
        try:
            bound = declared.bind(*args, **(kwargs or {}))
        except TypeError as exc:
            raise ModelError(
                f"the example inputs don't fit forward{declared}: {exc}. Give a tuple for positional arguments, a dict "
                "for keyword."
            ) from exc
        self._declared = []
        for parameter in declared.parameters.values():
            entry: Description = {"name": parameter.name, "kind": parameter.kind.name}
            if parameter.name in bound.arguments:
                value = bound.arguments[parameter.name]
                tensors, entry["example"] = describe(value, f"input {parameter.name!r}", self._objects)
                self.example += tuple(tensors)
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                entry["example"] = {"kind": "tuple", "items": []}
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                entry["example"] = {"kind": "dict", "keys": [], "items": [], "ordered": False}
            else:
                entry["default"] = _describe_default(parameter.default)
            self._declared.append(entry)
        if not self.example:
            raise ModelError("the example inputs hold no tensor; pass those that the model is called with.")

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the model; returns one tensor, or a flat tuple of them."""
        leaves = iter(tensors)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        by_name = False  # positional parameters after one that was left out are passed by name
        for parameter in self._declared:
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
            raise ModelError("the model must return tensors, alone or in a structure; its output holds none.")
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

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
            "parameters": self._declared,
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
    return {
        "config": json.loads(json.dumps(values, default=str)),
        "config_class": f"{cls.__module__}:{cls.__qualname__}",
    }
