"""What is written to a URL is read back from it; a store that fails costs nobody a run."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from ray import cloudpickle
from torch import nn

import raysq
from raysq import cli, journal, mirror, storage
from raysq.arguments import journal_path
from raysq.errors import OptionError, ResumeError, StorageError
from raysq.journal import Journal
from raysq.mirror import mirrored
from raysq.quantized import RECIPE_FILE
from raysq.recipe import Recipe
from raysq.result import Baseline, Stage, Status, TrialRecord
from raysq.run import Entry, Header
from raysq.storage import Store
from raysq.warm_start import EarlierRun, read

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import test modules

HEADER = Header({"model": "m"}, {}, {}, "ipex", Baseline(0.9, {"accuracy": 0.9}, 5.0, "ipex", {"ipex": 5.0}))
TRIAL = TrialRecord(0, Recipe({}), {}, Status.FINISHED, Stage.EVALUATED, accuracy=0.8, label="all int8")


class Unreliable(MemoryFileSystem):
    """A store in memory that is down at times."""

    protocol = "unreliable"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    down = False

    def put_file(self, *given: Any, **options: Any) -> None:
        if Unreliable.down:
            raise ConnectionError("the store is down")
        super().put_file(*given, **options)

    def find(self, *given: Any, **options: Any) -> Any:
        if Unreliable.down:
            raise ConnectionError("the store is down")
        return super().find(*given, **options)


fsspec.register_implementation("unreliable", Unreliable)


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Work in a directory, with stores, of this test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mirror, "INTERVAL_S", 0.01)
    for kind in (MemoryFileSystem, Unreliable):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    yield
    Unreliable.down = False


def content(url: str) -> bytes | None:
    """Return what stands at a URL, None where nothing does yet."""
    try:
        data: bytes = fsspec.filesystem(url.partition("://")[0]).cat_file(url)
    except FileNotFoundError:
        return None
    return data


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def run(path: Path, *trials: TrialRecord) -> Path:
    """Write the journal of a run."""
    with Journal.create(path, HEADER) as written:
        for trial in trials:
            written.append(Entry(trial, seen=trial.trial))
    return path


# --- places ---


@pytest.mark.parametrize(
    ("place", "expected"),
    [("s3://bucket/runs", True), ("memory://x", True), ("runs", False), ("/runs", False), ("C:/runs", False)],
)
def test_what_is_a_url(place: str, expected: bool) -> None:
    assert storage.is_url(place) is expected


def test_a_url_made_a_path_is_refused_with_the_right_one() -> None:
    with pytest.raises(OptionError, match="'s3://bucket/runs'"):
        storage.is_url(Path("s3://bucket/runs"))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket/a/b/", "raysq_runs/s3/bucket/a/b"),
        ("sftp://me:secret@host/a", "raysq_runs/sftp/host/a"),  # no password in a path
        ("file:///tmp/x", "raysq_runs/file/tmp/x"),
    ],
)
def test_each_url_has_a_directory_here(url: str, expected: str) -> None:
    assert storage.local_copy(url) == Path(expected)


def test_no_url_leads_out_of_the_directory_of_runs() -> None:
    with pytest.raises(StorageError, match=r"\.\."):
        storage.local_copy("memory://x/../../etc")


def test_names_in_a_store_that_lead_out_of_it_are_refused(tmp_path: Path) -> None:
    store = Store("memory://x")
    store._fs.store["/x/../../evil"] = store._fs.open("/x/file", "wb")
    with pytest.raises(StorageError, match="leads out"):
        store.download(tmp_path)


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(StorageError, match="adlfs"):  # no extra of raysq brings it
        Store("abfs://container/x").names()


def test_an_unknown_scheme_says_so() -> None:
    with pytest.raises(StorageError, match="can't reach nosuch://x"):
        Store("nosuch://x")


# --- artifacts ---


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_what_is_saved_to_a_url_is_loaded_from_it(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    url = f"{scheme}://{tmp_path}/models/small"
    int8 = raysq.quantize(model, [x], backend="reference")
    int8.save(url)
    assert torch.equal(raysq.load(url)(x), int8(x))
    (recipe,) = read(url)
    assert isinstance(recipe, Recipe) and recipe == int8.recipe


def test_an_empty_url_holds_no_model() -> None:
    with pytest.raises(StorageError, match="there is nothing at memory://nowhere"):
        raysq.load("memory://nowhere")


# --- the mirror ---


def test_a_run_is_at_the_url_while_it_lasts_and_whole_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "run" / journal.FILE
    with mirrored(path.parent, "memory://runs/a"), Journal.create(path, HEADER) as written:
        for number in range(3):
            written.append(Entry(replace(TRIAL, trial=number), seen=number))
            whole = path.read_bytes()
            eventually(lambda: content(f"memory://runs/a/{journal.FILE}") == whole)  # noqa: B023
        (path.parent / "weights.part").write_text("half")
        (path.parent / "logs").mkdir()
        (path.parent / "logs" / "trial.csv").write_text("1")
    assert Store("memory://runs/a").names() == [journal.FILE, "logs/trial.csv"]


def test_no_entry_waits_for_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[str] = []
    put = Unreliable.put_file

    def slow(self: Any, *given: Any, **options: Any) -> None:
        while not held:
            time.sleep(0.01)
        put(self, *given, **options)

    monkeypatch.setattr(Unreliable, "put_file", slow)
    path = tmp_path / "run" / journal.FILE
    with mirrored(path.parent, "unreliable://runs/a"):
        run(path, *(replace(TRIAL, trial=number) for number in range(20)))
        held.append("go on")  # here all 20 are on disk; the store has none yet
    assert content(f"unreliable://runs/a/{journal.FILE}") == path.read_bytes()


def test_a_store_that_comes_back_gets_everything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run" / journal.FILE
    with caplog.at_level(logging.WARNING, "raysq"), mirrored(path.parent, "unreliable://runs/a"):
        Unreliable.down = True
        run(path, TRIAL)
        eventually(lambda: "the store is down" in caplog.text)
        Unreliable.down = False
    assert content(f"unreliable://runs/a/{journal.FILE}") == path.read_bytes()
    assert caplog.text.count("the store is down") == 1  # however often it was tried


def test_a_store_that_stays_away_says_where_the_run_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run" / journal.FILE
    with caplog.at_level(logging.ERROR, "raysq"), mirrored(path.parent, "unreliable://runs/a"):
        Unreliable.down = True
        run(path, TRIAL)
    assert f"The whole run is in {path.parent}" in caplog.text


def test_a_store_that_never_answers_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror, "GRACE_S", 0.05)
    monkeypatch.setattr(Unreliable, "put_file", lambda *_, **__: time.sleep(3))
    path = tmp_path / "run" / journal.FILE
    with caplog.at_level(logging.ERROR, "raysq"), mirrored(path.parent, "unreliable://runs/a"):
        run(path, TRIAL)
    assert "has not answered" in caplog.text


# --- where a run is ---


def test_a_run_is_here_unless_it_is_told_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, _ = journal_path(None, "run", None)
    assert path.resolve() == tmp_path / "raysq_runs" / "run" / journal.FILE


def test_a_run_outlasts_the_files_of_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # where `ray job submit --working-dir` runs a script; Ray deletes it when it needs room
    files = tmp_path / "ray" / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_c39fa5e2482fdff0"
    files.mkdir(parents=True)
    monkeypatch.chdir(files)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path, _ = journal_path(None, "run", None)
    assert path == tmp_path / "home" / "raysq_runs" / "run" / journal.FILE
    assert storage.local_copy("memory://runs/run").is_relative_to(tmp_path / "home")


def test_a_new_run_has_a_directory_here_and_a_url() -> None:
    path, url = journal_path("memory://runs", "a", None)
    assert (path, url) == (Path("raysq_runs/memory/runs/a", journal.FILE), "memory://runs/a")
    assert not path.parent.exists() and not Store("memory://runs/a").names()  # nothing is left before there is a run


def test_a_store_that_fails_is_refused_before_any_work() -> None:
    Unreliable.down = True
    with pytest.raises(StorageError, match="the store is down"):
        journal_path("unreliable://runs", "a", None)


def test_a_run_that_stands_at_the_url_is_not_overwritten() -> None:
    Store("memory://runs/a").put(run(Path("other")), journal.FILE)
    with pytest.raises(StorageError, match="resume='memory://runs/a'"):
        journal_path("memory://runs", "a", None)


def sent(url: str, *trials: TrialRecord) -> None:
    """Have a run at a URL, and nothing of it here."""
    Store(url).put(run(Path("elsewhere"), *trials), journal.FILE)
    Path("elsewhere").unlink()


def test_a_run_goes_on_from_its_url_on_another_machine() -> None:
    sent("memory://runs/a", TRIAL)
    Store("memory://runs/a").put(Path(__file__), "trained-1.pt")
    path, url = journal_path(None, None, "memory://runs/a/")
    assert url == "memory://runs/a" and len(journal.read(path)[1]) == 1
    assert (path.parent / "trained-1.pt").exists()


@pytest.mark.parametrize(("here", "there"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("torn", ["", '{"record": '])
def test_of_the_copy_here_and_the_url_the_longer_counts(here: int, there: int, torn: str) -> None:
    trials = [replace(TRIAL, trial=number) for number in range(2)]
    sent("memory://runs/a", *trials[:there])
    path = run(storage.local_copy("memory://runs/a") / journal.FILE, *trials[:here])
    with path.open("a") as file:
        file.write(torn)
    assert journal_path(None, None, f"memory://runs/a/{journal.FILE}") == (path, "memory://runs/a")
    assert len(journal.read(path)[1]) == 2


def test_copies_that_went_different_ways_are_told() -> None:
    sent("memory://runs/a", TRIAL)
    path = run(storage.local_copy("memory://runs/a") / journal.FILE, replace(TRIAL, trial=1))
    before = path.read_bytes()
    with pytest.raises(ResumeError, match="different ways"):
        journal_path(None, None, "memory://runs/a")
    assert path.read_bytes() == before


def test_where_the_store_is_away_the_copy_here_is_named() -> None:
    path = run(storage.local_copy("unreliable://runs/a") / journal.FILE, TRIAL)
    Unreliable.down = True
    with pytest.raises(StorageError, match=f"resume='{path}'"):
        journal_path(None, None, "unreliable://runs/a")


def test_resuming_what_is_nowhere() -> None:
    with pytest.raises(ResumeError, match="no journal at memory://runs/a"):
        journal_path(None, None, "memory://runs/a")


# --- reading runs ---


def test_a_run_at_a_url_can_be_a_warm_start() -> None:
    sent("memory://runs/a", TRIAL)
    (source,) = read(["memory://runs/a"])
    assert isinstance(source, EarlierRun) and source.path == "memory://runs/a" and len(source.entries) == 1


def test_a_warm_start_from_a_url_without_a_run() -> None:
    Store("memory://runs/a").put(Path(__file__), "else.txt")
    with pytest.raises(ResumeError, match=RECIPE_FILE):
        read("memory://runs/a")


@pytest.mark.parametrize("place", ["memory://runs/a", f"memory://runs/a/{journal.FILE}"])
def test_show_and_report_read_a_url(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    sent("memory://runs/a", TRIAL)
    assert cli.main(["show", place]) == 0
    assert "all int8" in capsys.readouterr().out
    assert cli.main(["report", place]) == 0
    assert capsys.readouterr().out.strip() == "memory://runs/a/report.html"
    assert b"<html" in content("memory://runs/a/report.html")


def test_a_report_of_a_url_can_be_written_here(tmp_path: Path) -> None:
    sent("memory://runs/a", TRIAL)
    assert cli.main(["report", "memory://runs/a", "--to", "page.html"]) == 0
    assert "<html" in (tmp_path / "page.html").read_text()


def test_compare_reads_urls(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "other"):
        sent(f"memory://runs/{name}", TRIAL)
    assert cli.main(["compare", "memory://runs/one", "memory://runs/other"]) == 0
    assert "other" in capsys.readouterr().out


def test_a_url_of_several_runs_must_name_one(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "other"):
        sent(f"memory://runs/{name}", TRIAL)
    assert cli.main(["show", "memory://runs"]) == 2
    assert "2 journals" in capsys.readouterr().err


# --- a search ---


@pytest.mark.slow
def test_a_search_outlives_its_store_and_goes_on_from_the_url(
    cluster: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), torch.randn(64, 16)

    def eval_fn(candidate: nn.Module) -> float:
        return float(candidate(x).isfinite().float().mean())

    append = Journal.append

    def and_then_away(self: Journal, entry: Entry) -> None:
        append(self, entry)
        Unreliable.down = entry.record.trial >= 1

    monkeypatch.setattr(Journal, "append", and_then_away)
    quick: dict[str, Any] = {"num_threads": 1, "max_concurrent_trials": 1, "verbose": 0, "backend": "reference"}
    quick |= {"latency": raysq.Latency(0.02, 0.02), "strategy": "random"}
    first = raysq.tune(model, [x], eval_fn, max_trials=3, storage_path="unreliable://runs", **quick)
    monkeypatch.setattr(Journal, "append", append)
    assert first.journal is not None and len(journal.read(first.journal)[1]) == 3  # nothing was lost
    assert str(first.journal.parent) in caplog.text  # and it says where it is
    Unreliable.down = False
    url = f"unreliable://runs/{first.journal.parent.name}"
    more = raysq.tune(model, [x], eval_fn, max_trials=4, resume=url, **quick)
    assert len(more.trials) == 4 and more.journal == first.journal
    assert content(f"{url}/{journal.FILE}") == first.journal.read_bytes()
    more.save("unreliable://models/best")
    assert torch.equal(raysq.load("unreliable://models/best")(x), more.model(x))
