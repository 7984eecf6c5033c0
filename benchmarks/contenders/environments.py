"""Python environments of the peers: one each, made from PyPI when it is first asked for."""

from __future__ import annotations

import importlib.metadata
import shutil
import site
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Environment", "EnvironmentFailure"]

MARK = "installed.txt"  # what was asked for, written when all of it is there
GB = 1e9


class EnvironmentFailure(Exception):
    """An environment can't be made."""


@dataclass(frozen=True)
class Environment:
    """What a peer needs.

    Attributes:
        name: of its folder.
        requirements: what pip installs into it.
        needs_gb: space that this takes.
        borrowed: pinned packages that are used from this process's own environment if just these are there, and
            installed otherwise. They are found behind all that the environment has itself.
        borrowed_gb: space that installing those would take.
    """

    name: str
    requirements: Sequence[str]
    needs_gb: float
    borrowed: Sequence[str] = ()
    borrowed_gb: float = 0.0

    def python(self, folder: Path) -> Path:
        """Return the environment's interpreter, after everything is installed.

        Args:
            folder: holds all environments.

        Raises:
            EnvironmentFailure: too little space, or pip fails.
        """
        home = folder / self.name
        python, mark = home / "bin" / "python", home / MARK
        borrows = bool(self.borrowed) and all(map(_is_here, self.borrowed))
        wanted = [*self.requirements, *([] if borrows else self.borrowed)]
        asked = "\n".join([*wanted, f"borrows from {sys.prefix}" if borrows else ""])
        if mark.exists() and mark.read_text() == asked:
            return python
        shutil.rmtree(home, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = self.needs_gb + (0 if borrows else self.borrowed_gb), shutil.disk_usage(folder).free / GB
        if free < needed:
            raise EnvironmentFailure(f"it needs {needed:.0f} GB in {folder}, {free:.0f} are free")
        _run([sys.executable, "-m", "venv", str(home)])
        # what would be borrowed counts as installed for pip: it is told to bring all requirements' own dependencies
        if borrows:
            packages = Path(_run([str(python), "-c", "import site; print(site.getsitepackages()[0])"]).strip())
            (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
        fresh = ["--ignore-installed"] if borrows else []
        _run([str(python), "-m", "pip", "install", "--quiet", *fresh, *wanted])
        mark.write_text(asked)
        return python


def _is_here(pinned: str) -> bool:
    name, _, version = pinned.partition("==")
    try:
        return importlib.metadata.version(name).partition("+")[0] == version
    except importlib.metadata.PackageNotFoundError:
        return False


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise EnvironmentFailure(f"{' '.join(command[:4])} failed: {lines[-1] if lines else done.returncode}")
    return done.stdout
