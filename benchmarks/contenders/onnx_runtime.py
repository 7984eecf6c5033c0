"""ONNX Runtime's static quantization, with the settings that its documentation has one try by hand."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from contenders.base import Inputs, Task, Tuned, accuracy, versions
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

MODEL = "model.onnx"
OPSET = 17
PRODUCTS = ("Conv", "MatMul", "Gemm")
TIMED_RUNS = 20  # to choose among what passes


@dataclass(frozen=True)
class Setting:
    """One way to quantize; weights are signed, and per channel.

    Attributes:
        signed: whether activations are signed and symmetric.
        method: how their ranges are found.
        ops: kinds of node that are quantized; None: all that ONNX Runtime can.
        reduce_range: whether weights have seven bits, so that sums don't saturate on CPUs without VNNI.
    """

    signed: bool
    method: str
    ops: tuple[str, ...] | None
    reduce_range: bool

    @property
    def form(self) -> tuple[object, ...]:
        """All that the model's speed depends on."""
        return self.signed, self.ops, self.reduce_range

    def __str__(self) -> str:
        parts = ("S8S8" if self.signed else "U8S8", self.method, "products" if self.ops else "all ops")
        return ", ".join([*parts, *(["7 bits"] if self.reduce_range else [])])


SETTINGS = [
    Setting(signed, method, ops, reduce_range)
    for method in ("MinMax", "Entropy")
    for ops in (None, PRODUCTS)
    for signed, reduce_range in ((True, False), (False, False), (False, True))
]


class Peer:
    """It has no search: settings are tried in turn, and the fastest that holds the accuracy is kept."""

    def tune(self, task: Task, directory: Path) -> Tuned:
        """Try the settings."""
        begun = time.perf_counter()
        passed: list[tuple[float, int, float, Path]] = []  # ms, place, score, artifact
        scores, failures = [], []
        to_pass = None
        with tempfile.TemporaryDirectory() as scratch:
            exported, prepared = Path(scratch, "fp32.onnx"), Path(scratch, "prepared.onnx")
            export(task, exported)
            quant_pre_process(str(exported), str(prepared), skip_symbolic_shape=True)
            fp32 = accuracy(Session(exported, task.threads), task.items)
            for place, setting in enumerate(SETTINGS):
                if setting.form in {SETTINGS[known].form for _, known, _, _ in passed}:
                    continue  # other ranges can't make it faster
                path = Path(scratch, f"{place}.onnx")
                try:
                    quantize(prepared, path, task.calib, setting)
                    session = Session(path, task.threads)
                    scores.append(accuracy(session, task.items))
                except Exception as exc:  # a setting that this model can't have; the others remain
                    failures.append(f"{setting}: {type(exc).__name__}")
                    continue
                if (fp32 - scores[-1]) / fp32 <= task.tolerance:
                    to_pass = to_pass or time.perf_counter() - begun
                    passed.append((_ms(session.bound(*task.inputs)), place, scores[-1], path))
            best = min(passed, default=None)
            if best:
                best[3].replace(directory / MODEL)
        closest = f"none of {len(scores)} settings holds, the best has {max(scores, default=0):.4f}"
        return Tuned(
            trials=len(scores),
            seconds=time.perf_counter() - begun,
            to_pass=to_pass,
            accuracy=best[2] if best else None,
            reason="" if best else closest,
            note="; ".join([*([str(SETTINGS[best[1]])] if best else []), *failures]),
            versions=versions("onnxruntime", "onnx", "torch"),
        )

    def load(self, task: Task, directory: Path) -> Session:
        """Read the model."""
        return Session(directory / MODEL, task.threads)


class Session:
    """A model in ONNX Runtime's session."""

    def __init__(self, path: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self._session: Any = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [x.name for x in self._session.get_inputs()]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run it."""
        return torch.from_numpy(self._session.run(None, _named(self._names, inputs))[0])

    def bound(self, *inputs: Tensor) -> Callable[[], object]:
        """Return a run whose inputs and output are bound."""
        binding = self._session.io_binding()
        for name, x in _named(self._names, inputs).items():
            binding.bind_cpu_input(name, x)
        binding.bind_output(self._session.get_outputs()[0].name)
        return lambda: self._session.run_with_iobinding(binding)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration batches, by the names of the inputs."""

    def __init__(self, names: Sequence[str], batches: Sequence[Inputs]) -> None:
        self._batches = iter([_named(names, batch) for batch in batches])

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """Return the next batch, None after the last."""
        return next(self._batches, None)


def export(task: Task, path: Path) -> None:
    """Write the fp32 model, for any batch size."""
    names = input_names(task)
    axes = {name: {0: "batch"} for name in (*names, "output")}
    torch.onnx.export(
        task.model,
        task.inputs,
        str(path),
        input_names=names,
        output_names=["output"],
        dynamic_axes=axes,
        opset_version=OPSET,
        dynamo=False,
    )


def quantize(source: Path, path: Path, calib: Sequence[Inputs], setting: Setting) -> None:
    """Write the quantized model."""
    quantize_static(
        str(source),
        str(path),
        Reader([f"input{i}" for i in range(len(calib[0]))], calib),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=setting.reduce_range,
        op_types_to_quantize=setting.ops,
        activation_type=QuantType.QInt8 if setting.signed else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[setting.method],
        extra_options={"WeightSymmetric": True, "ActivationSymmetric": setting.signed},
    )


def input_names(task: Task) -> list[str]:
    """Return the names of the inputs, in order."""
    return [f"input{i}" for i in range(len(task.inputs))]


def _named(names: Sequence[str], inputs: Inputs) -> dict[str, np.ndarray[Any, Any]]:
    return {name: x.numpy() for name, x in zip(names, inputs, strict=True)}


def _ms(run: Callable[[], object]) -> float:
    seen = []
    for _ in range(TIMED_RUNS):
        begun = time.perf_counter()
        run()
        seen.append(1000 * (time.perf_counter() - begun))
    return statistics.median(seen)
