"""A model that a backend built on TorchScript: how it is called, what it executes, how it is written to disk."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysq.deployed import Deployed
from raysq.errors import ModelError, StorageError, shown
from raysq.kernels.cpu import instruction_sets
from raysq.plain_data import from_json
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
        """Size of the artifact, as a file: TorchScript would hold it three times to write it to a buffer."""
        with tempfile.TemporaryDirectory(prefix="raysq-") as directory:
            path = Path(directory) / MODEL_FILE
            torch.jit.save(self.script, str(path))
            return path.stat().st_size

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
        signature = from_json((directory / SIGNATURE_FILE).read_bytes())
        backend, isa = str(signature["backend"]), {str(name) for name in signature["isa"]}
        with torch.no_grad():
            example = tuple(_tensor(value) for value in torch.load(directory / EXAMPLE_FILE, weights_only=True))
    except Exception as exc:  # of a damaged file torch raises whatever its bytes lead to
        raise StorageError(_damaged(directory, exc)) from exc
    engine = base.get(backend)  # its kernels must be registered before the graph is read
    missing = isa - set(instruction_sets())
    if missing:
        log.warning(
            "the model was tuned on a CPU with %s; this one lacks it: measure again.", ", ".join(sorted(missing))
        )
    try:
        if isinstance(engine, base.Storing):
            script = engine.read(directory, example)
        else:
            script = torch.jit.load(str(directory / MODEL_FILE))
        with torch.no_grad():
            for _ in range(WARM_UP_RUNS):
                script(*example)
        return Deployed.load(script, signature)
    except ModelError:
        raise
    except Exception as exc:  # likewise, and OpenVINO
        raise StorageError(_damaged(directory, exc)) from exc


def _tensor(value: object) -> Tensor:
    if type(value) is not Tensor:
        raise TypeError(f"{EXAMPLE_FILE} holds tensors, got {shown(value)}")
    return value


def _damaged(directory: Path, exc: Exception) -> str:
    if isinstance(exc, FileNotFoundError):
        return f"{directory} holds no saved raysq model: {exc.filename} is missing. Pass what `save` was given."
    lines = str(exc).strip().splitlines()
    what = f"{type(exc).__name__}: {lines[0] if lines else ''}"
    return f"{directory} holds no saved raysq model, or a damaged one ({what}). Save it again."
