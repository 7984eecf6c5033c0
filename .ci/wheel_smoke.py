"""Builds sdist and wheel, and uses the wheel from outside of the repo: without any extra, and with each of them.

An environment holds exactly what pip would install for it: the distributions that the wheel's own requirements lead
to, as links into the environment that this runs in, since torch alone takes gigabytes. Extras whose distributions
aren't there (torchao beside IPEX) are left out, and said to be.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

REPO = Path(__file__).resolve().parent.parent
NOT_FOR_USERS = {"dev", "docs", "zoo"}

SETUP = """
import raysq, torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).eval()
calib = [torch.randn(64, 16) for _ in range(2)]
with torch.no_grad():
    wanted = model(calib[0])
assert raysq.__file__.startswith(sys.argv[1]), f"imported from {raysq.__file__}, not from the wheel"

def score(candidate):
    return 2.0 - float((candidate(calib[0]) - wanted).abs().mean())

def search(**options):
    return raysq.tune(model, calib, score, tolerance=0.5, max_trials=2, num_threads=1, max_concurrent_trials=1,
                      latency=raysq.Latency(0.02, 0.02), verbose=0, storage_path="runs", **options)

def refused(extra, call):
    try:
        call()
    except raysq.errors.RaysqError as exc:
        assert f"raysq[{extra}]" in str(exc), exc
    else:
        raise AssertionError(f"works without the extra {extra}")
"""

# What each environment must be able to do, "" without any extra; there, what is missing is said with its extra.
USES = {
    "": """
import importlib.resources
eager = {"ray", "intel_extension_for_pytorch", "plotly", "hyperopt", "openvino"} & set(sys.modules)
assert not eager, f"`import raysq` imports {eager}"
assert [f for f in importlib.resources.files("raysq.search_spaces").iterdir() if f.name.endswith(".yaml")]
result = search()
assert result.backend == "onednn", result.backend
result.save("saved")
assert torch.allclose(raysq.load("saved")(calib[0]), result.model(calib[0]))
refused("hyperopt", lambda: search(strategy="tpe_hyperopt"))
refused("ipex", lambda: raysq.quantize(model, calib, backend="ipex"))
refused("openvino", lambda: raysq.quantize(model, calib, backend="openvino"))
refused("s3", lambda: result.save("s3://bucket/saved"))
import pathlib, subprocess
subprocess.run([pathlib.Path(sys.executable).with_name("raysq"), "--help"], check=True, capture_output=True)
""",
    "ipex": "raysq.quantize(model, calib, backend='ipex')(calib[0])",
    "openvino": "raysq.quantize(model, calib, backend='openvino')(calib[0])",
    "hyperopt": "assert search(strategy='tpe_hyperopt').trials",
    "s3": "import fsspec; fsspec.filesystem('s3')",
    "tensorboard": "import tensorboard.summary",
    "mlflow": "from ray.air.integrations.mlflow import MLflowLoggerCallback as C; C(tracking_uri='sqlite:///m.db')",
    "wandb": "from ray.air.integrations.wandb import WandbLoggerCallback as C; C(project='p')",
    "optuna": "import optuna_dashboard; assert raysq.OptunaStudy",
    "report": "search().save('saved'); assert open('saved/report.html').read().lower().startswith('<!doctype html>')",
    "cluster": "import ray; assert ray.init(include_dashboard=True).dashboard_url",
    "torchao": "import raysq.torchao",
}


def key(name: str) -> str:
    """Return a distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(wheel: Distribution, extra: str) -> Iterator[Distribution]:
    """Yield what pip would install beside the wheel.

    Raises:
        PackageNotFoundError: one of them isn't here.
    """
    todo, seen = [(wheel, frozenset({extra}))], set()
    while todo:
        found, extras = todo.pop()
        if (key(found.name), extras) in seen:
            continue
        seen.add((key(found.name), extras))
        if found is not wheel:
            yield found
        for text in found.requires or ():
            required = Requirement(text)
            if required.marker is None or any(required.marker.evaluate({"extra": e}) for e in extras or {""}):
                there = distribution(required.name)
                if not required.specifier.contains(there.version, prereleases=True):
                    raise PackageNotFoundError(f"{required.name} {there.version}")
                todo.append((there, frozenset(required.extras)))


def link(found: Distribution, into: Path, shared: set[str]) -> None:
    """Link a distribution's files; whole folders where they are of one distribution alone."""
    for file in found.files or ():
        top = file.parts[0]
        part = Path(*file.parts) if top in shared or len(file.parts) == 1 else Path(top)
        target, name = Path(str(found.locate_file(part))), into / part
        if ".." in file.parts or "__pycache__" in file.parts or name.exists() or not target.exists():
            continue
        name.parent.mkdir(parents=True, exist_ok=True)
        name.symlink_to(target)


def environment(work: Path, wheel: Path, extra: str, shared: set[str]) -> Path:
    """Return the interpreter of an environment with the wheel and what this extra brings.

    Raises:
        PackageNotFoundError: something that it needs isn't here.
    """
    home = work / (extra or "base")
    venv.create(home, symlinks=True)
    python, site = home / "bin" / "python", next(home.glob("lib/python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)
    (own,) = distributions(name="raysq", path=[str(site)])
    for found in {key(d.name): d for d in closure(own, extra)}.values():
        link(found, site, shared)
    return python


def shared_folders() -> set[str]:
    """Return the top folders of site-packages that several distributions have files in."""
    owners: dict[str, set[str]] = {}
    for found in distributions():
        for file in found.files or ():
            if len(file.parts) > 1:
                owners.setdefault(file.parts[0], set()).add(key(found.name))
    return {folder for folder, names in owners.items() if len(names) > 1}


def main() -> None:
    """Build once, then try each environment, or those that are named."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        # the wheel is built from the sdist, so both are covered
        build = [sys.executable, "-m", "build", "--outdir", str(work / "dist"), str(REPO)]
        done = subprocess.run(build, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        (wheel,) = (work / "dist").glob("raysq-*.whl")
        shared = shared_folders()
        extras = set(distribution("raysq").metadata.get_all("Provides-Extra") or ()) - NOT_FOR_USERS
        assert extras == set(USES) - {""}, f"not tried, or gone: {extras ^ (set(USES) - {''})}"
        for extra in sys.argv[1:] or USES:
            try:
                python = environment(work, wheel, extra, shared)
            except PackageNotFoundError as exc:
                print(f"wheel[{extra}]: left out here: {exc}")
                continue
            script = work / "use.py"
            script.write_text(f"import sys\n{SETUP}{USES[extra]}")
            if subprocess.run([python, script, str(work)], cwd=work, check=False).returncode:
                sys.exit(f"wheel[{extra}]: failed")
            print(f"wheel[{extra}]: ok", flush=True)


if __name__ == "__main__":
    main()
