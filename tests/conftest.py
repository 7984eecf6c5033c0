"""One Ray for the session; and with several processes (pytest -n 2) a core and a temporary directory for each."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")  # "gw0", …; "" in the process that pytest was started as

if WORKER:  # before torch is imported, which counts the cores that it may use
    CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {CORES[int(WORKER.removeprefix("gw")) % len(CORES)]})
    # Ray's session and the lock by which trials of one node wait for each other's timings lie there; a short path,
    # since Ray has sockets in it
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix=f"raysq-{WORKER}-")


def pytest_sessionfinish() -> None:
    """Remove the directory of this process."""
    if WORKER:
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Run Ray with two slots, which `raysq.tune` joins; its workers find what tests share, such as `simulation`."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()
