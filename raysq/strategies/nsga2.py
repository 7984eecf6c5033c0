"""The Pareto front of all objectives, by a genetic algorithm that sorts by dominance."""

from __future__ import annotations

from typing import ClassVar

from optuna.samplers import NSGAIISampler

from raysq.checks import check_whole
from raysq.strategies.sampled import ByOptuna

__all__ = ["NSGA2"]

POPULATION = 20  # Optuna's 50 would all be random in `raysq.tune`'s default budget; with 10 it soon stood still


class NSGA2(ByOptuna):
    """The default recipe, then NSGA-II over the whole space: what no other trial beats in all objectives.

    The objectives are latency, accuracy and what else the goal names, each for itself; the goal's weights only pick
    the winner. Infeasible trials rank behind feasible ones, by their loss. `Result.pareto_front` is what it found. It
    learns from generation to generation: give it a hundred trials or more.

    Deb, Pratap, Agarwal, Meyarivan: A fast and elitist multiobjective genetic algorithm, IEEE Transactions on
    Evolutionary Computation 6 (2002). Crossover and mutation are Optuna's defaults.

    Args:
        population_size: recipes in a generation, >= 2; the first is random but for the default recipe.

    Raises:
        OptionError: `population_size` below 2.
    """

    name: ClassVar[str] = "nsga2"
    front: ClassVar[bool] = True

    def __init__(self, population_size: int = POPULATION) -> None:
        check_whole("population_size", population_size, 2)
        super().__init__(fallback=True)
        self.population_size = population_size

    def sampler(self) -> NSGAIISampler:
        """Return Optuna's NSGA-II."""
        return NSGAIISampler(seed=self.seed, population_size=self.population_size)
