"""Every error says what to do: CONTRIBUTING's rule, read out of the source.

A message that only states what went wrong ("can't write X: disk full.") leaves its reader alone. So each message has a
rule that what came breaks ("must lie in (50, 100]"), or an order ("Pass another path."); `unknown` lists what is known.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pages import ROOT

from raysq import errors

KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.RaysqError)}
FILES = sorted([*(ROOT / "kernels").glob("*.py"), *(p for p in (ROOT / "raysq").rglob("*.py") if not p.is_symlink())])
RULE = re.compile(r"\b(must|needs?|takes?|may|go(es)? with|is given as|can be)\b")
VERBS = (
    "allow|bind|calibrate|call|change|check|convert|escape|give|import|insert|install|join|keep|leave|load|lower|make|move|name|pass|put"
    "|quantize|remove|resume|run|save|say|see|start|state|take|train|try|update|use|wait|wrap|write"
)
ORDER = re.compile(rf"(?:^|[.:;,)] |\n|\b(?:or|then|and) )(?:{VERBS})\b", re.I)
WHEN_RAISED = "<…>"  # a part that only a run knows
PASSED_ON = re.compile(
    rf"[\s:.]*({WHEN_RAISED}[\s:.]*)+"
)  # nothing of its own: another message, which is looked at there
NOT_FOR_USERS = {"raysq/finalists.py": "becomes a word in the table of backends"}


@dataclass(frozen=True)
class Message:
    """What an error is raised with; parts that only a run knows are left out."""

    place: str
    text: str


TREES = {path: ast.parse(path.read_text()) for path in FILES}
CONSTANTS = {  # of modules, by name; a name that stands for two things has the last
    target.id: node.value
    for tree in TREES.values()
    for node in tree.body
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
    for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    if isinstance(target, ast.Name) and target.id.isupper()
}


def messages(path: Path) -> Iterator[Message]:
    for node in ast.walk(TREES[path]):
        match node:
            case ast.Raise(ast.Call(ast.Name(kind), [said, *_])) if kind in KINDS:
                yield Message(f"{path.relative_to(ROOT)}:{node.lineno}", text_of(said))


def text_of(node: ast.expr) -> str:
    """Return the text of an expression as far as the source tells."""
    match node:
        case ast.Constant(str(value)):
            return value
        case ast.JoinedStr(parts):
            return "".join(text_of(part) for part in parts)
        case ast.FormattedValue(value):
            return text_of(value)
        case ast.BoolOp(ast.Or(), values):
            return "".join(map(text_of, values))
        case ast.BinOp(left, ast.Add(), right):
            return text_of(left) + text_of(right)
        case ast.IfExp(_, one, other):
            return text_of(one) + text_of(other)
        case ast.Name(name) if name in CONSTANTS:
            return text_of(CONSTANTS[name])
        case ast.Call(ast.Name("unknown"), _):
            return "must be one of those that are known"
        case ast.Call(ast.Attribute(value, "format"), _):
            return text_of(value)
    return WHEN_RAISED


EVERY = [m for path in FILES if str(path.relative_to(ROOT)) not in NOT_FOR_USERS for m in messages(path)]


def test_messages_are_found() -> None:
    assert len(EVERY) > 200


@pytest.mark.parametrize("message", EVERY, ids=[m.place for m in EVERY])
def test_a_message_says_what_to_do(message: Message) -> None:
    if not PASSED_ON.fullmatch(message.text):
        assert RULE.search(message.text) or ORDER.search(message.text), message.text
