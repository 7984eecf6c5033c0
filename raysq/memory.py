"""The resident memory of this process: its peak, and how far one forward of a model raises it."""

from __future__ import annotations

import ctypes
import re
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raysq.errors import OptionError

__all__ = ["growth", "peak", "reset_peak"]

RUNS = 3  # other threads of the process can only add: the least of a few is the model's
PAGE = resource.getpagesize()


def growth(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return by how many bytes a forward raises the resident memory at its peak; at least a page.

    These are activations and scratchpads that live during the forward. What a model holds between forwards, above
    all its weights, is not among them: it counts as its size. Free memory of the heap is given back before, so that
    nothing hides in it. Whole pages are counted, and Linux's counters may lag by some tens of them per thread.

    Args:
        model: warmed up.
        args: its positional inputs.
        kwargs: its keyword inputs.

    Raises:
        OptionError: this system can't tell.
    """
    found = []
    for _ in range(RUNS):
        try:
            ctypes.CDLL(None).malloc_trim(0)
            reset_peak()
        except (OSError, AttributeError) as exc:
            raise OptionError(
                f"the objective 'memory' needs Linux with glibc and a writable /proc/self/clear_refs ({exc}). Leave "
                "it out of `Goal.objectives`; 'size' can be measured anywhere."
            ) from exc
        before = peak()
        with torch.no_grad():
            model(*args, **kwargs)
        found.append(peak() - before)
    return max(min(found), PAGE)


def reset_peak() -> None:
    """Make the peak what is resident now.

    Raises:
        OSError: it isn't allowed here.
    """
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return the largest number of bytes that were resident since the last reset."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
