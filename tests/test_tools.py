"""What the tools that people already use show of a search: each is run, and read back by its own reader."""

from __future__ import annotations

import csv
import json
import math
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from ray import cloudpickle, tune
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback, LoggerCallback, TBXLoggerCallback
from torch import nn

import raysq
from raysq.errors import StorageError
from raysq.result import Status
from raysq.tuning.loggers import FOLDER

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import test modules
pytestmark = pytest.mark.slow

QUICK: dict[str, Any] = {"num_threads": 1, "max_concurrent_trials": 1, "verbose": 0, "backend": "reference"}
QUICK |= {"latency": raysq.Latency(0.02, 0.02), "strategy": "random"}


def problem() -> tuple[nn.Module, list[torch.Tensor], Any]:
    """Return (model, calib, eval_fn)."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), torch.randn(64, 16)
    return model, [x], lambda candidate: {"accuracy": 0.9, "recall": 0.8}


class Failing(LoggerCallback):
    """A tool whose server goes away."""

    calls = 0

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        self.calls += 1
        raise ConnectionError("the server is gone")


class Plain(tune.Callback):
    """A callback that is no logger."""

    seen: list[dict[str, Any]]

    def __init__(self) -> None:
        self.seen = []

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self.seen.append(result)


@pytest.fixture(scope="module")
def searched(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """One search of three trials that all tools follow."""
    directory = tmp_path_factory.mktemp("tools")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        failing, plain = Failing(), Plain()
        study = f"sqlite:///{directory}/study.db"
        callbacks = [TBXLoggerCallback(), CSVLoggerCallback(), JsonLoggerCallback(), failing, plain]
        result = raysq.tune(
            *problem(),
            max_trials=3,
            name="net",
            goal=raysq.Goal(metric="accuracy"),
            callbacks=[*callbacks, raysq.OptunaStudy(study)],
            **QUICK,
        )
        yield SimpleNamespace(result=result, study=study, failing=failing, plain=plain, directory=directory)


def folders(searched: SimpleNamespace) -> list[Path]:
    return sorted((searched.directory / "raysq_runs" / "net" / FOLDER).iterdir())


def test_each_trial_has_a_folder_in_the_run(searched: SimpleNamespace) -> None:
    assert [folder.name for folder in folders(searched)] == ["trial-0000", "trial-0001", "trial-0002"]


def test_tensorboard_shows_the_numbers(searched: SimpleNamespace) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for folder, trial in zip(folders(searched), searched.result.trials, strict=True):
        events = accumulator.EventAccumulator(str(folder)).Reload()
        assert events.Scalars("ray/tune/latency_ratio")[-1].value == pytest.approx(trial.latency_ratio)
        assert events.Scalars("ray/tune/metrics/recall")[-1].value == pytest.approx(0.8)
        assert "_hparams_/session_start_info" in events.summary_metadata  # its tab of hyperparameters


def test_csv_has_a_row_per_report(searched: SimpleNamespace) -> None:
    for folder, trial in zip(folders(searched), searched.result.trials, strict=True):
        with (folder / "progress.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["stage"] for row in rows] == ["evaluated", "timed"]
        assert float(rows[-1]["latency_ms"]) == trial.latency_ms
        assert max(len(value) for row in rows for value in row.values()) < 200  # no recipe, no raw timings


def test_json_has_the_settings_and_the_reports(searched: SimpleNamespace) -> None:
    for folder, trial in zip(folders(searched), searched.result.trials, strict=True):
        params = json.loads((folder / "params.json").read_text())
        assert (params["label"], params["recipe"]) == (trial.label, trial.recipe.digest)
        assert {name: params[name] for name in params if name in trial.config} == {**trial.config, "label": trial.label}
        last = json.loads((folder / "result.json").read_text().splitlines()[-1])
        assert last["accuracy"] == 0.9 and not {"recipe", "pairs", "experiment_tag"} & set(last)


def test_a_callback_that_is_no_logger_gets_what_ray_has(searched: SimpleNamespace) -> None:
    assert len(searched.plain.seen) == 6 and all("pairs" in result for result in searched.plain.seen)


def test_a_logger_that_fails_is_told_once_and_costs_nothing(searched: SimpleNamespace) -> None:
    assert len(searched.result.trials) == 3 and searched.failing.calls == 1


# --- Optuna ---


def test_the_study_has_every_trial(searched: SimpleNamespace) -> None:
    study = optuna.load_study(study_name="net", storage=searched.study)
    assert study.metric_names == ["latency", "accuracy"]
    for trial, record in zip(study.trials, searched.result.trials, strict=True):
        assert trial.state is optuna.trial.TrialState.COMPLETE
        assert trial.values == [record.ratio.high, record.accuracy_drop]
        assert trial.user_attrs["recipe"] == record.recipe.digest and trial.user_attrs["label"] == record.label
        assert trial.params == {k: v for k, v in record.config.items() if k in trial.params} and trial.params
        assert trial.duration is not None and trial.duration.total_seconds() > 0
    assert study.best_trials  # all are feasible, so some are on the front


def test_a_resumed_run_adds_to_its_study_what_it_lacks(searched: SimpleNamespace) -> None:
    more = raysq.tune(
        *problem(),
        max_trials=5,
        goal=raysq.Goal(metric="accuracy"),
        resume="raysq_runs/net",
        callbacks=[raysq.OptunaStudy(searched.study), raysq.OptunaStudy(searched.study, "another")],
        **QUICK,
    )
    for name in ("net", "another"):
        trials = optuna.load_study(study_name=name, storage=searched.study).trials
        assert [t.user_attrs["recipe"] for t in trials] == [t.recipe.digest for t in more.trials]
        assert len(trials) == 5 and all(t.state.is_finished() for t in trials)  # none twice, none running for ever


def test_optuna_dashboard_shows_the_study(searched: SimpleNamespace) -> None:
    pytest.importorskip("optuna_dashboard")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [Path(sys.executable).with_name("optuna-dashboard"), searched.study, "--port", address.rpartition(":")[2]]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            studies = fetched(server, f"{address}/api/studies")["study_summaries"]
            (number,) = [study["study_id"] for study in studies if study["study_name"] == "net"]
            study = fetched(server, f"{address}/api/studies/{number}")
            assert "<html" in urllib.request.urlopen(f"{address}/dashboard/").read().decode().lower()
        finally:
            server.terminate()
    assert study["objective_names"] == ["latency", "accuracy"]
    trial = study["trials"][0]
    assert trial["state"] == "Complete" and len(trial["values"]) == 2 and len(trial["params"]) > 1
    assert not [t for t in study["trials"] if t["state"] == "Running"]


def fetched(server: subprocess.Popen[str], url: str) -> Any:
    """Return the JSON at a URL once its server is up."""
    end = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url) as answer:
                return json.load(answer)
        except OSError:
            assert server.poll() is None and time.monotonic() < end, "the server did not start"
            time.sleep(0.2)


def test_a_storage_that_cannot_be_opened_is_refused_at_once() -> None:
    with pytest.raises(StorageError, match="can't open the Optuna storage"):
        raysq.OptunaStudy("sqlite:////nowhere/study.db")


def test_a_failed_trial_is_one_in_the_study(cluster: None, tmp_path: Path) -> None:
    model, calib, _ = problem()

    def eval_fn(candidate: nn.Module) -> float:
        scored = len(list(tmp_path.glob("call-*")))
        (tmp_path / f"call-{scored}").touch()
        return (
            0.5 if scored == 2 else math.nan if scored == 3 else 0.9
        )  # calls 0 and 1 are the baseline's and a trial's

    storage = optuna.storages.InMemoryStorage()
    options = {"storage_path": tmp_path, "name": "a", "callbacks": [raysq.OptunaStudy(storage)]}
    result = raysq.tune(model, calib, eval_fn, max_trials=3, **options, **QUICK)
    study = optuna.load_study(study_name="a", storage=storage)
    failed = [t for t in study.trials if t.state is optuna.trial.TrialState.FAIL]
    assert len(failed) == sum(r.status is Status.FAILED for r in result.trials) == 1
    assert "eval_fn" in failed[0].user_attrs["reason"]
    assert {t.user_attrs["feasible"] for t in study.best_trials} == {True}  # the constraint is known to Optuna


# --- MLflow and W&B ---


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # mlflow's own, on SQLAlchemy 2.1
def test_mlflow_has_a_run_per_trial(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    callback = MLflowLoggerCallback(tracking_uri=uri, experiment_name="net")
    result = raysq.tune(*problem(), max_trials=2, goal=raysq.Goal(metric="accuracy"), callbacks=[callback], **QUICK)
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("net").experiment_id], order_by=["start_time"])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    for number, (run, trial) in enumerate(zip(runs, result.trials, strict=True)):
        assert run.info.run_name == f"trial-{number:04d} {trial.label}"
        assert run.data.params["recipe"] == trial.recipe.digest
        assert {name: run.data.params[name] for name in trial.config if name != "label"} == {
            name: str(value) for name, value in trial.config.items() if name != "label"
        }
        assert run.data.metrics["latency_ratio"] == pytest.approx(trial.latency_ratio)
        assert run.data.metrics["metrics/recall"] == 0.8
        assert [p.value for p in client.get_metric_history(run.info.run_id, "latency_predicted")] == [1.0, 0.0]
        assert not {"pid", "timestamp", "digest"} & set(run.data.metrics)


def test_wandb_has_a_run_per_trial(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    from ray.air.integrations.wandb import WandbLoggerCallback

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    callback = WandbLoggerCallback(project="raysq", mode="offline")  # the cluster of the tests was started before that
    options = {"goal": raysq.Goal(metric="accuracy"), "name": "net", "callbacks": [callback]}
    result = raysq.tune(*problem(), max_trials=1, **options, **QUICK)  # each trial takes W&B two processes
    for number, trial in enumerate(result.trials):
        (file,) = (tmp_path / "raysq_runs" / "net" / FOLDER / f"trial-{number:04d}").rglob("run-*.wandb")
        config, history = wandb_records(file)
        assert config["recipe"] == trial.recipe.digest and config["label"] == trial.label
        assert [row["latency_predicted"] for row in history] == [True, False]
        assert history[-1]["latency_ratio"] == trial.latency_ratio and history[-1]["metrics/recall"] == 0.8


def wandb_records(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return (config, history) of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    for data in leveldb_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        updates = [*record.run.config.update, *record.config.update]
        config |= {item.key: json.loads(item.value_json) for item in updates}
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return config, history


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log as LevelDB writes it; W&B's begins with seven bytes of its own."""
    block, header = 32768, struct.Struct("<IHB")  # checksum, length, and kind: 1 whole, 2 first, 3 middle, 4 last
    at, parts = 7, b""
    while at < len(data):
        if block - at % block < header.size:
            at += block - at % block
            continue
        _, length, kind = header.unpack_from(data, at)
        at += header.size
        parts += data[at : at + length]
        at += length
        if kind in (1, 4):
            yield parts
            parts = b""
