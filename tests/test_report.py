"""The page about a run: complete, needing no network, safe to open, readable on a phone and in the dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from raysq import cli, report
from raysq.errors import OptionError, StorageError
from raysq.journal import Journal, read
from raysq.op_times import OpTimes
from raysq.recipe import BF16, OpConfig, Precision, Recipe
from raysq.result import Baseline, Ratio, Stage, Status, TrialRecord
from raysq.run import Entry, Header, Run, WarmStart

pytest.importorskip("plotly")

BASELINE = Baseline(0.9, {"accuracy": 0.9}, 5.0, "jit", {"jit": 5.0})
GOAL = {"goal": "at most 1.000% relative loss", "tolerance": 0.01, "criterion": "relative", "higher_is_better": True}
CALLS = {
    "conv": {"op": "conv2d", "macs": 2_500_000, "group": "conv/0", "rank": 2, "sensitivity": 0.00012},
    "fc": {"op": "linear", "macs": 1000, "group": "fc/0", "rank": 1, "sensitivity": 0.034},
    "out": {"op": "linear", "macs": 10, "group": "", "rank": None},
}
TIMES = OpTimes({"conv": {Precision.INT8: 0.25, Precision.FP32: 0.75}}, {})
HEADER = Header(
    {"model": "abcdef0123"},
    {**GOAL, "strategy": "auto", "seed": 0, "objectives": {"latency": 1.0}},
    {"raysq": "0.1", "torch": "2.8"},
    "ipex",
    BASELINE,
    op_times=TIMES,
    calls=CALLS,
)
INT8 = OpConfig(Precision.INT8)
MACHINE = {"cpu": "Zen <5>", "isa": "avx2", "threads": 2}


def entry(number: int, accuracy: float | None, ratio: float | None, **values: object) -> Entry:
    interval = Ratio(ratio, ratio - 0.01, ratio + 0.01) if ratio else None
    record = TrialRecord(
        number,
        Recipe({"conv": INT8, "fc": BF16}, smoothing={"conv/0": number / 10}),
        {},
        Status.FAILED if accuracy is None else Status.FINISHED,
        Stage.TIMED if ratio else Stage.EVALUATED,
        accuracy=accuracy,
        accuracy_drop=None if accuracy is None else (0.9 - accuracy) / 0.9,
        feasible=ratio is not None,
        latency_ratio=ratio or 0.3,
        ratio=interval,
        int8_calls=1,
        label=f"step {number}",
        node="host",
    )
    return Entry(replace(record, **values), seen=number, environment=MACHINE, ended_s=10.0 * (number + 1))


ENTRIES = (
    entry(0, 0.5, None, reason="loses 0.4444, allowed is at most 1.000% relative loss"),
    entry(1, 0.895, 0.6),
    entry(2, 0.899, 0.5),
    entry(3, None, None, reason="RuntimeError: <script>alert(1)</script>"),
    entry(4, 0.6, None, items_scored=300, items=5000, reason="stopped after 300 of 5000 items"),
    entry(5, 0.9, 0.7),
)


class Page(HTMLParser):
    """What of a page a person reads, by the id of the table it stands in, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self._table, self._silent = "", 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loads += [str(found[name]) for name in ("src", "href") if name in found]
        self._silent += tag in ("script", "style")
        if tag == "table":
            self._table = str(found["id"])
            self.rows[self._table] = []
        elif tag == "tr":
            self.rows[self._table].append([])
        elif tag in ("td", "th"):
            self.rows[self._table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("script", "style")
        if tag == "table":
            self._table = ""

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        self.words.append(data)
        if self._table and self.rows[self._table] and self.rows[self._table][-1]:
            self.rows[self._table][-1][-1] += data.strip()


@pytest.fixture
def drawn(tmp_path: Path) -> Callable[..., Page]:
    def draw(header: Header = HEADER, entries: tuple[Entry, ...] = ENTRIES, winner: str | None = None) -> Page:
        report.write(Run(header, entries, winner), tmp_path / "page.html")
        return Page((tmp_path / "page.html").read_text())

    return draw


def test_the_page_loads_nothing(drawn: Callable[..., Page]) -> None:
    assert drawn().loads == []


def test_the_best_recipe_is_told_call_by_call(drawn: Callable[..., Page]) -> None:
    heading, *rows = drawn().rows["calls"]
    assert heading == [
        *("call", "op", "type", "time share", "sensitivity", "rank", "alpha", "10⁶ MACs", "quantized"),
    ]
    assert [row[:3] for row in rows] == [
        ["conv", "conv2d", "int8"],
        ["fc", "linear", "bf16"],
        ["out", "linear", "fp32"],
    ]
    assert rows[0][3:] == [
        "25.0 %",
        "1.2e-04",
        "2",
        "0.2",
        "2.5",
        "static, x uint8 asym minmax, w int8 per_channel nearest",
    ]
    assert rows[1][3:7] == ["", "3.4e-02", "1", ""], "it was not timed"
    assert rows[2][4:6] == ["", ""], "never in int8"


def test_the_model_and_what_it_gains_stand_at_the_top(drawn: Callable[..., Page]) -> None:
    named = replace(HEADER, arguments={**HEADER.arguments, "model": "MobileNet"})
    text = " ".join(" ".join(drawn(named).words).split())
    assert "MobileNet in int8 on ipex" in text
    assert "2.00× as fast as the fastest fp32 (1.96 to 2.04)" in text
    assert "0.899 loses 0.111 % of 0.9" in text and "1 of 3 calls" in text
    assert "3 hold the goal, 1 fail it, 1 stopped early, 1 failed" in text


def test_what_failed_says_why_and_can_do_no_harm(drawn: Callable[..., Page]) -> None:
    rows = drawn().rows["lost"][1:]
    assert [row[0] for row in rows] == ["0", "3", "4"]
    assert [row[2] for row in rows] == ["fails the goal", "failed", "stopped early"]
    assert rows[1][3] == "RuntimeError: <script>alert(1)</script>", "as text"
    assert rows[2][3:] == ["stopped after 300 of 5000 items", "0.6", "300 of 5000"]


def test_the_environment_is_there(drawn: Callable[..., Page]) -> None:
    rows = drawn().rows
    assert rows["machines"] == [["host", "Zen <5>; avx2; 2 threads"]]
    assert ["torch", "2.8"] in rows["versions"]
    assert ["strategy", "auto"] in rows["arguments"] and ["objectives", "latency 1.0"] in rows["arguments"]


@pytest.mark.parametrize("entries", [(), ENTRIES[:1]], ids=["none ended", "none holds"])
def test_a_run_without_a_winner_has_a_page(drawn: Callable[..., Page], entries: tuple[Entry, ...]) -> None:
    page = drawn(entries=entries)
    assert "none" in page.words and "calls" not in page.rows


def test_journals_of_older_versions_are_drawn(drawn: Callable[..., Page]) -> None:
    old = replace(HEADER, arguments={"goal": "x"}, calls={}, op_times=None)
    entries = tuple(replace(e, ended_s=None) for e in ENTRIES)
    assert [row[0] for row in drawn(old, entries).rows["calls"][1:]] == ["conv", "fc"]


def test_the_best_is_the_cheapest_that_holds_or_the_one_that_was_returned() -> None:
    run = Run(HEADER, ENTRIES)
    assert run.best is not None and run.best.trial == 2
    heavy = replace(HEADER, arguments={**HEADER.arguments, "objectives": {"latency": 1, "accuracy": 1000}})
    best = Run(heavy, ENTRIES).best
    assert best is not None and best.trial == 5, "the loss weighs more"
    returned = Run(HEADER, ENTRIES, winner=ENTRIES[1].record.recipe.digest).best
    assert returned is not None and returned.trial == 1
    carried = Run(HEADER, ENTRIES, winner="0123456789abcdef").best
    assert carried is not None and carried.trial == 2, "what was returned is no trial's recipe"


def test_trials_of_a_warm_start_count() -> None:
    known = replace(ENTRIES[2], record=replace(ENTRIES[2].record, trial=-1))
    best = Run(replace(HEADER, warm_start=WarmStart((known,))), ENTRIES[:2]).best
    assert best is not None and best.trial == -1


def test_the_goal_is_a_score() -> None:
    assert Run(HEADER, ()).least == pytest.approx(0.891)
    lower = {**HEADER.arguments, "criterion": "absolute", "higher_is_better": False}
    assert Run(replace(HEADER, arguments=lower), ()).least == pytest.approx(0.91)


def test_the_clock_of_a_resumed_run_goes_on() -> None:
    again = tuple(replace(e, ended_s=s) for e, s in zip(ENTRIES, [10, 20, 5, 9, 2, 3], strict=True))
    assert Run(HEADER, again).ended_s == [10, 20, 25, 29, 31, 32]


def test_what_is_missing_or_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="Pass another path"):
        report.write(Run(HEADER, ()), tmp_path / "no" / "page.html")
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(OptionError, match=r"raysq\[report\]"):
        report.write(Run(HEADER, ()), tmp_path / "page.html")


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    found = []
    for name, entries in (("first", ENTRIES), ("second", ENTRIES[:2])):
        with Journal.create(tmp_path / name / "journal.jsonl", HEADER) as journal:
            for each in entries:
                journal.append(each)
        found.append(tmp_path / name)
    return found


