"""Digests that tell whether a model, an evaluation or an output is the same as before, in any process."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["feed", "of_function", "of_model", "of_tensors", "of_text"]


def of_model(model: nn.Module) -> str:
    """Return a digest of a model's class, parameters and buffers."""
    state = model.state_dict()
    return _short(repr((type(model).__qualname__, sorted(state), of_tensors(state[name] for name in sorted(state)))))


def of_tensors(tensors: Iterable[Tensor]) -> str:
    """Return a digest of tensors: equal types, shapes and bits, equal digests."""
    sha = hashlib.sha256()
    for tensor in tensors:
        feed(sha, tensor)
    return sha.hexdigest()


def feed(sha: Any, tensor: Tensor) -> None:
    """Take a tensor's type, shape and bits into a digest, one of hashlib's."""
    sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def of_function(function: Callable[..., Any]) -> str:
    """Return a digest of a function's name and code; data that it reads is beyond it."""
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return _short(repr((named.__module__, named.__qualname__, _described(code) if code else "")))


def of_text(*parts: object) -> str:
    """Return a digest of what these are in words."""
    return _short(repr(parts))


def _described(constant: Any) -> str:
    """Return what is the same in every process: code with its constants, sets in order."""
    if isinstance(constant, types.CodeType):
        return repr((constant.co_code, constant.co_names, [_described(c) for c in constant.co_consts]))
    return repr(sorted(map(_described, constant))) if isinstance(constant, frozenset) else repr(constant)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
