"""Items are drawn in the same random order for every model, in batches, and no further than is needed."""

import logging
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from raysq import Evaluation
from raysq.errors import EvaluationError, OptionError
from raysq.evaluation import check, digest, evaluate, first_call, loss, warn_if_whole
from raysq.goal import Goal

N = 1000
LABELS = torch.arange(N) % 5
ITEMS = TensorDataset(torch.arange(N), LABELS)


class Knows(nn.Module):
    """Answers all questions but some; remembers which it was asked, batch by batch."""

    def __init__(self, wrong=()):
        super().__init__()
        self.wrong = torch.zeros(N, dtype=torch.bool)
        self.wrong[list(wrong)] = True
        self.asked = []

    def forward(self, x):
        self.asked.append(x.tolist())
        return nn.functional.one_hot((LABELS[x] + self.wrong[x]) % 5, 5).float()

    @property
    def seen(self):
        return [item for batch in self.asked for item in batch]


def right(output, batch):
    return output.argmax(1) == batch[1]


def scored(evaluation, model, reference=None, goal=None):
    return evaluate(evaluation, model, goal or Goal(), reference)


def test_all_items_once_in_batches():
    model = Knows(range(0, N, 10))
    score = scored(Evaluation(ITEMS, right, batch_size=64), model)
    assert (score.value, score.n, score.early) == (0.9, N, None)
    assert sorted(model.seen) == list(range(N)) != model.seen
    assert [len(batch) for batch in model.asked] == [64] * 15 + [40]
    assert scored(Evaluation(ITEMS, right, batch_size=1), model).n == N


def test_the_order_is_the_seeds():
    orders = []
    for seed in (0, 0, 1):
        torch.rand(1)  # whatever the program draws
        model = Knows()
        scored(Evaluation(ITEMS, right, seed=seed), model)
        orders.append(model.seen)
    assert orders[0] == orders[1] != orders[2]


def test_the_programs_own_randomness_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    scored(Evaluation(ITEMS, right), Knows())
    assert torch.rand(1) == expected


def test_a_bad_model_is_asked_no_further_than_needed():
    evaluation = Evaluation(ITEMS, right, batch_size=20)
    fp32 = scored(evaluation, Knows())
    bad = Knows(range(0, N, 3))
    score = scored(evaluation, bad, fp32.units)
    assert score.early.fails and score.n == len(bad.seen) < 0.1 * N
    reason = loss(score, fp32.value, fp32.metrics, Goal()).reason
    assert reason.startswith(f"stopped after {score.n} of 1000 items: loses 0.")
    assert "(at least 0." in reason and "allowed is at most 1.000% relative loss" in reason
    assert scored(evaluation, Knows(), fp32.units).early is None


def test_other_metrics_are_scored_whole():
    def both(output, batch):
        return {"accuracy": right(output, batch), "margin": output.max(1).values}

    goal = Goal(others={"margin": Goal()})
    evaluation = Evaluation(ITEMS, both)
    fp32 = scored(evaluation, Knows(), goal=goal)
    score = scored(evaluation, Knows(range(500)), fp32.units, goal)
    assert score.metrics == evaluation(Knows(range(500))) == {"accuracy": 0.5, "margin": 1.0} and score.early is None
    assert scored(evaluation, Knows(range(500)), fp32.units).early.fails  # without others it ends early
    with pytest.raises(EvaluationError, match="the goal has other metrics"):
        scored(Evaluation(ITEMS, right), Knows(), goal=goal)


@pytest.mark.parametrize("shuffled", [False, True])
def test_batches_are_drawn_whole(shuffled):
    batches = [(torch.arange(i, i + 10), LABELS[i : i + 10]) for i in range(0, N, 10)]
    evaluation = Evaluation(batches, right, batch_size=None, shuffled=shuffled)
    fp32, bad = scored(evaluation, Knows()), Knows(range(0, N, 3))
    assert len(fp32.units.sums) == (N if shuffled else 100) and fp32.n == N
    score = scored(evaluation, bad, fp32.units)
    assert score.early.fails and score.early.items == N
    assert bad.asked[0] != list(range(10))
    assert all(batch == list(range(batch[0], batch[0] + 10)) for batch in bad.asked)


def test_a_loaders_items_and_batches_are_taken():
    model = Knows()
    loader = DataLoader(ITEMS, batch_size=50, shuffle=True)
    assert scored(Evaluation(loader, right), model).value == 1
    assert [len(batch) for batch in model.asked] == [50] * 20


def test_a_loaders_functions_and_processes_are_taken():
    loader = DataLoader(ITEMS, collate_fn=torch.utils.data.default_convert, num_workers=1)
    evaluation = Evaluation(loader, right)
    assert (evaluation.items, evaluation.collate, evaluation.num_workers) == (ITEMS, loader.collate_fn, 1)


