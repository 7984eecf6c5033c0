"""`autotune` as the RFC of IPEX promised it: from model, data and evaluation to a tuned model that IPEX prepared."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate
from operator import itemgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from torch import nn

from raysq import api, evaluation
from raysq.calibration_data import Batch, Calibration, samples
from raysq.checks import is_whole
from raysq.errors import CalibrationError, EvaluationError, ModelError, NoFeasibleRecipe, OptionError, unknown
from raysq.flattened import forward_signature
from raysq.goal import Criterion, Goal
from raysq.inspection import deployable, evaluating
from raysq.kernels import base
from raysq.prepared import resolve
from raysq.smoothing import Smoothing
from raysq.source import Source

if TYPE_CHECKING:
    from raysq.result import Result

__all__ = ["autotune"]

P = ParamSpec("P")
T = TypeVar("T")

BACKEND = "ipex_qconf"
SAMPLING_SIZES = (100,)
ACCURACY_CRITERION: Mapping[str, float] = MappingProxyType({"relative": 0.01})
MAX_TRIALS = 100  # until the first that passes, as Intel Neural Compressor
UNTIL_TIME_IS_UP = 10_000  # trials
PASSED_ON = (
    *("op_name_dict", "higher_is_better", "num_threads", "latency_inputs", "max_trials", "max_concurrent_trials"),
    *("storage_path", "name", "seed", "callbacks", "verbose", "latency", "workers"),
)
PREPARED = """\
`autotune` prepares and calibrates by itself: give it the fp32 model, got one that ipex.quantization.{} returned.
Leave out `prepare` and the calibration loop, and write:
    tuned_model = raysq.autotune(model, calib_dataloader, eval_func)
    quantized_model = ipex.quantization.convert(tuned_model)"""

log = logging.getLogger("raysq")


def _lone_function_evaluates(function: Callable[P, T]) -> Callable[P, T]:
    """Take one function by position as `eval_func`, as the RFC calls it; two are `calib_func` and `eval_func`."""
    plain: Callable[..., T] = function

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        if len(args) == 3 and "eval_func" not in kwargs:
            return plain(*args[:2], **kwargs, eval_func=args[2])
        return plain(*args, **kwargs)

    return called


@_lone_function_evaluates
def autotune(
    model: nn.Module | str,
    calib_dataloader: Any,
    calib_func: Callable[[Any], object] | None = None,
    eval_func: evaluation.EvalFn | None = None,
    op_type_dict: Mapping[str, Any] | None = None,
    smoothquant_args: Mapping[str, Any] | None = None,
    sampling_sizes: Sequence[int] = SAMPLING_SIZES,
    accuracy_criterion: Mapping[str, float] = ACCURACY_CRITERION,
    tuning_time: float = 0,
    **options: Any,
) -> nn.Module:
    """Tune IPEX's int8 quantization, and return the model as IPEX prepares it with what was found loaded.

    `ipex.quantization.convert`, `torch.jit.trace` and `torch.jit.freeze` on the example inputs, which are the first
    batch, give the model that was measured. `autotune(model, calib_dataloader, eval_func)` is the short form: one
    function by position evaluates.

    Args:
        model: fp32 module on the CPU, or "module:function" that returns it; it is not changed.
        calib_dataloader: batches, read once and only as far as needed; of a pair the second is the label, unless
            forward requires both.
        calib_func: runs the model that it is given on calibration data; then the loader gives the example inputs only.
        eval_func: takes a model; returns a number, the higher the better, or what else `raysq.tune` takes.
        op_type_dict: narrows what is tried by op type, in INC's spelling.
        smoothquant_args: {"alpha": …, "auto_alpha_args": {…}}, see `raysq.Smoothing`; None is no SmoothQuant, {} is
            an alpha of its own for each layer.
        sampling_sizes: numbers of calibration samples to try, the first samples of the loader, each >= 1.
        accuracy_criterion: one of {"relative": share in [0, 1)} and {"absolute": loss >= 0}.
        tuning_time: seconds to search for the fastest; 0 ends with the first that meets the criterion.
        options: further arguments of `raysq.tune`, such as `num_threads`, `storage_path` and `verbose`.

    Raises:
        InputError: an argument that can't be used, before any work.
        BackendError: IPEX is missing, or can't prepare the model.
        NoFeasibleRecipe: nothing met the criterion; its `result` is the closest.

    Example:
        >>> import intel_extension_for_pytorch as ipex  # doctest: +SKIP
        >>> tuned_model = raysq.autotune(model, calib_dataloader, eval_func, smoothquant_args={})  # doctest: +SKIP
        >>> quantized_model = ipex.quantization.convert(tuned_model)  # doctest: +SKIP
    """
    model = resolve(model)
    _check_fp32(model)
    evaluate = _checked_evaluation(eval_func)
    goal = _goal(accuracy_criterion, options.pop("higher_is_better", True))
    _check_sizes(sampling_sizes)
    _check_time(tuning_time)
    if op_type_dict is not None and not isinstance(op_type_dict, Mapping):
        raise OptionError(f"`op_type_dict` must be a dict or None, got {type(op_type_dict).__name__}.")
    smoothing = False if smoothquant_args is None else Smoothing.of(smoothquant_args)
    for name in options:
        if name not in PASSED_ON:
            raise OptionError(unknown("option", name, [*inspect.signature(autotune).parameters, *PASSED_ON]))
    _check_data(calib_dataloader, calib_func, sampling_sizes)
    base.get(BACKEND)

    batches = _read(calib_dataloader, model, 1 if calib_func else max(sampling_sizes))
    args, kwargs = batches[0].args, batches[0].kwargs
    calibrations = {0: Calibration(calib_func)} if calib_func else _prefixes(batches, sampling_sizes)
    result = _search(
        calibrations,
        tuning_time,
        options,
        model=model,
        eval_fn=evaluate,
        goal=goal,
        backend=BACKEND,
        example_inputs=kwargs or args,
        op_type_dict=op_type_dict,
        smoothing=smoothing,
        switches={"smooth_quant": False} if smoothing is False else None,
    )
    log.info(
        "autotune: %.6g after %.6g in fp32, a loss of %.4g (%s)",
        *(result.accuracy, result.baseline.accuracy, result.accuracy_drop, goal),
    )
    return _prepared(model, args, kwargs, result)


def _search(
    calibrations: Mapping[int, Calibration], tuning_time: float, options: dict[str, Any], **what: Any
) -> Result:
    """Return the best result over all sizes, the first that passes where no time is given.

    Raises:
        NoFeasibleRecipe: the closest of all sizes.
    """
    from raysq.tuning import runner

    limits: dict[str, Any] = {"max_trials": MAX_TRIALS, "stop_at_first": True}
    if tuning_time:
        limits = {"max_trials": UNTIL_TIME_IS_UP, "timeout_s": tuning_time / len(calibrations)}
    best: Result | None = None
    closest: NoFeasibleRecipe | None = None
    with runner.session(options.get("verbose", 1)) if len(calibrations) > 1 else nullcontext():
        for size, calibration in calibrations.items():
            given = {**limits, **options}
            if len(calibrations) > 1 and "name" in given:
                given["name"] = f"{given['name']}-{size}"
            try:
                result = api.tune(calib=calibration, **what, **given)
            except NoFeasibleRecipe as exc:
                if closest is None or exc.result.accuracy_drop < closest.result.accuracy_drop:
                    closest = exc
                continue
            if best is None or result.latency_ratio < best.latency_ratio:
                best = result
            if not tuning_time:
                break
    if best is None:
        assert closest is not None  # there is at least one size, and each passes or not
        raise NoFeasibleRecipe(
            f"no configuration met the criterion ({what['goal']}) in {len(closest.result.trials)} trials; the closest "
            f"loses {closest.result.accuracy_drop:.4g}. It is in this error's `result`: `result.model` runs it, and "
            "`result.save(directory)` writes its configure.json, which `load_qconf_summary` reads. Allow a larger loss "
            "in `accuracy_criterion`, or try `smoothquant_args={}` and other `sampling_sizes`.",
            closest.result,
        ) from closest
    return best


def _prepared(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Result) -> nn.Module:
    """Return what the winner was made from: the model prepared anew, with the winner's configuration."""
    from raysq.kernels.built import ScriptedModel
    from raysq.kernels.ipex_qconf import prepared_model

    built = result.built
    assert isinstance(built, ScriptedModel) and built.configure is not None  # so the backend builds
    copied, graph = deployable(model, args, kwargs)
    return prepared_model(Source(copied, graph, None, args, kwargs), built.configure())


