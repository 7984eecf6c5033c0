"""Markdown tables between two marks of a document, and where they were measured: what all benchmarks write."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["check_marks", "commit", "cpu", "insert", "markdown_head", "markdown_row", "publish", "where"]


def markdown_row(cells: Iterable[object]) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def markdown_head(headings: Sequence[str]) -> list[str]:
    """Return the two lines that a table begins with."""
    return [markdown_row(headings), f"|{' --- |' * len(headings)}"]


def where(threads: int, packages: Sequence[str]) -> str:
    """Return what a table was measured on and with, as a sentence."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    here = f"{cpu()}, {threads} thread{'s' if threads > 1 else ''}, Python {platform.python_version()}"
    return f"{here}, {versions}, raysq {commit()}."


def commit() -> str:
    """Return the commit that is checked out here, or raysq's version where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=9", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return importlib.metadata.version("raysq")


def cpu() -> str:
    """Return the processor's name and the instruction sets that matter."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = {"avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8"} & set(fields.get("flags", "").split())
    return f"{fields.get('model name', platform.processor())} ({', '.join(sorted(flags)) or 'no int8 instructions'})"


def check_marks(path: Path | None, begin: str, end: str) -> None:
    """Refuse, before any work, a file without the marks that the result goes between; None is no file."""
    if path is not None and end not in path.read_text().partition(begin)[2]:
        raise SystemExit(f"the file must hold the marks {begin} and {end}, in this order: add them where it fits.")


def publish(content: str, path: Path | None, begin: str, end: str) -> None:
    """Print what was measured, and write it between the marks of a file if there is one."""
    print(content)
    if path is not None:
        path.write_text(insert(path.read_text(), content, begin, end))


def insert(text: str, content: str, begin: str, end: str) -> str:
    """Return `text` with what stands between two marks replaced."""
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"
