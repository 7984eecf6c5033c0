"""Tracing and freezing a model with TorchScript: the common ground of the float forms and of int8 on oneDNN Graph."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raysq.deployed import Deployed
from raysq.errors import BackendError
from raysq.flattened import Flattened
from raysq.intercept import Interceptor
from raysq.kernels.built import WARM_UP_RUNS, ScriptedModel
from raysq.recipe import Precision

if TYPE_CHECKING:
    from raysq.kernels.base import Source

__all__ = ["FORMS", "build_form", "freeze", "warm_up"]


def freeze(flat: Flattened, context: AbstractContextManager[Any] | None = None) -> Any:
    """Trace a flattened model in `context` and freeze it.

    Raises:
        BackendError: the model can't be traced.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of every constant; what it got wrong shows in the score
        try:
            with context or nullcontext():
                traced = torch.jit.trace(flat, flat.example, check_trace=False, strict=False)
                return torch.jit.freeze(traced.eval())
        except Exception as exc:
            raise BackendError(f"TorchScript can't trace the model: {exc}") from exc


def warm_up(script: Any, flat: Flattened) -> None:
    """Run the example inputs until every kernel is compiled.

    Raises:
        BackendError: a kernel can't be compiled or run.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for _ in range(WARM_UP_RUNS):
                script(*flat.example)
        except RuntimeError as exc:
            raise BackendError(f"the built model fails on the example inputs: {exc}") from exc


def build_form(
    source: Source,
    prepare: Callable[[nn.Module], nn.Module],
    backend: str,
    precision: Precision = Precision.FP32,
    context: AbstractContextManager[Any] | None = None,
) -> ScriptedModel:
    """Build a float form of the source's model: `prepare` gets a private copy of it."""
    model = prepare(copy.deepcopy(source.model))
    flat = Flattened(model, source.args, source.kwargs)
    script = freeze(flat, context or Interceptor(model, out_of_place=source.graph.out_of_place))
    warm_up(script, flat)
    executed = dict.fromkeys(source.graph.by_name, precision)
    return ScriptedModel(backend, script, Deployed.of(script, flat), executed, {}, flat.example)


def _channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {"jit": lambda model: model, "jit channels_last": _channels_last}
