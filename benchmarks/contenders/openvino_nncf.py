"""NNCF's quantize_with_accuracy_control on OpenVINO."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nncf
import openvino as ov
import torch
from contenders.base import Task, Tuned, accuracy, versions
from torch import Tensor

MODEL = "model.xml"
RANKED_ITEMS = 500  # of the evaluation data: its own default is 300 items, and a batch counts as one there


class Peer:
    """All settings are NNCF's own, but that a transformer is said to be one, and that calls are ranked on 500 items."""

    def tune(self, task: Task, directory: Path) -> Tuned:
        """Let NNCF revert operations until the accuracy holds."""
        scores: list[tuple[int, float]] = []  # batches, score

        def validate(compiled: Any, items: Iterable[Any]) -> tuple[float, list[float]]:
            batches = list(items)
            each = [accuracy(_predict(compiled), [batch]) for batch in batches]
            score = sum(each) / len(each)
            scores.append((len(batches), score))
            return score, each

        batch = len(task.inputs[0])
        begun = time.perf_counter()
        model = ov.convert_model(task.model, example_input=task.inputs)
        _reshape(model, task.inputs)
        quantized = nncf.quantize_with_accuracy_control(
            model,
            nncf.Dataset(task.calib, lambda inputs: [x.numpy() for x in inputs]),
            nncf.Dataset(task.items, lambda item: [x.numpy() for x in item[0]]),
            validate,
            max_drop=task.tolerance,
            drop_type=nncf.DropType.RELATIVE,
            subset_size=len(task.calib),
            model_type=nncf.ModelType.TRANSFORMER if task.is_transformer else None,
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=max(1, RANKED_ITEMS // batch), num_ranking_workers=task.cores
            ),
        )
        seconds = time.perf_counter() - begun
        ov.save_model(quantized, directory / MODEL, compress_to_fp16=False)
        on_all = [place for place, (batches, _) in enumerate(scores) if batches == len(task.items)]
        fp32, final = scores[on_all[0]][1], scores[on_all[-1]][1]  # it begins with the float model
        return Tuned(
            trials=len(scores) - on_all[0] - 1,
            whole=len(on_all) - 1,
            seconds=seconds,
            to_pass=seconds if (fp32 - final) / fp32 <= task.tolerance else None,
            accuracy=final,
            versions=versions("nncf", "openvino", "torch"),
        )

    def load(self, task: Task, directory: Path) -> Runtime:
        """Read the model; OpenVINO compiles it in the precision that it takes by default."""
        return Runtime(directory / MODEL, task.threads)


class Runtime:
    """A saved model, compiled for each shape that it is called with."""

    def __init__(self, path: Path, threads: int) -> None:
        self._core = ov.Core()
        self._model = self._core.read_model(path)
        self._settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        self._compiled: dict[object, Any] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run it, compiled for these shapes."""
        return _predict(self._for(inputs))(*inputs)

    def bound(self, *inputs: Tensor) -> Callable[[], object]:
        """Return a request whose inputs are set."""
        request = self._for(inputs).create_infer_request()
        for place, x in enumerate(inputs):
            request.set_input_tensor(place, ov.Tensor(x.numpy(), shared_memory=True))
        infer: Callable[[], object] = request.infer
        return infer

    def _for(self, inputs: tuple[Tensor, ...]) -> Any:
        shapes = tuple(tuple(x.shape) for x in inputs)
        if shapes not in self._compiled:
            _reshape(self._model, inputs)
            self._compiled[shapes] = self._core.compile_model(self._model, "CPU", self._settings)
        return self._compiled[shapes]


def _reshape(model: Any, inputs: tuple[Tensor, ...]) -> None:
    model.reshape({port: ov.PartialShape(list(x.shape)) for port, x in zip(model.inputs, inputs, strict=True)})


def _predict(compiled: Any) -> Callable[..., Tensor]:
    return lambda *inputs: torch.from_numpy(compiled([x.numpy() for x in inputs])[0])
