"""What this CPU can do, as the kernel tells it."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

__all__ = ["among", "governor", "has_bf16", "instruction_sets", "lacks_vnni", "model_name", "physical_cores"]

KNOWN = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
)
VNNI = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
BF16 = {"avx512_bf16", "amx_bf16"}


GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


@functools.cache
def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _values(key: str) -> list[str]:
    return [line.split(":", 1)[1].strip() for line in _cpuinfo().splitlines() if line.split(":")[0].strip() == key]


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that matter to int8 and bf16 kernels."""
    return among((_values("flags") or _values("Features") or [""])[0])


def among(flags: str) -> tuple[str, ...]:
    """Return those of a CPU's flags, as /proc/cpuinfo lists them, that matter to int8 and bf16 kernels."""
    given = set(flags.split())
    return tuple(name for name in KNOWN if name in given)


def lacks_vnni() -> bool:
    """Whether int8 products are added in 16 bits and can saturate, so that 7 bits are safer than 8."""
    return not VNNI & set(instruction_sets())


def has_bf16() -> bool:
    """Whether there are bf16 instructions; without them bf16 kernels are emulated and slow."""
    return bool(BF16 & set(instruction_sets()))


def model_name() -> str:
    """Return the CPU's name."""
    return (_values("model name") or [platform.processor() or platform.machine()])[0]


def governor() -> str | None:
    """Return what sets the first core's frequency, such as "performance"; None where none is told, as in most VMs."""
    try:
        return GOVERNOR.read_text().strip() or None
    except OSError:
        return None


@functools.cache
def physical_cores() -> int:
    """Return the number of physical cores that this process may run on."""
    import os

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = {(p, c) for p, c in zip(_values("physical id"), _values("core id"), strict=False)}
    return max(1, min(usable, len(cores) or usable))
