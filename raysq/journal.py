"""The journal of a run: a header, then one line of JSON per finished trial, on disk before the next one counts.

Ray's own snapshot may lose every trial of a run that is killed; a line that stands here is never lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Self

import numpy as np

from raysq.errors import InputError, ResumeError, StorageError
from raysq.op_times import OpTimes
from raysq.recipe import Recipe
from raysq.result import Baseline, Ratio, Stage, Status, TrialRecord
from raysq.scores import Units

__all__ = [
    "FILE",
    "SCHEMA",
    "Entry",
    "Header",
    "Journal",
    "WarmStart",
    "baseline_from_dict",
    "read",
    "record_from_dict",
    "to_dict",
    "vacant",
]

FILE = "journal.jsonl"  # of a run's directory
SCHEMA = 1  # grows by additions only: a reader of schema n accepts every schema <= n


@dataclass(frozen=True)
class Entry:
    """One finished trial, and what its record doesn't hold.

    Attributes:
        record: the trial.
        seen: how many trials had completed when this one was suggested: what replay needs.
        pairs: raw milliseconds (candidate, reference) of its timing, () if it wasn't timed.
        environment: "cpu", "isa", "threads" and "governor" of the worker.
        ended_s: seconds from the begin of the search, or of its resumed part, to the end of the trial.
    """

    record: TrialRecord
    seen: int
    pairs: tuple[tuple[float, float], ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    ended_s: float | None = None


@dataclass(frozen=True)
class WarmStart:
    """What earlier runs spare this one.

    Attributes:
        entries: results that are not measured again; their trials are numbered below 0.
        recipes: what is tried first, in this order.
    """

    entries: tuple[Entry, ...] = ()
    recipes: tuple[Recipe, ...] = ()


@dataclass(frozen=True)
class Header:
    """What a run is about; a journal is continued only by a run whose fingerprints are the same.

    Attributes:
        fingerprints: digests of "model", "calibration", "evaluation".
        arguments: what `raysq.tune` was asked, as plain data.
        versions: of raysq, torch, ray and the backend.
        backend: its name.
        baseline: what int8 is measured against.
        warm_start: what it began with, so that it is resumed without the runs that this came from.
        op_times: of single calls, where they were measured: a strategy that reads them must see the same again.
        calls: name of each call, in execution order, to its "op", "macs", "group" (of calls that are smoothed alike)
            and "rank" (1: int8 costs it most), for people who read the run later.
    """

    fingerprints: Mapping[str, str]
    arguments: Mapping[str, Any]
    versions: Mapping[str, str]
    backend: str
    baseline: Baseline
    warm_start: WarmStart = field(default_factory=WarmStart)
    op_times: OpTimes | None = None
    calls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Journal:
    """Appends entries to one file, which no other process may write meanwhile.

    Use `Journal.create` or `Journal.resume`; close it, or use it in a `with` block.
    """

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self._file = file

    @classmethod
    def create(cls, path: Path, header: Header) -> Journal:
        """Start a journal; its directory is made.

        Raises:
            StorageError: the path can't be written, or stands already.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = FileIO(path, "x")
        except FileExistsError as exc:
            raise _taken(path) from exc
        except OSError as exc:
            raise StorageError(f"can't write {path}: {exc.strerror}. Pass another `storage_path`.") from exc
        _lock(path, file)
        journal = cls(path, file)
        journal._write({"schema": SCHEMA, **to_dict(header)})
        with contextlib.suppress(OSError):  # the file's name must survive too; not every file system can
            _sync_directory(path.parent)
        return journal

    @classmethod
    def resume(cls, path: Path, fingerprints: Mapping[str, str]) -> tuple[Journal, Header, tuple[Entry, ...]]:
        """Continue a journal, dropping a last line that was torn by a crash.

        Raises:
            ResumeError: missing, damaged, in use, or of a run with other fingerprints.
            StorageError: the path can't be written.
        """
        header, entries = read(path)
        differ = [k for k in sorted({*header.fingerprints, *fingerprints}) if _get(header, k) != fingerprints.get(k)]
        if differ:
            what = "; ".join(f"{k}: {_get(header, k)} there, {fingerprints.get(k)} now" for k in differ)
            raise ResumeError(f"{path} belongs to another run ({what}). Start a new one: leave out `resume`.")
        try:
            file = FileIO(path, "r+")
        except OSError as exc:
            raise StorageError(f"can't write {path}: {exc.strerror}.") from exc
        _lock(path, file)
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        return cls(path, file), header, entries

    def append(self, entry: Entry) -> None:
        """Write one entry; it is on disk when this returns.

        Raises:
            StorageError: the disk is full or gone.
        """
        self._write(to_dict(entry))

    def close(self) -> None:
        """Let others write the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, data: Mapping[str, Any]) -> None:
        line = json.dumps(data, allow_nan=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as exc:
            raise StorageError(f"can't write {self.path}: {exc.strerror}.") from exc


def vacant(path: Path) -> Path:
    """Return the path of a new journal after making sure that it can be created; nothing is left there yet.

    Raises:
        StorageError: it can't be written, or stands already.
    """
    made: list[Path] = []
    try:
        for folder in reversed(path.parents):
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                made.append(folder)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as exc:
        raise StorageError(f"can't write {path.parent}: {exc.strerror}. Pass another `storage_path`.") from exc
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another run has begun in it meanwhile
                folder.rmdir()
    if path.exists():
        raise _taken(path)
    return path


def read(path: Path) -> tuple[Header, tuple[Entry, ...]]:
    """Read a journal; a last line without its end is left out, as a crash leaves it.

    Raises:
        ResumeError: it can't be read, or a line is damaged; the message names it.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as exc:
        raise ResumeError(f"can't read a journal at {path}: {exc.strerror}.") from exc
    if not lines:
        raise ResumeError(f"{path} holds no header: the run ended before its baseline. Start a new one.")
    parsed = [_parsed(path, number, line) for number, line in enumerate(lines, 1)]
    schema = parsed[0].pop("schema", None)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ResumeError(f"{path}: its schema must be at most {SCHEMA}, got {schema!r}. Update raysq to read it.")
    header, *entries = [
        _understood(path, number, kind, data)
        for number, (kind, data) in enumerate(zip([Header] + [Entry] * len(lines), parsed, strict=False), 1)
    ]
    return header, tuple(entries)


