"""A trial that works for too long is found out; one that waits is not, nor is one that ends in time."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from raysq.tuning import last_words
from raysq.tuning.deadline import Deadline, Hanging


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def thread():
    with ThreadPoolExecutor(1) as executor:
        yield executor


def test_what_ends_in_time_is_returned(thread):
    assert Deadline(60).run(thread, lambda: "done") == "done"


def test_what_raises_raises(thread):
    with pytest.raises(TimeoutError, match="of its own"):  # the same class as that of a wait that was too long
        Deadline(60).run(thread, lambda: raises(TimeoutError("of its own")))


def raises(error):
    raise error


def stuck(release):
    release.wait(120)


def test_what_hangs_is_found_out_with_its_place(thread):
    release = threading.Event()
    with pytest.raises(Hanging, match=r"the 0\.2 s .* at test_deadline\.py:\d+ in stuck\. .*Workers\.trial_timeout_s"):
        Deadline(0.2).run(thread, lambda: stuck(release))
    release.set()


def test_no_limit_is_none(thread):
    assert Deadline(float("inf")).run(thread, lambda: time.sleep(0.1)) is None


def test_waiting_does_not_count(thread):
    clock = Clock()
    deadline = Deadline(10, clock)

    def waits():
        with deadline.paused(), deadline.paused():
            clock.now += 100
        clock.now += 3

    deadline.run(thread, waits)
    assert (deadline.left_s, deadline.waited_s) == (7, 100)
    deadline.begin()
    assert (deadline.left_s, deadline.waited_s) == (10, 0)


def test_the_clock_stands_still_while_a_trial_waits(thread):
    clock = Clock()
    deadline = Deadline(10, clock)

    def waits():
        clock.now += 4
        with deadline.paused():
            clock.now += 100
            return deadline.left_s, deadline.waited_s

    assert deadline.run(thread, waits) == (6, 100)


def test_another_thread_s_waiting_counts(thread):
    clock = Clock()
    deadline = Deadline(10, clock)

    def waits():
        with deadline.paused():
            clock.now += 4

    def evaluates():
        other = threading.Thread(target=waits)
        other.start()
        other.join()

    deadline.run(thread, evaluates)
    assert deadline.left_s == 6  # or a trial that hangs in one thread and waits in another would never be found out


def test_each_trial_has_all_its_time(thread):
    clock = Clock()
    deadline = Deadline(10, clock)
    clock.now += 9
    deadline.begin()
    assert deadline.left_s == 10


HOLDS_THE_LOCK = """
import re, sys
from concurrent.futures import ThreadPoolExecutor
from raysq.tuning import deadline, last_words

deadline.GRACE_S = 0.2

def _advance():
    backtracks()

def backtracks():
    re.match("(a+)+$", "a" * 64 + "b")

with last_words.keep(sys.argv[1]) as words:
    limit = deadline.Deadline(0.3)
    limit.begin(words)
    limit.run(ThreadPoolExecutor(1), _advance)
"""


def test_what_holds_the_interpreter_is_ended_with_its_process(tmp_path):
    script = tmp_path / "holds.py"
    script.write_text(HOLDS_THE_LOCK)
    assert subprocess.run([sys.executable, script, tmp_path], timeout=300).returncode == 1
    words = last_words.read(tmp_path)
    assert last_words.hung(words)
    assert words.endswith(" at holds.py:12 in backtracks")
