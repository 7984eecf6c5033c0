"""What a backend must offer, and the table of backends by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from raysq.errors import BackendError, OptionError, RecipeError, unknown
from raysq.graph import OpType
from raysq.recipe import Approach, Granularity, OpConfig, Precision, QuantDType, Rounding, Scheme, Transform

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from raysq.deployed import Deployed
    from raysq.graph import Call, ModelGraph
    from raysq.plan import Planner
    from raysq.recipe import Recipe
    from raysq.stats import CalibrationStats

__all__ = [
    "BACKENDS",
    "Backend",
    "BuiltModel",
    "CallTime",
    "Capabilities",
    "OpCapability",
    "Profiling",
    "Selective",
    "Source",
    "Storing",
    "available",
    "check",
    "get",
    "offering",
    "usable",
    "with_approaches",
]

BACKENDS: Mapping[str, str] = {
    "ipex": "raysq.kernels.ipex",
    "ipex_qconf": "raysq.kernels.ipex_qconf",
    "onednn": "raysq.kernels.onednn",
    "openvino": "raysq.kernels.openvino",
    "reference": "raysq.kernels.reference",
}
PREFERRED = ("ipex", "onednn", "openvino", "reference")  # order in which backend=None looks for one that is available


@dataclass(frozen=True)
class OpCapability:
    """What a backend can run for one kind of call, the first of each being its default."""

    precisions: tuple[Precision, ...]
    approaches: tuple[Approach, ...] = ()
    activations: tuple[tuple[QuantDType, Scheme], ...] = ()
    weights: tuple[tuple[QuantDType, Scheme], ...] = ()
    granularities: tuple[Granularity, ...] = ()


@dataclass(frozen=True)
class Capabilities:
    """What this CPU and this build of the backend can run.

    Attributes:
        backend: its name.
        ops: per kind of call; a kind that is missing stays in float.
        isa: instruction sets that matter, such as "avx512_vnni".
        reduce_range: whether int8 products can saturate here, so that 7 bits are the default and 8 are a choice.
        transforms: changes of the whole model that it builds.
        smooths: types of modules whose own calls may be smoothed; None: any call, and what makes an activation may
            absorb its scales.
    """

    backend: str
    ops: Mapping[OpType, OpCapability]
    isa: tuple[str, ...]
    reduce_range: bool
    transforms: tuple[Transform, ...] = tuple(Transform)
    smooths: tuple[str, ...] | None = None

    @property
    def approaches(self) -> set[Approach]:
        """The approaches that some kind of call has a kernel for."""
        return {approach for capability in self.ops.values() for approach in capability.approaches}

    def may_smooth(self, call: Call) -> bool:
        """Whether the input of a call may be divided by scales."""
        own = call.module != "" and call.name.partition("#")[0] == call.module
        return self.smooths is None or (own and call.module_type in self.smooths)

    def may_smooth_group(self, graph: ModelGraph, group: str) -> bool:
        """Whether the input that a group of calls shares may be divided by scales."""
        return all(self.may_smooth(graph[call]) for call in graph.groups[group].calls)

    def why_not(self, op: OpType, config: OpConfig) -> str:
        """Say why a kind of call can't run under a configuration; "" if it can."""
        capability = self.ops.get(op)
        if capability is None:
            return "" if config.precision is Precision.FP32 else f"{op} stays in fp32."
        if config.precision not in capability.precisions:
            return f"{op} runs in {', '.join(capability.precisions)}, not in {config.precision}."
        if not config.is_int8:
            return ""
        static = config.approach is Approach.STATIC
        if config.rounding is not Rounding.NEAREST and not (static and (op.is_conv or op is OpType.LINEAR)):
            return f"{config.rounding} rounding is for static convolutions and linear layers."
        if config.approach not in capability.approaches:
            return f"{op} runs {' or '.join(capability.approaches)}, not {config.approach}."
        pair = (config.activation.dtype, config.activation.scheme)
        if capability.activations and pair not in capability.activations:
            return f"activations of {op} can't be {pair[0]} {pair[1]}."
        pair = (config.weight.dtype, config.weight.scheme)
        if op.has_weight and pair not in capability.weights:
            return f"weights of {op} can't be {pair[0]} {pair[1]}."
        if op.has_weight and config.weight.granularity not in capability.granularities:
            return f"weights of {op} can't be {config.weight.granularity}."
        return ""


@dataclass(frozen=True)
class Source:
    """What a backend builds from; it changes none of it.

    Attributes:
        model: the fp32 model, batch norms folded, in-place ops out of place, in eval mode.
        graph: its calls.
        stats: its calibration statistics; None suffices for float forms and for recipes without static calls.
        args: positional example inputs.
        kwargs: keyword example inputs.
        absorb: whether smoothing scales go into whatever makes an activation, where that is exact; False keeps
            them as multiplications, the only form that a qconf has.
        multipliers: call to what its first activation is multiplied by, (channels,), whatever precision it runs in.
    """

    model: torch.nn.Module
    graph: ModelGraph
    stats: CalibrationStats | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    absorb: bool = True
    multipliers: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # what is derived is derived again

    @cached_property
    def planner(self) -> Planner:
        """What turns recipes into scales for this model."""
        from raysq.plan import Planner

        return Planner(self)

    def under(self, recipe: Recipe) -> Source:
        """Return the model with a recipe's scales worked into its weights: in fp32 it computes the same.

        The last one is kept: recipes that are tried one after the other mostly differ elsewhere.

        Raises:
            RecipeError: the recipe scales what this model can't.
        """
        from raysq.smoothquant.rescaled import under

        key = (tuple(recipe.smoothing.items()), Transform.EQUALIZATION in recipe.transforms)
        if key not in self._rescaled:
            self._rescaled.clear()
            self._rescaled[key] = under(self, recipe)
        return self._rescaled[key]

    @cached_property
    def _rescaled(self) -> dict[object, Source]:
        return {}

    @cached_property
    def derived(self) -> dict[object, Any]:
        """What backends keep of this model between builds, each under a key of its own."""
        return {}

    @cached_property
    def channels_last(self) -> torch.nn.Module:
        """The model with convolution weights in the layout that float kernels are fastest in.

        It is the model itself where there are none, and where its forward needs the other layout (it calls `view`).
        """
        from raysq.kernels.floats import channels_last

        return channels_last(self)


