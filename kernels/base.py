"""What a backend must offer, and the table of backends by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from raysq.errors import BackendError, OptionError, RecipeError, unknown
from raysq.recipe import Approach, Precision

if TYPE_CHECKING:
    import torch

    from raysq.capabilities import Capabilities
    from raysq.deployed import Deployed
    from raysq.recipe import Recipe
    from raysq.source import Source

__all__ = [
    "BACKENDS",
    "TRY_ELSEWHERE",
    "Backend",
    "BuiltModel",
    "CallTime",
    "Profiling",
    "Selective",
    "Storing",
    "available",
    "check",
    "count_int8",
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
TRY_ELSEWHERE = "Try another `backend`, or keep the calls that it names in float by `op_name_dict`."
PREFERRED = ("ipex", "onednn", "openvino", "reference")  # order in which backend=None looks for one that is available


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


def count_int8(built: BuiltModel) -> int:
    """Return how many calls of a build really run in int8."""
    return sum(precision is Precision.INT8 for precision in built.executed.values())


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
    """A backend that reads what its builds saved in a way of its own."""

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
        raise BackendError(f"backend {name!r} can't run here: {reason}. Leave `backend` out for one that can.")
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
    reasons = "; ".join(f"{name}: {_engine(name).unavailable_because()}" for name in names)
    raise BackendError(f"a backend that can run here must be installed; tried {reasons}.")


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
            raise RecipeError(
                f"backend {name!r} can't run {call}: {reason} Change the recipe, or pass another `backend`."
            )
