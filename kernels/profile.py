"""What oneDNN says of each primitive that a built model ran, in the order in which they ran."""

from __future__ import annotations

import ctypes
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

__all__ = ["Primitive", "profile"]

LINE = re.compile(r"onednn_verbose,v1,primitive,exec,cpu,(?P<kind>\w+),.*,(?P<problem>[^,]*),(?P<ms>[\d.e+-]+)$")
CONVOLUTION = re.compile(r"(g|mb|ic|oc|id|od|kd|ih|oh|kh|iw|ow|kw)(\d+)")
INT8 = re.compile(r",src:[us]8:.*? wei:[us]8:")


@dataclass(frozen=True)
class Primitive:
    """One that was executed.

    Attributes:
        macs: multiply-accumulates, 0 for what has none.
        is_int8: whether it multiplies integers.
        ms: milliseconds.
        kind: such as "convolution" or "matmul".
        problem: its sizes, as oneDNN writes them.
    """

    macs: int
    is_int8: bool
    ms: float
    kind: str = ""
    problem: str = ""

    @property
    def is_depthwise(self) -> bool:
        """Whether it is a convolution of each channel by itself."""
        size = {name: int(value) for name, value in CONVOLUTION.findall(self.problem)}
        return self.kind == "convolution" and 1 < size.get("g", 1) == size["ic"]


def profile(run: Callable[[], object], verbose: AbstractContextManager[object]) -> list[Primitive]:
    """Run something and return the convolutions and matrix products that oneDNN executed for it.

    Args:
        run: what is looked at.
        verbose: makes oneDNN print, on C's standard output, while it is entered.
    """
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    saved = os.dup(1)
    with tempfile.TemporaryFile() as printed:
        try:
            os.dup2(printed.fileno(), 1)
            with verbose:
                run()
            libc.fflush(None)
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        printed.seek(0)
        return list(_parsed(printed.read().decode(errors="replace")))


def _parsed(text: str) -> Iterator[Primitive]:
    for line in text.splitlines():
        found = LINE.match(line)
        macs = _macs(found["kind"], found["problem"]) if found else 0
        if found and macs:
            is_int8 = INT8.search(line) is not None
            yield Primitive(macs, is_int8, float(found["ms"]), found["kind"], found["problem"])


def _macs(kind: str, problem: str) -> int:
    """Return the multiply-accumulates of a problem such as mb8_ic3oc32_ih32oh16kh3… or 8x256:256x10."""
    if kind == "matmul":
        *first, inner = problem.split(":")[0].split("x")
        return math.prod(map(int, [*first, inner])) * int(problem.split("x")[-1])
    if kind not in ("convolution", "deconvolution", "inner_product"):
        return 0
    size = {name: int(value) for name, value in CONVOLUTION.findall(problem)}
    out = "i" if kind == "deconvolution" else "o"  # each input position of a transposed one meets the whole kernel
    places = math.prod(size.get(f"{out}{axis}", 1) * size.get(f"k{axis}", 1) for axis in "dhw")
    if kind == "inner_product":
        places = math.prod(size.get(f"i{axis}", 1) for axis in "dhw")
    return size["mb"] * size["ic"] * size["oc"] // size.get("g", 1) * places
