"""The clusters that come with raysq: Ray accepts their files, and they keep what docs/cluster.md promises."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
CLUSTERS = ROOT / "examples" / "clusters"
IN_CLOUDS = {"aws": ROOT / "cluster.yaml", "gcp": CLUSTERS / "gcp.yaml"}
LAUNCHED = {**IN_CLOUDS, "on-premise": CLUSTERS / "on-premise.yaml"}
KUBERAY = CLUSTERS / "kuberay.yaml"
DOCKERFILE = CLUSTERS / "Dockerfile"
ALL = [*LAUNCHED.values(), KUBERAY, DOCKERFILE, CLUSTERS / "node-setup.sh"]
RAY = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]
IMAGE = f"rayproject/ray:{RAY}-py311-cpu"

in_clouds = pytest.mark.parametrize("path", IN_CLOUDS.values(), ids=IN_CLOUDS)
launched = pytest.mark.parametrize("path", LAUNCHED.values(), ids=LAUNCHED)


def read(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(path.read_text())
    return read


def prepared(path: Path) -> dict[str, Any]:
    """Return what `ray up` makes of a file, with the defaults of its provider."""
    config: dict[str, Any] = prepare_config(read(path))
    return config


def starts(config: dict[str, Any]) -> dict[str, str]:
    """Return the command that starts Ray, of the head and of a worker."""
    found = {}
    for kind in ("head", "worker"):
        (found[kind],) = (c for c in config[f"{kind}_start_ray_commands"] if "ray start" in c)
    return found


def pods() -> dict[str, dict[str, Any]]:
    spec = read(KUBERAY)["spec"]
    (workers,) = spec["workerGroupSpecs"]
    return {"head": spec["headGroupSpec"], "worker": workers}


@launched
def test_ray_accepts_the_file(path: Path) -> None:
    validate_config(prepared(path))


# --- Python and Ray ---


@in_clouds
def test_python_and_ray_are_those_that_were_tested(path: Path) -> None:
    assert prepared(path)["docker"]["image"] == IMAGE


def test_kubernetes_has_the_same_python_and_ray() -> None:
    assert f"FROM {IMAGE}\n" in DOCKERFILE.read_text()
    assert read(KUBERAY)["spec"]["rayVersion"] == RAY


@launched
def test_nothing_of_rays_own_setup_is_left(path: Path) -> None:
    # its defaults install a nightly build, and a browser's worth of tools, with another Python
    commands = [c for c in prepared(path)["setup_commands"] if c not in read(path)["setup_commands"]]
    assert commands == []


@launched
def test_node_setup_gets_the_index_that_a_variable_names(path: Path) -> None:
    (command,) = (c for c in read(path)["setup_commands"] if "node-setup.sh" in c)
    assert 'export TORCH_INDEX="" PIP_FLAGS=""; ' in command
    assert '--index-url "$TORCH_INDEX"' in (CLUSTERS / "node-setup.sh").read_text()


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_no_file_names_a_host(path: Path) -> None:
    assert "://" not in path.read_text()


@launched
def test_what_is_installed_is_shipped(path: Path) -> None:
    shipped = {remote: local for remote, local in read(path)["file_mounts"].items() if not local.startswith("~")}
    for remote, local in shipped.items():
        assert (ROOT / local).exists()
        assert remote.endswith(f"/raysq/{local}")  # raysq/kernels is a link to ../kernels
    copied = [p for line in re.findall(r"^COPY --\S+ (.+) \S+$", DOCKERFILE.read_text(), re.M) for p in line.split()]
    wanted = {p.name for p in (ROOT / "raysq").iterdir() if p.is_symlink()} | {"raysq", "pyproject.toml"}
    assert wanted | {"constraints.txt", "README.md", "LICENSE"} <= set(shipped.values()) & {*copied}
    assert "." not in shipped.values()  # Ray hashes every byte below, .venv included


# --- safety ---


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_nothing_listens_on_all_addresses(path: Path) -> None:
    assert "0.0.0.0" not in path.read_text()


@launched
def test_the_dashboard_listens_on_loopback(path: Path) -> None:
    assert "--dashboard-host=127.0.0.1" in starts(prepared(path))["head"]


@launched
@pytest.mark.parametrize("kind", ["head", "worker"])
def test_every_node_asks_for_the_token(path: Path, kind: str) -> None:
    config = prepared(path)
    assert re.search(r"^export .*\bRAY_AUTH_MODE=token\b.*\bray start", starts(config)[kind])
    home = "/home/ray" if config["docker"] else "~"
    assert config["file_mounts"][f"{home}/.ray/auth_token"] == "~/.ray/auth_token"


def test_kubernetes_asks_for_the_token() -> None:
    assert read(KUBERAY)["spec"]["authOptions"] == {"mode": "token"}
    assert pods()["head"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"


# --- what raysq needs of a node ---


@launched
@pytest.mark.parametrize("kind", ["head", "worker"])
def test_workers_do_not_inherit_one_thread(path: Path, kind: str) -> None:
    assert re.search(r"; unset OMP_NUM_THREADS; .*ray start", starts(prepared(path))[kind])


@launched
@pytest.mark.parametrize("kind", ["head", "worker"])
def test_every_node_has_a_latency_slot(path: Path, kind: str) -> None:
    config = prepared(path)
    stated = re.search(r"--resources='(\{.+?\})'", starts(config)[kind])
    resources = json.loads(stated[1]) if stated else config["available_node_types"][kind]["resources"]
    assert resources["latency_slot"] == 1


def test_kubernetes_has_a_latency_slot_for_each_pod_and_a_node_for_each_pod() -> None:
    for pod in pods().values():
        assert json.loads(json.loads(pod["rayStartParams"]["resources"])) == {"latency_slot": 1}
        template = pod["template"]
        (rule,) = template["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert rule["topologyKey"] == "kubernetes.io/hostname"
        assert rule["labelSelector"]["matchLabels"] == template["metadata"]["labels"]
        (container,) = template["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in template["spec"]["volumes"]}


# --- what it costs ---


@in_clouds
def test_the_number_of_machines_is_bounded_and_none_is_interruptible(path: Path) -> None:
    config = prepared(path)
    workers = config["available_node_types"]["worker"]
    assert 0 < workers["min_workers"] <= workers["max_workers"] <= config["max_workers"]
    assert config["idle_timeout_minutes"] <= 10
    for kind in config["available_node_types"].values():
        assert not {"InstanceMarketOptions", "scheduling"} & kind["node_config"].keys()


def test_kubernetes_is_bounded_too() -> None:
    worker = pods()["worker"]
    assert read(KUBERAY)["spec"]["enableInTreeAutoscaling"]
    assert 0 < worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]


@in_clouds
def test_head_and_workers_are_machines_of_one_kind(path: Path) -> None:
    # the driver measures fp32, probes kernels and times the winner on the head
    head, worker = (prepared(path)["available_node_types"][kind]["node_config"] for kind in ("head", "worker"))
    assert head == worker