def _read(data: Any, model: nn.Module, count: int) -> list[Batch]:
    """Return the first batches, as many as hold `count` samples or all."""
    found: list[Batch] = []
    for batch in data.batches(evaluating(model)) if isinstance(data, Calibration) else _batches(data, model):
        found.append(batch)
        if sum(map(samples, found)) >= count:
            break
    return found


def _batches(data: Iterable[Any], model: nn.Module) -> Iterator[Batch]:
    """Yield batches without their labels; the second of a pair is one, as IPEX reads loaders, unless forward needs it.

    Raises:
        CalibrationError: there is none, or one doesn't fit the model.
    """
    parameters = forward_signature(model).parameters.values()
    required = sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    empty = True
    for raw in data:
        empty = False
        pair = isinstance(raw, tuple | list) and len(raw) == 2
        labelled = pair and (required < 2 or isinstance(raw[0], tuple | list | Mapping))
        yield from Calibration([raw], inputs=itemgetter(0) if labelled else None).batches(model)
    if empty:
        yield from Calibration([]).batches(model)  # says what to do


def _prefixes(batches: Sequence[Batch], sizes: Sequence[int]) -> dict[int, Calibration]:
    """Return calibration data of each size, those of what was read."""
    read = list(accumulate(map(samples, batches)))[-1]
    return {
        size: Calibration(batches, inputs=lambda batch: batch.kwargs or batch.args, calib_samples=size)
        for size in dict.fromkeys(min(size, read) for size in sizes)
    }


