"""A directory that says it is a saved model runs no Python of its own, and damage is raysq's error."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import ANYTHING, BYTES, changed, torn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import raysq
from raysq.errors import BackendError, InputError, OptionError
from raysq.kernels import base

pytestmark = pytest.mark.slow
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
BACKENDS = ("reference", "onednn", "ipex", "openvino")
FOR_PEOPLE = ("recipe.json", "configure.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the directory of a model that a backend saved; do not write to it."""
    made: dict[str, Path] = {}

    def directory(backend: str) -> Path:
        if backend not in made:
            try:
                base.get(backend)
            except BackendError as exc:
                pytest.skip(str(exc))
            torch.manual_seed(0)
            made[backend] = tmp_path_factory.mktemp(backend)
            raysq.quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), [X], backend=backend).save(made[backend])
        return made[backend]

    return directory


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trap}",)


def as_pickle(whole: bytes, trap: Path) -> bytes:
    return pickle.dumps(Malicious(trap))


def as_torch_file(whole: bytes, trap: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save([Malicious(trap)], buffer)
    return buffer.getvalue()


def as_old_torch_file(whole: bytes, trap: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save([Malicious(trap)], buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def inside_of_the_archive(whole: bytes, trap: Path) -> bytes:
    """Replace every pickle in a zip archive, as torch writes them; another file becomes a pickle."""
    if not zipfile.is_zipfile(io.BytesIO(whole)):
        return as_pickle(whole, trap)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as before, zipfile.ZipFile(buffer, "w") as after:
        for name in before.namelist():
            after.writestr(name, as_pickle(b"", trap) if name.endswith(".pkl") else before.read(name))
    return buffer.getvalue()


@pytest.mark.parametrize("poison", [as_pickle, as_torch_file, as_old_torch_file, inside_of_the_archive])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_unpickled(saved: Any, tmp_path: Path, backend: str, poison: Any) -> None:
    for name in sorted(path.name for path in saved(backend).iterdir()):
        trap = tmp_path / f"trap.{name}"
        poisoned = Path(shutil.copytree(saved(backend), tmp_path / name))
        (poisoned / name).write_bytes(poison((poisoned / name).read_bytes(), trap))
        try:
            raysq.load(poisoned)
        except (InputError, BackendError):
            pass
        else:
            assert name in (*FOR_PEOPLE, "model.bin")  # whose bytes are weights, whatever they are
        assert not trap.exists()


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(as_pickle(b"", tmp_path / "trap"))
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_file_may_be_missing(saved: Any, tmp_path: Path, backend: str) -> None:
    for name in sorted(path.name for path in saved(backend).iterdir()):
        copy = Path(shutil.copytree(saved(backend), tmp_path / name))
        (copy / name).unlink()
        if name in FOR_PEOPLE:
            raysq.load(copy)
        else:
            with pytest.raises(InputError, match="holds no saved raysq model"):
                raysq.load(copy)


def refused_or_loaded(directory: Path) -> None:
    try:
        raysq.load(directory)
    except (InputError, BackendError) as exc:
        assert len(str(exc)) < 5000


@quick
@given(data=st.data())
def test_changed_signature(saved: Any, tmp_path: Path, data: st.DataObject) -> None:
    signature = json.loads((saved("reference") / "signature.json").read_text())
    copy = Path(shutil.copytree(saved("reference"), tmp_path / "copy", dirs_exist_ok=True))
    (copy / "signature.json").write_text(json.dumps(data.draw(changed(signature) | ANYTHING)))
    refused_or_loaded(copy)


@pytest.mark.parametrize("backend", ["reference", "openvino"])
@pytest.mark.parametrize("content", BYTES, ids=lambda content: repr(content[:12]))
def test_hostile_bytes(saved: Any, tmp_path: Path, backend: str, content: bytes) -> None:
    for name in sorted(path.name for path in saved(backend).iterdir()):
        copy = Path(shutil.copytree(saved(backend), tmp_path / name))
        (copy / name).write_bytes(content)
        refused_or_loaded(copy)


@pytest.mark.parametrize("name", ["example.pt", "signature.json"])
@quick
@given(data=st.data())
def test_torn_files(saved: Any, tmp_path: Path, name: str, data: st.DataObject) -> None:
    copy = Path(shutil.copytree(saved("reference"), tmp_path / "copy", dirs_exist_ok=True))
    (copy / name).write_bytes(data.draw(torn((saved("reference") / name).read_bytes())))
    refused_or_loaded(copy)


@pytest.mark.parametrize("example", [{"a": 1}, [1], ["x"], 5, None, [torch.zeros(1), "x"], [torch.zeros(3, 2)]])
def test_example_that_is_none(saved: Any, tmp_path: Path, example: Any) -> None:
    copy = Path(shutil.copytree(saved("reference"), tmp_path / "copy"))
    torch.save(example, copy / "example.pt")
    with pytest.raises(InputError, match="damaged"):
        raysq.load(copy)


def test_example_larger_than_memory(saved: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved("reference"), tmp_path / "copy"))
    torch.save([torch.zeros(1).expand(1 << 50, 8)], copy / "example.pt")  # 32 bytes in the file
    with pytest.raises(InputError, match="damaged"):
        raysq.load(copy)


@pytest.mark.parametrize("backend", ["../reference", "os", "", 5, None, ["reference"]])
def test_signature_that_names_no_backend(saved: Any, tmp_path: Path, backend: Any) -> None:
    copy = Path(shutil.copytree(saved("reference"), tmp_path / "copy"))
    signature = json.loads((copy / "signature.json").read_text())
    (copy / "signature.json").write_text(json.dumps({**signature, "backend": backend}))
    with pytest.raises((OptionError, InputError)):
        raysq.load(copy)
