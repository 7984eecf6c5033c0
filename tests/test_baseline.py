"""The baseline is the fastest form that computes what the model computes; a form that can't be used is named."""

import pytest
import torch
from torch import nn

from raysq.baseline import measure
from raysq.errors import BackendError, EvaluationError, ModelError
from raysq.goal import Goal
from raysq.inspection import deployable
from raysq.kernels import reference
from raysq.latency import Latency
from raysq.prepared import Prepared
from raysq.source import Source
from raysq.space import build_space

MODEL = nn.Linear(4, 2).eval()
EXAMPLE = (torch.ones(3, 4),)


class Form(nn.Module):
    """The model, after `work` rounds of something slow, its output off by `error`."""

    def __init__(self, work=1, error=0.0):
        super().__init__()
        self.work, self.error = work, error

    def forward(self, x):
        a = torch.ones(200, 200)
        for _ in range(self.work):
            a = a @ a * 0.005
        return MODEL(x) + self.error


class Engine:
    """A backend whose float forms are given; an exception stands for one that can't be built."""

    name = "toy"

    def __init__(self, **forms):
        self.forms = {name.replace("_", " "): form for name, form in forms.items()}
        self.alive, self.most_alive = 0, 0

    def float_forms(self):
        return tuple(self.forms)

    def build_float(self, source, form):
        if isinstance(self.forms[form], Exception):
            raise self.forms[form]
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        return Built(self, self.forms[form])


class Built:
    size_bytes = 1000

    def __init__(self, engine, model):
        self.engine, self.model = engine, model

    def __del__(self):
        self.engine.alive -= 1


def measured(engine, eval_fn=lambda model: 0.5, goal=None, model=MODEL):
    _, graph = deployable(MODEL, EXAMPLE, {})
    capabilities = reference.Engine().capabilities()
    source, space = Source(model, graph, None, EXAMPLE), build_space(graph, capabilities)
    prepared = Prepared(source, engine.name, capabilities, space, EXAMPLE, {}, 1, {})
    return measure(prepared, engine, model, eval_fn, goal or Goal(), Latency(budget_s=0.1))


def test_fastest_form_wins():
    # forms differ a hundredfold in work, so that noise can't turn them round
    baseline = measured(Engine(slow=Form(100), fast=Form(1), middling=Form(10)))
    assert baseline.form == "fast"
    assert set(baseline.forms_ms) == {"slow", "fast", "middling"}
    assert baseline.latency_ms == baseline.forms_ms["fast"]
    assert (baseline.accuracy, baseline.metrics) == (0.5, {"accuracy": 0.5})
    assert baseline.bf16_accuracy is None
    assert baseline.size_bytes == Built.size_bytes


def test_a_fast_form_that_computes_something_else_is_dropped():
    baseline = measured(Engine(right=Form(50), wrong=Form(1, error=0.1)))
    assert baseline.form == "right"
    assert "differs" in baseline.dropped["wrong"]


def test_a_form_that_fails_to_build_is_dropped():
    baseline = measured(Engine(broken=RuntimeError("no compiler"), good=Form()))
    assert baseline.form == "good"
    assert baseline.dropped == {"broken": "RuntimeError: no compiler"}


def test_a_model_without_convolutions_is_not_timed_in_channels_last():
    engine = Engine(jit=Form())
    engine.forms["jit channels_last"] = Form()
    baseline = measured(engine)
    assert set(baseline.forms_ms) == {"jit"}
    assert not baseline.dropped


def test_at_most_two_forms_are_alive():
    engine = Engine(a=Form(3), b=Form(2), c=Form(1), d_bf16=Form(1), e_bf16=Form(1))
    measured(engine)
    assert engine.most_alive == 2
    assert engine.alive == 0


def test_bf16_is_scored_and_timed_against_the_fastest_fp32():
    rough = Form(1, error=0.1)  # other numbers are bf16's right
    baseline = measured(Engine(fp32=Form(100), x_bf16=rough), lambda model: 0.4 if model is rough else 0.5)
    assert baseline.form == "fp32"
    assert baseline.bf16_accuracy == 0.4
    assert baseline.bf16_ratio < 1
    assert baseline.bf16_latency_ms == baseline.forms_ms["x bf16"]


def test_no_fp32_form_says_why():
    with pytest.raises(BackendError, match="broken: RuntimeError: no compiler"):
        measured(Engine(broken=RuntimeError("no compiler"), x_bf16=Form()))


def test_a_model_that_draws_random_numbers_is_told_so():
    class Drawing(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(MODEL(x), training=True)

    torch.manual_seed(0)
    with pytest.raises(ModelError, match="other outputs when it is called again .* random numbers"):
        measured(Engine(form=Drawing()), model=Drawing())


def test_score_of_zero_allows_no_relative_loss():
    with pytest.raises(EvaluationError, match="absolute"):
        measured(Engine(fp32=Form()), lambda model: 0.0)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (Goal(others={"recall": Goal()}), "'recall'"),
        (Goal(confirm=lambda model: "good"), "`Goal.confirm`"),
        (Goal(confirm=lambda model: 0.0), "absolute"),
    ],
)
def test_what_the_goal_cannot_score_is_told_before_any_form_is_built(goal, message):
    engine = Engine(fp32=Form())
    with pytest.raises(EvaluationError, match=message):
        measured(engine, lambda model: {"accuracy": 0.5}, goal)
    assert engine.most_alive == 0


def test_the_model_is_scored_once_on_the_split_that_confirms():
    seen = []
    goal = Goal(confirm=lambda model: seen.append(model) or {"accuracy": 0.25, "recall": 1.0})
    baseline = measured(Engine(fp32=Form()), goal=goal)
    assert (baseline.accuracy, baseline.confirm_accuracy) == (0.5, 0.25)
    assert baseline.confirm_metrics == {"accuracy": 0.25, "recall": 1.0}
    assert seen == [MODEL]


def test_eval_fn_that_fails_is_told_before_any_form_is_built():
    engine = Engine(fp32=Form())
    with pytest.raises(EvaluationError):
        measured(engine, lambda model: "good")
    assert engine.most_alive == 0
