"""Nested values taken apart into tensors and a plain JSON description, and put together again.

A description is a dict with a `kind`: "tensor" (the next leaf), "constant" (`value`), "repr" (`text`: a constant JSON
can't hold, compared by its repr), "omitted" (`type`: left out, becomes None), "list" / "tuple" (`items`), "dict"
(`keys`, `items`, `ordered`), "record" (`class`, `keys`, `items`: a dataclass, Hugging Face's ModelOutput included, or
a named tuple).
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from raysq.errors import ModelError

__all__ = [
    "AttributeDict",
    "Description",
    "describe",
    "find_class",
    "has_tensor",
    "match",
    "output_tensors",
    "rebuild",
    "tensors_in",
]

Description = dict[str, Any]

TRUSTED_PACKAGE = re.compile(r"transformers(\.\w+)*")  # the one package that loading an artifact may import by name


class AttributeDict(dict[str, Any]):
    """A dict with attribute access and, as in ModelOutput, positions: stands in for a class that isn't installed."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError:
            raise AttributeError(f"no field {name!r}; fields are {', '.join(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        return self.to_tuple()[key] if isinstance(key, int | slice) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that aren't None, in order."""
        return tuple(value for value in self.values() if value is not None)


def _class_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _fields(cls: type) -> tuple[str, ...] | None:
    """Names of the fields of a named tuple or a dataclass, None for any other class."""
    if issubclass(cls, tuple):
        return getattr(cls, "_fields", None)
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls) if field.init)
    return None


def find_class(name: str) -> Any:
    """Find a class, or None; among the modules already imported: only `transformers` is imported for it.

    Args:
        name: "module:qualified name".
    """
    module_name, _, qualified = name.partition(":")
    if module_name not in sys.modules and TRUSTED_PACKAGE.fullmatch(module_name):
        try:
            importlib.import_module(module_name)
        except ImportError:
            return None
    found: Any = sys.modules.get(module_name)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


def _find_record(name: str, keys: list[str]) -> Any:
    """Find a dataclass or named tuple with these fields: what an artifact names may be called only if it is one."""
    cls = find_class(name)
    fields = _fields(cls) if cls is not None else None
    return cls if fields is not None and set(keys) <= set(fields) else None


def describe(
    value: Any, where: str, objects: dict[str, Any] | None = None, *, omit: bool = False
) -> tuple[list[Tensor], Description]:
    """Take a value apart.

    Args:
        value: tensors, constants, and any nesting of lists, tuples, dicts, dataclasses and named tuples.
        where: what the value is, for the error's text.
        objects: filled with the classes that were met, by name, and the constants that JSON can't hold, by repr.
        omit: whether what can't be described is left out where it is a record's field, such as a
            model's key-value cache in its output.

    Returns:
        The tensors in order, and the description.

    Raises:
        ModelError: it holds something else.
    """
    if isinstance(value, Tensor):
        return [value], {"kind": "tensor"}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return [], {"kind": "constant", "value": value}
    if isinstance(value, torch.dtype | torch.device | torch.layout | enum.Enum | slice | range | complex | bytes):
        if objects is not None:
            objects[repr(value)] = value
        return [], {"kind": "repr", "text": repr(value)}
    fields = _fields(type(value))
    head: Description
    if fields is not None:
        if objects is not None:
            objects[_class_name(type(value))] = type(value)
        head = {"kind": "record", "class": _class_name(type(value)), "keys": list(fields)}
        parts = [(field, getattr(value, field)) for field in fields]
    elif isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        head = {"kind": "dict", "keys": list(value), "ordered": isinstance(value, OrderedDict)}
        parts = list(value.items())
    elif isinstance(value, list | tuple):
        head = {"kind": "tuple" if isinstance(value, tuple) else "list"}
        parts = [(str(index), item) for index, item in enumerate(value)]
    else:
        raise ModelError(
            f"{where} must be made of tensors, numbers, strings, lists, tuples, dicts with string keys, dataclasses "
            f"and named tuples; got {type(value).__name__}. Wrap the model in a module that takes and returns those."
        )
    tensors, items = [], []
    for key, part in parts:
        try:
            leaves, item = describe(part, f"{where}[{key!r}]", objects, omit=omit)
        except ModelError:
            if not (omit and fields is not None):
                raise
            leaves, item = [], {"kind": "omitted", "type": _class_name(type(part))}
        tensors += leaves
        items.append(item)
    return tensors, {**head, "items": items}


def output_tensors(output: Any) -> list[Tensor]:
    """Return the tensors of what a model returned, in order, whatever its class; those that deployment returns.

    Raises:
        ModelError: it holds something that can't be deployed.
    """
    return describe(output, "the model's output", omit=True)[0]


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def has_tensor(description: Description) -> bool:
    """Whether there is a tensor anywhere in it."""
    return description["kind"] == "tensor" or any(has_tensor(item) for item in description.get("items", ()))


def match(description: Description, value: Any, where: str) -> list[Tensor]:
    """Return the tensors of a value that has the described structure, in order.

    Raises:
        TypeError: it has another one; the message says where.
    """
    kind = description["kind"]
    if kind == "tensor":
        if not isinstance(value, Tensor):
            raise TypeError(f"{where} must be a tensor, got {type(value).__name__}")
        return [value]
    if kind in ("constant", "repr"):
        _match_constant(description, value, where)
        return []
    if kind == "record":
        labels = description["keys"]
        parts = [getattr(value, key, None) for key in labels]
    elif kind == "dict":
        labels = description["keys"]
        if not isinstance(value, Mapping) or set(value) != set(labels):
            shown = f"one with {', '.join(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
            raise TypeError(f"{where} must be a dict with exactly {', '.join(labels)}, got {shown}")
        parts = [value[key] for key in labels]
    else:
        labels = range(len(description["items"]))
        if not isinstance(value, list | tuple) or len(value) != len(labels):
            shown = f"{len(value)}" if isinstance(value, list | tuple) else type(value).__name__
            raise TypeError(f"{where} must be a {kind} of {len(labels)} items, got {shown}")
        parts = list(value)
    tensors = []
    for label, item, part in zip(labels, description["items"], parts, strict=True):
        tensors += match(item, part, f"{where}[{label!r}]")
    return tensors


def _match_constant(description: Description, value: Any, where: str) -> None:
    if value is None:
        return
    fixed = description["value"] if description["kind"] == "constant" else description["text"]
    given = value if description["kind"] == "constant" else repr(value)
    if isinstance(given, bool | int | float | str) and given == fixed:
        return
    shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise TypeError(f"{where} is fixed to {fixed}, got {shown}")


def rebuild(description: Description, tensors: Iterator[Tensor], objects: Mapping[str, Any]) -> Any:
    """Put a value together from its description and its tensors.

    Args:
        description: as `describe` gave it.
        tensors: consumed in order.
        objects: as `describe` filled it. Where a class is missing it is searched for, and replaced by
            `AttributeDict` if not found; a constant that is missing comes back as its repr.
    """
    kind = description["kind"]
    if kind == "tensor":
        return next(tensors)
    if kind in ("constant", "omitted"):
        return description.get("value")
    if kind == "repr":
        return objects.get(description["text"], description["text"])
    items = [rebuild(item, tensors, objects) for item in description["items"]]
    if kind == "list":
        return items
    if kind == "tuple":
        return tuple(items)
    named = dict(zip(description["keys"], items, strict=True))
    if kind == "dict":
        return OrderedDict(named) if description["ordered"] else named
    name = description["class"]
    cls = objects.get(name) or _find_record(name, list(named))
    return AttributeDict(named) if cls is None else cls(**named)
