"""What raysq logs, and how loud: RAYSQ_LOGLEVEL wins over `verbose`."""

from __future__ import annotations

import logging
import os

from rich.logging import RichHandler

from raysq.errors import OptionError, unknown

__all__ = ["VARIABLE", "configure"]

VARIABLE = "RAYSQ_LOGLEVEL"
LEVELS = {0: "ERROR", 1: "WARNING", 2: "DEBUG"}


def configure(verbose: int = 1) -> None:
    """Set the level of the "raysq" logger, and let it write to stderr unless the program handles logs itself.

    Args:
        verbose: 0 errors only, 1 warnings too, 2 each proposal, skip and reason.

    Raises:
        OptionError: RAYSQ_LOGLEVEL names no level.
    """
    name = os.environ.get(VARIABLE, LEVELS.get(verbose, "DEBUG")).upper()
    known = logging.getLevelNamesMapping()
    if name not in known:
        raise OptionError(f"{VARIABLE}: {unknown('level', name, known)}")
    logger = logging.getLogger("raysq")
    logger.setLevel(name)
    if not logger.hasHandlers():
        logger.addHandler(RichHandler(show_path=False, show_time=False))
