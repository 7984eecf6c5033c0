"""Strategies that other packages bring, by entry points of the group "raysq.strategies"."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from raysq.errors import OptionError
from raysq.strategies.base import Strategy

__all__ = ["GROUP", "load", "names"]

GROUP = "raysq.strategies"


def names() -> list[str]:
    """Return what is installed; nothing is imported."""
    return [point.name for point in entry_points(group=GROUP)]


def load(name: str) -> type[Strategy] | None:
    """Return the installed strategy of a name, in any case; None if there is none. Only its own package is imported.

    Raises:
        OptionError: two packages bring that name, or it can't be imported, or it is no class of `Strategy`.
    """
    found = [point for point in entry_points(group=GROUP) if point.name.lower() == name.lower()]
    if not found:
        return None
    if len(found) > 1:
        origins = " and by ".join(map(_origin, found))
        raise OptionError(f"strategy {name!r} is brought by {origins}. Pass an instance of the one you mean.")
    point = found[0]
    try:
        kind = point.load()
    except (ImportError, AttributeError) as exc:
        raise OptionError(
            f"strategy {name!r} of {_origin(point)} can't be imported: {exc}. Install what it needs, or remove it."
        ) from exc
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        raise OptionError(
            f"strategy {name!r} of {_origin(point)} must be a class of raysq.strategies.Strategy, got {kind!r}."
        )
    return kind


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name if point.dist else 'an unknown package'} ({point.value})"
