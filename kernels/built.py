"""A model that a backend built on TorchScript: how it is called, what it executes, how it is written to disk."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from raysq.deployed import Deployed
from raysq.recipe import Precision

__all__ = ["MODEL_FILE", "SIGNATURE_FILE", "ScriptedModel"]

MODEL_FILE = "model.pt"
SIGNATURE_FILE = "signature.json"


@dataclass(frozen=True)
class ScriptedModel:
    """A frozen TorchScript module behind the original's own signature.

    Attributes:
        backend: name of the backend that built it, and that must be there to load it.
        script: the module, flat tensors in and out.
        model: what is called.
        executed: call name to the precision it really runs in.
        left_in_float: call name to the reason why it isn't as the recipe asked.
    """

    backend: str
    script: Any
    model: Deployed
    executed: Mapping[str, Precision]
    left_in_float: Mapping[str, str]

    @cached_property
    def size_bytes(self) -> int:
        """Size of the artifact."""
        buffer = io.BytesIO()
        torch.jit.save(self.script, buffer)
        return buffer.tell()

    def save(self, directory: Path) -> None:
        """Write model.pt, which torch.jit.load reads, and how it is called."""
        torch.jit.save(self.script, str(directory / MODEL_FILE))
        signature = {**self.model.signature(), "backend": self.backend}
        (directory / SIGNATURE_FILE).write_text(json.dumps(signature, indent=1))
