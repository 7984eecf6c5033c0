"""What is public, what importing it costs, and a recipe that is replayed.

`python tests/test_api.py` writes public_api.txt anew: the names and signatures that docs/api.md promises.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import raysq
from raysq import cli, errors, strategies, switches
from raysq.kernels import base
from raysq.rivals import AUTO

ROOT = Path(__file__).parents[1]
PINNED = Path(__file__).with_name("public_api.txt")
ENTRY = re.compile(r"^\.\. auto(?:function|class):: ([\w.]+).*(?:\n   :members: (.*))?", re.M)
MODEL = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
CALIB = [torch.randn(4, 8)]


def documented() -> dict[str, list[str]]:
    """Return what docs/api.md documents, and which members."""
    page = (ROOT / "docs" / "api.md").read_text()
    return {name: members.split(", ") if members else [] for name, members in ENTRY.findall(page)}


def found(name: str) -> Any:
    """Return what a documented name stands for: in raysq, or in a module that is named in full."""
    place, _, last = name.rpartition(".")
    return getattr(importlib.import_module(place or "raysq"), last)


def signature(thing: Any) -> str:
    """Return arguments and defaults without annotations, in the order in which they are given."""
    if is_dataclass(thing):
        return "(" + ", ".join(f.name + ("" if _bare(f) else f"={_default(f)!r}") for f in fields(thing)) + ")"
    if isinstance(thing, property):
        return ""
    parameters = inspect.signature(thing).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(plain))


def _bare(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _default(field: Any) -> Any:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return dict(value) if hasattr(value, "keys") else value


def public() -> Iterator[str]:
    """Yield a line for each public name, error and command, and for each name that arguments take."""
    for name, members in sorted(documented().items()):
        thing = found(name)
        whole = name if name.startswith("raysq.") else f"raysq.{name}"
        yield whole + signature(thing)
        yield from (f"{whole}.{member}{signature(getattr(thing, member))}" for member in members)
    for name in sorted(errors.__all__):
        kind = getattr(errors, name)
        if isinstance(kind, type):
            yield f"raysq.errors.{name}({', '.join(base.__name__ for base in kind.__bases__)})"
    yield from (f"strategy {kind.name!r}{signature(kind)}" for kind in strategies.ALL)
    yield from (f"switch {switch.name!r}" for switch in switches.ALL)
    yield from (f"backend {name!r}" for name in (*base.PREFERRED, AUTO))
    for action in cli._parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                options = [word for each in command._actions for word in each.option_strings or [each.dest.upper()]]
                yield " ".join(["$ raysq", name, *options])


def test_public_names_stand_in_the_documentation() -> None:
    assert raysq.__all__ == sorted(raysq.__all__)
    modules = {"errors", "strategies"}  # documented by what they hold
    assert set(raysq.__all__) - modules <= set(documented())
    assert all(hasattr(raysq, name) for name in raysq.__all__)


def test_names_and_signatures_are_pinned() -> None:
    """What fails here breaks someone's program, or is new: see CONTRIBUTING, "What may change when"."""
    assert list(public()) == PINNED.read_text().splitlines()


def test_the_version_is_that_of_the_project_and_the_newest_in_the_changelog() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## \[(\d.*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest and newest[1] == declared == raysq.__version__


def test_importing_raysq_brings_neither_ray_nor_ipex() -> None:
    code = "import raysq, sys; assert not {'ray', 'intel_extension_for_pytorch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_quantize_replays_a_recipe() -> None:
    first = raysq.quantize(MODEL, CALIB, backend="reference")
    again = raysq.quantize(MODEL, CALIB, recipe=first.recipe, backend="reference")
    assert torch.equal(first(CALIB[0]), again(CALIB[0]))


if __name__ == "__main__":
    PINNED.write_text("".join(f"{line}\n" for line in public()))
