"""The front door: errors before any work, and one real search."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import raysq
from raysq.errors import CalibrationError, EvaluationError, ModelError, OptionError, ResumeError

MODEL = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
CALIB = [torch.randn(4, 8)]


def score(model: nn.Module) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"tolerance": -1.0}, OptionError, "tolerance"),
        ({"tolerance": 1.5}, OptionError, "tolerance"),
        ({"criterion": "relativ"}, OptionError, "relative"),
        ({"max_trials": 0}, OptionError, "max_trials"),
        ({"timeout_s": 0}, OptionError, "stop_at_first"),
        ({"strategy": "tpee"}, OptionError, "tpe"),
        ({"backend": "ipx"}, OptionError, "ipex"),
        ({"num_threads": 0}, OptionError, "num_threads"),
        ({"resume": "nowhere"}, ResumeError, "nowhere"),
        ({"calib": []}, CalibrationError, "at least one batch"),
        ({"calib": [torch.randn(4, 9)]}, ModelError, "example inputs"),
        ({"eval_fn": lambda a, b: 1.0}, EvaluationError, "eval_fn"),
        ({"model": nn.ReLU()}, ModelError, "no quantizable op"),
        ({"op_name_dict": {"(": {}}}, ValueError, r"\("),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments, error, says, tmp_path) -> None:
    given = {"model": MODEL, "calib": CALIB, "eval_fn": score, "backend": "reference", "storage_path": tmp_path}
    with pytest.raises(error, match=says):
        raysq.tune(**{**given, **arguments})


def test_public_names_are_pinned() -> None:
    assert raysq.__all__ == sorted(raysq.__all__)
    assert all(hasattr(raysq, name) for name in raysq.__all__)


def test_importing_raysq_brings_neither_ray_nor_ipex() -> None:
    code = "import raysq, sys; assert not {'ray', 'intel_extension_for_pytorch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_quantize_replays_a_recipe() -> None:
    first = raysq.quantize(MODEL, CALIB, backend="reference")
    again = raysq.quantize(MODEL, CALIB, recipe=first.recipe, backend="reference")
    assert torch.equal(first(CALIB[0]), again(CALIB[0]))


@pytest.mark.slow
def test_a_search_ends_with_a_model_that_is_what_was_measured_and_can_be_resumed(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    x = torch.randn(256, 16)
    wanted = model(x).argmax(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def agreement(candidate: nn.Module) -> float:
        return float((candidate(x).argmax(1) == wanted).float().mean())

    options = {"tolerance": 0.1, "num_threads": 1, "storage_path": tmp_path, "verbose": 0}
    result = raysq.tune(model, [x[:64], x[64:128]], agreement, max_trials=3, name="run", **options)
    assert result.accuracy == agreement(result.model)
    assert result.accuracy_drop <= 0.1
    assert len(result.dataframe()) == len(result.trials) >= 1
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    result.save(tmp_path / "out")
    assert torch.equal(raysq.load(tmp_path / "out")(x), result.model(x))

    more = raysq.tune(model, [x[:64], x[64:128]], agreement, max_trials=5, resume=tmp_path / "run", **options)
    done = [t.recipe.digest for t in more.trials]
    assert done[: len(result.trials)] == [t.recipe.digest for t in result.trials]
    assert len(set(done)) == len(done)  # nothing is run again
