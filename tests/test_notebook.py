"""What a notebook shows: whole, small, escaped, and in no colours of its own."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import raysq
from raysq.recipe import Precision, Recipe
from raysq.result import Baseline, Ratio, Result, Stage, Status, TrialRecord

EVIL = "<script>alert('&')</script>"


class Reader(HTMLParser):
    """Collects the tables of a page as rows of text, and checks that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag in {"p", "table", "thead", "tbody", "tr", "th", "td", "details", "summary"}
        assert not attrs  # no colours, scripts, or links
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def read(shown: Any) -> Reader:
    page = shown._repr_html_()
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def trial(label: str, drop: float, latency: float, feasible: bool = True) -> TrialRecord:
    return TrialRecord(
        trial=0,
        recipe=Recipe({}),
        config={},
        status=Status.FINISHED,
        stage=Stage.TIMED,
        label=label,
        accuracy=1.0 - drop,
        accuracy_drop=drop,
        feasible=feasible,
        latency_ratio=latency,
        ratio=Ratio(latency, latency, latency),
        int8_calls=4,
    )


def result(**changes: Any) -> Result:
    given: dict[str, Any] = {
        "model": None,
        "built": SimpleNamespace(backend="ipex"),
        "recipe": Recipe({}),
        "accuracy": 0.99,
        "accuracy_drop": 0.01,
        "baseline": Baseline(1.0, {}, 2.0, "jit", {}),
        "latency_ms": 1.0,
        "latency_ratio": Ratio(0.5, 0.45, 0.55),
        "feasible": True,
        "trials": (trial(EVIL, 0.01, 0.5), trial("default", 0.02, 0.4, feasible=False), trial("slow", 0.02, 0.9)),
        "executed": {"fc1": Precision.INT8, "fc2": Precision.FP32},
        "left_in_float": {"fc2": EVIL},
    }
    return Result(**{**given, **changes})


def test_a_result_shows_the_winner_beside_fp32() -> None:
    page = read(result())
    assert page.rows[:4] == [
        ["", "fp32 (jit)", "int8 (ipex)"],
        ["accuracy", "1", "0.99 (loss 0.01)"],
        ["latency", "2 ms", "1 ms"],
        ["time / fp32", "1", "0.500 [0.450, 0.550]"],
    ]
    assert "raysq: meets the goal" in page.text and "1 of 2 calls in int8, 1 left in float" in page.text


def test_bf16_is_a_column_where_the_cpu_has_it() -> None:
    baseline = Baseline(
        1.0, {}, 2.0, "jit", {}, bf16_accuracy=0.999, bf16_latency_ms=1.2, bf16_ratio=Ratio(0.6, 0.5, 0.7)
    )
    assert [row[2] for row in read(result(baseline=baseline)).rows[:4]] == ["bf16", "0.999", "1.2 ms", "0.600"]


def test_the_front_is_shown_and_what_users_named_is_escaped() -> None:
    page = read(result())  # the reader refuses a script
    assert [row[0] for row in page.rows if len(row) == 5] == ["label", "default", EVIL]
    assert ["fc2", EVIL] in page.rows
    assert "Pareto front of 3 trials, 2 of which meet the goal" in page.text


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"feasible": False}, "does not meet the goal: the closest recipe"),
        ({"latency_ratio": Ratio(1.1, 1.0, 1.2)}, "meets the goal, but is not faster than float beyond luck"),
    ],
)
def test_bad_news_is_said_first(changes: dict[str, Any], verdict: str) -> None:
    assert read(result(**changes)).text.startswith(f"raysq: {verdict}")


def test_a_result_without_timed_trials_is_shown_too() -> None:
    untimed = replace(trial("default", 0.5, 0.5, feasible=False), ratio=None)
    assert "Pareto front of 1 trials, 0 of which meet the goal" in read(result(trials=(untimed,), feasible=False)).text


def test_a_quantized_model_and_a_graph() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(4, 8)
    quantized = raysq.quantize(model, [x], backend="reference")
    assert re.match(r"int8 \(reference\)2 of 2 calls in int8", read(quantized).text)
    graph = raysq.inspect(model, x)
    assert [row[:2] for row in read(graph).rows] == [["call", "op"], ["0", "linear"], ["2", "linear"]]
