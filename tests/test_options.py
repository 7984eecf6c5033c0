"""Every option out of its range."""

import math
import pickle

import pytest

from raysq.errors import OptionError
from raysq.latency import Latency
from raysq.workers import Workers


@pytest.mark.parametrize("name", ["budget_s", "final_budget_s", "ci_width"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_latency_out_of_range(name, value):
    with pytest.raises(OptionError, match=f"`Latency.{name}` must be positive, got {value}"):
        Latency(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus_per_trial": 0}, "`Workers.cpus_per_trial` must be a whole number of at least 1, got 0"),
        ({"cpus_per_trial": -2}, "`Workers.cpus_per_trial` must be a whole number of at least 1, got -2"),
        ({"max_failures": -1}, "`Workers.max_failures` must be a whole number of at least 0, got -1"),
        ({"trial_timeout_s": 0}, "`Workers.trial_timeout_s` must be a positive number of seconds or None, got 0"),
        ({"trial_timeout_s": math.nan}, "`Workers.trial_timeout_s` must be a positive number"),
        ({"trial_timeout_s": "1m"}, "`Workers.trial_timeout_s` must be a positive number .* got '1m'"),
    ],
)
def test_workers_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        Workers(**options)


@pytest.mark.parametrize(
    "option",
    [Latency(0.1, 0.2, 0.3), Workers(2, 0), Workers(trial_timeout_s=math.inf)],
)
def test_options_within_their_ranges_are_values_that_pickle(option):
    assert pickle.loads(pickle.dumps(option)) == option
    assert hash(pickle.loads(pickle.dumps(option))) == hash(option)
