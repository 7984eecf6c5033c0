"""A tuning strategy of one's own: INC's `AbcTuneStrategy`, with `next_recipe` for `next_tune_cfg`, and `traverse`.

Passed as an instance it needs no registration. A package offers it by name, `strategy="abc"`, through its pyproject:

    [project.entry-points."raysq.strategies"]
    abc = "custom_strategy:AbcTuneStrategy"
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import raysq
from raysq.demo import workload
from raysq.strategies import BARRIER, History, Proposal, Strategy
from raysq.strategies.base import Barrier


class AbcTuneStrategy(Strategy):
    """The default recipe, then each calibration algorithm for the inputs of all calls of a kind.

    Args:
        patience: rounds without a faster recipe after which the search ends, >= 1.
    """

    name: ClassVar[str] = "abc"

    def __init__(self, patience: int = 1) -> None:
        super().__init__()
        self.patience = patience

    def next_recipe(self, history: History) -> Iterator[Proposal | Barrier]:
        """Yield one round: what may be changed of the best recipe so far."""
        base = history.best.recipe if history.best else self.space.default()
        yield Proposal(base, "default")
        point = self.space.config(base)
        for dimension in self.space.dimensions:
            if dimension.name.endswith(".algorithm"):
                for value in dimension.values:
                    yield Proposal(self.space.recipe({**point, dimension.name: value}), f"{dimension.name} {value}")

    def traverse(self, history: History) -> Iterator[Proposal | Barrier]:
        """Go through rounds until none finds a faster recipe; the trials of a round run in parallel."""
        left = self.patience
        while left:
            before = history.best
            yield from self.next_recipe(history)
            yield BARRIER  # what follows sees how the round did
            left = self.patience if history.best is not before else left - 1


def main() -> None:
    """Search with it, and print what it found."""
    model, calib, accuracy = workload()
    result = raysq.tune(model, calib, accuracy, tolerance=0.01, max_trials=8, strategy=AbcTuneStrategy())
    print(f"accuracy {result.accuracy:.4f}, {result.latency_ratio:.3f} of the fastest fp32's time")


if __name__ == "__main__":
    main()
