"""How loud raysq logs."""

from __future__ import annotations

import logging

import pytest

from raysq import logs
from raysq.errors import OptionError


@pytest.mark.parametrize(
    ("variable", "verbose", "level"),
    [(None, 0, logging.ERROR), (None, 1, logging.WARNING), (None, 2, logging.DEBUG), ("info", 0, logging.INFO)],
)
def test_variable_wins_over_verbose(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, verbose: int, level: int
) -> None:
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    if variable:
        monkeypatch.setenv(logs.VARIABLE, variable)
    logs.configure(verbose)
    assert logging.getLogger("raysq").level == level


def test_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "DEBG")
    with pytest.raises(OptionError, match="Did you mean 'DEBUG'"):
        logs.configure()
