"""What `raysq.quantize` returns: a model like the original, which knows its recipe and can be saved."""

from pathlib import Path

import pytest
import torch
from torch import nn

import raysq
from raysq.deployed import Deployed
from raysq.errors import StorageError
from raysq.recipe import Precision

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def quantized() -> Deployed:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    return raysq.quantize(model, [X], backend="reference")


def test_it_has_what_an_evaluation_asks_a_model_for(quantized: Deployed) -> None:
    assert quantized.eval() is quantized and quantized.to("cpu") is quantized
    assert (quantized.device, quantized.dtype) == (torch.device("cpu"), torch.float32)
    assert next(quantized.parameters()).dtype is torch.float32


def test_it_runs_its_recipe(quantized: Deployed) -> None:
    assert set(quantized.executed) == {"0", "2"} == set(quantized.recipe.int8_calls)
    assert set(quantized.executed.values()) == {Precision.INT8}


def test_every_call_that_stays_in_float_has_a_reason() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.fc = nn.Conv1d(4, 4, 3, padding=1), nn.MaxPool1d(2), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.pool(x + self.conv(x)))

    model = raysq.quantize(Residual().eval(), [torch.randn(2, 4, 16)])
    assert set(model.left_in_float) == {name for name, p in model.executed.items() if p is not Precision.INT8}


def test_what_is_saved_is_what_ran(quantized: Deployed, tmp_path: Path) -> None:
    quantized.save(tmp_path / "made")
    assert torch.equal(raysq.load(tmp_path / "made")(X), quantized(X))
    assert raysq.Recipe.from_json((tmp_path / "made" / "recipe.json").read_text()) == quantized.recipe


def test_where_nothing_can_be_written_is_said(quantized: Deployed, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="another directory"):
        quantized.save(tmp_path / "file")
