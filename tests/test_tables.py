"""What all tables of benchmarks/ have in common: they are written by `make bench`, and say where they were measured."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- t -->", "<!-- end of t -->"


@pytest.fixture
def tables(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("tables")


def test_make_bench_runs_each_script_that_writes_a_table_into_the_page_that_has_its_marks() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    listed = re.search(r"^BENCHMARKS := (.*)$", makefile, re.M)
    assert listed is not None
    pages = dict(pair.split(":") for pair in listed[1].split())
    scripts = {path.stem: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    assert set(pages) == {name for name, text in scripts.items() if '"--docs"' in text}
    for name, page in pages.items():
        marks = re.findall(r'"(<!-- .*? -->)"', scripts[name])
        assert marks
        assert all(mark in (ROOT / page).read_text() for mark in marks), name


def test_a_table_says_on_what_and_with_what_it_was_measured(tables: ModuleType) -> None:
    sentence = tables.where(2, ("torch",))
    assert re.fullmatch(r".+ \(.+\), 2 threads, Python 3\.\d+\.\d+, torch \S+, raysq \S+\.", sentence)


def test_a_file_without_marks_is_refused_before_any_work(tables: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"{END}\n{BEGIN}\n")
    with pytest.raises(SystemExit, match="in this order"):
        tables.check_marks(path, BEGIN, END)


def test_what_stands_around_the_marks_stays(tables: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    tables.check_marks(path, BEGIN, END)
    tables.publish("new", path, BEGIN, END)
    assert path.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"


def test_the_dashboards_cost_has_a_line_for_what_costs_most(benchmark_script: Callable[[str], ModuleType]) -> None:
    script = benchmark_script("dashboard_cost")
    of = {f"process {n}": float(n) for n in range(9)}
    lines = script.table(1.25, of, 10).splitlines()
    assert lines[2] == "| waiting, in worker and driver together | 1.2 |"
    assert lines[3] == "| CPU of all processes | 36.0 |"
    assert lines[4] == "| of that: `process 8` | 8.0 |"
    assert sum(line.startswith("| of that") for line in lines) == script.MOST
