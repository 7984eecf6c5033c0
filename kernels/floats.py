"""Tracing and freezing a model with TorchScript: the common ground of the float forms and of int8 on oneDNN Graph."""

from __future__ import annotations

import copy
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
from raysq.kernels.aliasing import protect_inputs
from raysq.kernels.built import WARM_UP_RUNS, ScriptedModel
from raysq.kernels.extrema import split_extrema
from raysq.kernels.tracing import trace
from raysq.latency import PATIENCE_S
from raysq.recipe import Precision

if TYPE_CHECKING:
    from raysq.kernels.base import Source

__all__ = ["FORMS", "build_form", "channels_last", "freeze", "warm_up"]


def freeze(flat: Flattened, context: AbstractContextManager[Any] | None = None) -> Any:
    """Trace a flattened model in `context` and freeze it.

    Raises:
        BackendError: the model can't be traced.
    """
    # the tracer warns of every constant; what it got wrong shows in the score
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        try:
            with context or nullcontext():
                frozen = torch.jit.freeze(trace(flat).eval())
        except Exception as exc:
            raise BackendError(f"TorchScript can't trace the model: {exc}") from exc
    protect_inputs(frozen.graph)
    split_extrema(frozen.graph)
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
            raise BackendError(f"the built model fails on the example inputs: {exc}") from exc


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


def channels_last(source: Source) -> nn.Module:
    """Return a copy of the model with convolution weights in channels_last, or the model where that can't be."""
    if not any(isinstance(m, CONVOLUTIONS) for m in source.model.modules()):
        return source.model
    shared = {id(t): t for t in (*source.model.parameters(), *source.model.buffers())}
    model = copy.deepcopy(source.model, shared)
    for module in model.modules():
        if isinstance(module, CONVOLUTIONS):
            weight = module.weight.detach()
            module.weight = nn.Parameter(weight.contiguous(memory_format=LAYOUTS[weight.dim()]), requires_grad=False)
    try:
        with torch.no_grad():
            model(*source.args, **source.kwargs)
    except RuntimeError:  # a `view` of what a convolution returns
        return source.model
    return model


LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the weight's dimensions
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FORMS: Mapping[str, Callable[[Source], nn.Module]] = {
    "jit": lambda source: source.model,
    "jit channels_last": lambda source: source.channels_last,
}
