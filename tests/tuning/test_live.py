"""What is shown: a table in a terminal, a line per trial elsewhere, nothing if so wished."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from raysq.goal import Goal
from raysq.recipe import Recipe
from raysq.result import Baseline, Ratio, Stage, Status, TrialRecord
from raysq.tuning.live import Progress, line, opening, shown, table

BASELINE = Baseline(0.9, {}, 5.0, "jit", {})
GOOD = TrialRecord(
    trial=0,
    recipe=Recipe({}),
    config={},
    status=Status.FINISHED,
    stage=Stage.TIMED,
    accuracy=0.895,
    accuracy_drop=0.0056,
    feasible=True,
    latency_ms=2.0,
    latency_ratio=0.4,
    ratio=Ratio(0.4, 0.39, 0.41),
    label="default",
)
FASTER = replace(GOOD, trial=1, latency_ratio=0.2, ratio=Ratio(0.2, 0.19, 0.21), label="kl")
UNTIMED = replace(GOOD, trial=2, feasible=False, latency_ratio=0.1, ratio=None, reason="loses 0.1")
FAILED = TrialRecord(3, Recipe({}), {}, Status.FAILED, Stage.BUILD, reason="ValueError: [bold]\nmore")


def progress(*records, **options):
    found = Progress(BASELINE, Goal(), 10, **options)
    found.records.extend(records)
    return found


def printed(renderable):
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("records", "best"), [((), None), ((GOOD,), GOOD), ((GOOD, FASTER, UNTIMED), FASTER), ((UNTIMED, FAILED), None)]
)
def test_best_is_the_fastest_feasible_timed(records, best):
    assert progress(*records).best is best


@pytest.mark.parametrize(
    ("done", "timeout_s", "expected"),
    [(0, None, None), (0, 60.0, 40.0), (2, None, 80.0), (2, 60.0, 40.0), (2, 15.0, 0.0)],
)
def test_seconds_left(done, timeout_s, expected):
    times = iter([0.0, 20.0])
    assert progress(*[GOOD] * done, timeout_s=timeout_s, clock=lambda: next(times)).seconds_left == expected


def test_earlier_trials_say_nothing_about_the_time_left():
    assert Progress(BASELINE, Goal(), 10, records=[GOOD]).seconds_left is None


def test_before_the_first_trial_the_time_left_is_what_was_expected():
    begun = Progress(BASELINE, Goal(), 10, trial_s=2.0)
    assert begun.seconds_left == 20
    assert opening(begun).endswith("up to 10 trials of about 2.0 s, 20 s in all at most")


def test_table():
    text = printed(table(progress(GOOD, FASTER, FAILED)))
    for part in ("3 of 10 done, 0 running, 1 failed", "5.00x faster", "kl", "0.895 of 0.9", "time left", "ValueError"):
        assert part in text


def test_table_without_a_feasible_trial():
    assert "none holds the goal yet" in printed(table(progress(UNTIMED)))


def test_lines():
    assert line(progress(GOOD), GOOD) == (
        "trial 1/10  default  accuracy 0.895 (+0.56% loss)  latency 0.400 [0.390, 0.410] of fp32"
    )
    assert line(progress(GOOD, FAILED), FAILED) == "trial 2/10  #3  failed: ValueError: [bold]"
    assert line(progress(GOOD), replace(GOOD, waiting_s=9.0)) == line(progress(GOOD), GOOD)
    assert line(progress(GOOD), replace(GOOD, waiting_s=61.0)).endswith("  waited 61 s for others on this machine")


def test_an_absolute_loss_is_in_the_unit_of_the_score():
    record = replace(GOOD, accuracy=12.7, accuracy_drop=0.4)
    assert "accuracy 12.7 (+0.4 loss)" in line(replace(progress(record), goal=Goal(0.5, "absolute")), record)


@pytest.mark.parametrize(("verbose", "expected"), [(0, ""), (1, "trial 1/10  #3  failed: ValueError: [bold]\n")])
def test_elsewhere_a_line_per_trial(verbose, expected):
    console = Console(file=io.StringIO(), width=20)
    with shown(progress(FAILED), verbose, console) as show:
        before = console.file.getvalue()
        show(FAILED)
    assert console.file.getvalue().removeprefix(before) == expected
    assert before.startswith("fp32 scores") if verbose else not before


def test_in_a_terminal_a_table():
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with shown(progress(GOOD), 1, console) as show:
        show(GOOD)
    assert "2.50x faster" in console.file.getvalue()
