"""Values out of JSON, checked against the fields of the dataclass that they are for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from raysq.errors import shown

__all__ = ["typed"]

NOT_FINITE = ("nan", "inf", "-inf")  # how strict JSON spells them


def typed(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return data of which those values are checked whose field holds a number, a truth, text, or several of these.

    Lists become tuples, of any length.

    Args:
        kind: a dataclass; fields of other types are for its reader to check.
        data: by field.

    Raises:
        TypeError, ValueError, OverflowError: a value of another type.
    """
    known = {field.name: str(field.type) for field in fields(kind)}
    return {name: _checked(name, known.get(name, ""), value) for name, value in _mapping(data).items()}


def _checked(name: str, kind: str, value: Any) -> Any:
    reader = _reader(kind.removesuffix(" | None"))
    if reader is None or (value is None and kind.endswith(" | None")):
        return value
    try:
        return reader(value)
    except TypeError as exc:
        raise TypeError(f"`{name}` must be {exc}, got {shown(value)}") from None


def _reader(kind: str) -> Callable[[Any], Any] | None:
    if not (kind.startswith("tuple[") and kind.endswith(", ...]")):
        return READERS.get(kind)
    item = _reader(kind.removeprefix("tuple[").removesuffix(", ...]"))
    return None if item is None else _tuple_of(item)


def _number(value: Any) -> float:
    if value in NOT_FINITE or (isinstance(value, int | float) and not isinstance(value, bool)):
        return float(value)
    raise TypeError("a number")


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise TypeError("a whole number")


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise TypeError("true or false")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise TypeError("text")


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise TypeError("an object")


def _of(reader: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {key: reader(item) for key, item in _mapping(value).items()}


def _tuple_of(reader: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise TypeError("a list")
        try:
            return tuple(map(reader, value))
        except TypeError as exc:
            raise TypeError(f"a list: {exc}") from None

    return read


READERS: Mapping[str, Callable[[Any], Any]] = {
    "int": _whole,
    "float": _number,
    "bool": _truth,
    "str": _text,
    "Mapping[str, float]": _of(_number),
    "Mapping[str, str]": _of(_text),
    "Mapping[str, Any]": _mapping,
    "Mapping[str, object]": _mapping,
    "Mapping[str, Mapping[str, Any]]": _of(_mapping),
}
