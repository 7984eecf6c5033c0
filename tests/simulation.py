"""A model of sixty calls that exists in numbers only: planted sensitivities and latencies, no kernels."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raysq.capabilities import Capabilities, OpCapability
from raysq.goal import Goal
from raysq.graph import Call, ModelGraph, OpType
from raysq.op_times import OpTimes
from raysq.prediction import REMAINDER
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


@dataclass
class RoughSimulation(Simulation):
    """The same with what makes real models harder: effects that don't add up, entries into int8, noisy timings.

    Attributes:
        interaction: how much more than their sum the losses of several calls are, per 1 % of loss.
        crossing: what it costs to enter or leave int8 between two calls, as a share of the second's fp32 time.
        noise: std of a measured ratio.
    """

    interaction: float = 0.1
    crossing: float = 0.05
    noise: float = 0.004

    def __post_init__(self) -> None:
        super().__post_init__()
        rng = random.Random(f"rough {self.seed}")
        shares = {OpType.CONV2D: (0.3, 0.6), OpType.LINEAR: (0.3, 0.6)}
        self.int8_share = {
            call.name: rng.uniform(*((1.1, 1.5) if call.is_depthwise else shares.get(call.op, (0.5, 1.3))))
            for call in self.graph.calls
        }
        names = [call.name for call in self.graph.calls]
        self.pairs = tuple(zip(names, names[1:], strict=False))

    def drop(self, recipe: Recipe) -> float:
        drop: float = super().run(recipe)["accuracy_drop"]
        return drop * (1 + self.interaction * drop / 0.01)

    def exact_ratio(self, recipe: Recipe) -> float:
        """Return the latency ratio without noise."""
        times = 0.0
        for call in self.graph.calls:
            config = recipe.config(call.name)
            scheme = 1.0 if config.activation.scheme is Scheme.AFFINE else 0.97
            shares = {"fp32": 1.0, "bf16": 0.7, "int8": scheme * self.int8_share[call.name]}
            times += self.time[call.name] * shares[config.precision]
        for one, other in self.pairs:
            if recipe.config(one).is_int8 != recipe.config(other).is_int8:
                times += self.crossing * self.time[other]
        return REMAINDER + (1 - REMAINDER) * times / sum(self.time.values())

    def run(self, recipe: Recipe) -> dict[str, Any]:
        result = super().run(recipe)
        if result["status"] == "failed":
            return result
        drop = self.drop(recipe)
        ratio = self.exact_ratio(recipe) * (1 + random.Random(recipe.digest).gauss(0, self.noise))
        feasible = self.goal.holds(drop) and bool(recipe.int8_calls)
        return result | {
            "accuracy": 0.9 * (1 - drop),
            "accuracy_drop": drop,
            "latency_ratio": ratio,
            "latency_ratio_low": ratio * (1 - 2 * self.noise),
            "latency_ratio_high": ratio * (1 + 2 * self.noise),
            "latency_predicted": not feasible,
            "feasible": feasible,
            "stage": "timed" if feasible else "evaluated",
        }

    def op_times(self) -> OpTimes:
        """Return the times of single calls as a profile would show them: each off by about 15 %."""
        rng = random.Random(f"times {self.seed}")
        total = sum(self.time.values()) / (1 - REMAINDER)
        shares = {
            name: {
                Precision.FP32: time / total,
                Precision.BF16: 0.7 * time / total * rng.lognormvariate(0, 0.15),
                Precision.INT8: self.int8_share[name] * time / total * rng.lognormvariate(0, 0.15),
            }
            for name, time in self.time.items()
        }
        return OpTimes(shares, {name: self.crossing * time / total for name, time in self.time.items()}, self.pairs)


def _lost(recipe: Recipe) -> Mapping[str, Any]:
    return {"recipe": recipe.to_json(), "status": "failed", "stage": "build", "reason": "planted", "feasible": False}
