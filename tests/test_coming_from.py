"""docs/coming-from.md has every argument of Neural Compressor 2.6 and of IPEX's RFC, and names raysq's as they are."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import pytest
from inc_2_6 import FIELDS
from pages import ROOT, tables

import raysq
from raysq.switches import read_switches

PAGE = ROOT / "docs" / "coming-from.md"
NONE = "–"
REQUIRED = "required"
ARGUMENT = re.compile(r"`(?P<function>[A-Za-z]+)\((?P<argument>\w+)=\)`")
SWITCH = re.compile(r'`switches\["(?P<name>\w+)"\]`')
HEADINGS = {"recipes": "Recipes"}  # where it isn't the name itself


def rows(heading: str) -> list[list[str]]:
    ((_, *found),) = tables(PAGE, heading)
    return found


def default_of(function: str, argument: str) -> Any:
    """Return an argument's default, `MISSING` for none."""
    kind = getattr(raysq, function)
    if is_dataclass(kind):
        field = next(f for f in fields(kind) if f.name == argument)
        return field.default if field.default_factory is MISSING else field.default_factory()
    parameter = inspect.signature(kind).parameters[argument]
    return MISSING if parameter.default is parameter.empty else parameter.default


@pytest.mark.parametrize("name", FIELDS)
def test_every_argument_has_a_line_with_its_default(name: str) -> None:
    lines = rows(HEADINGS.get(name, name))
    assert {line[0].strip("`"): line[1].strip("`") for line in lines} == {
        field: REQUIRED if default is None else default for field, default in FIELDS[name].items()
    }
    assert len(lines) == len(FIELDS[name])  # none stands twice


@pytest.mark.parametrize("name", [*FIELDS, "From NNCF"])
def test_each_line_says_what_raysq_has_or_why_not(name: str) -> None:
    for _, _, ours, default, differs in rows(HEADINGS.get(name, name)):
        if ours == NONE:
            assert default == NONE and differs, differs
            continue
        switch = SWITCH.fullmatch(ours)
        if switch:
            assert read_switches({switch["name"]: None}) and default == "tuned"
            continue
        match = ARGUMENT.fullmatch(ours)
        assert match, ours
        found = default_of(match["function"], match["argument"])
        if default == REQUIRED:
            assert found is MISSING, ours
        else:
            assert found == ast.literal_eval(default.strip("`")), ours


def test_arguments_named_anywhere_on_the_page_exist() -> None:
    text = PAGE.read_text()
    named = {(match["function"], match["argument"]) for match in ARGUMENT.finditer(text)}
    assert len(named) > 30
    for function, argument in named:
        default_of(function, argument)
    for match in SWITCH.finditer(text):
        read_switches({match["name"]: None})
