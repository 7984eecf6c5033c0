"""Everything about a model that all its trials share: the deployable copy, its graph, statistics and search space."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from raysq import fingerprint, memory
from raysq.calibration_data import Batch, Calibration, arguments, peek
from raysq.capabilities import Capabilities
from raysq.checks import check_whole, is_whole
from raysq.errors import CalibrationError, ModelError, OptionError
from raysq.flattened import forward_signature
from raysq.graph import ModelGraph
from raysq.inspection import deployable, evaluating, run_once
from raysq.kernels import base
from raysq.kernels.base import BuiltModel
from raysq.kernels.cpu import governor, model_name, physical_cores
from raysq.latency import Latency, Timing, alone, pair
from raysq.model_choices import ModelChoices
from raysq.observation import observe
from raysq.probing import Probe, probe
from raysq.recipe import Precision
from raysq.rivals import AUTO, CHEAPEST_FIRST, seeded
from raysq.sensitivities import MSE, rank
from raysq.smoothing import Smoothing
from raysq.smoothquant.alphas import advised_alphas, smoothable, tuned_alphas
from raysq.source import Source
from raysq.space import APPROACHES, SearchSpace, build_space
from raysq.structure import tensors_in
from raysq.switches import Switches, read_switches, with_switches

__all__ = ["MACHINE", "Prepared", "machine", "prepare", "ranked", "resolve"]


MACHINE = ("cpu", "isa", "threads", "governor")  # the CPU's name, its instruction sets, of its frequency or None
UNREAD = "nothing reads its result, so it isn't computed"
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
        calibration_s: seconds that the pass over the calibration data took.
        sensitivities: call to the noise that int8 adds at its output in the default recipe, as a share of the signal,
            both squared; what the calls are ranked by. Empty where there are no statistics, or the space was given.
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
    calibration_s: float = 0.0
    sensitivities: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What people call the model: its class."""
        return type(self.source.model).__name__

    @property
    def environment(self) -> dict[str, Any]:
        """What latency depends on beside model, recipe and inputs, as it is here: see `machine`."""
        return machine(self.capabilities, self.num_threads)

    @property
    def calls(self) -> dict[str, dict[str, Any]]:
        """What a person wants to know of each call, in execution order: see `raysq.run.Header`."""
        graph = self.source.graph
        groups = {call: group.name for group in graph.groups.values() for call in group.calls}
        ranks = {name: place for place, name in enumerate(self.space.rankings.get(MSE().name, ()), 1)}
        return {
            c.name: {
                "op": c.op.value,
                "macs": c.macs,
                "group": groups.get(c.name, ""),
                "rank": ranks.get(c.name),
                "sensitivity": self.sensitivities.get(c.name),
            }
            for c in graph.calls
        }

    @property
    def timed_inputs(self) -> list[str]:
        """Type and shape of each tensor among the inputs that are timed, such as "torch.float32 (1, 3, 32, 32)"."""
        return [f"{t.dtype} {tuple(t.shape)}" for t in tensors_in((self.latency_args, self.latency_kwargs))]

    def time(
        self, candidate: Callable[..., Any], reference: Callable[..., Any], latency: Latency, *, deciding: bool = False
    ) -> Timing:
        """Time two forms of the model in turn, as it will be deployed, see `raysq.latency.pair`."""
        return pair(
            candidate,
            reference,
            args=self.latency_args,
            kwargs=self.latency_kwargs,
            num_threads=self.num_threads,
            latency=latency,
            deciding=deciding,
        )

    def latency_ms(self, model: Callable[..., Any]) -> float:
        """Return the median milliseconds of one form of the model, as it will be deployed."""
        return alone(model, args=self.latency_args, kwargs=self.latency_kwargs, num_threads=self.num_threads)

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
    check_whole("seed", seed, 0)
    switches = read_switches(switches)
    smoothing = _smoothing_of(smoothing, switches.get("smooth_quant"))
    if backend == AUTO:
        engines = list(base.usable(CHEAPEST_FIRST)) or [base.available()]
    else:
        engines = [base.get(backend) if backend else base.available()]
    batches, args, kwargs = _inputs(model, calib, approach, example_inputs)
    copy, graph = deployable(model, args, kwargs)
    timed = None if latency_inputs is None else _timed(copy, latency_inputs)
    engine, *rivals = seeded(engines, graph, APPROACHES.get(approach, ()))
    capabilities = engine.capabilities()
    if isinstance(space, SearchSpace):
        described = space
    else:
        described = build_space(
            graph,
            capabilities,
            description=space,
            op_type_dict=op_type_dict,
            op_name_dict=op_name_dict,
            approach=approach,
        )
    begun = time.perf_counter()
    stats = None if batches is None else observe(copy, graph, batches, seed=seed)
    calibration_s = time.perf_counter() - begun
    evaluated = called() if called and example_inputs is None else None
    if evaluated and _given(model, *evaluated) != _given(model, args, kwargs):
        args, kwargs = evaluated[0], dict(evaluated[1])
    source = Source(copy, graph, stats, args, kwargs)
    found = Probe(described, {}, 0.0) if isinstance(space, SearchSpace) else _probed(described, source, engine)
    searched, sensitivities = found.space, dict[str, float]()
    if stats is not None and not isinstance(space, SearchSpace):
        searched, sensitivities = ranked(_smoothed(searched, source, smoothing, capabilities), source)
    latency_args, latency_kwargs = timed or (args, kwargs)
    return Prepared(
        source=source,
        engine=engine.name,
        rivals=tuple(rival.name for rival in rivals),
        capabilities=capabilities,
        space=with_switches(searched, switches),
        latency_args=latency_args,
        latency_kwargs=latency_kwargs,
        num_threads=num_threads or physical_cores(),
        fingerprints={"model": fingerprint.of_model(model), "calibration": stats.fingerprint if stats else ""},
        left_in_float={**graph.left_in_float, **_without_kernel(graph, capabilities), **found.left_in_float},
        build_s=found.build_s,
        calibration_s=calibration_s,
        sensitivities=sensitivities,
    )


