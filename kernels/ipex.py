"""Runs recipes on Intel Extension for PyTorch: quantize/dequantize pairs in a frozen graph that oneDNN Graph fuses.

Our own insertion is used instead of `ipex.quantization.prepare` and `convert`: it needs no calibrated module, takes any
scale per call, has bf16 per call, and builds faster; the kernels are the same, since oneDNN Graph fuses the same
`dequantize -> op -> quantize` patterns. What really runs is read back from the graph that was executed.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raysq.arithmetic import QParams
from raysq.capabilities import Capabilities, OpCapability
from raysq.copies import state
from raysq.deployed import Deployed
from raysq.errors import BackendError
from raysq.flattened import Flattened, forward_signature
from raysq.graph import OpType
from raysq.insertion import Insertion
from raysq.intercept import POOLS, Interceptor, Operands, Site, with_strides
from raysq.kernels import grids
from raysq.kernels.base import TRY_ELSEWHERE, CallTime, check
from raysq.kernels.broadcasts import set_apart
from raysq.kernels.built import ScriptedModel
from raysq.kernels.call_times import call_times
from raysq.kernels.cpu import has_bf16, instruction_sets, lacks_vnni
from raysq.kernels.dynamic import swap_dynamic
from raysq.kernels.executed import executed_precisions, without_unfused
from raysq.kernels.floats import FORMS, build_form, freeze, warm_up
from raysq.kernels.qconf import fill, is_smoothed, why_not
from raysq.kernels.sums import apart
from raysq.kernels.weights import quantized_weight
from raysq.plan import CallPlan
from raysq.recipe import Approach, Granularity, Precision, Recipe, TensorConfig
from raysq.source import Source

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Engine", "extension", "frozen", "prepare", "summary", "without_fusions"]

log = logging.getLogger("raysq")


FP32_FORM, BF16_FORM = "ipex", "ipex bf16"
CONSTANT = "it reads the same whatever the inputs are, and oneDNN Graph crashes on a call that freezing computes"
SMOOTH_MAPPING = "ipex.quantization.get_smooth_quant_qconfig_mapping"


def extension() -> ModuleType:
    """Import the extension without the warnings that it prints for its own developers."""
    # IPEX imports torch's compiler, which would start processes that wait to compile for a GPU, here and in each
    # worker: 5 s of CPU and 0.6 GB
    os.environ.setdefault("TORCH_WARM_POOL", "0")
    with warnings.catch_warnings(action="ignore"), _quiet_stderr():
        import intel_extension_for_pytorch as ipex
    logging.getLogger("IPEX").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="JIT pass will be deprecated")  # raised whenever a shape is compiled
    warnings.filterwarnings("ignore", message="Conv1d channels last support")  # of an IPEX that will never be
    warnings.filterwarnings("ignore", message=".*an autograd kernel was not registered")  # its own calls have gradients
    return ipex  # type: ignore[no-any-return]


@contextmanager
def without_fusions() -> Iterator[None]:
    """Keep IPEX, where something has loaded it, out of what TorchScript optimizes in here.

    It rewrites every graph of its process, and fails on some: on the masked attention of a graph in which products were
    replaced, and on a batch norm after a concatenation whose shapes no call has profiled.
    """
    ipex = sys.modules.get("intel_extension_for_pytorch")
    if ipex is None or not ipex._C.get_jit_opt():
        yield
        return
    ipex.enable_onednn_fusion(False)
    try:
        yield
    finally:
        ipex.enable_onednn_fusion(True)


class _quiet_stderr(AbstractContextManager[None]):
    """Silence what C++ code prints at import: operators registered twice."""

    def __enter__(self) -> None:
        self._saved = os.dup(2)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)

    def __exit__(self, *exc: object) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)


class QuantizeDequantize:
    """torch's own quantize and dequantize, which oneDNN Graph recognises."""

    def __init__(self) -> None:
        self._rounded: dict[tuple[int, int, int, float, int, int], tuple[Tensor, Tensor, Any]] = {}

    def activation(self, x: Tensor, params: QParams) -> Tensor:
        """Quantize once per tensor and scale: calls that share an input share its integers."""
        scale, zero, grid = float(params.scale), int(params.zero_point), params.grid
        trace = torch._C._get_tracing_state()  # a model may be traced twice, with the same tensors
        key = (id(x), state(x), id(trace), scale, zero, grid.qmin)
        if key not in self._rounded:
            clamped = x
            if grid.steps < 255:  # quantize_per_tensor clamps to eight bits, a reduced range has seven
                clamped = x.clamp((grid.qmin - zero) * scale, (grid.qmax - zero) * scale)
            dtype = torch.qint8 if grid.qmin < 0 else torch.quint8
            self._rounded[key] = (torch.quantize_per_tensor(clamped, scale, zero, dtype), x, trace)  # keeps the ids
        return self._rounded[key][0].dequantize()

    def dynamic(self, x: Tensor, config: TensorConfig) -> Tensor:
        return x  # a dynamic call that is no module of its own; the plan has left it in float

    def weight(self, w: Tensor, params: QParams) -> Tensor:
        return quantized_weight(w, params).dequantize()


