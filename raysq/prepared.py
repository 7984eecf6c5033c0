"""Everything about a model that all its trials share: the deployable copy, its graph, statistics and search space."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from raysq import fingerprint, memory
from raysq.calibration_data import Calibration, peek
from raysq.errors import CalibrationError, ModelError, OptionError
from raysq.flattened import forward_signature
from raysq.graph import ModelGraph
from raysq.inspection import deployable, evaluating
from raysq.kernels import base
from raysq.kernels.base import BuiltModel, Capabilities, Source
from raysq.kernels.cpu import governor, model_name, physical_cores
from raysq.latency import Timing, pair
from raysq.model_choices import ModelChoices
from raysq.observation import observe
from raysq.options import Latency, Smoothing, is_whole
from raysq.probing import probe
from raysq.recipe import Precision
from raysq.rivals import AUTO, CHEAPEST_FIRST, seeded
from raysq.sensitivities import MSE, rank
from raysq.smoothquant.alphas import advised_alphas, smoothable, tuned_alphas
from raysq.space import APPROACHES, SearchSpace, build_space
from raysq.switches import Switches, read_switches, with_switches

__all__ = ["MACHINE", "Prepared", "as_call", "machine", "prepare", "ranked", "resolve"]


MACHINE = ("cpu", "isa", "threads", "governor")  # the CPU's name, its instruction sets, of its frequency or None
UNCALIBRATED = ("dynamic", "weight_only")  # approaches that need no statistics


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be searched; made by `raysq.prepare`.

    Attributes:
        source: the deployable fp32 copy with its graph, statistics and example inputs.
        engine: name of the backend.
        capabilities: what the backend runs on this CPU.
        space: every recipe that may be tried.
        latency_args: positional inputs that are timed.
        latency_kwargs: keyword inputs that are timed.
        num_threads: threads that the model will run with.
        fingerprints: digests of "model" and "calibration".
        left_in_float: call or function, and why it stays in float in every recipe.
        build_s: seconds that building the default recipe took; 0 where nothing was built.
        rivals: names of further backends, which the best recipes are tried on.
    """

    source: Source
    engine: str
    capabilities: Capabilities
    space: SearchSpace
    latency_args: tuple[Any, ...]
    latency_kwargs: Mapping[str, Any]
    num_threads: int
    fingerprints: Mapping[str, str]
    left_in_float: Mapping[str, str] = field(default_factory=dict)
    build_s: float = 0.0
    rivals: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, Any]:
        """What latency depends on beside model, recipe and inputs, as it is here: see `machine`."""
        return machine(self.capabilities, self.num_threads)

    @property
    def calls(self) -> dict[str, dict[str, Any]]:
        """What a person wants to know of each call, in execution order: see `raysq.journal.Header`."""
        graph = self.source.graph
        groups = {call: group.name for group in graph.groups.values() for call in group.calls}
        ranks = {name: place for place, name in enumerate(self.space.rankings.get(MSE().name, ()), 1)}
        return {
            c.name: {"op": c.op.value, "macs": c.macs, "group": groups.get(c.name, ""), "rank": ranks.get(c.name)}
            for c in graph.calls
        }

    @property
    def timed_inputs(self) -> list[str]:
        """Type and shape of each tensor among the inputs that are timed, such as "torch.float32 (1, 3, 32, 32)"."""
        leaves = tree_leaves((self.latency_args, self.latency_kwargs))
        return [f"{t.dtype} {tuple(t.shape)}" for t in leaves if isinstance(t, Tensor)]

    def time(self, candidate: Callable[..., Any], reference: Callable[..., Any], latency: Latency) -> Timing:
        """Time two forms of the model in turn, as it will be deployed."""
        return pair(
            candidate,
            reference,
            args=self.latency_args,
            kwargs=self.latency_kwargs,
            num_threads=self.num_threads,
            latency=latency,
        )

    def memory_growth(self, built: BuiltModel) -> int:
        """Return the bytes that a forward of a build adds to the resident memory at its peak, see `memory.growth`."""
        return memory.growth(built.model, self.latency_args, self.latency_kwargs)


