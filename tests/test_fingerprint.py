"""Digests: equal things have equal ones in every process, others differ."""

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from raysq.fingerprint import of_function, of_model


class Scorer:
    """An evaluation that is an object."""

    def __call__(self, model: nn.Module) -> float:
        return 1.0


class OtherScorer(Scorer):
    """Another, with the same code."""


def scorer(score: float) -> Any:
    source = f"class Scorer:\n    def __call__(self, model):\n        return {score}"
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(source, namespace)
    return namespace["Scorer"]()


# what tells evaluations apart, two that differ in nothing else
EVALUATIONS = {
    "a number": (lambda model: 1.0, lambda model: 0.99),
    "a name": (lambda model: torch.sum(model), lambda model: torch.mean(model)),
    "a function inside": (lambda model: max(i + 1 for i in range(3)), lambda model: max(i + 2 for i in range(3))),
    "the class of an object": (Scorer(), OtherScorer()),
    "the code of an object's class": (scorer(1.0), scorer(0.99)),
    "the function of a partial": (partial(pow, 2), partial(divmod, 2)),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_evaluations_are_told_apart_by(case: str) -> None:
    first, second = EVALUATIONS[case]
    assert of_function(first) != of_function(second)


def test_an_evaluation_is_the_same_in_every_process() -> None:
    code = """
from raysq.fingerprint import of_function
def eval_fn(model):
    return sum(1.0 for i in range(3) if i in {"a", "b"})
print(of_function(eval_fn))
"""
    command = [sys.executable, "-c", code]
    seen = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    assert seen[0] == seen[1]


def test_a_changed_weight_or_buffer_or_class_is_another_model() -> None:
    torch.manual_seed(0)
    model = nn.BatchNorm1d(4)
    first = of_model(model)
    assert first == of_model(model)
    assert first != of_model(nn.SyncBatchNorm(4))
    model.running_mean += 1
    assert first != of_model(model)
