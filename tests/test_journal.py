"""Whatever happens to the process or the file, a finished trial is read back, and damage is named."""

import json
import math
import multiprocessing
import os
import resource
import signal
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysq.errors import ResumeError, StorageError
from raysq.journal import Journal, read
from raysq.journal_lines import record_from_dict, to_dict
from raysq.op_times import OpTimes
from raysq.recipe import OpConfig, Precision, Recipe
from raysq.result import Baseline, Ratio, Stage, Status, TrialRecord
from raysq.run import Entry, Header, WarmStart
from raysq.scores import Units

BASELINE = Baseline(0.9, {"accuracy": 0.9}, 5.0, "ipex", {"jit": 9.0, "ipex": 5.0}, 0.89, 4.0, Ratio(0.8, 0.7, 0.9))
HEADER = Header({"model": "m1", "calibration": "c1"}, {"tolerance": 0.01}, {"raysq": "0.1"}, "ipex", BASELINE)
TIMED = TrialRecord(
    trial=3,
    recipe=Recipe({"fc": OpConfig(Precision.INT8)}, smoothing={"fc/0": 0.5}),
    config={"scheme": "asym", "k": 4, "alpha": 0.5, "on": True, "none": None},
    status=Status.FINISHED,
    stage=Stage.TIMED,
    accuracy=0.89,
    accuracy_drop=0.011,
    feasible=True,
    latency_ms=2.0,
    latency_ratio=0.4,
    ratio=Ratio(0.4, 0.39, 0.41),
    metrics={"accuracy": 0.89},
    size_bytes=1000,
    eval_s=2.0,
    timing_s=1.5,
    worst_drop=0.02,
    size_ratio=0.3,
    memory_ratio=0.5,
    node="host",
)
FAILED = TrialRecord(4, Recipe({}), {}, Status.FAILED, Stage.BUILD, reason="ValueError: so\nwhat")
ENTRY = Entry(TIMED, seen=2, pairs=((1.0, 2.5), (1.1, 2.4)), environment={"cpu": "Zen", "isa": "vnni", "threads": 2})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "journal.jsonl"


def written(path, *entries):
    with Journal.create(path, HEADER) as journal:
        for entry in entries:
            journal.append(entry)


@pytest.mark.parametrize("record", [TIMED, FAILED, replace(TIMED, metrics={"recall": float("inf")})])
def test_record_survives_strict_json(record):
    text = json.dumps(to_dict(record), allow_nan=False)
    assert record_from_dict(json.loads(text)) == record


def test_reads_what_was_written(path):
    entries = ENTRY, Entry(FAILED, seen=3)
    written(path, *entries)
    assert read(path) == (HEADER, entries)


def test_a_run_keeps_the_times_that_its_strategy_read(path):
    times = OpTimes({"fc": {Precision.INT8: 0.1, Precision.FP32: 0.3}}, {"fc": 0.01}, (("fc", "head"),))
    with Journal.create(path, replace(HEADER, op_times=times)):
        pass
    assert read(path)[0].op_times == times


def test_a_run_keeps_what_it_was_warm_started_with(path):
    header = replace(HEADER, warm_start=WarmStart((replace(ENTRY, seen=0),), (TIMED.recipe, FAILED.recipe)))
    Journal.create(path, header).close()
    assert read(path) == (header, ())


def test_a_line_is_there_before_append_returns(path):
    with Journal.create(path, HEADER) as journal:
        journal.append(ENTRY)
        assert read(path)[1] == (ENTRY,)


@pytest.mark.parametrize("torn", [b"", b"{", b'{"record": {"trial": 4', b"\xff\xfe"])
def test_torn_last_line_is_dropped(path, torn):
    written(path, ENTRY)
    with path.open("ab") as file:
        file.write(torn)
    journal, header, entries = Journal.resume(path, HEADER.fingerprints)
    with journal:
        journal.append(Entry(FAILED, seen=1))
    assert (header, entries) == (HEADER, (ENTRY,))
    assert read(path)[1] == (ENTRY, Entry(FAILED, seen=1))


def test_killed_writer_loses_no_finished_line(path):
    def write():
        with Journal.create(path, HEADER) as journal:
            journal.append(ENTRY)
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    process.join()
    assert read(path)[1] == (ENTRY,)


def test_every_truncation_gives_a_prefix_or_says_why(path):
    written(path, ENTRY, ENTRY)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        try:
            assert read(path)[1] in ((), (ENTRY,))
        except ResumeError:
            assert b"\n" not in whole[:size]  # not even the header is whole


