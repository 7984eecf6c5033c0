"""Evaluations run side by side, a timing runs alone and next, and a killed process holds nothing."""

import multiprocessing
import os
import pickle
import signal
import threading
import time

import pytest
import torch
from torch import nn

from raysq.tuning.turns import TakesTurns, Turns

processes = multiprocessing.get_context("fork")


@pytest.fixture
def turns(tmp_path):
    return Turns(tmp_path / "turns")


class Holder:
    """A process that holds one side until told to leave."""

    def __init__(self, turns, side):
        self.pipe, child = processes.Pipe()
        self.process = processes.Process(target=self._hold, args=(turns, side, child), daemon=True)
        self.process.start()

    def _hold(self, turns, side, pipe):
        with getattr(turns, side)():
            pipe.send("inside")
            pipe.recv()

    def is_inside(self, within=0.3):
        return self.pipe.poll(within)

    def end(self):
        if self.process.is_alive():
            self.pipe.send("leave")
        self.process.join(60)


@pytest.fixture
def hold(turns):
    holders = []

    def start(side):
        holders.append(Holder(turns, side))
        return holders[-1]

    yield start
    for holder in holders:
        holder.end()


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [("shared", "shared", True), ("shared", "alone", False), ("alone", "shared", False), ("alone", "alone", False)],
)
def test_who_may_be_inside_together(hold, first, second, together):
    one = hold(first)
    assert one.is_inside(60)
    two = hold(second)
    assert two.is_inside(60 if together else 0.3) is together
    one.end()
    assert two.is_inside(60)


def test_who_wants_to_be_alone_goes_before_new_readers(hold):
    reader = hold("shared")
    assert reader.is_inside(60)
    timing = hold("alone")
    assert not timing.is_inside()
    late = hold("shared")
    assert not late.is_inside()  # though a reader is inside
    reader.end()
    assert timing.is_inside(60)
    assert not late.is_inside()
    timing.end()
    assert late.is_inside(60)


@pytest.mark.parametrize("side", ["shared", "alone"])
def test_killed_process_holds_nothing(hold, side):
    victim = hold(side)
    assert victim.is_inside(60)
    os.kill(victim.process.pid, signal.SIGKILL)
    victim.process.join()
    assert hold("alone").is_inside(60)


def test_forked_child_does_not_keep_the_lock(turns, hold):
    with turns.shared():
        child = processes.Process(target=time.sleep, args=(60,), daemon=True)
        child.start()
    assert hold("alone").is_inside(60)
    child.kill()
    child.join()


def test_exception_lets_go(turns, hold):
    with pytest.raises(ZeroDivisionError), turns.alone():
        raise ZeroDivisionError
    assert hold("alone").is_inside(60)


def test_shared_inside_shared_does_not_wait_for_itself(turns, hold):
    with turns.shared():
        timing = hold("alone")
        assert not timing.is_inside()
        with turns.shared():
            pass


def test_alone_inside_shared_is_refused(turns):
    with turns.shared(), pytest.raises(RuntimeError, match="wait for itself"), turns.alone():
        pass


def test_threads_are_independent(turns):
    entered = threading.Event()

    def hold():
        with turns.shared():
            entered.set()

    with turns.alone():
        thread = threading.Thread(target=hold)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(60)
    thread.join()


def test_survives_pickling(turns):
    assert pickle.loads(pickle.dumps(turns)).directory == turns.directory


class Net(nn.Module):
    config = {"hidden": 3}
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 3)

    def forward(self, x, scale=1.0):
        return self.fc(x) * scale

    def helper(self):
        return "helped"


def test_wrapper_is_the_model_to_eval_fn(turns):
    net = Net().eval()
    model = TakesTurns(net, turns)
    assert model.eval() is model
    assert model.to("cpu") is model
    assert not model.training
    assert (model.config, model.device, model.helper()) == (net.config, net.device, "helped")
    assert model.fc is net.fc
    assert list(model.state_dict()) == list(net.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert next(model.parameters()).dtype == torch.float32
    assert torch.equal(model(torch.ones(1, 2), scale=2.0), net(torch.ones(1, 2), 2.0))
    with pytest.raises(AttributeError):
        _ = model.nothing


def test_wrapper_holds_the_shared_side_per_forward(turns, hold):
    class Slow(nn.Module):
        def forward(self):
            self.timing = hold("alone")
            return self.timing.is_inside()

    model = TakesTurns(Slow(), turns)
    assert model() is False  # a timing waits while a forward runs ...
    assert model.timing.is_inside(60)  # ... and gets its turn between two
