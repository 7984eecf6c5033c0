"""The front door: what users call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raysq import evaluation, fingerprint, logs, qat, storage
from raysq.arguments import (
    check_limits,
    check_options,
    check_sendable,
    goal_of,
    journal_path,
    searcher_of,
    sources_of,
    versions,
    workers_of,
)
from raysq.baseline import measure
from raysq.calibration_data import arguments
from raysq.conclusion import conclude
from raysq.deployed import Deployed
from raysq.errors import OptionError
from raysq.goal import Goal
from raysq.graph import ModelGraph
from raysq.inspection import deployable, evaluating
from raysq.job import Job
from raysq.kernels import base, built
from raysq.latency import Latency, threads
from raysq.mirror import mirrored
from raysq.op_times import measured_times
from raysq.prepared import Prepared, prepare, resolve
from raysq.quantized import Quantized
from raysq.recipe import Recipe
from raysq.result import Result
from raysq.rivals import AUTO
from raysq.smoothing import Smoothing
from raysq.space import SearchSpace
from raysq.switches import Switches, read_switches
from raysq.workers import Workers

if TYPE_CHECKING:
    from raysq.tuning.trial import QuantTrial

__all__ = ["inspect", "load", "prepare", "quantize", "search_space", "trainable", "tune"]

JUDGED = ("goal", "higher_is_better", "objectives", "num_threads")  # arguments by which trials are judged and timed


def tune(
    model: torch.nn.Module | str,
    calib: Any,
    eval_fn: evaluation.EvalFn,
    *,
    tolerance: float = 0.01,
    criterion: str = "relative",
    higher_is_better: bool = True,
    strategy: Any = "auto",
    strategy_kwargs: Mapping[str, Any] | None = None,
    backend: str | None = None,
    approach: str = "static",
    max_trials: int = 50,
    timeout_s: float | None = None,
    stop_at_first: bool = False,
    space: SearchSpace | str | None = None,
    op_type_dict: Mapping[str, Any] | None = None,
    op_name_dict: Mapping[str, Any] | None = None,
    switches: Switches | None = None,
    example_inputs: Any = None,
    latency_inputs: Any = None,
    num_threads: int | None = None,
    max_concurrent_trials: int | None = None,
    storage_path: str | Path | None = None,
    name: str | None = None,
    resume: str | Path | None = None,
    warm_start: Any = None,
    seed: int = 0,
    callbacks: Sequence[Any] = (),
    verbose: int = 1,
    goal: Goal | None = None,
    latency: Latency | None = None,
    smoothing: Smoothing | bool | None = None,
    workers: Workers | None = None,
    train_fn: qat.TrainFn | None = None,
) -> Result:
    """Find the int8 recipe that runs fastest on this CPU while accuracy stays within the tolerance.

    Args:
        model: fp32 module on the CPU, or "module:function" that returns it; it is not changed.
        calib: calibration batches, read once; or `raysq.Calibration`.
        eval_fn: takes a model; returns a number, a dict of numbers, or yields (sum, n) per batch.
        tolerance: how much may be lost, >= 0; as a share of the fp32 score where `criterion` is "relative".
        criterion: "relative" or "absolute".
        higher_is_better: False for losses and the like.
        strategy: a name from `raysq.strategies`, or a Ray Tune searcher.
        strategy_kwargs: arguments of a named strategy.
        backend: "ipex", "onednn", "openvino" or "reference"; None takes the first of these that can run here. "auto"
            searches on the one with the cheapest builds that fits the model, tries the best recipes on all, and takes
            the fastest that meets the goal; `Result.backends` has each.
        approach: "static", "dynamic", "auto" (static or dynamic per call), "weight_only", or "qat": static, of the
            model that `train_fn` has trained under the default recipe.
        max_trials: trials at most, those of a resumed run included, >= 1.
        timeout_s: seconds the search may take, > 0; None for no limit.
        stop_at_first: end with the first recipe that meets the goal; single calls aren't timed for that.
        space: a `SearchSpace`, or the path of a YAML description, to search instead of the default.
        op_type_dict: narrows the space by op type, in INC's spelling.
        op_name_dict: narrows it by call name.
        switches: name to True (on in every recipe), False (off) or None (tuned), see `raysq.switches`.
        example_inputs: what the model is traced with; default the first calibration batch.
        latency_inputs: what is timed; default the example inputs.
        num_threads: threads of deployment; default the physical cores.
        max_concurrent_trials: at most this many at once: `Workers.count`.
        storage_path: directory of runs; default "raysq_runs", or "~/raysq_runs" in a Ray job with files. A URL of any
            kind that fsspec knows ("s3://bucket/runs") gets a copy of the run's directory, which is below the default.
        name: of this run; default the strategy's `experiment_name` if it has one, else the time.
        resume: directory or journal of a run to continue, or its URL.
        warm_start: directory, journal or URL of another run, a recipe or its file, or a list of these: results of the
            same model and data are not measured again, the best recipes of any others are tried first.
        seed: of every random choice.
        callbacks: Ray Tune callbacks, and `raysq.OptunaStudy`; Ray's loggers write below "logs" in the run's directory.
        verbose: 0 silent, 1 progress, 2 each proposal and its reason.
        goal: the goal as one value, instead of `tolerance`, `criterion` and `higher_is_better`; it alone may hold
            further metrics, other objectives than latency, and a split that confirms the winner.
        latency: budget of timings.
        smoothing: how the alphas of SmoothQuant are found; None: for each group, where it pays; False: none.
        workers: what a trial reserves, how many run at once, and how often a lost one is tried again.
        train_fn: trains the module that it gets, which rounds as int8 will, in place; called once, in this process.
            Without approach "qat" it is the last resort: if no recipe meets the goal, under the closest of them.

    Raises:
        InputError: an argument that can't be used, before any work.
        NoFeasibleRecipe: nothing met the goal, or nothing was confirmed; its `result` is the closest.

    Example:
        >>> result = raysq.tune(model, calib, eval_fn, tolerance=0.01)  # doctest: +SKIP
    """
    logs.configure(verbose)
    check_options(goal=goal, latency=latency, workers=workers, callbacks=callbacks)
    goal = goal_of(goal, tolerance, criterion, higher_is_better)
    latency, workers = latency or Latency(), workers_of(workers, max_concurrent_trials)
    check_limits(max_trials, timeout_s)
    switches = read_switches(switches)
    evaluation.check(eval_fn)
    qat.check(approach, train_fn, searching=True)
    if goal.confirm is not None:
        evaluation.check(goal.confirm, "Goal.confirm")
    searcher = searcher_of(strategy, strategy_kwargs or {})
    path, url = journal_path(storage_path, name or getattr(searcher, "experiment_name", None), resume)
    sources = sources_of(warm_start, resume)
    model = resolve(model)
    check_sendable(model, eval_fn)
    prepared = prepare(
        model,
        calib,
        backend=backend,
        approach=qat.post_training(approach),
        example_inputs=example_inputs,
        latency_inputs=latency_inputs,
        num_threads=num_threads,
        space=space,
        op_type_dict=op_type_dict,
        op_name_dict=op_name_dict,
        switches=switches,
        smoothing=smoothing,
        seed=seed,
        called=lambda: evaluation.first_call(eval_fn, evaluating(model), goal),
    )
    engine = base.get(prepared.engine)
    prints = {**prepared.fingerprints, "evaluation": evaluation.digest(eval_fn)}
    if goal.confirm is not None:
        prints["confirmation"] = evaluation.digest(goal.confirm)
    arguments = {
        "model": prepared.name,
        "goal": str(goal),
        "tolerance": goal.tolerance,
        "criterion": goal.criterion.value,
        "higher_is_better": goal.higher_is_better,
        "objectives": dict(goal.objectives),
        "strategy": strategy if isinstance(strategy, str) else type(strategy).__name__,
        "approach": approach,
        "smoothing": str(smoothing),
        "switches": switches,
        "max_trials": max_trials,
        "seed": seed,
        "num_threads": prepared.num_threads,
        "latency_inputs": prepared.timed_inputs,
    }
    with threads(prepared.num_threads), mirrored(path.parent, url):
        from raysq.journal import Journal
        from raysq.run import Entry, Header
        from raysq.trained import searched, train_once, with_last_resort
        from raysq.tuning import live, runner
        from raysq.warm_start import gather

        given, say = prepared, live.said(verbose)
        if train_fn is not None and approach == qat.QAT:
            default = given.space.default()
            prepared = searched(given, train_once(given, default, train_fn, path.parent, again=resume is None))
            prints["training"] = fingerprint.of_model(prepared.source.model)
        if resume is None:
            baseline = measure(given, engine, evaluating(model), eval_fn, goal, latency)
            wanted = getattr(searcher, "measures_times", False) and not stop_at_first  # they tell which is fastest
            times = measured_times(prepared, engine, baseline) if wanted else None
            header = Header(
                prints, arguments, versions(), prepared.engine, baseline, op_times=times, calls=prepared.calls
            )
            header = gather(sources, header, prepared.environment, prepared.space, goal)
            journal, earlier = Journal.create(path, header), tuple[Entry, ...]()
        else:
            settings = {name: arguments[name] for name in JUDGED} | {"backend": prepared.engine}
            journal, header, earlier = Journal.resume(path, prints, settings)
        job = Job(prepared, eval_fn, goal, latency, header.baseline)
        sought = replace(job, goal=replace(goal, confirm=None))  # neither searchers nor workers get that split
        if hasattr(searcher, "bind"):
            searcher.bind(prepared.space, sought.goal, max_trials, seed, prepared.source, times=header.op_times)
        with journal:
            trials = runner.run(
                sought,
                workers=workers,
                searcher=searcher,
                max_trials=max_trials,
                timeout_s=timeout_s,
                stop_at_first=stop_at_first,
                journal=journal,
                earlier=earlier,
                warm_start=header.warm_start,
                callbacks=callbacks,
                verbose=verbose,
            )
        if train_fn is not None and approach != qat.QAT and not any(trial.feasible for trial in trials):
            return with_last_resort(job, engine, trials, path, train_fn, say)
        return conclude(job, engine, trials, path, say)


def quantize(
    model: torch.nn.Module | str,
    calib: Any = None,
    recipe: Recipe | None = None,
    backend: str | None = None,
    approach: str = "static",
    *,
    example_inputs: Any = None,
    smoothing: Smoothing | bool | None = None,
    train_fn: qat.TrainFn | None = None,
    switches: Switches | None = None,
) -> Quantized:
    """Quantize without tuning: by a recipe, or by the default one.

    Args:
        model: fp32 module on the CPU, or "module:function".
        calib: calibration batches; None for approach "dynamic" or "weight_only" with `example_inputs`.
        recipe: what runs how; None takes the default of the search space.
        backend: its name; None takes the fastest that can run here.
        approach: "static", "dynamic", "auto" (static or dynamic per call), "weight_only", or "qat": static, after
            `train_fn`.
        example_inputs: what the model is traced with; default the first calibration batch.
        smoothing: how the alphas of the default recipe are found; None: for each group, where it pays; False: none.
        train_fn: for approach "qat": trains the module that it gets, which rounds as int8 will, in place.
        switches: name to True or False, for the default recipe, see `raysq.switches`.

    Raises:
        InputError: what can't be used, and why.

    Example:
        >>> int8 = raysq.quantize(model, calib, approach="qat", train_fn=lambda m: fit(m, loader))  # doctest: +SKIP
    """
    qat.check(approach, train_fn, searching=False)
    if recipe is not None and switches:
        raise OptionError(
            "`switches` go with the default recipe, and would have no effect on the one that is given. Leave one out."
        )
    if backend == AUTO:
        raise OptionError('backend="auto" compares backends, as `raysq.tune` does. Name one, or leave it out.')
    prepared = prepare(
        model,
        calib,
        backend=backend,
        approach=qat.post_training(approach),
        example_inputs=example_inputs,
        smoothing=smoothing,
        switches=switches,
    )
    source, chosen = prepared.source, recipe or prepared.space.default()
    if train_fn is not None:
        source, chosen = qat.train(source, chosen, train_fn), qat.plain(chosen)
    return Quantized.by(base.get(prepared.engine).build(source, chosen), chosen, prepared.left_in_float)


def load(directory: str | Path) -> Deployed:
    """Return a model that `save` wrote, warmed up; nothing is unpickled.

    Args:
        directory: path, or URL of any kind that fsspec knows.

    Raises:
        StorageError: there is none.
        BackendError: the backend that runs it isn't installed.
    """
    with storage.read(directory) as path:
        return built.load(path)


def inspect(model: torch.nn.Module | str, example_inputs: Any) -> ModelGraph:
    """Print what of a model could run in int8, a line per call, and return its graph.

    Args:
        model: fp32 module on the CPU, or "module:function".
        example_inputs: a tuple is positional, a dict keyword, anything else one argument.
    """
    from rich.console import Console
    from rich.table import Table

    graph = deployable(resolve(model), *arguments(example_inputs))[1]
    table = Table(*graph.COLUMNS)
    for row in graph.rows():
        table.add_row(*row)
    console = Console()
    console.print(table)
    for where, reason in graph.left_in_float.items():
        console.print(f"left in float: {where}: {reason}")
    return graph


def search_space(prepared: Prepared) -> dict[str, Any]:
    """Return the space of a prepared model as Ray Tune domains, for `Tuner(param_space=…)`."""
    from raysq.tuning.domains import domains

    return domains(prepared.space)


def trainable(prepared: Prepared, eval_fn: evaluation.EvalFn, **options: Any) -> type[QuantTrial]:
    """Return the Ray Tune trainable of a prepared model; options are those of `raysq.tuning.trial.trainable`."""
    from raysq.tuning import trial

    return trial.trainable(prepared, eval_fn, **options)
