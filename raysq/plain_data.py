"""JSON and YAML that anyone may have written: read whole, or refused with a ValueError that says why."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import yaml

__all__ = ["from_json", "from_yaml"]

DEEPEST = 64  # levels; what raysq writes has 10, and code that walks what it reads goes no deeper than the stack
MERGE = "tag:yaml.org,2002:merge"
MOST_MERGED = 10_000  # keys in one mapping of YAML
LARGEST = 10_000_000  # values, YAML's aliases counted as what they stand for; a journal's line has some thousands


def from_json(text: str | bytes) -> Any:
    """Return the value of a JSON document; NaN and Infinity are read too, as `json` does.

    Raises:
        ValueError: no JSON, a key that stands twice in an object, deeper or larger than anything that raysq writes.

    Example:
        >>> from_json('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ValueError: key 'a' stands twice
    """
    if not isinstance(text, str | bytes):
        raise ValueError(f"text is needed, got {type(text).__name__}")
    return _read(lambda: json.loads(text, object_pairs_hook=_object))


def from_yaml(text: str | bytes) -> Any:
    """Return the value of a YAML document, made of plain values only.

    Raises:
        ValueError: no YAML, a key that stands twice, deeper or larger than anything that raysq reads.
    """
    return _read(lambda: yaml.load(text, _Loader))  # a SafeLoader


def _read(parse: Callable[[], Any]) -> Any:
    try:
        value = parse()
        if _size(value, 0, {}) > LARGEST:
            raise ValueError(f"more than {LARGEST:,} values")
    except RecursionError as exc:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from exc
    except MemoryError as exc:
        raise ValueError("larger than the memory") from exc
    except (yaml.YAMLError, AttributeError, TypeError, LookupError, ArithmeticError) as exc:  # of a tag's wrong content
        raise ValueError(str(exc)) from exc
    return value


def _size(value: Any, depth: int, known: dict[int, int]) -> int:
    """Return how many values there are, each counted as often as it can be reached."""
    if not isinstance(value, dict | list):
        return 1
    if depth == DEEPEST:
        raise RecursionError
    found = known.get(id(value))
    if found is None:
        parts = value.values() if isinstance(value, dict) else value
        found = known[id(value)] = 1 + sum(_size(part, depth + 1, known) for part in parts)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        _refuse_twice(key for key, _ in pairs)
    return found


def _refuse_twice(keys: Iterable[Hashable]) -> None:
    seen: set[Hashable] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"key {key!r} stands twice")
        seen.add(key)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML's own loader takes the last, and merges that multiply."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        own = [key for key, _ in node.value if key.tag != MERGE]
        _refuse_twice(self.construct_object(key, deep=True) for key in own)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_MERGED:
            raise ValueError(f"more than {MOST_MERGED:,} keys in one mapping")