@settings(max_examples=200, deadline=None)
@given(
    line=st.one_of(
        st.binary(max_size=80),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(to_dict(ENTRY))), inner),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
    ),
    where=st.integers(0, 1),
)
def test_hostile_lines_raise_nothing_but_resume_error(tmp_path_factory, line, where):
    path = tmp_path_factory.mktemp("hostile") / "journal.jsonl"
    lines = [json.dumps({"schema": 1, **to_dict(HEADER)}).encode(), line.replace(b"\n", b" ")]
    path.write_bytes(b"\n".join(lines[:: 1 - 2 * where]) + b"\n")
    with pytest.raises(ResumeError):
        read(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["record"].pop("recipe"),
        lambda d: d["record"].update(recipe={"ops": []}),
        lambda d: d["record"].update(status="lost"),
        lambda d: d["record"].update(metrics=[1]),
        lambda d: d["record"].update(ratio={"value": 1}),
        lambda d: d["record"].update(surprise=1),
        lambda d: d.update(pairs=[[1]]),
        lambda d: d.pop("seen"),
    ],
)
def test_damaged_entry_is_named(path, change):
    data = to_dict(ENTRY)
    change(data)
    written(path)
    with path.open("a") as file:
        file.write(json.dumps(data) + "\n")
    with pytest.raises(ResumeError, match="line 2"):
        read(path)


def test_deep_nesting_is_damage(path):
    written(path)
    with path.open("a") as file:
        file.write("[" * 100_000 + "\n")
    with pytest.raises(ResumeError, match="line 2"):
        read(path)


def test_newer_schema_is_refused(path):
    path.parent.mkdir()
    path.write_text(json.dumps({"schema": 2, **to_dict(HEADER)}) + "\n")
    with pytest.raises(ResumeError, match="Update raysq"):
        read(path)


@pytest.mark.parametrize(
    "now", [{"model": "m2", "calibration": "c1"}, {"model": "m2"}, {"model": "m2", "calibration": "c1", "more": "x"}]
)
def test_other_fingerprint_says_what_differs(path, now):
    written(path)
    with pytest.raises(ResumeError, match="model: m1 there, m2 now"):
        Journal.resume(path, now)


def test_resume_from_nothing(path):
    with pytest.raises(ResumeError, match="can't read"):
        Journal.resume(path, {})


def test_two_writers_are_refused(path):
    with Journal.create(path, HEADER), pytest.raises(ResumeError, match="another run"):
        Journal.resume(path, HEADER.fingerprints)


def test_existing_journal_is_not_overwritten(path):
    written(path, ENTRY)
    with pytest.raises(StorageError, match="resume="):
        Journal.create(path, HEADER)


@pytest.mark.parametrize("base", ["/proc/nowhere", "/dev/null/below"])
def test_unwritable_path(base, tmp_path):
    with pytest.raises(StorageError, match="storage_path"):
        Journal.create(tmp_path / base / "journal.jsonl", HEADER)


def test_a_line_that_does_not_fit_leaves_the_others_whole(path):
    def write(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # as a disk that is full: a part of the line fits
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with Journal.resume(path, HEADER.fingerprints)[0] as journal:
            try:
                journal.append(ENTRY)
            except StorageError as exc:
                assert "resume=" in str(exc)
                os._exit(3)

    written(path, ENTRY)
    size = path.stat().st_size
    process = multiprocessing.get_context("fork").Process(target=write, args=(size + 100,))
    process.start()
    process.join()
    assert process.exitcode == 3
    assert path.stat().st_size == size  # what a later line would have been glued to is gone
    assert read(path)[1] == (ENTRY,)


def test_a_journal_that_was_removed_is_missed(path):
    with Journal.create(path, HEADER) as journal:
        path.unlink()
        with pytest.raises(StorageError, match="was removed"):
            journal.append(ENTRY)


def test_full_disk():
    with open("/dev/full", "rb+", buffering=0) as full, pytest.raises(StorageError, match="No space"):
        Journal("/dev/full", full).append(ENTRY)


def test_what_ended_early_and_the_reference_survive(path):
    units = Units(np.array([1.0, 0.25, 0.1 + 0.2]), np.array([3, 1, 2]), (0.0, math.inf))
    early = replace(TIMED, items_scored=100, items=5000, drop_std=0.0125)
    with Journal.create(path, replace(HEADER, baseline=replace(BASELINE, reference=units))) as journal:
        journal.append(replace(ENTRY, record=early))
    header, (entry,) = read(path)
    again = header.baseline.reference
    assert entry.record == early and entry.record.estimated
    assert again.sums.tolist() == units.sums.tolist() and again.sizes.tolist() == [3, 1, 2]
    assert again.bounds == (0.0, math.inf)
