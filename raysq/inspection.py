"""From a model and example inputs to the copy that deployment starts from, and the graph of its calls."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from raysq.copies import cloned, state
from raysq.errors import InputError, ModelError
from raysq.graph import Call, ModelGraph, Node, OpType
from raysq.intercept import CALLS, Function, Interceptor, Operands, Site
from raysq.parametrization import bake, computed
from raysq.structure import describe, tensors_in

__all__ = ["deployable", "evaluating", "record", "run_once", "same_outputs"]

log = logging.getLogger("raysq")

GROUPED = "a product for each group of rows, as mixtures of experts have it, has no int8 kernel"
CELL = "a single step of a recurrent network has no int8 kernel"
FLOAT_ONLY = {  # functions that multiply matrices and that no backend here runs in int8
    "scaled_dot_product_attention": "fused attention has no int8 kernel",
    "einsum": "einsum has no int8 kernel; torch.matmul has one",
    "baddbmm": "baddbmm has no int8 kernel; torch.matmul has one",
    "gru": "GRU has no int8 kernel",
    "rnn_tanh": "RNN has no int8 kernel",
    "rnn_relu": "RNN has no int8 kernel",
    "bilinear": "bilinear has no int8 kernel",
    "tensordot": "tensordot has no int8 kernel; torch.matmul has one",
    "addbmm": "addbmm has no int8 kernel; torch.matmul has one",
    "_grouped_mm": GROUPED,
    "grouped_mm": GROUPED,
    "grouped_mm_fallback": GROUPED,  # transformers' own op
    "lstm_cell": CELL,
    "gru_cell": CELL,
    "rnn_tanh_cell": CELL,
    "rnn_relu_cell": CELL,
}
PRODUCTS = {op for op in OpType if op.has_weight or op in (OpType.MATMUL, OpType.BMM)} - {OpType.LSTM}
OTHER_FORM = "called with these arguments it has no int8 kernel"
MUTATING = {"__iadd__", "add_", "relu_", "relu6_", "__imul__", "mul_", "hardtanh_", "silu_", "hardswish_"}
ROUNDING = 1e-3  # largest relative difference that folding a batch norm may make in fp32


def deployable(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[nn.Module, ModelGraph]:
    """Return the fp32 copy that is quantized, and its graph; the model itself is not changed.

    The copy shares the model's weights, those that it computes apart, is in eval mode, has its in-place ops out of
    place where that changes no output, and its batch norms folded into the convolutions and linear layers before them.
    Where the forward changes its inputs, that of the copy changes copies of them.

    Raises:
        ModelError: on a device other than the CPU, not copyable, failing on the inputs, nothing to quantize.
    """
    _check_devices(model)
    if model.training:
        log.info("the model is in train mode: raysq works on a copy of it in eval mode.")
    plain = bake(evaluating(model))
    with torch.no_grad():
        given = cloned(args, dict(kwargs))
        before = [*map(state, tensors_in(given))]
        wanted = run_once(plain, *given)
        protects = before != [*map(state, tensors_in(given))]
        if protects:
            plain.register_forward_pre_hook(_on_copies, with_kwargs=True)
            model = plain
        candidate = bake(evaluating(model))
        for module in candidate.modules():
            if getattr(module, "inplace", False) is True:
                module.inplace = False  # type: ignore[assignment]
        graph = record(candidate, args, kwargs)
        with Interceptor(candidate):
            if not same_outputs(candidate(*args, **kwargs), wanted, 0.0):
                candidate, graph = plain, record(plain, args, kwargs, out_of_place=False)
        folded = _fold(candidate, graph)
        if folded:
            if same_outputs(candidate(*args, **kwargs), wanted, ROUNDING):
                graph = record(candidate, args, kwargs, out_of_place=graph.out_of_place, folded=folded)
            else:  # a batch norm with extreme statistics: folding would change the fp32 model
                candidate = bake(evaluating(model))
                graph = record(candidate, args, kwargs, out_of_place=False)
    if not graph.calls:
        raise ModelError(
            "the model must have a call that can run in int8, and its forward on the example inputs reaches none of "
            + ", ".join(op.value for op in OpType)
            + "."
        )
    return candidate, graph


def run_once(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    inputs: str = "the example inputs",
    error: type[InputError] = ModelError,
) -> Any:
    """Return the model's outputs on inputs that a person gave.

    Raises:
        InputError: it fails; of the class `error`, and with the name of the inputs.
    """
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except Exception as exc:
        shapes = [tuple(t.shape) for t in tensors_in((args, dict(kwargs)))]
        raise error(f"the model must run on {inputs}, and fails (shapes {shapes}): {exc}") from exc


def same_outputs(got: Any, wanted: Any, tolerance: float) -> bool:
    """Whether two outputs have the same tensors, within a tolerance relative to each tensor's largest value."""
    ours, theirs = tree_leaves(got), tree_leaves(wanted)
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return False
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape:
            return False
        if not b.is_floating_point():
            if tolerance == 0 and not torch.equal(a, b):
                return False
            continue
        bound = tolerance * float(b.detach().abs().nan_to_num(posinf=0.0).max()) if b.numel() else 0.0
        if not torch.allclose(a.float(), b.float(), rtol=0.0, atol=bound + 1e-6, equal_nan=True):
            return False
    return True


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    out_of_place: bool = True,
    folded: tuple[tuple[str, str], ...] = (),
) -> ModelGraph:
    """Run the model once and return the graph of what it called."""
    recorder = _Recorder(model)
    given = recorder.given((args, dict(kwargs)))
    with torch.no_grad(), Interceptor(model, recorder.call, recorder.function, out_of_place=out_of_place):
        result = model(*args, **kwargs)
    blocks = _blocks(model, recorder.calls)
    calls = tuple(_finish(call, blocks) for call in recorder.calls)
    return ModelGraph(
        calls=calls,
        nodes=tuple(recorder.nodes),
        blocks=blocks,
        folded=folded,
        left_in_float=recorder.left_in_float,
        parameters={n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)},
        outputs=recorder.values(result),
        out_of_place=out_of_place,
        inputs=given,
    )


