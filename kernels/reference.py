"""Simulates any recipe in float on any machine: the numerical check for the int8 kernels, and a search without them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raysq.capabilities import Capabilities, OpCapability
from raysq.deployed import Deployed
from raysq.flattened import Flattened
from raysq.graph import OpType
from raysq.kernels.base import check
from raysq.kernels.built import ScriptedModel
from raysq.kernels.cpu import instruction_sets, lacks_vnni
from raysq.kernels.floats import FORMS, build_form, freeze, warm_up
from raysq.kernels.grids import GRANULARITIES
from raysq.kernels.ipex import without_fusions
from raysq.recipe import Approach, Precision, QuantDType, Scheme
from raysq.simulated import simulating
from raysq.source import Source

if TYPE_CHECKING:
    from raysq.recipe import Recipe

__all__ = ["Engine"]

ALL_PAIRS = (
    (QuantDType.U8, Scheme.AFFINE),
    (QuantDType.S8, Scheme.SYMMETRIC),
    (QuantDType.S8, Scheme.AFFINE),
    (QuantDType.U8, Scheme.SYMMETRIC),
)


class Engine:
    """The reference backend: every pair of scheme and type, every approach, on any CPU."""

    name = "reference"

    def unavailable_because(self) -> str | None:
        """Return None: it runs anywhere."""
        return None

    def capabilities(self) -> Capabilities:
        """Return every pair of scheme and type for every kind of call."""
        precisions = (Precision.INT8, Precision.BF16, Precision.FP32)
        approaches = (Approach.STATIC, Approach.DYNAMIC)
        weighted = OpCapability(precisions, tuple(Approach), ALL_PAIRS, ALL_PAIRS[1:] + ALL_PAIRS[:1], GRANULARITIES)
        plain = OpCapability(precisions, approaches, ALL_PAIRS)
        ops = {op: weighted if op.has_weight else plain for op in OpType}
        return Capabilities(self.name, ops, instruction_sets(), lacks_vnni())

    def float_forms(self) -> tuple[str, ...]:
        """Name plain TorchScript in both layouts."""
        return tuple(FORMS)

    def build_float(self, source: Source, form: str) -> ScriptedModel:
        """Build one float form."""
        return build_form(source, FORMS[form], self.name)

    def build(self, source: Source, recipe: Recipe) -> ScriptedModel:
        """Build a simulation of a recipe in fp32."""
        check(recipe, source, self.capabilities())
        source = source.under(recipe)
        plans = source.planner.plan(recipe)
        flat = Flattened(source.model, source.args, source.kwargs)
        script = freeze(flat, simulating(source, plans))
        with without_fusions():  # IPEX, where it is loaded, sums convolutions into tensors that are still read
            warm_up(script, flat)
        executed = {n: Precision.FP32 if p.reason else p.config.precision for n, p in plans.items()}
        left = {n: p.reason for n, p in plans.items() if p.reason}
        return ScriptedModel(self.name, script, Deployed.of(script, flat), executed, left, flat.example)
