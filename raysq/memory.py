"""The resident memory of this process: what it is, its peak, and how far one forward of a model raises it."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from raysq.errors import OptionError

__all__ = ["growth", "peak", "release", "reset_peak", "resident", "trim"]

RUNS = 3  # other threads of the process can only add: the least of a few is the model's
PAGE = resource.getpagesize()

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
OWN_PAGES = 128 * 1024  # bytes from which on a block has pages of its own while it is measured: glibc's first threshold
ADAPTED = 32 * 2**20  # what glibc raises that to, at most, as a process frees such blocks


def growth(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return by how many bytes a forward raises the resident memory at its peak; at least a page.

    These are activations and scratchpads that live during the forward. What a model holds between forwards, above
    all its weights, is not among them: it counts as its size. Large blocks go back to the system as soon as they are
    freed, so that nothing hides in the heap or comes from its layout; afterwards the process keeps freed memory as
    one that has run for long does. Whole pages are counted, and Linux's counters may lag by some tens of them.

    Args:
        model: warmed up.
        args: its positional inputs.
        kwargs: its keyword inputs.

    Raises:
        OptionError: this system can't tell.
    """
    libc = ctypes.CDLL(None)
    try:
        libc.mallopt(M_MMAP_THRESHOLD, OWN_PAGES)
        found = [_grown(libc, model, args, kwargs) for _ in range(RUNS)]
        libc.mallopt(M_MMAP_THRESHOLD, ADAPTED)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * ADAPTED)
    except (OSError, AttributeError) as exc:
        raise OptionError(
            f"the objective 'memory' needs Linux with glibc and a writable /proc/self/clear_refs ({exc}). Leave it out "
            "of `Goal.objectives`; 'size' can be measured anywhere."
        ) from exc
    return max(min(found), PAGE)


def _grown(libc: ctypes.CDLL, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    libc.malloc_trim(0)
    reset_peak()
    before = peak()
    with torch.no_grad():
        model(*args, **kwargs)
    return peak() - before


def reset_peak() -> None:
    """Make the peak what is resident now.

    Raises:
        OSError: it isn't allowed here.
    """
    Path("/proc/self/clear_refs").write_text("5")


def release() -> None:
    """Give memory that nothing uses back to the system; where that can't be told, it is only made free."""
    gc.collect()
    trim()


def trim() -> None:
    """Give what was freed back to the system: glibc keeps the gigabytes of weights that a build packed and dropped."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Return how many bytes are resident now, on Linux."""
    return PAGE * int(Path("/proc/self/statm").read_text().split()[1])


def peak() -> int:
    """Return the largest number of bytes that were resident since the last reset."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
