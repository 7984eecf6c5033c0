"""Neural Compressor 2.6 on IPEX, with its own strategy `basic`."""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import intel_extension_for_pytorch  # noqa: F401  # registers the kernels that an artifact needs
import torch
from contenders.base import Inputs, Task, TorchModel, Tuned, accuracy, versions
from intel_extension_for_pytorch.quantization import _quantize_utils as ipex_utils
from neural_compressor import PostTrainingQuantConfig, quantization
from neural_compressor.config import AccuracyCriterion, TuningCriterion, options
from torch import Tensor
from torch.ao.quantization.observer import HistogramObserver

MODEL = "best_model.pt"  # the name that Neural Compressor gives it


class Batches:
    """A dataloader as Neural Compressor wants one: inputs, and labels that it doesn't read."""

    def __init__(self, calib: list[Inputs]) -> None:
        self._calib = calib
        self.batch_size = len(calib[0][0])

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        labels = torch.zeros(self.batch_size, dtype=torch.long)
        return ((batch[0] if len(batch) == 1 else batch, labels) for batch in self._calib)

    def __len__(self) -> int:
        return len(self._calib)


@dataclass(frozen=True)
class Peer:
    """Static quantization of what IPEX can, tuned by op type and by fallback.

    Attributes:
        max_trials: its own default is 100.
        ties_pools: repair IPEX's scales of pooling, see `tie_pools`.
    """

    max_trials: int
    ties_pools: bool = False

    def tune(self, task: Task, directory: Path) -> Tuned:
        """Tune; Neural Compressor stops at the first model that passes."""
        drop_unknown_argument()
        if self.ties_pools:
            tie_pools()
        logging.getLogger("neural_compressor").setLevel(logging.ERROR)
        options.workspace = tempfile.mkdtemp()
        batches = Batches(list(task.calib))
        example = task.inputs[0] if len(task.inputs) == 1 else task.inputs
        config = PostTrainingQuantConfig(
            backend="ipex",
            approach="static",
            example_inputs=example,
            quant_level=1,
            calibration_sampling_size=[batches.batch_size * len(batches)],
            tuning_criterion=TuningCriterion(strategy="basic", max_trials=self.max_trials),
            accuracy_criterion=AccuracyCriterion(criterion="relative", tolerable_loss=task.tolerance),
        )
        scores: list[float] = []
        ended: list[float] = []

        def eval_func(model: Callable[..., Tensor]) -> float:
            with torch.no_grad():
                scores.append(accuracy(model, task.items))
            ended.append(time.perf_counter())
            return scores[-1]

        begun = time.perf_counter()
        best = quantization.fit(copy.deepcopy(task.model), config, calib_dataloader=batches, eval_func=eval_func)
        seconds = time.perf_counter() - begun
        if best is not None:
            best.save(str(directory))
        fp32, *tried = scores or [float("nan")]
        passed = [at for at, score in zip(ended[1:], tried, strict=True) if (fp32 - score) / fp32 <= task.tolerance]
        return Tuned(
            trials=len(tried),
            seconds=seconds,
            to_pass=passed[0] - begun if passed else None,
            accuracy=tried[-1] if best is not None else None,
            reason="" if best is not None else f"found no model, the best trial has {max(tried, default=0):.4f}",
            versions=versions("neural-compressor", "intel-extension-for-pytorch", "torch"),
        )

    def load(self, task: Task, directory: Path) -> TorchModel:
        """Read the model, which is TorchScript."""
        return TorchModel(torch.jit.freeze(torch.jit.load(str(directory / MODEL)).eval()))


def drop_unknown_argument() -> None:
    """Let Neural Compressor use torch 2.8's histogram observer, which has no `upsample_rate` any more."""
    original = HistogramObserver.__init__

    def init(self: HistogramObserver, *args: Any, upsample_rate: object = None, **kwargs: Any) -> None:
        original(self, *args, **kwargs)

    HistogramObserver.__init__ = init  # type: ignore[method-assign]


def tie_pools() -> None:
    """Tie the scales of pooling's input and output again after IPEX has read a configuration.

    Neural Compressor lets IPEX read one, calibrate and convert; IPEX ties those scales before it reads, not after.
    """
    original = ipex_utils.attach_scale_zp_values_to_model

    def attach(module: Any) -> None:
        original(module)
        if hasattr(module, "_fqn_to_auto_quant_state_map"):
            states: Mapping[str, Any] = module._fqn_to_auto_quant_state_map
            nodes = ipex_utils.convert_quant_state_map_to_nodes(states)
            ipex_utils.sync_pool_and_lstm_input_output_scale_zp(states, nodes)

    ipex_utils.attach_scale_zp_values_to_model = attach
