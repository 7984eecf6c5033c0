"""Models for the tests of sensitivities, with their calibration data."""

from __future__ import annotations

from torch import Tensor, nn

from raysq.calibration_data import Batch
from raysq.inspection import deployable
from raysq.observation import observe
from raysq.recipe import Granularity, OpConfig, Precision, QuantDType, Recipe, Scheme, TensorConfig
from raysq.source import Source

INT8 = OpConfig(Precision.INT8)
PER_TENSOR = OpConfig(Precision.INT8, weight=TensorConfig(QuantDType.S8, Scheme.SYMMETRIC, Granularity.PER_TENSOR))


class Residual(nn.Module):
    """Linear layers of which some are added up, so that a call's plan depends on its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.left = nn.Linear(16, 16)
        self.right = nn.Linear(16, 16)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(self.left(x) + self.right(x))


def prepared(model: nn.Module, batches: list[Tensor], targets: list[Tensor] | None = None) -> Source:
    """Return a model with its statistics."""
    copy, graph = deployable(model.eval(), (batches[0],), {})
    labels = targets or [None] * len(batches)
    calls = [Batch((x,), {}, y) for x, y in zip(batches, labels, strict=True)]
    return Source(copy, graph, observe(copy, graph, calls), (batches[0],))


def recipe_of(source: Source, config: OpConfig = INT8) -> Recipe:
    """Return the recipe with every call under one configuration."""
    return Recipe({call.name: config for call in source.graph.calls})
