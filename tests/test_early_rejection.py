"""A whole search on real Ray with an evaluation that ends early: what is rejected costs little, and resumes."""

import sys

import pytest
import torch
from ray import cloudpickle
from torch import nn
from torch.utils.data import TensorDataset

import raysq
from raysq.errors import NoFeasibleRecipe
from raysq.goal import Goal

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import test modules
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

X = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
OPTIONS = {
    **{"backend": "reference", "num_threads": 1, "max_concurrent_trials": 1, "verbose": 0, "strategy": "random"},
    **{"latency": raysq.Latency(0.02, 0.02), "smoothing": False},
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def evaluation(agreeing):
    """Counts an item as right where the output is the fp32 model's to within `agreeing`."""
    with torch.no_grad():
        items = TensorDataset(X, net()(X))
    return raysq.Evaluation(items, lambda output, batch: (output - batch[1]).abs().amax(1) < agreeing, batch_size=40)


def test_rejected_trials_are_cheap_and_a_resumed_run_goes_on(tmp_path):
    goal = Goal(0.01, "absolute")
    with pytest.raises(NoFeasibleRecipe) as caught:  # int8 can't be this close
        raysq.tune(net(), [X], evaluation(1e-4), goal=goal, max_trials=2, storage_path=tmp_path, name="a", **OPTIONS)
    with pytest.raises(NoFeasibleRecipe) as again:
        raysq.tune(net(), [X], evaluation(1e-4), goal=goal, max_trials=4, resume=tmp_path / "a", **OPTIONS)
    trials = again.value.result.trials
    assert [t.recipe for t in trials[:2]] == [t.recipe for t in caught.value.result.trials]
    assert len(trials) == 4
    for trial in trials:
        assert trial.items == 4000 and trial.items_scored <= 400 and not trial.feasible
        assert trial.reason.startswith(f"stopped after {trial.items_scored} of 4000 items: loses ")
    frame = again.value.result.dataframe()
    assert list(frame["items_scored"]) == [t.items_scored for t in trials]
    result = again.value.result  # the closest, scored whole
    assert result.accuracy == evaluation(1e-4)(result.model)


def test_the_winner_is_scored_whole_where_trials_end_as_they_pass(tmp_path):
    drawn = evaluation(0.5)
    passing = raysq.Evaluation(drawn.items, drawn.metric, batch_size=40, stop_passing=True)
    result = raysq.tune(net(), [X], passing, max_trials=2, storage_path=tmp_path, name="a", **OPTIONS)
    assert any(trial.estimated and trial.feasible for trial in result.trials)
    assert result.feasible and result.accuracy == drawn(result.model)