def test_a_loader_may_give_batches_that_its_dataset_holds():
    batches = [(torch.arange(i, i + 10), LABELS[i : i + 10]) for i in range(0, N, 10)]
    assert scored(Evaluation(DataLoader(batches, batch_size=None), right), Knows(range(100))).value == 0.9


@pytest.mark.parametrize(
    ("items", "inputs", "metric"),
    [
        ([{"x": i, "label": int(LABELS[i])} for i in range(N)], None, lambda out, b: out.argmax(1) == b["label"]),
        (
            [(int(LABELS[i]), i) for i in range(N)],
            lambda batch: batch[1],
            lambda out, batch: (out.argmax(1) == batch[0]).tolist(),
        ),
        (list(range(N)), None, lambda out, batch: (out.argmax(1) == LABELS[batch]).float()),
        ([(i,) for i in range(N)], None, lambda out, batch: out.argmax(1) == LABELS[batch[0]]),
    ],
    ids=["dict", "inputs", "no label", "no label in a tuple"],
)
def test_what_of_a_batch_is_an_input(items, inputs, metric):
    assert scored(Evaluation(items, metric, inputs=inputs), Knows(range(100))).value == pytest.approx(0.9)


def test_all_but_the_last_of_a_batch_are_inputs():
    items = [(i, -i, "label") for i in range(8)]
    assert Evaluation(items, lambda output, batch: output == 0)(lambda x, y: x + y) == 1


def test_batches_are_made_as_it_is_said():
    assert Evaluation([1, 2], lambda _, batch: [batch == [1, 2]] * 2, collate=sorted)(str) == 1
    assert Evaluation([np.ones(2)], lambda _, batch: [isinstance(batch, np.ndarray)] * 2, batch_size=None)(str) == 1


