"""Packs objects for Ray's object store so that workers map their tensors instead of copying them.

Ray shares numpy arrays between the processes of a node without a copy, torch tensors it copies for each worker
(95 MB: 150 ms and 95 MB each, against 1 ms and nothing). So tensors travel as the bytes of their storage.
The shared memory is read-only and writing to it kills the process: parameters, which nobody writes at inference,
are mapped; other tensors (buffers, data held by eval_fn) are copied on arrival.
"""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from ray import cloudpickle
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from raysq.errors import EvaluationError, ModelError
from raysq.parametrization import bake

__all__ = ["Packed", "pack", "pack_eval_fn", "pack_model", "unpack"]

Bytes = NDArray[np.uint8]
RECORDABLE = "_can_record_outputs"  # of transformers' models: the hidden states and the like that they can return


@dataclass(frozen=True)
class Packed:
    """A pickle whose large parts lie beside it, as numpy arrays; they are the object's own memory, not copies.

    Attributes:
        payload: the pickle.
        buffers: its large parts.
        path: where its modules were imported from; Ray's workers know the script's own folder only.
    """

    payload: bytes
    buffers: tuple[Bytes, ...]
    path: tuple[str, ...]


def pack(value: Any) -> Packed:
    """Pickle anything that cloudpickle takes; tied tensors stay tied, views of one storage share it.

    Raises:
        Exception: whatever the object's own pickling raises.
    """
    buffers: list[pickle.PickleBuffer] = []
    payload = io.BytesIO()
    _Pickler(payload, protocol=5, buffer_callback=buffers.append).dump(value)  # type: ignore[no-untyped-call]
    path = tuple(str(Path(entry).resolve()) for entry in sys.path)
    return Packed(payload.getvalue(), tuple(np.frombuffer(b.raw(), np.uint8) for b in buffers), path)


def unpack(packed: Packed) -> Any:
    """Return the object; its numpy arrays and parameters are read-only where `packed` came from Ray.

    What `sys.path` lacks of the packing process's folders is appended to it.
    """
    sys.path.extend(entry for entry in packed.path if entry not in sys.path and Path(entry).exists())
    return pickle.loads(packed.payload, buffers=packed.buffers)


def pack_model(model: nn.Module) -> Packed:
    """Pack a model.

    Raises:
        ModelError: it can't be pickled; the message names the attribute.
    """
    try:
        return pack(model)
    except Exception as exc:
        culprit = next(_unpicklable(model), None)
        where = f"its attribute `{culprit[0]}` ({culprit[1]})" if culprit else str(exc)
        raise ModelError(
            f"the model can't be sent to workers, because {where} can't be pickled. Remove it from the model, "
            "or give its class a `__getstate__` that leaves it out."
        ) from exc


def pack_eval_fn(eval_fn: Any) -> Packed:
    """Pack the evaluation with all that it closes over.

    Raises:
        EvaluationError: it can't be pickled.
    """
    try:
        return pack(eval_fn)
    except Exception as exc:
        raise EvaluationError(
            f"`eval_fn` can't be sent to workers: {exc}. It and what it refers to must be picklable: open files, "
            "connections and locks inside the function."
        ) from exc


class _Pickler(cloudpickle.Pickler):
    """Takes dense CPU tensors out as the bytes of their storages, and context variables by their names.

    Models of transformers know what they record from a table of the process that made them: they enter the other one's.

    A function inside of another one, such as the hooks of transformers' models, travels with the globals that it reads;
    a context variable among them can't, and means something only as the one that its module has.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._storages: dict[int, Bytes] = {}  # by address; kept, so that pickle's memo recognises them

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) in (Tensor, nn.Parameter) and obj.device.type == "cpu" and obj.layout is torch.strided:
            return self._reduce(obj)
        if isinstance(obj, nn.Module) and is_parametrized(obj):  # torch pickles none
            return _same, (bake(copy.deepcopy(obj)),)
        if isinstance(obj, nn.Module) and hasattr(type(obj), RECORDABLE):
            make, arguments, *rest = cast(tuple[Any, ...], obj.__reduce_ex__(pickle.DEFAULT_PROTOCOL))
            return _entered, (make, arguments), *rest
        if _holds_context(obj) and (place := _global_name(obj)):
            return _global, place
        return super().reducer_override(obj)  # type: ignore[no-untyped-call]

    def _reduce(self, tensor: Tensor) -> Any:
        if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            return NotImplemented
        dense = tensor.detach()
        if dense.numel() * dense.element_size() * 2 < dense.untyped_storage().nbytes():
            dense = dense.clone()  # a small part of something big
        storage = dense.untyped_storage()
        data = self._storages.get(storage.data_ptr())
        if data is None or len(data) != storage.nbytes():
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            self._storages[storage.data_ptr()] = data
        layout = (dense.storage_offset(), tuple(dense.shape), dense.stride())
        return _tensor, (data, dense.dtype, layout, type(tensor) is nn.Parameter, tensor.requires_grad)


def _holds_context(value: Any) -> bool:
    return isinstance(value, ContextVar) or any(
        isinstance(v, ContextVar) for v in getattr(value, "__dict__", {}).values()
    )


def _global_name(value: Any) -> tuple[str, str] | None:
    """Return the module of which a value is a global, and its name there."""
    modules = [(name, m) for name, m in sys.modules.items() if isinstance(m, ModuleType) and name != "__main__"]
    found = ((name, key) for name, module in modules for key, v in list(vars(module).items()) if v is value)
    return next(found, None)


def _same(value: Any) -> Any:
    return value


def _entered(make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    """Make a module of transformers, and enter it in the table of this process that says what its class records."""
    module = make(*arguments)
    table = getattr(sys.modules.get("transformers.utils.output_capturing"), "_CAN_RECORD_REGISTRY", None)
    if table is not None:
        table[module] = getattr(module, RECORDABLE)
    return module


def _global(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _tensor(
    data: Bytes, dtype: torch.dtype, layout: tuple[int, Any, Any], is_parameter: bool, requires_grad: bool
) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of read-only memory; see the module's docstring
        storage = torch.from_numpy(data if is_parameter else data.copy()).untyped_storage()
    offset, shape, stride = layout
    tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
    return nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)


def _unpicklable(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield path and type of each attribute that can't be pickled, of the innermost modules first."""
    for path, module in reversed(list(model.named_modules())):
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            try:
                pack(value)
            except Exception:  # noqa: BLE001  # whatever its class raises
                yield ".".join(filter(None, (path, name))), type(value).__name__
