"""What a worker that dies leaves in its trial's directory on that node: what it died of, and where it was."""

from __future__ import annotations

import faulthandler
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

__all__ = ["forget", "hung", "keep", "place", "read"]

FILE = "last_words"
FATAL = re.compile(r"Fatal Python error: (.+)")
WATCHDOG = "Timeout ("  # how the interpreter's watchdog begins
FRAME = re.compile(r'  File "(.+)", line (\d+) in (.+)')
STACK = re.compile(r"^(?:Current thread|Thread|Stack) .*$", re.MULTILINE)
TRIAL = "in _advance"  # the frame that all work of a trial has below it
PACKAGE = str(Path(__file__).parents[1])
NOT_THE_USERS = tuple(f"{folder}/" for folder in (*map(sysconfig.get_path, ("stdlib", "purelib")), PACKAGE))
HELD = "it held the interpreter's lock for longer than a trial may take"

Frame = tuple[str, int, str]  # file, line, function


def keep(directory: str | Path) -> TextIO:
    """Return the file in which a fatal error of this process is written from now on; keep it open."""
    file = (Path(directory) / FILE).open("w")
    faulthandler.enable(file, all_threads=False)
    return file


def forget(directory: str | Path) -> None:
    """Leave nothing: it is known otherwise why this process ends."""
    (Path(directory) / FILE).unlink(missing_ok=True)


def read(directory: str | Path) -> str | None:
    """Say what a trial's earlier worker died of; None if it never ran on this node."""
    try:
        text = (Path(directory) / FILE).read_text(errors="replace")
    except OSError:
        return None
    fatal = FATAL.search(text)
    blocks = STACK.split(text)[1:]
    block = next((b for b in blocks if TRIAL in b), blocks[0] if blocks else "")
    at = place([(file, int(line), name) for file, line, name in FRAME.findall(block)])
    if fatal:
        return f"{fatal[1]}{at}"
    if text.startswith(WATCHDOG):
        return f"{HELD}{at}"
    return (
        "it was killed without a word: by the system if memory ran out (then lower `max_concurrent_trials`), by "
        "someone, or by itself"
    )


def hung(words: str | None) -> bool:
    """Whether these are the words of a process that the watchdog ended."""
    return words is not None and words.startswith(HELD)


def place(frames: Sequence[Frame]) -> str:
    """Return " at file:line in function" of the user's innermost frame, of the innermost if there is none, or "".

    Args:
        frames: the innermost first.
    """
    users = (f for f in frames if not f[0].startswith(NOT_THE_USERS) and not f[0].startswith("<frozen"))
    found = next(users, frames[0] if frames else None)
    return "" if found is None else f" at {Path(found[0]).name}:{found[1]} in {found[2]}"