def _check_fp32(model: nn.Module) -> None:
    if hasattr(model, "save_qconf_summary") or hasattr(model, "_fqn_to_auto_quant_state_map"):
        raise ModelError(PREPARED.format("prepare"))
    if hasattr(model, "q_config"):
        raise ModelError(PREPARED.format("convert"))


def _checked_evaluation(eval_func: evaluation.EvalFn | None) -> evaluation.EvalFn:
    if eval_func is None:
        raise EvaluationError(
            "`eval_func` is needed: without a score there is nothing to tune by. Pass a function that takes a model "
            "and returns its accuracy, `autotune(model, calib_dataloader, eval_func)`; to quantize without tuning use "
            "`raysq.quantize(model, calib_dataloader)`."
        )
    if not callable(eval_func):
        raise EvaluationError(f"`eval_func` must be a function of one argument, the model; got {eval_func!r}.")
    evaluation.check(eval_func)
    return eval_func


def _goal(accuracy_criterion: Any, higher_is_better: bool) -> Goal:
    names = [c.value for c in Criterion]
    if not isinstance(accuracy_criterion, Mapping) or len(accuracy_criterion) != 1:
        raise OptionError(
            f"`accuracy_criterion` must be a dict with one key, {' or '.join(map(repr, names))}, such as "
            f"{{'relative': 0.01}}; got {accuracy_criterion!r}."
        )
    ((criterion, tolerance),) = accuracy_criterion.items()
    if criterion not in names:
        raise OptionError(unknown("key in `accuracy_criterion`:", criterion, names))
    return Goal(tolerance, Criterion(criterion), higher_is_better)


def _check_sizes(sizes: Any) -> None:
    if not isinstance(sizes, list | tuple) or not sizes or not all(is_whole(s) and s >= 1 for s in sizes):
        raise OptionError(
            f"`sampling_sizes` must be a list of numbers of samples, each at least 1, such as [100]; got {sizes!r}."
        )


def _check_time(seconds: Any) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < float("inf"):
        raise OptionError(
            f"`tuning_time` must be a number of seconds, 0 to end with the first model that passes; got {seconds!r}."
        )


def _check_data(calib_dataloader: Any, calib_func: Any, sizes: Sequence[int]) -> None:
    if callable(calib_dataloader) and not hasattr(calib_dataloader, "__iter__"):
        raise CalibrationError(
            "`calib_dataloader` must be an iterable of batches, got a function. One that runs the calibration goes by "
            "`calib_func=`; the loader gives the example inputs all the same."
        )
    if not isinstance(calib_dataloader, Calibration):
        Calibration(calib_dataloader)
    if calib_func is None:
        return
    if not callable(calib_func):
        raise OptionError(f"`calib_func` must be a function of one argument, the model; got {calib_func!r}.")
    if tuple(sizes) != SAMPLING_SIZES:
        raise OptionError(
            f"`sampling_sizes` are of the loader's samples, and would have no effect with `calib_func`; got {sizes!r}. "
            "Leave one of them out."
        )
