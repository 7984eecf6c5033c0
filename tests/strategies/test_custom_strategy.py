"""The example of a strategy of one's own does what it says."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from driving import drive
from simulation import Simulation

import raysq
from raysq import strategies
from raysq.errors import OptionError
from raysq.strategies import plugins

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_strategy.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("custom_strategy", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom_strategy", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("slots", [1, 4])
def test_it_goes_on_in_rounds_as_long_as_it_gets_faster(example: ModuleType, slots: int) -> None:
    sim = Simulation(sensitive=0)
    strategy = example.AbcTuneStrategy().bind(sim.space(), sim.goal)
    labels = [config["label"] for config in drive(strategy, sim, slots, trials=100)]
    assert labels[0] == "default"
    assert set(labels[1:]) >= {"linear.algorithm kl", "conv.algorithm minmax"}
    assert len(labels) < 100  # a round that finds nothing faster ends it


def test_it_is_known_by_its_entry_point(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:

    lines = [line.strip() for line in (example.__doc__ or "").splitlines()]
    name, _, value = next(line for line in lines if line.startswith("abc = ")).partition(" = ")
    point = metadata.EntryPoint(name, value.strip('"'), plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == plugins.GROUP else [])
    assert isinstance(strategies.get("abc", patience=2), example.AbcTuneStrategy)
    with pytest.raises(OptionError, match="Did you mean 'patience'"):
        strategies.get("abc", patienc=2)


@pytest.mark.slow
def test_it_runs(
    cluster: None,
    example: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(raysq, "tune", partial(raysq.tune, latency=raysq.Latency(0.02, 0.02), max_concurrent_trials=1))
    example.main()
    assert "of the fastest fp32's time" in capsys.readouterr().out
