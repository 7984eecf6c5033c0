"""What a process died of is read from what it left."""

import re
import subprocess
import sys

import pytest

from raysq.tuning import last_words

SCRIPT = """
import ctypes, os, signal, sys, threading
from raysq.tuning import last_words

words = last_words.keep(sys.argv[1])

def _advance():
    kernel()

def kernel():
    {dies}

thread = threading.Thread(target=_advance)
thread.start()
thread.join()
"""


@pytest.mark.parametrize(
    ("dies", "says"),
    [
        ("ctypes.string_at(0)", "Segmentation fault at dies.py:11 in kernel"),
        ("os.abort()", "Aborted at dies.py:11 in kernel"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "it was killed without a word: by the system if memory ran out"),
        ("os._exit(3)", "it was killed without a word"),
    ],
    ids=lambda value: value[:20],
)
def test_what_a_process_died_of(tmp_path, dies, says):
    script = tmp_path / "dies.py"
    script.write_text(SCRIPT.format(dies=dies))
    assert subprocess.run([sys.executable, script, tmp_path], capture_output=True, timeout=300).returncode
    words = last_words.read(tmp_path)
    assert words.startswith(says)
    assert not last_words.hung(words)


def test_nothing_is_said_of_a_process_of_another_node(tmp_path):
    assert last_words.read(tmp_path) is None
    assert not last_words.hung(None)


def test_who_ends_for_a_known_reason_leaves_nothing(tmp_path):
    (tmp_path / last_words.FILE).touch()
    last_words.forget(tmp_path)
    last_words.forget(tmp_path)
    assert last_words.read(tmp_path) is None


@pytest.mark.parametrize("left", [b"\xff\x00", b"Fatal Python error: ", b"Timeout (", b'  File "', b"Stack \n" * 10])
def test_whatever_was_left_can_be_read(tmp_path, left):
    (tmp_path / last_words.FILE).write_bytes(left)
    assert isinstance(last_words.read(tmp_path), str)


def test_the_place_is_the_innermost_one_of_the_user():
    mine = ("/home/me/score.py", 7, "score")
    library = (re.__file__, 1, "match")
    assert last_words.place([library, mine, (last_words.__file__, 2, "x")]) == " at score.py:7 in score"
    assert last_words.place([library]) == " at __init__.py:1 in match"
    assert last_words.place([]) == ""