class Reader:
    """Items that tell which process read them."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index, os.getpid()


def test_items_are_read_by_processes_of_their_own_where_that_is_asked_for():
    for workers, elsewhere in ((0, 0), (1, 1)):
        evaluation = Evaluation(Reader(), lambda _, batch: batch[1] != os.getpid(), num_workers=workers)
        assert evaluation(lambda x: x) == elsewhere


def test_bounds_are_known_of_booleans_or_stated():
    bounds = {
        (right, None): (0, 1),
        (floats, None): (-np.inf, np.inf),
        (floats, (0, 1)): (0, 1),
        (right, (-1, 2)): (-1, 2),
    }
    for (metric, stated), expected in bounds.items():
        assert scored(Evaluation(ITEMS, metric, bounds=stated), Knows()).units.bounds == expected
    assert Evaluation(ITEMS, right, bounds=[0, 1]).bounds == (0, 1)  # as JSON has them


def floats(output, batch):
    return right(output, batch).float()


def yields(model):
    yield 1, 2


@pytest.mark.parametrize(
    ("eval_fn", "others", "warns"),
    [
        (Evaluation(ITEMS, floats), {}, True),
        (Evaluation(ITEMS, floats, bounds=(0, 1)), {}, False),
        (Evaluation(ITEMS, right), {}, False),
        (Evaluation(ITEMS, lambda out, b: {"a": floats(out, b), "b": floats(out, b)}), {"b": Goal()}, False),
        (yields, {}, False),
        (lambda model: 0.5, {}, False),
    ],
    ids=["anything", "stated", "booleans", "scored whole for the others", "a stream", "a number"],
)
def test_a_warning_says_what_keeps_trials_from_ending_early(eval_fn, others, warns, caplog):
    caplog.set_level(logging.WARNING, "raysq")  # a silent search before may have left another
    goal = Goal(others=others)
    warn_if_whole(eval_fn, scored(eval_fn, Knows(), goal=goal), goal)
    assert ("State what each lies in" in caplog.text) is warns


def test_it_is_an_eval_fn_of_its_own_and_travels():
    evaluation = Evaluation(ITEMS, right)
    check(evaluation)
    again = pickle.loads(pickle.dumps(evaluation))
    assert again(Knows(range(100))) == evaluation(Knows(range(100))) == 0.9
    assert digest(again) == digest(evaluation)
    assert first_call(evaluation, Knows(), Goal())[0][0].shape == (32,)


@pytest.mark.parametrize(
    "other",
    [
        lambda: Evaluation(ITEMS, right, seed=1),
        lambda: Evaluation(ITEMS, right, batch_size=64),
        lambda: Evaluation(ITEMS, right, inputs=lambda batch: batch[0]),
        lambda: Evaluation(ITEMS, right, error_rate=0.05),
        lambda: Evaluation(ITEMS, right, bounds=(0, 2)),
        lambda: Evaluation(list(range(5)), right),
        lambda: Evaluation(ITEMS, lambda output, batch: output),
        lambda: right,
        lambda: floats,
    ],
)
def test_another_evaluation_has_another_digest(other):
    assert digest(other()) not in (digest(Evaluation(ITEMS, right)), digest(yields))


def test_batches_that_were_dealt_at_random_have_another_digest():
    dealt, not_dealt = (Evaluation([ITEMS[:10]], right, batch_size=None, shuffled=s) for s in (True, False))
    assert digest(dealt) != digest(not_dealt)


class Endless(IterableDataset):
    def __iter__(self):
        yield from ITEMS


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Evaluation(iter(ITEMS), right), EvaluationError, "raysq.Stream"),
        (lambda: Evaluation({1, 2}, right), EvaluationError, "need `len` and an index"),
        (lambda: Evaluation((ITEMS.tensors), right), EvaluationError, "TensorDataset"),
        (lambda: Evaluation([], right), EvaluationError, "no item"),
        (lambda: Evaluation(ITEMS, None), EvaluationError, "metric"),
        (lambda: Evaluation(ITEMS, right, inputs=0), EvaluationError, "inputs"),
        (lambda: Evaluation(ITEMS, right, batch_size=0), OptionError, "batch_size"),
        (lambda: Evaluation(ITEMS, right, batch_size=2.0), OptionError, "batch_size"),
        (lambda: Evaluation(ITEMS, right, seed=-1), OptionError, "seed"),
        (lambda: Evaluation(ITEMS, right, num_workers=True), OptionError, "num_workers"),
        (lambda: Evaluation(ITEMS, right, shuffled=True), OptionError, "batch_size=None"),
        (lambda: Evaluation([ITEMS[:10]], right, batch_size=None, shuffled=1), OptionError, "shuffled"),
        (lambda: Evaluation(ITEMS, right, error_rate=1.0), OptionError, "error_rate"),
        (lambda: Evaluation(ITEMS, right, bounds=(1, 1)), OptionError, "bounds"),
        (lambda: Evaluation(DataLoader(Endless()), right), EvaluationError, "index"),
        (lambda: Evaluation(DataLoader(ITEMS, drop_last=True), right), EvaluationError, "drop_last"),
        (
            lambda: Evaluation(DataLoader(ITEMS, sampler=RandomSampler(ITEMS, replacement=True)), right),
            EvaluationError,
            "Subset",
        ),
        (
            lambda: Evaluation(DataLoader(ITEMS, batch_sampler=BatchSampler(range(N), 8, False)), right),
            EvaluationError,
            "no sampler of its own",
        ),
        (lambda: Evaluation(DataLoader(ITEMS), right, batch_size=8), OptionError, "leave out"),
        (lambda: Evaluation(DataLoader(ITEMS), right, collate=list), OptionError, "leave out"),
        (lambda: Evaluation(DataLoader(ITEMS), right, num_workers=1), OptionError, "leave out"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "metric",
    [
        lambda out, batch: {"a": right(out, batch), "b": right(out, batch)[:-1]},
        lambda out, batch: right(out, batch)[:0],
    ],
    ids=["fewer of one", "none"],
)
def test_a_batch_has_as_many_scores_of_each_metric_and_at_least_one(metric):
    with pytest.raises(EvaluationError, match="a score of each metric for each item"):
        Evaluation([ITEMS[:10]], metric, batch_size=None)(Knows())


@pytest.mark.parametrize(
    ("metric", "arguments", "message"),
    [
        (lambda out, batch: out, {}, r"shape \(32,\); got shape \(32, 5\)"),
        (lambda out, batch: right(out, batch).float().mean(), {}, "one score for each item"),
        (lambda out, batch: right(out, batch)[:-1], {}, r"shape \(32,\)"),
        (lambda out, batch: out[:, 0] / 0, {}, "finite"),
        (lambda out, batch: out[:, 0] + 1, {"bounds": (0, 1)}, r"lie in the bounds \(0, 1\)"),
        (lambda out, batch: ["a"] * 32, {}, "must be numbers"),
        (lambda out, batch: {}, {}, "empty dict"),
        (lambda out, batch: {"f1": right(out, batch), "bleu": right(out, batch)}, {}, r"Goal\(metric='f1'\)"),
        (lambda out, batch: 1 / 0, {}, "ZeroDivisionError"),
    ],
)
def test_what_a_metric_may_return(metric, arguments, message):
    with pytest.raises(EvaluationError, match=message):
        scored(Evaluation(ITEMS, metric, **arguments), Knows())
