"""Checks that arguments of many functions have in common."""

from __future__ import annotations

from typing import TypeGuard

from raysq.errors import OptionError

__all__ = ["check_whole", "is_whole"]


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole(name: str, value: object, least: int, note: str = "") -> None:
    """Refuse what isn't a whole number of at least `least`; a note says what else the argument may be.

    Raises:
        OptionError: it isn't one.
    """
    if not is_whole(value) or value < least:
        raise OptionError(f"`{name}` must be a whole number of at least {least}{note}, got {value!r}.")