def test_the_journal_keeps_what_the_page_needs(runs: list[Path]) -> None:
    header, entries = read(runs[0] / "journal.jsonl")
    assert header.calls == CALLS and [e.ended_s for e in entries] == [e.ended_s for e in ENTRIES]


def test_a_page_is_made_of_a_run_on_the_command_line(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(runs[0])]) == 0
    assert capsys.readouterr().out.strip() == str(runs[0] / "report.html")
    assert len(Page((runs[0] / "report.html").read_text()).rows["calls"]) == 4


def test_two_runs_are_compared(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *map(str, runs)]) == 0
    shown = capsys.readouterr().out
    for part in (
        "first",
        "second",
        "0.500 [0.490, 0.510]",
        "0.600 [0.590, 0.610]",
        "alpha 0.2",
        "alpha 0.1",
        "60",
        "20",
    ):
        assert part in shown
    assert "conv " not in shown, "it runs alike"


def test_save_writes_the_page(runs: list[Path], tmp_path: Path) -> None:
    from raysq.result import Result

    result = SimpleNamespace(journal=runs[0] / "journal.jsonl", recipe=ENTRIES[1].record.recipe)
    Result._report(result, tmp_path)  # type: ignore[arg-type]
    assert "trial 1" in " ".join(Page((tmp_path / "report.html").read_text()).words)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MEASURE = "<script>addEventListener('load', () => document.title = JSON.stringify({wide: document.body.scrollWidth, \
back: getComputedStyle(document.body).backgroundColor}))</script>"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: `apt-get install chromium`")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_it_on_a_phone_and_in_the_dark(tmp_path: Path, dark: bool) -> None:
    page = tmp_path / "page.html"
    report.write(Run(HEADER, ENTRIES), page)
    page.write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--virtual-time-budget=10000"]
    if dark:
        options += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]
    done = subprocess.run(
        [str(CHROMIUM), *options, f"--user-data-dir={tmp_path}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    points = 5 + 1 + 1, 2 * (3 + 3)  # scored trials, the best, fp32; in each progress those that hold, and the others
    assert done.stdout.count('class="point"') == sum(points)
    found = json.loads(re.findall(r"<title>(.*?)</title>", done.stdout)[0].replace("&quot;", '"'))
    assert found["wide"] <= 500, "nothing is cut off"
    assert found["back"] == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