def machine(capabilities: Capabilities, num_threads: int) -> dict[str, Any]:
    """Return a value for each of MACHINE, in this process."""
    values = (model_name(), ",".join(capabilities.isa), num_threads, governor())
    return dict(zip(MACHINE, values, strict=True))


def prepare(
    model: nn.Module | str,
    calib: Any = None,
    *,
    backend: str | None = None,
    approach: str = "static",
    example_inputs: Any = None,
    latency_inputs: Any = None,
    num_threads: int | None = None,
    space: Any = None,
    op_type_dict: Mapping[str, Any] | None = None,
    op_name_dict: Mapping[str, Any] | None = None,
    smoothing: Smoothing | bool | None = None,
    switches: Switches | None = None,
    seed: int = 0,
    called: Callable[[], tuple[tuple[Any, ...], Mapping[str, Any]] | None] | None = None,
) -> Prepared:
    """Inspect a model and run the calibration data through it once; the model itself is not changed.

    Args:
        model: fp32, on the CPU; or "module:function" that returns it.
        calib: calibration batches, or `raysq.Calibration`; None for approach "dynamic" or "weight_only" with
            `example_inputs`.
        backend: a name; None takes the fastest that can run here.
        approach: "static", "dynamic", "auto" (static or dynamic per call) or "weight_only".
        example_inputs: what deployment is traced with; default the first calibration batch.
        latency_inputs: what is timed; default the example inputs.
        num_threads: threads of deployment, >= 1; default the physical cores.
        space: a `SearchSpace` to search instead, or the path of a YAML description.
        op_type_dict: rules by type, in INC's spelling.
        op_name_dict: rules by name.
        smoothing: how alphas are found; None or True: for each group by its error, where that pays; False: none.
        switches: name to True (on in every recipe), False (off) or None (tuned), see `raysq.switches`.
        seed: of the sampled rows and items.
        called: returns the (positional, keyword) inputs that the evaluation calls the model with, None if it doesn't;
            where these are other arguments than calibration gives it (labels, no mask), they are the default example.

    Raises:
        InputError: what can't be used, and why; before any work.
        BackendError: the backend can't run here.
    """
    model = resolve(model)
    if num_threads is not None and (not is_whole(num_threads) or not 1 <= num_threads <= 1024):
        raise OptionError(f"`num_threads` must be a whole number in [1, 1024], got {num_threads!r}.")
    if not is_whole(seed) or seed < 0:
        raise OptionError(f"`seed` must be a whole number of at least 0, got {seed!r}.")
    if not isinstance(smoothing, Smoothing | bool | None):
        raise OptionError(f"`smoothing` must be a raysq.Smoothing, True, False or None, got {smoothing!r}.")
    switches = read_switches(switches)
    smooth = switches.get("smooth_quant")
    if smooth is not None and smoothing is not None and smooth == (smoothing is False):
        raise OptionError(f"`smoothing`={smoothing!r} and switch 'smooth_quant' contradict each other. Leave one out.")
    if backend == AUTO:
        engines = list(base.usable(CHEAPEST_FIRST)) or [base.available()]
    else:
        engines = [base.get(backend) if backend else base.available()]
    if calib is None and (approach not in UNCALIBRATED or example_inputs is None):
        raise CalibrationError(
            '`calib` may be None for approach="dynamic" and approach="weight_only" with `example_inputs` only.'
        )
    batches = iter(()) if calib is None else Calibration.of(calib).batches(evaluating(model))
    if calib is None:
        args, kwargs = as_call(example_inputs)
    else:
        first, batches = peek(batches)
        args, kwargs = as_call(example_inputs) if example_inputs is not None else (first.args, first.kwargs)
    copy, graph = deployable(model, args, kwargs)
    engine, *rivals = seeded(engines, graph, APPROACHES.get(approach, ()))
    capabilities = engine.capabilities()
    if isinstance(space, SearchSpace):
        searched = space
    else:
        searched = build_space(
            graph,
            capabilities,
            description=space,
            op_type_dict=op_type_dict,
            op_name_dict=op_name_dict,
            approach=approach,
        )
    stats = None
    if calib is not None:
        stats = observe(copy, graph, batches, seed=seed)
    evaluated = called() if called and example_inputs is None else None
    if evaluated and _given(model, *evaluated) != _given(model, args, kwargs):
        args, kwargs = evaluated[0], dict(evaluated[1])
    source = Source(copy, graph, stats, args, kwargs)
    left_in_float = {**graph.left_in_float, **_without_kernel(graph, capabilities)}
    build_s = 0.0
    if not isinstance(space, SearchSpace):
        if isinstance(engine, base.Selective):
            unseen = engine.unseen(source)
            searched = searched.without_int8(unseen)
            left_in_float |= unseen
        probed = probe(searched, source, engine)
        searched, build_s = probed.space, probed.build_s
        left_in_float |= probed.left_in_float
        if stats is not None:
            smoothing = False if smooth is False else smoothing
            searched = ranked(_smoothed(searched, source, smoothing, capabilities), source)
    searched = with_switches(searched, switches)
    latency_args, latency_kwargs = (args, kwargs) if latency_inputs is None else as_call(latency_inputs)
    return Prepared(
        source=source,
        engine=engine.name,
        rivals=tuple(rival.name for rival in rivals),
        capabilities=capabilities,
        space=searched,
        latency_args=latency_args,
        latency_kwargs=latency_kwargs,
        num_threads=num_threads or physical_cores(),
        fingerprints={"model": fingerprint.of_model(model), "calibration": stats.fingerprint if stats else ""},
        left_in_float=left_in_float,
        build_s=build_s,
    )


