"""What importing IPEX does to the process that it happens in."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILDREN = """
from pathlib import Path
from raysq.kernels import ipex
ipex.extension()
print(sum(len((task / "children").read_text().split()) for task in Path("/proc/self/task").iterdir()))
"""


def test_importing_it_starts_no_process() -> None:
    pytest.importorskip("intel_extension_for_pytorch")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHILDREN], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]  # torch's compiler would keep some ready, for GPUs
