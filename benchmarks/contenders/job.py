"""What is asked of a process: which contender, on which workload, where."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from contenders.base import Contender

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """One contender on one workload, as it is handed to a process.

    Attributes:
        module: that holds its class `Peer`.
        options: the arguments of that class.
        workload: a name from `workloads.NAMES`.
        directory: gets the artifact and the record.
        threads: of the model, >= 1.
        cores: that the process may run on.
        tolerance: share of the fp32 score that may be lost.
    """

    module: str
    options: Mapping[str, Any]
    workload: str
    directory: str
    threads: int
    cores: Sequence[int]
    tolerance: float

    def to_json(self) -> str:
        """Return it as `from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def contender(self) -> Contender:
        """Return the contender; its packages are imported here."""
        made: Contender = importlib.import_module(self.module).Peer(**self.options)
        return made