class _Recorder:
    """Follows every tensor of one forward: which function made it, and which read it."""

    def __init__(self, model: nn.Module) -> None:
        self._types = {path: type(module).__name__ for path, module in model.named_modules()}
        self._names: WeakIdKeyDictionary = WeakIdKeyDictionary()  # not by id: a buffer that is replaced frees its id
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names[tensor] = name
        self._own: dict[tuple[str, int], str] = {}  # a tied weight has a name in each module that holds it
        self._storages: dict[int, dict[str, Tensor]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._own[name.rpartition(".")[0], id(parameter)] = name
            if parameter.untyped_storage().nbytes():
                self._storages.setdefault(parameter.untyped_storage().data_ptr(), {})[name] = parameter
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor to its value, and its state as such
        self._made = 0
        self._operands: Operands | None = None
        self._canonical: dict[int, str] = {}
        self.nodes: list[Node] = []
        self.calls: list[Call] = []
        self.left_in_float: dict[str, str] = {}

    def call(self, site: Site, operands: Operands) -> Any:
        self._operands = operands
        return operands.run(operands.activations, operands.weights)

    def function(self, function: Function, site: Site | None, result: Any) -> None:
        tensors = tensors_in((function.args, dict(function.kwargs)))
        held = [t for t in tensors if t in self._names]
        read = [t for t in tensors if t not in self._names]
        parameters = tuple(self._own.get((function.module, id(t)), self._names[t]) for t in held)
        made = tensors_in(result)
        if function.name == "__setitem__":
            made = tensors[:1]
        changed = [id(t) for t in made]
        inputs = tuple(self._value(t, after=id(t) in changed) for t in read)
        if site is not None and self._operands is not None:
            self.calls.append(self._describe(site, self._operands, result))
            self._operands = None
        if not made:
            return  # asks a tensor for its size or type
        outputs, shapes = tuple(map(self._new_value, made)), tuple(tuple(t.shape) for t in made)
        where = f"{function.module}:{function.name}" if function.module else function.name
        if function.name in FLOAT_ONLY:
            self.left_in_float[where] = FLOAT_ONLY[function.name]
        elif function.name == "lstm" and site is None:
            self.left_in_float[where] = "an LSTM over packed sequences has no int8 kernel"
        elif site is None and CALLS.get(function.name) in PRODUCTS and all(t.is_floating_point() for t in made):
            self.left_in_float[where] = OTHER_FORM
        elif function.name in MUTATING:
            self.left_in_float[where] = "changes its input in place, and that is read under another name"
        name = site.name if site is not None else None
        self.nodes.append(
            Node(
                index=len(self.nodes),
                function=function.name,
                module=function.module,
                inputs=inputs,
                outputs=outputs,
                shapes=shapes,
                call=name,
                parameters=parameters,
                read_shapes=tuple(tuple(t.shape) for t in (*read, *held)),
            )
        )

    def given(self, inputs: Any) -> tuple[int, ...]:
        """Return the values of the tensors that the model is given."""
        return tuple(map(self._value, tensors_in(inputs)))

    def values(self, tree: Any) -> tuple[int, ...]:
        """Return the values among the tensors of what a model returns."""
        try:
            tensors = describe(tree, "the model's output", omit=True)[0]
        except ModelError:  # it can't be deployed like that; who asks for its graph may want it all the same
            tensors = tensors_in(tree)
        return tuple(self._value(t) for t in tensors if t in self._values)

    def _value(self, tensor: Tensor, *, after: bool = False) -> int:
        """Return the value that a tensor is; or was, where it is asked `after` a function that changed it."""
        value, known = self._values.get(tensor, (0, -1))
        return value if value and (after or known == state(tensor)) else self._new_value(tensor)

    def _new_value(self, tensor: Tensor) -> int:
        self._made += 1
        self._values[tensor] = self._made, state(tensor)
        return self._made

    def _describe(self, site: Site, operands: Operands, result: Any) -> Call:
        tensors = []
        for position, tensor in enumerate(operands.activations):
            value = self._value(tensor)
            tensors.append(self._canonical.setdefault(value, f"{site.name}/{position}"))
        output = tensors_in(result)[0]
        weight = operands.weights[0] if operands.weights else None
        name, start, transposed = (None, 0, False) if weight is None else self._origin(weight, site.module)
        return Call(
            name=site.name,
            op=site.op,
            module=site.module,
            module_type=self._types[site.module],
            tensors=tuple(tensors),
            input_shapes=tuple(tuple(t.shape) for t in operands.activations),
            output_shape=tuple(output.shape),
            weight=name,
            weight_shape=() if weight is None else tuple(weight.shape),
            groups=operands.groups,
            macs=_macs(site.op, operands, output),
            block=None,
            weight_start=start,
            weight_transposed=transposed,
        )

    def _origin(self, weight: Tensor, module: str) -> tuple[str | None, int, bool]:
        """Return the parameter that a weight is, is rows of or is transposed, the first row, and whether it is."""
        named = self._storages.get(weight.untyped_storage().data_ptr())
        if not named:
            return None, 0, False
        name = next((name for name in named if name.rpartition(".")[0] == module), next(iter(named)))
        parameter = named[name]
        offset = int(weight.storage_offset() - parameter.storage_offset())
        for view, transposed in ((weight, False), (weight.mT if weight.dim() == 2 else weight, True)):
            if view.shape[1:] == parameter.shape[1:] and view.stride() == parameter.stride():
                start, within = divmod(offset, parameter.stride(0))
                if within == 0 and (not transposed or view.shape == parameter.shape):
                    return name, start, transposed
        return None, 0, False


def _macs(op: OpType, operands: Operands, output: Tensor) -> int:
    if op is OpType.LSTM:
        steps = math.prod(operands.activations[0].shape[:-1])
        return steps * sum(w.numel() for w in operands.weights if w.dim() == 2)
    if op is OpType.LINEAR:
        return output.numel() * operands.weights[0].shape[1]
    if op.is_conv:
        weight = operands.weights[0]  # (out, in/groups, *kernel), transposed: (in, out/groups, *kernel)
        if "transpose" in op.value:
            return operands.activations[0].numel() * math.prod(weight.shape[1:])
        return output.numel() * math.prod(weight.shape[1:])
    if op in (OpType.MATMUL, OpType.BMM):
        return output.numel() * operands.activations[0].shape[-1]
    return 0


def _finish(call: Call, blocks: Sequence[str]) -> Call:
    block = next((b for b in blocks if call.module == b or call.module.startswith(b + ".")), None)
    return replace(call, block=block)


def _blocks(model: nn.Module, calls: Sequence[Call]) -> tuple[str, ...]:
    """Return the outermost modules whose class stands at least twice, with two calls or more in each."""
    inside: Counter[str] = Counter()
    for call in calls:
        parts = call.module.split(".")
        inside.update(".".join(parts[:n]) for n in range(1, len(parts) + 1))
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    candidates = {p: type(m) for p, m in model.named_modules() if p and inside[p] >= 2 and type(m) not in containers}
    repeated = {kind for kind, times in Counter(candidates.values()).items() if times >= 2}
    paths: list[str] = []
    for path, kind in candidates.items():  # named_modules lists outer modules before inner ones
        if kind in repeated and not any(path.startswith(p + ".") for p in paths):
            paths.append(path)
    first = {path: next(i for i, c in enumerate(calls) if f"{c.module}.".startswith(path + ".")) for path in paths}
    return tuple(sorted(paths, key=first.__getitem__))


def _fold(model: nn.Module, graph: ModelGraph) -> tuple[tuple[str, str], ...]:
    """Merge each batch norm into the convolution or linear layer before it, in place on our copy."""
    modules = dict(model.named_modules())
    readers = Counter(value for node in graph.nodes for value in node.inputs)
    uses = Counter(node.module for node in graph.nodes if node.call or node.function == "batch_norm")
    makers = {value: node for node in graph.nodes for value in node.outputs}
    folded = []
    for node in graph.nodes:
        before = makers.get(node.inputs[0]) if node.function == "batch_norm" and node.inputs else None
        if before is None or before.call is None or readers[node.inputs[0]] != 1:
            continue
        norm, layer = modules[node.module], modules[before.module]
        if uses[node.module] != 1 or uses[before.module] != 1 or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        if norm.running_mean is None:
            continue
        if isinstance(layer, nn.Linear) and layer.out_features == norm.num_features:
            merged: nn.Module = fuse_linear_bn_eval(layer, norm)
        elif isinstance(layer, nn.modules.conv._ConvNd) and not (layer.transposed and layer.groups > 1):
            merged = fuse_conv_bn_eval(layer, norm, transpose=layer.transposed)
        else:
            continue
        _replace(model, before.module, merged)
        _replace(model, node.module, nn.Identity())
        folded.append((before.module, node.module))
    return tuple(folded)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def evaluating(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode that shares the parameters, which inference never writes to.

    Raises:
        ModelError: it can't be copied.
    """
    shared = {id(p): p for p in model.parameters()} | {id(t): t.detach() for t in computed(model)}
    try:
        return copy.deepcopy(model, shared).eval()
    except Exception as exc:
        raise ModelError(
            f"the model must be copyable, as raysq quantizes a copy, never the model itself: {exc}."
        ) from exc


def _on_copies(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return cloned(args, kwargs)


def _check_devices(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model must be a torch.nn.Module, got {type(model).__name__}.")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise ModelError(f"the model must be on the CPU, but {name} is on {tensor.device}. Call model.cpu() first.")
        if tensor.is_floating_point() and tensor.dtype is not torch.float32 and name:
            raise ModelError(f"the model must be fp32, but {name} is {tensor.dtype}. Call model.float() first.")
