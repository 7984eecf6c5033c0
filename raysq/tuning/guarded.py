"""What a search doesn't need may fail without harm to it."""

from __future__ import annotations

import logging
from collections.abc import Callable

__all__ = ["Guarded"]

log = logging.getLogger("raysq")


class Guarded:
    """Calls what may fail; the first failure is told, and nothing is called after it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._failed = False

    def __call__(self, act: Callable[[], object]) -> None:
        """Do it, if nothing has failed before."""
        if self._failed:
            return
        try:
            act()
        except Exception as exc:  # noqa: BLE001  # whatever a tool raises costs its records, not the run
            self._failed = True
            log.error("%s failed, and gets nothing more of this run: %s: %s", self._name, type(exc).__name__, exc)
