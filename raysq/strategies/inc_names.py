"""INC's names of strategies and arguments, in raysq's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from raysq.errors import OptionError

__all__ = ["ALIASES", "SIGOPT_ARGUMENTS", "translated"]

SIGOPT = "sigopt"
ALIASES: Mapping[str, str] = {"o0": "conservative", "o1": "basic", SIGOPT: "constrained"}
UNUSED = ("sigopt_api_token", "sigopt_project_id")  # of a service that has closed
SIGOPT_ARGUMENTS: Mapping[str, str | None] = {"sigopt_experiment_name": "experiment_name", **dict.fromkeys(UNUSED)}


def translated(name: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name of a strategy in lower case, an alias replaced, and its arguments in raysq's words.

    SigOpt's token and project are dropped with a warning each, which doesn't show them.

    Raises:
        OptionError: an experiment's name was given in both spellings.
    """
    spelled = name.lower()
    found = dict(arguments)
    if spelled == SIGOPT:
        for key in UNUSED:
            if found.pop(key, None) is not None:
                text = f"`{key}` is not used and not kept: SigOpt's service has closed. `storage` tracks experiments."
                warnings.warn(text, UserWarning, stacklevel=3)
        if {"sigopt_experiment_name", "experiment_name"} <= set(found):
            raise OptionError("give `experiment_name` or `sigopt_experiment_name`, not both.")
        found = {SIGOPT_ARGUMENTS.get(key) or key: value for key, value in found.items()}
    return ALIASES.get(spelled, spelled), found