def _timed(model: nn.Module, latency_inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return the arguments that are timed, after running the model on them once."""
    args, kwargs = arguments(latency_inputs)
    run_once(model, args, kwargs, "`latency_inputs`", OptionError)
    return args, kwargs


def _smoothing_of(smoothing: Smoothing | bool | None, switch: bool | None) -> Smoothing | bool | None:
    """Return how alphas are found, by the argument and by the switch "smooth_quant".

    Raises:
        OptionError: it can't be used, or they contradict each other.
    """
    if not isinstance(smoothing, Smoothing | bool | None):
        raise OptionError(f"`smoothing` must be a raysq.Smoothing, True, False or None, got {smoothing!r}.")
    if switch is not None and smoothing is not None and switch == (smoothing is False):
        raise OptionError(f"`smoothing`={smoothing!r} and switch 'smooth_quant' contradict each other. Leave one out.")
    return False if switch is False else smoothing


def _inputs(
    model: nn.Module, calib: Any, approach: str, example_inputs: Any
) -> tuple[Iterator[Batch] | None, tuple[Any, ...], dict[str, Any]]:
    """Return the calibration batches, if any, and the positional and keyword inputs that the model is traced with.

    Raises:
        CalibrationError: there are none, or the approach needs statistics and gets none.
    """
    if calib is None:
        if approach not in UNCALIBRATED or example_inputs is None:
            raise CalibrationError(
                '`calib` may be None for approach="dynamic" and approach="weight_only" with `example_inputs` only.'
            )
        return None, *arguments(example_inputs)
    first, batches = peek(Calibration.of(calib).batches(evaluating(model)))
    return batches, *((first.args, first.kwargs) if example_inputs is None else arguments(example_inputs))


def _probed(space: SearchSpace, source: Source, engine: base.Backend) -> Probe:
    """Return the space without what the backend turns out not to run in int8, and why."""
    unseen = engine.unseen(source) if isinstance(engine, base.Selective) else {}
    found = probe(space.without_int8(unseen), source, engine)
    left = {**unseen, **found.left_in_float}
    return replace(found, left_in_float=left | dict.fromkeys(left.keys() & source.graph.unread_calls, UNREAD))


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


def ranked(space: SearchSpace, source: Source) -> tuple[SearchSpace, dict[str, float]]:
    """Return the space with its calls ranked by what int8 costs them in its default recipe, and these costs.

    They are told by the statistics, see `MSE`.
    """
    sensitivity = MSE()
    scores = sensitivity.scores(source, space.default())
    return space.with_ranking(sensitivity.name, rank(scores)), scores


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
    return {name for name, value in arguments.items() if tensors_in(value)}
