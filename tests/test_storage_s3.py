"""The same on S3, by s3fs, against an S3 server in this process: moto's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle
from torch import nn

import raysq
from raysq import cli
from raysq.arguments import journal_path
from raysq.errors import StorageError

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import test modules
pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a client of a server that has one empty bucket, "models"."""
    monkeypatch.chdir(tmp_path)
    s3.create_bucket(Bucket="models")
    return s3


def test_a_search_on_s3(cluster: None, bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), torch.randn(64, 16)

    def eval_fn(candidate: nn.Module) -> float:
        return float(candidate(x).isfinite().float().mean())

    quick: dict[str, Any] = {"num_threads": 1, "max_concurrent_trials": 1, "verbose": 0, "backend": "reference"}
    quick |= {"latency": raysq.Latency(0.02, 0.02), "strategy": "random"}
    first = raysq.tune(model, [x], eval_fn, max_trials=2, storage_path="s3://models/runs", name="a", **quick)
    assert first.journal == Path("raysq_runs/s3/models/runs/a/journal.jsonl")

    def at(key: str) -> bytes:
        data: bytes = bucket.get_object(Bucket="models", Key=key)["Body"].read()
        return data

    assert at("runs/a/journal.jsonl") == first.journal.read_bytes()
    with pytest.raises(StorageError, match="stands already"):
        journal_path("s3://models/runs", "a", None)

    first.journal.unlink()  # another machine has no copy
    more = raysq.tune(model, [x], eval_fn, max_trials=3, resume="s3://models/runs/a", **quick)
    assert [t.recipe for t in more.trials[:2]] == [t.recipe for t in first.trials] and len(more.trials) == 3
    assert more.journal is not None and at("runs/a/journal.jsonl") == more.journal.read_bytes()

    more.save("s3://models/best")
    assert torch.equal(raysq.load("s3://models/best")(x), more.model(x))
    assert cli.main(["report", "s3://models/runs/a"]) == 0
    assert b"<html" in at("runs/a/report.html")
    known = raysq.tune(model, [x], eval_fn, max_trials=1, warm_start="s3://models/runs/a", **quick)
    assert {t.recipe.digest for t in more.trials} <= {t.recipe.digest for t in known.trials}
    keys = {entry["Key"] for entry in bucket.list_objects_v2(Bucket="models")["Contents"]}
    assert not any("probe" in key for key in keys)


def test_a_bucket_that_is_not_there_is_not_made(bucket: Any) -> None:
    with pytest.raises(StorageError, match="misspelt"):
        journal_path("s3://misspelt/runs", "a", None)
    assert [found["Name"] for found in bucket.list_buckets()["Buckets"]] == ["models"]


def test_a_key_that_may_not_write_is_refused_before_any_work(bucket: Any) -> None:
    policy = """{"Statement": [{"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject",
                                "Resource": "arn:aws:s3:::models/*"}]}"""
    bucket.put_bucket_policy(Bucket="models", Policy=policy)
    with pytest.raises(StorageError, match="can't write s3://models/runs/a"):
        journal_path("s3://models/runs", "a", None)


def test_a_server_that_is_not_there(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match="can't read s3://models"):
        raysq.load("s3://models/best")
