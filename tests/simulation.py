"""A model of sixty calls that exists in numbers only: planted sensitivities and latencies, no kernels."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raysq.goal import Goal
from raysq.graph import Call, ModelGraph, OpType
from raysq.kernels.base import Capabilities, OpCapability
from raysq.recipe import Approach, Granularity, Precision, QuantDType, Recipe, Scheme
from raysq.sensitivities import Sensitivity
from raysq.space import SearchSpace, build_space

WEIGHTED = OpCapability(
    precisions=(Precision.INT8, Precision.BF16, Precision.FP32),
    approaches=(Approach.STATIC,),
    activations=((QuantDType.U8, Scheme.AFFINE), (QuantDType.S8, Scheme.SYMMETRIC)),
    weights=((QuantDType.S8, Scheme.SYMMETRIC),),
    granularities=(Granularity.PER_CHANNEL, Granularity.PER_TENSOR),
)
DYNAMIC = OpCapability(
    WEIGHTED.precisions,
    (Approach.STATIC, Approach.DYNAMIC),
    WEIGHTED.activations,
    WEIGHTED.weights,
    WEIGHTED.granularities,
)
WEIGHTLESS = OpCapability(WEIGHTED.precisions, (Approach.STATIC,), WEIGHTED.activations)
CAPABILITIES = Capabilities(
    backend="ipex",
    ops={
        OpType.CONV2D: WEIGHTED,
        OpType.LINEAR: DYNAMIC,
        OpType.MATMUL: WEIGHTLESS,
        OpType.ADD: WEIGHTLESS,
        OpType.MAX_POOL: WEIGHTLESS,
    },
    isa=("avx512_vnni",),
    reduce_range=False,
)


BYTES = {Precision.INT8: 1, Precision.BF16: 2, Precision.FP32: 4}


def make_call(
    name: str, op: OpType, *, module_type: str = "", depthwise: bool = False, block: str | None = None
) -> Call:
    weight = {OpType.CONV2D: (8, 1 if depthwise else 8, 3, 3), OpType.LINEAR: (8, 8)}.get(op, ())
    return Call(
        name=name,
        op=op,
        module=name.partition(":")[0],
        module_type=module_type or {OpType.CONV2D: "Conv2d", OpType.LINEAR: "Linear"}.get(op, "Block"),
        tensors=(f"{name}/0",),
        input_shapes=((1, 8, 8, 8),),
        output_shape=(1, 8, 8, 8),
        weight=f"{name}.weight" if weight else None,
        weight_shape=weight,
        groups=8 if depthwise else 1,
        macs=1000,
        block=block,
    )


def make_graph(calls: list[Call]) -> ModelGraph:
    return ModelGraph(tuple(calls), (), tuple(dict.fromkeys(c.block for c in calls if c.block)), (), {})


def sixty_calls() -> ModelGraph:
    """Ten blocks of a convolution, a depthwise one, two linears, a matmul and an addition."""
    calls = []
    for i in range(10):
        block = f"blocks.{i}"
        calls += [
            make_call(f"{block}.conv", OpType.CONV2D, block=block),
            make_call(f"{block}.dw", OpType.CONV2D, depthwise=True, block=block),
            make_call(f"{block}.fc1", OpType.LINEAR, block=block),
            make_call(f"{block}.fc2", OpType.LINEAR, block=block),
            make_call(f"{block}:matmul", OpType.MATMUL, block=block),
            make_call(f"{block}:add", OpType.ADD, block=block),
        ]
    return make_graph(calls)


@dataclass
class Simulation:
    """Answers a recipe as a trial would.

    Attributes:
        seed: of the planted numbers.
        sensitive: how many calls cost much accuracy in int8.
        tolerance: what the goal allows.
        objectives: what the goal makes small.
    """

    seed: int = 0
    sensitive: int = 5
    tolerance: float = 0.01
    failing: frozenset[str] = frozenset()  # calibration algorithms with which a trial fails
    nan: frozenset[str] = frozenset()  # ... or returns NaN
    graph: ModelGraph = field(default_factory=sixty_calls)
    objectives: Mapping[str, float] = field(default_factory=lambda: {"latency": 1.0})

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        names = [call.name for call in self.graph.calls]
        self.loss = {name: rng.uniform(0, 1e-4) for name in names}
        for name in rng.sample(names, self.sensitive):
            self.loss[name] = rng.uniform(0.008, 0.02)
        self.time = {name: rng.uniform(0.5, 1.5) for name in names}  # of fp32, per call
        noisy = {name: loss * rng.lognormvariate(0, 0.5) for name, loss in self.loss.items()}
        ranked = sorted(names, key=lambda name: -noisy[name])
        self.rankings = {"mse": tuple(ranked), "kl": tuple(rng.sample(names, len(names)))}

    @property
    def goal(self) -> Goal:
        return Goal(tolerance=self.tolerance, objectives=self.objectives)

    def space(self, **kwargs: Any) -> SearchSpace:
        return build_space(self.graph, CAPABILITIES, rankings=self.rankings, **kwargs)

    def costs(
        self, sensitivity: Sensitivity, recipe: Recipe, calls: Sequence[str] | None = None, floats: Collection[str] = ()
    ) -> dict[str, float]:
        """Return the planted losses as a sensitivity would see them: with noise, its own and always the same."""
        rng = random.Random(f"{self.seed} {sensitivity.name}")
        noisy = {name: loss * rng.lognormvariate(0, 0.5) for name, loss in self.loss.items()}
        wanted = recipe.int8_calls if calls is None else calls
        return {name: cost for name, cost in noisy.items() if name in wanted and recipe.config(name).is_int8}

    def run(self, recipe: Recipe) -> dict[str, Any]:
        drop, time, size, held = 0.0, 0.0, 0.0, []
        for call in self.graph.calls:
            config = recipe.config(call.name)
            share = {"fp32": 1.0, "bf16": 0.7}.get(config.precision, 0.4)
            if config.is_int8:
                algorithm = str(config.activation.algorithm)
                drop += self.loss[call.name] * {"mse": 1.0, "minmax": 1.4, "kl": 0.9}.get(algorithm, 1.1)
                share = 1.3 if call.is_depthwise else 0.45 if config.activation.scheme is Scheme.AFFINE else 0.43
            time += self.time[call.name] * share
            width = BYTES[config.precision] / BYTES[Precision.FP32]
            size += width if call.weight else 1.0
            held.append(width * self.time[call.name])  # what takes long holds much
        ratio = time / sum(self.time.values())
        algorithms = {str(c.activation.algorithm) for c in recipe.ops.values() if c.is_int8}
        feasible = self.goal.holds(drop) and bool(recipe.int8_calls)
        result: dict[str, Any] = {
            "accuracy": 0.9 * (1 - drop),
            "accuracy_drop": drop,
            "baseline_accuracy": 0.9,
            "latency_ratio": ratio,
            "latency_ratio_low": ratio * 0.995,
            "latency_ratio_high": ratio * 1.005,
            "latency_predicted": not feasible,
            "size_ratio": size / len(self.graph.calls),
            "memory_ratio": max(held) / max(self.time.values()),
            "feasible": feasible,
            "stage": "timed" if feasible else "evaluated",
            "int8_calls": len(recipe.int8_calls),
            "recipe": recipe.to_json(),
            "status": "finished",
            "training_iteration": 1,
        }
        if algorithms & self.failing:
            return {**_lost(recipe), "latency_ratio": 1.0}
        if algorithms & self.nan:
            return {**_lost(recipe), "accuracy": float("nan"), "latency_ratio": float("nan")}
        return result


def _lost(recipe: Recipe) -> Mapping[str, Any]:
    return {"recipe": recipe.to_json(), "status": "failed", "stage": "build", "reason": "planted", "feasible": False}
