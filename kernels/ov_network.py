"""A network of OpenVINO as a function of flat torch tensors, in as many threads as torch is set to."""

from __future__ import annotations

import ctypes
import functools
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raysq.deployed import Deployed
from raysq.kernels.built import write_signature
from raysq.recipe import Precision

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Network", "OpenVINOModel", "runtime"]

NETWORK_FILE = "model.xml"  # its weights lie beside it, in model.bin
TELEMETRY = "openvino_telemetry"
OWN_NETWORKS = 2  # compiled for one shape, which saves up to a quarter of a small model's time
Outputs = Tensor | tuple[Tensor, ...]
Shapes = tuple[tuple[int, ...], ...]
RECURRENT = {"GRUSequence": 3, "LSTMSequence": 4, "RNNSequence": 3}  # the place of its weight among an op's inputs
OPEN: Shapes = ()  # stands for the network that takes any shapes
SETTINGS = {
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": "1",
    "ENABLE_CPU_PINNING": "NO",  # pinned threads of several models in one process share a core and leave others idle
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",  # a recipe says what is rounded
}


def runtime() -> ModuleType:
    """Import OpenVINO without its telemetry, which by default reports every import over the network."""
    if "openvino" not in sys.modules and TELEMETRY not in sys.modules:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # "can't be imported": OpenVINO has a stub for that
        try:
            import openvino
        finally:
            del sys.modules[TELEMETRY]
    import openvino

    return openvino  # type: ignore[no-any-return]


@functools.cache
def _core() -> Any:
    return runtime().Core()


class Network:
    """A network that is compiled when it is called.

    It follows `torch.set_num_threads`: another number of threads compiles it anew. The example's shapes have a network
    of their own, and so has the first other shape that comes twice in a row, as one that is served or timed does; the
    rest share one whose axes are open. Calls from several threads wait for each other.

    Args:
        model: an `openvino.Model` with open axes.
        example: the shapes that it is compiled for first.
        precision: fp32, or bf16 for all that runs in float.
    """

    def __init__(self, model: Any, example: Shapes, precision: Precision = Precision.FP32) -> None:
        self.model = model
        self._example = example
        self._settings = SETTINGS | {"INFERENCE_PRECISION_HINT": "bf16" if precision is Precision.BF16 else "f32"}
        self._threads = 0
        self._networks: dict[Shapes, _Fixed | _Open] = {}
        self._last: Shapes = OPEN
        self._fitting: set[Shapes] = set()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        return self  # calls leave nothing behind

    def __call__(self, *tensors: Tensor) -> Outputs:
        """Run the network; the results are copies."""
        with self._lock:
            return self._compiled(tuple([t.shape for t in tensors]))(tensors)

    def bound(self, *tensors: Tensor) -> Callable[[], Outputs]:
        """Return what runs the network on these tensors, read where they lie, in as many threads as torch has now.

        Its results are always the same tensors. Where OpenVINO would need copies it is a call like any other.
        """
        shapes = tuple([t.shape for t in tensors])
        with self._lock:
            self._follow_torch()
            network = self._networks.get(shapes) or self._compile(shapes)
        if isinstance(network, _Fixed) and network.fits(tensors):
            return network.bound(tensors)
        return partial(self, *tensors)

    @property
    def executed(self) -> Any:
        """The graph that is executed for the example's shapes: an `openvino.Model` with a node per kernel."""
        with self._lock:
            return self._compiled(self._example).request.get_compiled_model().get_runtime_model()

    def save(self, path: Path) -> None:
        """Write the network as OpenVINO's IR: `path`, an XML file, and its weights with the suffix .bin."""
        runtime().save_model(self.model, path, compress_to_fp16=False)

    @classmethod
    def load(cls, directory: Path, example: tuple[Tensor, ...]) -> Network:
        """Return a network that `OpenVINOModel.save` wrote."""
        return cls(_core().read_model(directory / NETWORK_FILE), tuple(tuple(t.shape) for t in example))

    def _compiled(self, shapes: Shapes) -> _Fixed | _Open:
        self._follow_torch()
        again, self._last = shapes == self._last, shapes
        known = self._networks.get(shapes)
        if known is not None:
            return known
        own = len(self._networks.keys() - {OPEN}) < OWN_NETWORKS and (again or shapes == self._example)
        if not own:
            self._check(shapes)
            shapes = OPEN
        if shapes not in self._networks:
            self._networks[shapes] = self._compile(shapes)
        return self._networks[shapes]

    def _follow_torch(self) -> None:
        threads = torch.get_num_threads()
        if threads != self._threads:
            self._networks, self._threads = {}, threads

    def _check(self, shapes: Shapes) -> None:
        """Make sure that shapes fit the model: open kernels would read what lies beside their inputs.

        Raises:
            RuntimeError: they don't.
        """
        if shapes not in self._fitting:
            _reshape(self._checked, shapes)
            self._fitting.add(shapes)

    @cached_property
    def _checked(self) -> Any:
        """A copy of the model on which shapes are tried."""
        return self.model.clone()

    def _compile(self, shapes: Shapes) -> _Fixed | _Open:
        model = self.model
        if shapes != OPEN:
            model = model.clone()
            _reshape(model, shapes)
        settings = self._settings | {"INFERENCE_NUM_THREADS": str(self._threads)}
        compiled = _core().compile_model(model, "CPU", settings)
        fixed = shapes != OPEN and all(y.get_partial_shape().is_static for y in compiled.outputs)
        return (_Fixed if fixed else _Open)(compiled.create_infer_request())


