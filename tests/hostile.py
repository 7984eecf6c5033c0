"""Documents that nobody should be sent: arbitrary JSON, and valid documents changed in some places."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {0: 0, 1: 1, 2: 2}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
DEEP: Any = json.loads("[" * 50 + "]" * 50)
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["nan", "int8", "static", "../../etc/passwd", "x" * 1000, "\x00", "\ud800"])
)
ANYTHING = st.builds(copy.deepcopy, st.just(DEEP)) | st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TEXTS = ["", "{", "[]", "null", "[" * 100_000, '{"a":' * 100_000, '{"a": 1, "a": 2}', "9" * 5000, "NaN", "\x00", BOMB]
BYTES = [*(text.encode() for text in TEXTS), b"\xff\xfe", b"\xef\xbb\xbf{}", b"\x80\x04\x95.", b'"' + b"x" * 10**7]


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """Return a copy in which one to three values, keys or items are others, more, or gone."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        node = document
        while isinstance(node, dict | list) and node:
            key = draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 9)):
                node = node[key]
                continue
            what = draw(st.sampled_from(["another", "gone", "more"]))
            if what == "another":
                node[key] = draw(ANYTHING)
            elif what == "gone":
                del node[key]
            elif isinstance(node, dict):
                node[draw(st.text(max_size=5))] = draw(ANYTHING)
            else:
                node.insert(key, draw(ANYTHING))
            break
    return document


@st.composite
def torn(draw: st.DrawFn, text: bytes) -> bytes:
    """Return bytes of which a part is others, or gone."""
    begin = draw(st.integers(0, len(text)))
    end = draw(st.integers(begin, min(len(text), begin + 40)))
    return text[:begin] + draw(st.binary(max_size=8)) + text[end:]
