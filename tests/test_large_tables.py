"""The scripts that write docs/large.md: what they compute beside measuring."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

Script = Callable[[str], ModuleType]
MIB, GIB = 2**20, 2**30


def test_memory_of_a_family_counts_shared_pages_once(benchmark_script: Script) -> None:
    footprint = benchmark_script("footprint")
    code = "import os, mmap, time; m = mmap.mmap(-1, 64 << 20); m.write(b'x' * (64 << 20)); os.fork(); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            while len(footprint.family(process.pid)) < 2:
                assert process.poll() is None
            child = footprint.family(process.pid)[1]
            together = footprint.pss(process.pid) + footprint.pss(child)
            assert footprint.resident(process.pid) >= 64 * MIB
            assert 64 * MIB <= together < 2 * 64 * MIB
            assert process.pid in footprint.family(os.getpid())
            os.kill(child, 9)
        finally:
            process.kill()


def test_the_peak_is_that_of_the_sum(benchmark_script: Script) -> None:
    found = benchmark_script("footprint").Footprint()
    for driver, workers in ((5, 0), (1, 3), (2, 5)):
        found.see({"driver": driver, "workers": workers, "Ray": 0})
    assert (found.peak, found.parts) == (7, {"driver": 2, "workers": 5, "Ray": 0})
    assert found.peaks == {"driver": 5, "workers": 5, "Ray": 0}


def test_a_command_that_takes_too_much_is_ended(benchmark_script: Script) -> None:
    code = "import time; held = b'x' * (64 << 20); time.sleep(60)"
    with pytest.raises(SystemExit, match="takes more than"):
        benchmark_script("footprint").watched([sys.executable, "-c", code], at_most=32 * MIB)


def test_a_row_about_a_large_model(benchmark_script: Script) -> None:
    large = benchmark_script("large")
    found = {
        "parameters": 350_400_000,
        "backend": "ipex",
        "weights": GIB,
        "said": 9.04,
        "peak": 8 * GIB,
        "peaks": {"driver": 4 * GIB, "workers": 3 * GIB, "Ray": 2 * GIB},
        "failed": [],
        "trials": 4,
        "ratio": 0.456,
    }
    row = large.row(found)
    assert row == "| 350 million | `ipex` | 1.00 | 9.0 | **8.0** | 4.0 | 3.0 | 2.0 | 0 of 4 | 0.46 |"
    assert row.count("|") == len(large.HEADINGS) + 1


def test_a_row_about_many_trials_compares_their_begin_and_end(benchmark_script: Script) -> None:
    script = benchmark_script("long_run")
    count = script.WARM + 30
    grows = [MIB * (100 + trial) for trial in range(count)]
    found = {
        "trials": count,
        "failed": 1,
        "driver": [MIB * 100] * count,
        "worker": grows,
        "walls": [0.1] * 30 + [0.2] * 29,
        "suggestions": [0.01] * 30 + [0.02] * 30,
        "journal": 2048 * count,
    }
    row = script.trials_row("onednn", found)
    assert "| 100 → 100 (+0 KiB a trial) | 134 → 154 (+1024 KiB a trial) | 2.0 | 0.10 | 0.20 | 10 | 20 |" in row
    assert row.count("|") == len(script.TRIALS_HEADINGS) + 1


def test_a_row_about_runs_for_each_way_to_have_ray(benchmark_script: Script) -> None:
    script = benchmark_script("long_run")
    left = {"driver": 500 * MIB, "processes": 0, "workers": 0, "threads": 1, "files": 9, "objects": MIB}
    rows = script.runs_rows("ipex", {"own": [left] * 2, "joined": [left] * 2})
    assert rows[0] == "| `ipex` | of its own | 500 500 | 0 0 | 0 0 | 1 1 | 9 9 | none |"
    assert rows[1].endswith("| 1.0 1.0 |")
    assert {row.count("|") for row in rows} == {len(script.RUNS_HEADINGS) + 1}