class _Open:
    """A compiled network that is given its inputs."""

    def __init__(self, request: Any) -> None:
        self.request = request

    def __call__(self, tensors: tuple[Tensor, ...]) -> Outputs:
        inputs = [tensor.detach().contiguous().numpy() for tensor in tensors]
        outputs = tuple(map(torch.from_numpy, self.request.infer(inputs, share_inputs=True).to_tuple()))
        return outputs[0] if len(outputs) == 1 else outputs


class _Fixed:
    """A compiled network of fixed shapes, whose own tensors are written and read.

    Giving it others took longer than running digits_cnn: 0.26 ms a call at batch 1 instead of 0.11. Beside OpenVINO's
    code each function of torch takes ten times as long as by itself, 10 to 20 µs, so there are few of them here.
    """

    def __init__(self, request: Any) -> None:
        self.request = request
        self._inputs = _memory(request.input_tensors)
        self._places = [(x.dtype, x.data_ptr(), x.nbytes) for x in self._inputs]
        self._outputs = _memory(request.output_tensors)
        self._infer = _bare(request)

    def __call__(self, tensors: tuple[Tensor, ...]) -> Outputs:
        for own, (dtype, address, size), tensor in zip(self._inputs, self._places, tensors, strict=True):
            if tensor.dtype is dtype and tensor.is_contiguous() and tensor.is_cpu:
                ctypes.memmove(address, tensor.data_ptr(), size)
            else:
                own.copy_(tensor)
        self._infer()
        if len(self._outputs) == 1:
            return self._outputs[0].clone()
        return tuple([own.clone() for own in self._outputs])

    def fits(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether the network can read these tensors where they lie."""
        return all(
            tensor.dtype is own.dtype and tensor.is_contiguous() and tensor.is_cpu
            for own, tensor in zip(self._inputs, tensors, strict=True)
        )

    def bound(self, tensors: tuple[Tensor, ...]) -> Callable[[], Outputs]:
        """Return what runs the network on these tensors, which fit."""
        request = self.request.get_compiled_model().create_infer_request()
        for place, tensor in enumerate(tensors):
            request.set_input_tensor(place, runtime().Tensor(tensor.detach().numpy(), shared_memory=True))
        infer, outputs = _bare(request), tuple(_memory(request.output_tensors))
        result = outputs[0] if len(outputs) == 1 else outputs

        def run() -> Outputs:
            infer()
            return result

        return run


def _reshape(model: Any, shapes: Shapes) -> None:
    """Fix the shapes of a model's inputs.

    Raises:
        RuntimeError: they don't fit it. OpenVINO itself doesn't look at the widths that recurrent layers read.
    """
    model.reshape({x: runtime().PartialShape(list(s)) for x, s in zip(model.inputs, shapes, strict=True)})
    for op in model.get_ops():
        if weight := RECURRENT.get(op.get_type_name()):
            given, read = op.input(0).get_partial_shape()[2], op.input(weight).get_partial_shape()[2]
            if given.is_static and given != read:
                raise RuntimeError(f"{op.get_friendly_name()} reads {read} features, and is given {given}")


def _memory(tensors: Any) -> list[Tensor]:
    """Return tensors of torch that lie where OpenVINO's own do."""
    return [torch.from_numpy(tensor.data) for tensor in tensors]


def _bare(request: Any) -> Callable[[], object]:
    """Return what runs a request on its own tensors: what OpenVINO's Python does around it takes 7 µs."""
    infer: Callable[..., object] = super(type(request), request).infer
    return partial(infer, {}, True, True)  # no inputs; the outputs are shared, strings are decoded


@dataclass(frozen=True)
class OpenVINOModel:
    """A network behind the original's own signature.

    Attributes:
        backend: name of the backend that built it.
        network: what runs.
        model: what is called.
        executed: call name to the precision it really runs in.
        left_in_float: call name to the reason why it isn't as the recipe asked.
        example: the flat example inputs, which warm a loaded model up.
    """

    backend: str
    network: Network
    model: Deployed
    executed: Mapping[str, Precision]
    left_in_float: Mapping[str, str]
    example: tuple[Tensor, ...]

    @cached_property
    def size_bytes(self) -> int:
        """Size of the artifact."""
        with tempfile.TemporaryDirectory() as directory:
            self.network.save(Path(directory) / NETWORK_FILE)
            return sum(path.stat().st_size for path in Path(directory).iterdir())

    def save(self, directory: Path) -> None:
        """Write model.xml and model.bin, which `openvino.Core().read_model` reads, and how the model is called."""
        self.network.save(directory / NETWORK_FILE)
        write_signature(directory, self.model, self.backend, self.example)