def _smoothed(
    space: SearchSpace, source: Source, smoothing: Smoothing | bool | None, capabilities: Capabilities
) -> SearchSpace:
    """Return the space with what may be chosen beside the calls, alphas as found for its default recipe."""
    default = space.default()
    if isinstance(smoothing, Smoothing):
        alphas = tuned_alphas(source, smoothing, default)
    else:
        alphas = {} if smoothing is False else advised_alphas(source, default)
    everywhere = smoothing.alpha if isinstance(smoothing, Smoothing) and isinstance(smoothing.alpha, tuple) else ()
    groups = [n for n in smoothable(source.graph, default) if capabilities.may_smooth_group(source.graph, n)]
    alphas = {name: alpha for name, alpha in alphas.items() if name in groups}
    model = ModelChoices.of(source.graph, groups, alphas, everywhere, capabilities.transforms)
    return replace(space, model=model)


def ranked(space: SearchSpace, source: Source) -> SearchSpace:
    """Return the space with its calls ranked by what int8 costs them in its default recipe, as statistics tell."""
    sensitivity = MSE()
    return space.with_ranking(sensitivity.name, rank(sensitivity.scores(source, space.default())))


def resolve(model: nn.Module | str) -> nn.Module:
    """Return the model itself, or what the function named "module:function" returns.

    Raises:
        ModelError: no such function, or it returns no module.
    """
    if isinstance(model, str):
        module, _, name = model.partition(":")
        try:
            model = getattr(importlib.import_module(module), name)()
        except (ImportError, AttributeError, ValueError, TypeError) as exc:
            raise ModelError(f'`model` must be a module or "module:function" that returns one: {exc}') from exc
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model must be a torch.nn.Module, got {type(model).__name__}.")
    return model


def _without_kernel(graph: ModelGraph, capabilities: Capabilities) -> dict[str, str]:
    """Return the calls of a kind that the backend can't run in int8 on this CPU, and that reason."""
    int8 = {op for op, capability in capabilities.ops.items() if Precision.INT8 in capability.precisions}
    reason = f"backend {capabilities.backend!r} has no int8 kernel for it on this CPU"
    return {call.name: reason for call in graph.calls if call.op not in int8}


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs as (args, kwargs): a tuple is positional, a dict is keyword, anything else one argument."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def _given(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[str]:
    """Return the names of the arguments that hold tensors, none if they don't fit the model."""
    signature = forward_signature(model)
    try:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError:
        return set()
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    return {name for name, value in arguments.items() if any(isinstance(t, Tensor) for t in tree_leaves(value))}
