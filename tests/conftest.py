"""One Ray for the session; and with several processes (pytest -n 2) a core and a temporary directory for each."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import Phase, settings

HERE = Path(__file__).parent
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")  # "gw0", …; "" in the process that pytest was started as

if WORKER:  # before torch is imported, which counts the cores that it may use
    CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {CORES[int(WORKER.removeprefix("gw")) % len(CORES)]})
    # Ray's session and the lock by which trials of one node wait for each other's timings lie there; a short path,
    # since Ray has sockets in it
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix=f"raysq-{WORKER}-")

# of `make mutants`: the same examples each time, few, and none made smaller
settings.register_profile(
    "mutants", max_examples=20, derandomize=True, database=None, deadline=None, phases=[Phase.explicit, Phase.generate]
)


def pytest_sessionfinish() -> None:
    """Remove the directory of this process."""
    if WORKER:
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


@pytest.fixture
def benchmark_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return what imports a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(HERE.parent / "benchmarks"))
    return importlib.import_module


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Run Ray with two slots, which `raysq.tune` joins; its workers find what tests share, such as `simulation`."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a client of an empty S3 server in this process, moto's; s3fs finds it as it would find AWS."""
    import boto3

    s3fs = pytest.importorskip("s3fs", reason="needs the extra s3")
    server = pytest.importorskip("moto.server", reason="needs the extra dev")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()  # they keep the address of an earlier server
    yield boto3.client("s3")
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    running.stop()