class Engine:
    """The IPEX backend, for torch 2.8."""

    name = "ipex"

    def unavailable_because(self) -> str | None:
        """Say what is missing: the extension, its torch, or AVX2."""
        if importlib.util.find_spec("intel_extension_for_pytorch") is None:
            return "intel_extension_for_pytorch is not installed. Run: pip install 'raysq[ipex]'"
        try:
            extension()
        except (ImportError, OSError, RuntimeError) as exc:
            return f"intel_extension_for_pytorch {exc}. It needs torch 2.8: pip install 'raysq[ipex]'"
        if not {"avx512f", "avx2"} & set(instruction_sets()):
            return "its kernels need at least AVX2"
        return None

    def capabilities(self) -> Capabilities:
        """Return what oneDNN Graph fuses on this CPU."""
        floats = (Precision.BF16, Precision.FP32) if has_bf16() else (Precision.FP32,)
        int8 = (Precision.INT8, *floats)
        # no weight-only: IPEX's kernel is exact, but takes 10 times as long as fp32 at batch 1 on AVX2
        static, both = (Approach.STATIC,), (Approach.STATIC, Approach.DYNAMIC)
        activations = grids.activations()
        conv = OpCapability(int8, static, activations, grids.WEIGHTS, grids.GRANULARITIES)
        product = OpCapability(int8, static, activations)
        passive = OpCapability((Precision.INT8, Precision.FP32), static, activations)
        ops = {
            OpType.CONV1D: conv,
            OpType.CONV2D: conv,
            OpType.CONV3D: conv,
            OpType.CONV_TRANSPOSE1D: conv,
            OpType.CONV_TRANSPOSE2D: conv,
            OpType.CONV_TRANSPOSE3D: conv,
            OpType.LINEAR: OpCapability(int8, both, activations, grids.WEIGHTS, grids.GRANULARITIES),
            OpType.MATMUL: product,
            OpType.BMM: product,
            OpType.ADD: passive,
            OpType.MAX_POOL: passive,
            OpType.AVG_POOL: passive,
            OpType.EMBEDDING_BAG: OpCapability(
                (Precision.INT8, Precision.FP32), both, activations, grids.WEIGHTS, (Granularity.PER_TENSOR,)
            ),
            OpType.LSTM: OpCapability(
                (Precision.INT8, Precision.FP32), both, grids.U8, grids.WEIGHTS, (Granularity.PER_CHANNEL,)
            ),
        }
        # measured on AVX2, with VNNI or without: a sum fused into a convolution is wrong, int8 pools don't compile
        if "avx512_vnni" not in instruction_sets():
            ops = {op: capability for op, capability in ops.items() if capability is not passive}
        return Capabilities(self.name, ops, instruction_sets(), lacks_vnni())

    def float_forms(self) -> tuple[str, ...]:
        """Name plain TorchScript in both layouts, and `ipex.optimize` in fp32 and, where the CPU has it, bf16."""
        return (*FORMS, FP32_FORM, BF16_FORM) if has_bf16() else (*FORMS, FP32_FORM)

    def build_float(self, source: Source, form: str) -> ScriptedModel:
        """Build one float form."""
        ipex = extension()
        if form in FORMS:
            return build_form(source, FORMS[form], self.name)
        dtype = torch.bfloat16 if form == BF16_FORM else torch.float32

        def optimize(source: Source) -> nn.Module:
            with warnings.catch_warnings(action="ignore"):
                model = copy.deepcopy(source.model).eval()
                return ipex.optimize(model, dtype=dtype, inplace=True)  # type: ignore[no-any-return]

        autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype is torch.bfloat16)
        precision = Precision.BF16 if dtype is torch.bfloat16 else Precision.FP32
        return build_form(source, optimize, self.name, precision, autocast)

    def unseen(self, source: Source) -> Mapping[str, str]:
        """Return the calls that depend on no input of the model, and why they stay in float."""
        kinds = self.capabilities().ops
        return {name: CONSTANT for name in source.graph.constant_calls if source.graph[name].op in kinds}

    def build(self, source: Source, recipe: Recipe) -> ScriptedModel:
        """Build a recipe; calls that oneDNN Graph does not fuse are left in float by a second build."""
        extension()
        check(recipe, source, self.capabilities())
        scaled = source.under(recipe)
        constant = {name: reason for name, reason in self.unseen(source).items() if recipe.config(name).is_int8}
        built, unfused = without_unfused(
            lambda unfused: self._insert(scaled, scaled.planner.plan(recipe, {**constant, **unfused}))
        )
        return replace(built, configure=partial(self._to_save, source, recipe, {**constant, **unfused}))

    def call_times(self, source: Source, recipe: Recipe) -> dict[str, CallTime]:
        """Time the calls of a model in float, and those of a recipe that oneDNN runs in int8."""
        ipex = extension()
        return call_times(source, self.build(source, recipe), partial(ipex.verbose, ipex.VERBOSE_ON))

    def _to_save(self, source: Source, recipe: Recipe, idle: Mapping[str, str]) -> dict[str, Any]:
        qconf = self.configure(source, recipe, idle)
        if is_smoothed(qconf):
            log.info("configure.json is for a model prepared with %s(): others load it silently wrong.", SMOOTH_MAPPING)
        return qconf

    def configure(self, source: Source, recipe: Recipe, idle: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the qconf JSON with which IPEX's own `prepare`, `load_qconf_summary` and `convert` run a recipe.

        Args:
            source: what the recipe is for.
            recipe: what runs how.
            idle: calls that stay in float all the same, and why, as `build` found it.

        Raises:
            RecipeError: the recipe asks for what this backend can't run.
            BackendError: a qconf can't express it, or IPEX can't prepare the model.
        """
        check(recipe, source, self.capabilities())
        reasons = why_not(recipe)
        if reasons:
            raise BackendError(
                f"a qconf can't express this recipe: {'; '.join(reasons)}. Leave that out, or the qconf."
            )
        plans = replace(source, absorb=False).under(recipe).planner.plan(recipe, idle)
        smooth = any(plan.config.is_int8 and plan.multiplier is not None for plan in plans.values())
        return fill(summary(source, smooth), source.graph, plans, source.stats)

    def framework_default(
        self, source: Source, batches: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]]
    ) -> ScriptedModel:
        """Build what IPEX gives without raysq: its default static mapping, calibrated over `batches`.

        What runs in which precision is not read back: `convert` leaves no trace of the modules in the graph.

        Args:
            source: the model and its example inputs; no statistics are needed.
            batches: (positional, keyword) inputs of each calibration batch.

        Raises:
            BackendError: IPEX can't prepare or convert the model.
        """
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # observers complain of data they don't need
            prepared = prepare(source)
            try:
                for args, kwargs in batches:
                    prepared(*args, **kwargs)
                converted = extension().quantization.convert(prepared)
            except Exception as exc:
                raise BackendError(f"IPEX can't calibrate the model: {exc}\n{TRY_ELSEWHERE}") from exc
        return frozen(source, converted, self.name)

    def _insert(self, source: Source, plans: Mapping[str, CallPlan]) -> ScriptedModel:
        _forget_packed()
        model, plans = swap_dynamic(source.channels_last, source.graph, plans)
        flat = Flattened(model, source.args, source.kwargs)
        insertion = Insertion(apart(source.graph, plans), QuantizeDequantize())
        in_int8 = {name for name, plan in plans.items() if plan.config.is_int8 and not plan.reason}
        on_call = _copying(insertion, set_apart(source.graph) & in_int8)
        script = freeze(flat, Interceptor(model, on_call, out_of_place=source.graph.out_of_place))
        warm_up(script, flat)
        executed, left = executed_precisions(torch._C._last_executed_optimized_graph(), source.graph, plans)
        return ScriptedModel(self.name, script, Deployed.of(script, flat), executed, left, flat.example)


def _copying(on_call: Insertion, names: Collection[str]) -> Callable[[Site, Operands], Any]:
    """Return what computes calls as `on_call` does, and copies the results of some."""

    def call(site: Site, operands: Operands) -> Any:
        result = on_call(site, operands)
        return result.clone() if site.name in names else result

    return call


def frozen(source: Source, converted: nn.Module, backend: str) -> ScriptedModel:
    """Return what IPEX's `convert` made of a model, traced and warmed up; what runs in which precision is not read.

    Raises:
        BackendError: it can't be traced or run.
    """
    _forget_packed()
    flat = Flattened(converted, source.args, source.kwargs)
    script = freeze(flat)
    warm_up(script, flat)
    like = Flattened(source.model, source.args, source.kwargs)  # a converted model returns a dict for a ModelOutput
    return ScriptedModel(backend, script, Deployed.of(script, like), {}, {}, flat.example)


def _forget_packed() -> None:
    """Let oneDNN Graph drop the weights that it packed: it keeps even those of kernels that are gone.

    Turning the cache on is what empties it. Kernels that are still there pack theirs again when they run next.
    """
    extension()._C._jit_set_llga_weight_cache_enabled(True)


def summary(source: Source, smooth: bool = False) -> dict[str, Any]:
    """Return what IPEX saves of a model that it prepared: every op that it records, nothing decided.

    Raises:
        BackendError: IPEX can't prepare the model.
    """
    with torch.no_grad(), warnings.catch_warnings(action="ignore"), tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "qconf.json"
        prepared = prepare(source, smooth)
        if smooth:  # observers of SmoothQuant fail to save before they have seen data
            prepared(*source.args, **source.kwargs)
        prepared.save_qconf_summary(str(path))
        saved: dict[str, Any] = json.loads(path.read_text())
        return saved


def prepare(source: Source, smooth: bool = False) -> Any:
    """Return a copy of the model as IPEX prepares it: every op recorded in order, observers in place.

    Args:
        source: the model and its example inputs.
        smooth: whether inputs of linear modules may have smoothing factors.

    Raises:
        BackendError: IPEX can't prepare the model.
    """
    quantization = extension().quantization
    mapping = quantization.default_static_qconfig_mapping
    if smooth:
        mapping = quantization.get_smooth_quant_qconfig_mapping()
    given: dict[str, Any] = {"example_inputs": source.args}
    try:
        if source.kwargs:  # IPEX takes positional or keyword inputs, not both
            bound = forward_signature(source.model).bind(*source.args, **source.kwargs)
            given = {"example_kwarg_inputs": dict(bound.arguments)}
        with torch.no_grad():
            model = copy.deepcopy(source.model)  # `inplace=False` copies too, after it has changed the weights' layout
            if any(call.op in POOLS for call in source.graph.calls):
                model = with_strides(model)
            return quantization.prepare(model, mapping, inplace=True, **given)
    except Exception as exc:
        raise BackendError(f"IPEX can't prepare the model: {exc}\n{TRY_ELSEWHERE}") from exc
