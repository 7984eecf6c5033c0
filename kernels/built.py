"""A model that a backend built on TorchScript: how it is called, what it executes, how it is written to disk."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysq.deployed import Deployed
from raysq.errors import StorageError
from raysq.kernels.cpu import instruction_sets
from raysq.recipe import Precision

__all__ = ["WARM_UP_RUNS", "ScriptedModel", "load", "write_signature"]

log = logging.getLogger("raysq")

MODEL_FILE = "model.pt"
SIGNATURE_FILE = "signature.json"
EXAMPLE_FILE = "example.pt"
CONFIGURE_FILE = "configure.json"  # the name that IPEX's tutorial gives it
WARM_UP_RUNS = 3  # the first run profiles, the second compiles, from the third on nothing changes


@dataclass(frozen=True)
class ScriptedModel:
    """A frozen TorchScript module behind the original's own signature.

    Attributes:
        backend: name of the backend that built it, and that must be there to load it.
        script: the module, flat tensors in and out.
        model: what is called.
        executed: call name to the precision it really runs in.
        left_in_float: call name to the reason why it isn't as the recipe asked.
        example: the flat example inputs, which warm a loaded model up.
        configure: returns the framework's own configuration of the same model, where it has one.
    """

    backend: str
    script: Any
    model: Deployed
    executed: Mapping[str, Precision]
    left_in_float: Mapping[str, str]
    example: tuple[Tensor, ...] = ()
    configure: Callable[[], Mapping[str, Any]] | None = None

    @cached_property
    def size_bytes(self) -> int:
        """Size of the artifact."""
        buffer = io.BytesIO()
        torch.jit.save(self.script, buffer)
        return buffer.tell()

    def save(self, directory: Path) -> None:
        """Write model.pt, which torch.jit.load reads, how it is called, and configure.json where there is one."""
        torch.jit.save(self.script, str(directory / MODEL_FILE))
        write_signature(directory, self.model, self.backend, self.example)
        if self.configure is not None:
            try:
                (directory / CONFIGURE_FILE).write_text(json.dumps(self.configure(), indent=1))
            except Exception as exc:  # it is an extra, made by another framework: the model is saved whatever it raises
                log.info("%s is not written: %s", CONFIGURE_FILE, exc)


def write_signature(directory: Path, model: Deployed, backend: str, example: tuple[Tensor, ...]) -> None:
    """Write how a model is called and what runs it, and the flat example inputs that warm it up."""
    torch.save(list(example), directory / EXAMPLE_FILE)
    signature = {**model.signature(), "backend": backend, "isa": list(instruction_sets())}
    (directory / SIGNATURE_FILE).write_text(json.dumps(signature, indent=1))


def load(directory: Path) -> Deployed:
    """Return a saved model, warmed up; nothing is unpickled.

    Raises:
        StorageError: the directory holds no model, or it can't be read.
        BackendError: the backend that runs it isn't installed here.
    """
    from raysq.kernels import base

    try:
        signature = json.loads((directory / SIGNATURE_FILE).read_text())
        example = torch.load(directory / EXAMPLE_FILE, weights_only=True)
    except (OSError, ValueError, RuntimeError) as exc:
        raise StorageError(f"{directory} holds no saved raysq model: {exc}") from exc
    engine = base.get(signature["backend"])  # its kernels must be registered before the graph is read
    missing = set(signature["isa"]) - set(instruction_sets())
    if missing:
        log.warning(
            "the model was tuned on a CPU with %s; this one lacks it: measure again.", ", ".join(sorted(missing))
        )
    if isinstance(engine, base.Storing):
        script = engine.read(directory, tuple(example))
    else:
        script = torch.jit.load(str(directory / MODEL_FILE))
    with torch.no_grad():
        for _ in range(WARM_UP_RUNS):
            script(*example)
    return Deployed.load(script, signature)