class BuiltModel(Protocol):
    """A model that a backend built: warmed up, ready to be called, scored, timed and saved."""

    @property
    def backend(self) -> str:
        """Name of the backend that built it, and that must be there to load it."""

    @property
    def model(self) -> Deployed:
        """What is called: the original's arguments in, its output class out."""

    @property
    def executed(self) -> Mapping[str, Precision]:
        """Call name to the precision it really runs in, read from what was built."""

    @property
    def left_in_float(self) -> Mapping[str, str]:
        """Call name to the reason why it isn't in the precision that the recipe asked for."""

    @property
    def size_bytes(self) -> int:
        """Size of the artifact."""

    def save(self, directory: Path) -> None:
        """Write the artifact; what loads it again stands in its own signature file."""


class Backend(Protocol):
    """One way to run recipes. A module in this folder holds a class `Engine` that implements it.

    Heavy imports happen inside the methods: importing the module must work anywhere.
    """

    name: str

    def unavailable_because(self) -> str | None:
        """Return why it can't run here and what to install, or None if it can."""

    def capabilities(self) -> Capabilities:
        """Return what can run here."""

    def float_forms(self) -> tuple[str, ...]:
        """Names of the float forms of a model, fp32 and bf16, such as "jit" or "ipex bf16"."""

    def build_float(self, source: Source, form: str) -> BuiltModel:
        """Build one float form."""

    def build(self, source: Source, recipe: Recipe) -> BuiltModel:
        """Build a recipe from the statistics alone: no calibration data is run.

        Raises:
            RecipeError: the recipe asks for what this backend can't run.
            BackendError: the build itself failed.
        """


@dataclass(frozen=True)
class CallTime:
    """What a call takes.

    Attributes:
        ms: by precision, those that could be measured; int8 on inputs that are quantized already.
        entry_ms: of quantizing what it reads.
    """

    ms: Mapping[Precision, float]
    entry_ms: float


@runtime_checkable
class Profiling(Protocol):
    """A backend that can time single calls."""

    def call_times(self, source: Source, recipe: Recipe) -> Mapping[str, CallTime]:
        """Return the times of calls, in int8 where the recipe has them so; asked once, with nothing running beside."""


@runtime_checkable
class Selective(Protocol):
    """A backend that lacks single calls of a kind that it runs otherwise."""

    def unseen(self, source: Source) -> Mapping[str, str]:
        """Return the calls of a model that can't run in int8, and why; asked once, before its space is searched."""


@runtime_checkable
class Storing(Protocol):
    """A backend whose builds are saved as something else than TorchScript."""

    def read(self, directory: Path, example: tuple[torch.Tensor, ...]) -> Callable[..., Any]:
        """Return what a build saved in a directory, as a function of flat tensors like the example's."""


def get(name: str) -> Backend:
    """Return a backend that can run here.

    Raises:
        OptionError: unknown name.
        BackendError: it can't run here; the message says what to install.
    """
    if name not in BACKENDS:
        raise OptionError(unknown("backend", name, BACKENDS))
    engine = _engine(name)
    reason = engine.unavailable_because()
    if reason:
        raise BackendError(f"backend {name!r} can't run here: {reason}")
    return engine


def with_approaches(approaches: Iterable[Approach]) -> list[str]:
    """Return the names of the backends that have one of these approaches on this CPU, installed or not."""
    return [engine.name for engine in map(_engine, BACKENDS) if set(approaches) & engine.capabilities().approaches]


def usable(names: Iterable[str]) -> Iterator[Backend]:
    """Yield those of some backends that can run here."""
    return (engine for engine in map(_engine, names) if engine.unavailable_because() is None)


def available(names: Sequence[str] = PREFERRED) -> Backend:
    """Return the first of some backends that can run here."""
    for engine in usable(names):
        return engine
    raise BackendError(f"no backend can run here; tried {', '.join(names)}.")


def offering(form: str, engine: Backend) -> Backend:
    """Return the backend itself if it has a float form, else one that has it and can run here.

    Raises:
        BackendError: none has.
    """
    if form in engine.float_forms():
        return engine
    return available([name for name in BACKENDS if form in _engine(name).float_forms()])


def _engine(name: str) -> Backend:
    engine: Backend = importlib.import_module(BACKENDS[name]).Engine()
    return engine


def check(recipe: Recipe, source: Source, capabilities: Capabilities) -> None:
    """Refuse a recipe that this backend can't run on this model.

    Raises:
        RecipeError: a call that the model doesn't have, or a choice beyond the capabilities.
    """
    name = capabilities.backend
    for call, config in recipe.ops.items():
        if call not in source.graph.by_name:
            raise RecipeError(unknown("call in the recipe:", call, source.graph.by_name))
        reason = capabilities.why_not(source.graph[call].op, config)
        if reason:
            raise RecipeError(f"backend {name!r} can't run {call}: {reason}")
