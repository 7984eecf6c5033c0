"""The command line: `raysq demo`, `inspect`, `tune`, `show`, `report`, `compare`."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raysq.errors import InputError, NoFeasibleRecipe, OptionError, RaysqError, StorageError, unknown

__all__ = ["main"]

SUFFIX = ".jsonl"  # of journals
OVERRIDES = {  # options of `raysq tune` that override what the YAML file or the function says
    "tolerance": float,
    "criterion": str,
    "strategy": str,
    "backend": str,
    "approach": str,
    "max_trials": int,
    "timeout_s": float,
    "num_threads": int,
    "seed": int,
    "name": str,
    "storage_path": str,
    "resume": str,
    "warm_start": str,
    "verbose": int,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None takes the real ones.

    Returns:
        0; 1 if no recipe met the goal; 2 if something given can't be used.
    """
    options, rest = _parser().parse_known_args(arguments)
    try:
        code: int = options.run(options, rest)
    except NoFeasibleRecipe as exc:
        print(f"raysq: {exc}", file=sys.stderr)
        return 1
    except RaysqError as exc:
        print(f"raysq: {exc}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raysq",
        description="Find the fastest int8 recipe of a PyTorch model that keeps its accuracy.",
        epilog="RAYSQ_LOGLEVEL=DEBUG logs each proposal, skip and reason.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="quantize a small CNN, about a minute", add_help=False)
    demo.set_defaults(run=_demo)

    graph = commands.add_parser("inspect", help="print what of a model can be quantized")
    graph.add_argument("target", help="module:name or file.py:name of a model, or of a function that returns one")
    graph.add_argument("--shape", help="shape of its input, such as 1,3,224,224; not needed if calib comes with it")
    graph.set_defaults(run=_inspect)

    tune = commands.add_parser("tune", help="search a recipe")
    tune.add_argument("target", help="a YAML file, or module:function that returns model, calib, eval_fn")
    tune.add_argument("--save", help="directory or URL for the int8 model and its recipe")
    for name, kind in OVERRIDES.items():
        tune.add_argument(f"--{name.replace('_', '-')}", type=kind, help="as in raysq.tune")
    tune.set_defaults(run=_tune)

    show = commands.add_parser("show", help="print the trials of a run, finished or not")
    show.add_argument("journal", metavar="RUN", help="a run's directory, its journal, or a URL")
    show.set_defaults(run=_show)

    page = commands.add_parser("report", help="write a run as one HTML page, finished or not")
    page.add_argument("journal", metavar="RUN", help="a run's directory, its journal, or a URL")
    page.add_argument("--to", help="the file, a path or a URL; default report.html beside the journal")
    page.set_defaults(run=_report)

    against = commands.add_parser("compare", help="print two runs side by side, and where their best recipes differ")
    against.add_argument("runs", nargs=2, metavar="RUN", help="a run's directory, its journal, or a URL")
    against.set_defaults(run=_compare)
    return parser


def _demo(_: argparse.Namespace, rest: list[str]) -> int:
    from raysq import demo

    return demo.main(rest)


def _inspect(options: argparse.Namespace, rest: list[str]) -> int:
    import torch

    import raysq
    from raysq.calibration_data import Calibration

    _refuse(rest)
    found = _called(options.target)
    if isinstance(found, torch.nn.Module):
        if not options.shape:
            raise OptionError("a model alone doesn't say its inputs. Pass their shape, such as `--shape 1,3,224,224`.")
        example = torch.zeros(_shape(options.shape))
        raysq.inspect(found, (example,))
        return 0
    arguments = _workload(found, options.target)
    first = next(Calibration.of(arguments["calib"]).batches(arguments["model"]))
    raysq.inspect(arguments["model"], first.kwargs or first.args)
    return 0


def _tune(options: argparse.Namespace, rest: list[str]) -> int:
    import raysq

    _refuse(rest)
    settings: dict[str, Any] = {}
    target = options.target
    if target.endswith((".yaml", ".yml")):
        settings = _yaml(Path(target))
        target = settings.pop("workload", None)
        if not isinstance(target, str):
            raise OptionError(f'{options.target} must name `workload: "module:function"`, got {target!r}.')
    save = options.save or settings.pop("save", None)
    arguments = {**_workload(_called(target), target), **settings}
    arguments |= {name: getattr(options, name) for name in OVERRIDES if getattr(options, name) is not None}
    known = inspect.signature(raysq.tune).parameters
    for name in arguments:
        if name not in known:
            raise OptionError(unknown("argument of raysq.tune", name, known))
    result = raysq.tune(**arguments)
    print(result.dataframe().to_string())
    print(f"accuracy {result.accuracy:.4f} of {result.baseline.accuracy:.4f}, {result.speedup:.2f}x the fastest fp32")
    print(result.confirmation or f"not confirmed: the best of {len(result.trials)} trials on one evaluation set")
    if save:
        result.save(save)
        print(f"saved to {save}")
    return 0


def _show(options: argparse.Namespace, rest: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from raysq import journal

    _refuse(rest)
    with _journal(options.journal) as path:
        header, entries = journal.read(path)
    baseline = header.baseline
    fp32 = f"accuracy {baseline.accuracy:.4f}, {baseline.latency_ms:.3f} ms ({baseline.form})"
    table = Table(title=f"{header.backend}, fp32: {fp32}")
    for column in (
        "trial",
        "label",
        "status",
        "stage",
        "accuracy",
        "drop",
        "ratio to fp32",
        "ms",
        "int8",
        "feasible",
        "reason",
    ):
        table.add_column(column)
    for entry in entries:
        record = entry.record
        table.add_row(
            str(record.trial),
            record.label,
            record.status.value,
            record.stage.value,
            _number(record.accuracy, ".4f"),
            _number(record.accuracy_drop, ".4f"),
            record.ratio.with_interval if record.ratio else "",
            _number(record.latency_ms, ".3f"),
            str(record.int8_calls),
            "yes" if record.feasible else "no",
            record.reason,
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    from raysq import journal, report, storage
    from raysq.run import Run

    _refuse(rest)
    place = options.journal
    with _journal(place) as path:
        run = Run(*journal.read(path))
        folder = str(path.parent)
    if storage.is_url(place):
        folder = storage.parent_of(place) if place.endswith(SUFFIX) else place.rstrip("/")
    target = options.to or f"{folder}/{report.FILE}"
    with storage.written(storage.parent_of(target)) as directory:
        report.write(run, directory / storage.name_of(target))
    print(target)
    return 0


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
    from rich.console import Console

    from raysq import comparison, journal, storage
    from raysq.run import Run

    _refuse(rest)
    with _journal(options.runs[0]) as first, _journal(options.runs[1]) as second:
        one, other = (Run(*journal.read(path)) for path in (first, second))
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in comparison.tables(one, other, [storage.name_of(place) for place in options.runs]):
        console.print(table)
    return 0


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _refuse(rest: list[str]) -> None:
    if rest:
        raise OptionError(f"unknown option {rest[0]!r}; see --help.")


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as exc:
        raise OptionError(f"`--shape` must be whole numbers with commas between, got {text!r}.") from exc


@contextmanager
def _journal(place: str) -> Iterator[Path]:
    from raysq import storage

    with storage.read(place, lambda name: name.endswith(SUFFIX)) as path:
        if path.is_file():
            yield path
            return
        found = sorted(path.rglob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise StorageError(f"{place} holds no journal (*{SUFFIX}). Pass the directory of a run.")
        if len(found) > 1 and storage.is_url(place):
            raise StorageError(f"{place} holds {len(found)} journals, and a URL doesn't tell the newest. Name one run.")
        yield found[-1]


def _yaml(path: Path) -> dict[str, Any]:
    from raysq.plain_data import from_yaml

    try:
        settings = from_yaml(path.read_bytes())
    except OSError as exc:
        raise StorageError(f"can't read {path}: {exc.strerror}. Pass a YAML file, or module:function.") from exc
    except ValueError as exc:
        raise OptionError(f"{path} must be YAML, a line for each argument such as `tolerance: 0.01`: {exc}.") from exc
    if not isinstance(settings, dict):
        raise OptionError(f"{path} must hold keys such as `workload` and `tolerance`, got {type(settings).__name__}.")
    return settings


def _called(target: str) -> Any:
    """Import "module:name" or "file.py:name", and call it if it is a function."""
    from torch.nn import Module

    place, separator, name = target.rpartition(":")
    if not separator:
        raise OptionError(f'the target must read "module:function" or "file.py:function", got {target!r}.')
    file = Path(place)
    folder = str(file.parent.resolve()) if file.suffix == ".py" else str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # before Ray starts: its workers inherit the path
    try:
        module = importlib.import_module(file.stem if file.suffix == ".py" else place)
    except ModuleNotFoundError as exc:
        raise InputError(
            f"can't import {place!r} from {folder}: {exc}. Call raysq where the module lies, or give a path, "
            "file.py:name."
        ) from exc
    try:
        found = getattr(module, name)
    except AttributeError:
        raise InputError(unknown(f"name in {place}", name, (n for n in vars(module) if n[0] != "_"))) from None
    return found() if callable(found) and not isinstance(found, Module) else found


def _workload(found: Any, target: str) -> dict[str, Any]:
    """Bring what the user's function returned to arguments of raysq.tune."""
    if isinstance(found, Mapping) and {"model", "calib"} <= set(found):
        return dict(found)
    if isinstance(found, tuple | list) and len(found) >= 3:
        return dict(zip(("model", "calib", "eval_fn"), found, strict=False))
    raise InputError(
        f"{target} must return `model, calib, eval_fn`, or a dict with these and other arguments of raysq.tune; "
        f"got {type(found).__name__}."
    )
