"""The order in which waiting trials get free workers."""

from types import SimpleNamespace

from ray.tune.experiment import Trial

from raysq.tuning.newest_first import NewestFirst


def chosen(*states):
    trials = [SimpleNamespace(status=status, number=number) for number, status in enumerate(states)]
    found = NewestFirst().choose_trial_to_run(SimpleNamespace(get_trials=lambda: trials))
    return found and found.number


def test_a_free_worker_goes_to_the_newest_so_that_those_being_started_are_kept():
    assert chosen(Trial.TERMINATED, Trial.PENDING, Trial.RUNNING, Trial.PENDING) == 3
    assert chosen(Trial.PENDING, Trial.RUNNING) == 0
    assert chosen(Trial.RUNNING) is None
