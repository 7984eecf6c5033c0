"""Costs of calls on disk: a line of JSON each, so that a measurement that was cut short goes on with what is left."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from raysq.errors import StorageError, shown
from raysq.plain_data import from_json

__all__ = ["Costs", "SensitivityCache"]

FILE = "sensitivities.jsonl"

Costs = dict[str, float | None]  # by call; None where the method can't tell


class SensitivityCache:
    """The answers to one question, in a file that holds those to others too; several processes may write it.

    Args:
        directory: made on the first write.
        question: all that the costs depend on.
    """

    def __init__(self, directory: Path, question: Mapping[str, str]) -> None:
        self._path = directory / FILE
        self._question = dict(question)

    def read(self) -> Costs:
        """Return what is known; a last line without its end is left out, as a crash leaves it.

        Raises:
            StorageError: it can't be read, or a line is damaged; the message names it.
        """
        try:
            lines = self._path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return {}
        except OSError as exc:
            raise StorageError(f"can't read {self._path}: {exc.strerror}. Pass another `cache`.") from exc
        costs: Costs = {}
        for number, line in enumerate(lines, 1):
            try:
                entry = from_json(line)
                if entry["question"] == self._question:
                    costs[_call(entry["call"])] = _cost(entry["cost"])
            except (ValueError, TypeError, KeyError, OverflowError) as exc:
                raise StorageError(f"{self._path}, line {number} is damaged: {exc!r}. Remove that line.") from exc
        return costs

    def append(self, costs: Costs) -> None:
        """Write costs; they are on disk when this returns.

        Raises:
            StorageError: the file can't be written.
        """
        entries = [{"question": self._question, "call": call, "cost": cost} for call, cost in costs.items()]
        lines = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:
            raise StorageError(f"can't write {self._path}: {exc.strerror}. Pass another `cache`.") from exc


def _call(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a call's name is text, got {shown(value)}")
    return value


def _cost(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"a cost is a number or null, got {shown(value)}")
    return float(value)
