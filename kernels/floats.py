"""Tracing and freezing a model with TorchScript: the common ground of the float forms and of int8 on oneDNN Graph."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raysq.deployed import Deployed
from raysq.errors import BackendError
from raysq.flattened import Flattened
from raysq.intercept import Interceptor
from raysq.kernels import tracing
from raysq.kernels.aliasing import protect_inputs
from raysq.kernels.base import TRY_ELSEWHERE
from raysq.kernels.built import WARM_UP_RUNS, ScriptedModel
from raysq.kernels.extrema import split_extrema
from raysq.kernels.scalars import with_axis
from raysq.kernels.tracing import TRACEABLE
from raysq.latency import PATIENCE_S
from raysq.recipe import Precision

if TYPE_CHECKING:
    from raysq.source import Source

__all__ = ["FORMS", "build_form", "freeze", "warm_up"]


def freeze(flat: Flattened, context: AbstractContextManager[Any] | None = None) -> Any:
    """Trace a flattened model in `context` and freeze it.

    Raises:
        BackendError: the model can't be traced.
    """
    # the tracer warns of every constant; what it got wrong shows in the score
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        try:
            with context or nullcontext():
                frozen = tracing.frozen(flat)
        except Exception as exc:
            raise BackendError(f"TorchScript can't trace the model: {exc}\n{TRACEABLE}") from exc
    protect_inputs(frozen.graph)
    split_extrema(frozen.graph)
    with_axis(frozen.graph, flat.example)
    return frozen


def warm_up(script: Any, flat: Flattened, runs: int = WARM_UP_RUNS) -> None:
    """Run the example inputs until every kernel is compiled; twice, which is enough, where that takes long.

    Raises:
        BackendError: a kernel can't be compiled or run.
    """
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        try:
            begun = time.perf_counter()
            for run in range(runs):
                script(*flat.example)
                if run and time.perf_counter() - begun > PATIENCE_S:
                    break
        except RuntimeError as exc:
            raise BackendError(f"the built model fails on the example inputs: {exc}\n{TRY_ELSEWHERE}") from exc


def build_form(
    source: Source,
    prepare: Callable[[Source], nn.Module],
    backend: str,
    precision: Precision = Precision.FP32,
    context: AbstractContextManager[Any] | None = None,
) -> ScriptedModel:
    """Build a float form: of the model that `prepare` makes of the source."""
    model = prepare(source)
    flat = Flattened(model, source.args, source.kwargs)
    script = freeze(flat, context or Interceptor(model, out_of_place=source.graph.out_of_place))
    warm_up(script, flat)
    executed = dict.fromkeys(source.graph.by_name, precision)
    return ScriptedModel(backend, script, Deployed.of(script, flat), executed, {}, flat.example)


FORMS: Mapping[str, Callable[[Source], nn.Module]] = {
    "jit": lambda source: source.model,
    "jit channels_last": lambda source: source.channels_last,
}
