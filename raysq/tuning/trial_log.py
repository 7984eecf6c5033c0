"""What a worker writes of each trial: into a file among Ray's logs of its node, which the dashboard lists.

Not to standard output, which Ray prints on the screen of whoever began the search.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

from raysq.recipe import Recipe

__all__ = ["NAME", "attach", "tried"]

NAME = "raysq-worker-{pid}.log"
FORMAT = "%(asctime)s %(levelname)s %(message)s"
STDOUT = Path("/proc/self/fd/1")


def attach() -> None:
    """Let this process's "raysq" logger write such a file, if it is a worker of Ray; warnings go to stderr as well."""
    with suppress(OSError):  # no /proc, or a disk that is full: the trial matters more
        output = STDOUT.readlink()
        if not (output.name.startswith("worker-") and output.suffix == ".out"):
            return
        handler = logging.FileHandler(output.with_name(NAME.format(pid=os.getpid())), delay=False)
        handler.setFormatter(logging.Formatter(FORMAT))
        logger = logging.getLogger("raysq")
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        if logging.lastResort is not None:
            logger.addHandler(logging.lastResort)  # what is written where a logger has no handler


def tried(recipe: Recipe) -> str:
    """Return a recipe in a line: its digest, how many calls run how, what else it changes."""
    kinds = Counter(str(config) for config in recipe.ops.values())
    parts = [f"{count} x {kind}" for kind, count in kinds.most_common()]
    if recipe.smoothing:
        parts.append(f"{len(recipe.smoothing)} groups smoothed")
    return "; ".join([f"recipe {recipe.digest}", *parts, *map(str, recipe.transforms)])
