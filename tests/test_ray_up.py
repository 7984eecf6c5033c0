"""`ray up` for real: three machines in network namespaces, each with an sshd, and a search that is submitted to them.

The commands are those of docs/cluster.md, in tests/netns/scenario.sh; the cluster is that of
examples/clusters/on-premise.yaml with these machines' addresses.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import raysq
from raysq import cli

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
MACHINES = ROOT / "tests" / "netns" / "machines.sh"
ADDRESSES = ["10.77.0.10", "10.77.0.11", "10.77.0.12"]
PACKAGES = {"sshd": "openssh-server", "rsync": "rsync", "ip": "iproute2", "curl": "curl"}
LIMIT_S = 3600  # it took 12 minutes on two cores that twenty processes shared
# nothing of this process: neither its Ray, nor its temporary directory, which the machines don't see
ENVIRONMENT = {
    "PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}/usr/sbin:{os.environ['PATH']}",
    "VIRTUAL_ENV": sys.prefix,
    "LANG": "C.UTF-8",
}


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def possible() -> None:
    """Skip where there can be no machines; install what they need from Debian."""
    if os.geteuid() != 0:
        pytest.skip("machines in namespaces need root")
    if sys.prefix == sys.base_prefix:
        pytest.skip("each machine writes over a virtual environment, and this Python is in none")
    separate = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork"]
    tried = run([*separate, "mount", "-t", "tmpfs", "tmpfs", "/mnt"])
    if tried.returncode:
        pytest.skip(f"this system lets nobody make namespaces: {tried.stderr.strip()}")
    missing = [package for tool, package in PACKAGES.items() if not shutil.which(tool, path=ENVIRONMENT["PATH"])]
    if missing:
        if not shutil.which("apt-get"):
            pytest.skip(f"there is no {' and no '.join(missing)}, and no apt-get to install it")
        unattended = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        run(["apt-get", "update", "-qq"], env=unattended)
        installed = run(["apt-get", "install", "-qq", *missing], env=unattended)
        if installed.returncode:
            pytest.skip(f"apt-get can't install {' '.join(missing)}: {installed.stderr.strip()[-200:]}")


@pytest.fixture(scope="module")
def came_back(possible: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory with what came back from the cluster, which is down again."""
    directory = tmp_path_factory.mktemp("machines")
    wheels, out = directory / "wheels", directory / "out"
    out.mkdir()
    # the machines reach no index; pip builds raysq from what was shipped, and that takes setuptools
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    download = run([*pip, "--dest", str(wheels), "setuptools"])
    if download.returncode:
        pytest.skip(f"pip can't download setuptools: {download.stderr.strip()[-200:]}")
    cluster = (ROOT / "examples" / "clusters" / "on-premise.yaml").read_text()
    for theirs, ours in {
        "head_ip: 192.0.2.10 ": f"head_ip: {ADDRESSES[0]} ",
        "worker_ips: [192.0.2.11, 192.0.2.12]": f"worker_ips: [{', '.join(ADDRESSES[1:])}]",
        "ssh_user: ubuntu": "ssh_user: root",
        'PIP_FLAGS=""': f'PIP_FLAGS="--no-index --find-links {wheels}"',
    }.items():
        assert cluster.count(theirs) == 1
        cluster = cluster.replace(theirs, ours)
    (directory / "cluster.yaml").write_text(cluster)

    scenario = [MACHINES.with_name("scenario.sh"), directory / "cluster.yaml", out, *ADDRESSES]
    done = run([str(p) for p in (MACHINES, len(ADDRESSES), directory, *scenario)], env=ENVIRONMENT, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def journal(came_back: Path) -> list[dict[str, Any]]:
    lines = (came_back / "job" / "journal.jsonl").read_text().splitlines()
    return [json.loads(line)["record"] for line in lines[1:]]


def test_the_search_ran_on_more_than_one_machine(journal: list[dict[str, Any]]) -> None:
    nodes = {trial["node"] for trial in journal}
    assert len(nodes) > 1
    assert nodes <= {"machine1", "machine2", "machine3"}


def test_a_job_that_lost_its_driver_went_on_when_it_was_submitted_again(
    came_back: Path, journal: list[dict[str, Any]]
) -> None:
    # search.py kills the driver of the first job after its fourth trial
    assert (came_back / "first").read_text() == "1\n"
    assert (came_back / "second").read_text() == "0\n"
    assert sorted(trial["trial"] for trial in journal) == list(range(9))
    assert {trial["status"] for trial in journal} == {"finished"}


def test_raysq_was_installed_from_what_was_shipped(came_back: Path) -> None:
    found = json.loads((came_back / "found.json").read_text())
    assert found["raysq"].endswith("/site-packages/raysq/__init__.py")
    assert found["trials"] == 9


def test_workers_have_their_threads(came_back: Path) -> None:
    # `ray up` sets OMP_NUM_THREADS to 1; Ray sets it to what a trial reserves where it is unset
    found = json.loads((came_back / "found.json").read_text())
    assert found["threads"] == ["2"] * len(ADDRESSES)


def test_the_run_can_be_read_elsewhere(came_back: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", str(came_back / "job")]) == 0
    assert capsys.readouterr().out.count("finished") == 9


def test_the_int8_model_came_back(came_back: Path) -> None:
    assert raysq.load(came_back / "int8")(torch.zeros(2, 16)).shape == (2, 4)


def test_the_dashboard_refuses_whoever_has_no_token(came_back: Path) -> None:
    assert (came_back / "without-token").read_text() == "401"


def test_no_ray_is_left_on_the_machines(came_back: Path) -> None:
    assert (came_back / "left").read_text() == ""


def test_all_machines_end_with_the_process_that_made_them(possible: None, tmp_path: Path) -> None:
    command = [str(p) for p in (MACHINES, 1, tmp_path, "sleep", "3600")]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as machines:
        while not processes_of(tmp_path, "sshd"):
            assert machines.poll() is None
            time.sleep(0.1)
        machines.kill()
    end = time.monotonic() + 60
    while processes_of(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    assert processes_of(tmp_path) == []
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def processes_of(directory: Path, name: str = "") -> list[str]:
    """Return the command lines that name a directory and a program."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has just ended
            continue
        if str(directory) in line and name in line:
            found.append(line)
    return found