def to_dict(value: Any) -> Any:
    """Return plain data for strict JSON; numbers that are not finite become text ("nan", "inf")."""
    if isinstance(value, Recipe):
        return value.to_dict()
    if isinstance(value, Ratio):
        return {"value": float(value), "low": value.low, "high": value.high}
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    if isinstance(value, np.generic):
        return to_dict(value.item())
    if isinstance(value, np.ndarray):
        return to_dict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def record_from_dict(data: Mapping[str, Any]) -> TrialRecord:
    """Return the record whose `to_dict` this is.

    Raises:
        InputError: a malformed recipe.
        TypeError, ValueError, KeyError, AttributeError: anything else that is malformed.
    """
    return TrialRecord(
        **{
            **data,
            "recipe": Recipe.from_dict(data["recipe"]),
            "config": dict(data["config"]),
            "status": Status(data["status"]),
            "stage": Stage(data["stage"]),
            "ratio": _ratio(data.get("ratio")),
            "metrics": _optional_floats(data.get("metrics")),
            **{name: _float(data[name]) for name in _NUMBERS if data.get(name) is not None},
        }
    )


def baseline_from_dict(data: Mapping[str, Any]) -> Baseline:
    """Return the baseline whose `to_dict` this is.

    Raises:
        TypeError, ValueError, KeyError, AttributeError: malformed data.
    """
    return Baseline(
        **{
            **data,
            "metrics": _floats(data["metrics"]),
            "forms_ms": _floats(data["forms_ms"]),
            "bf16_ratio": _ratio(data.get("bf16_ratio")),
            "confirm_metrics": _optional_floats(data.get("confirm_metrics")),
            "reference": Units.from_dict(data["reference"]) if data.get("reference") else None,
        }
    )


_NUMBERS = (
    *("accuracy", "accuracy_drop", "worst_drop", "drop_std"),
    *("latency_ms", "latency_ratio", "size_ratio", "memory_ratio"),
)


def _understood(path: Path, number: int, kind: type, data: dict[str, Any]) -> Any:
    try:
        if kind is Header:
            baseline, warm_start = baseline_from_dict(data["baseline"]), _warm_start(data.get("warm_start", {}))
            op_times = OpTimes.from_dict(data["op_times"]) if data.get("op_times") else None
            return Header(**{**data, "baseline": baseline, "warm_start": warm_start, "op_times": op_times})
        return _entry(data)
    except (TypeError, ValueError, KeyError, AttributeError, InputError) as exc:
        what = f"{type(exc).__name__}: {exc}"
        raise ResumeError(f"{path}, line {number} is not what raysq wrote ({what}). Remove that line.") from exc


def _entry(data: Mapping[str, Any]) -> Entry:
    pairs = tuple((float(a), float(b)) for a, b in data["pairs"])
    return Entry(**{**data, "record": record_from_dict(data["record"]), "pairs": pairs})


def _warm_start(data: Mapping[str, Any]) -> WarmStart:
    recipes = tuple(map(Recipe.from_dict, data.get("recipes", ())))
    return WarmStart(tuple(map(_entry, data.get("entries", ()))), recipes)


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ResumeError(f"{path}, line {number} is damaged: {exc}. Remove that line.") from exc
    if not isinstance(data, dict):
        raise ResumeError(f"{path}, line {number} must be an object, got {type(data).__name__}. Remove that line.")
    return data


def _ratio(data: Mapping[str, Any] | None) -> Ratio | None:
    return None if data is None else Ratio(**_floats(data))


def _floats(data: Mapping[str, Any]) -> dict[str, float]:
    return {name: _float(value) for name, value in data.items()}


def _optional_floats(data: Mapping[str, Any] | None) -> dict[str, float] | None:
    return None if data is None else _floats(data)


def _float(value: Any) -> float:
    return float(value)  # reads "nan" and "inf" too


def _taken(path: Path) -> StorageError:
    return StorageError(f"{path} stands already. Pass `resume={str(path)!r}` or another name.")


def _get(header: Header, name: str) -> str | None:
    return header.fingerprints.get(name)


def _lock(path: Path, file: FileIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        file.close()
        raise ResumeError(f"{path} is being written by another run. Wait for it, or start a new one.") from exc


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
