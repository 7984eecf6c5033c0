"""Measures what a rejected trial costs, in items and in CPU seconds, on real int8 recipes, and how often it is wrong.

`python benchmarks/early_rejection.py --docs docs/early-rejection.md`: builds recipes of `cifar_mbv2_hard` that lose
more or less, scores each on all 5,000 images once, and then lets the evaluation end early in one random order after
another: on the recorded scores for the items, with the model itself for the seconds. It takes minutes on one core.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tables import check_marks, markdown_head, markdown_row, publish, where
from torch.utils.data import TensorDataset

import raysq
from raysq import evaluation
from raysq.kernels import base
from raysq.strategies.moves import in_float, other_values, rankings, with_feature

if TYPE_CHECKING:
    from raysq.recipe import Recipe
    from raysq.scores import Units
    from raysq.space import SearchSpace

sys.path.insert(0, str(Path(__file__).resolve().parent / "workloads"))

WORKLOAD = "cifar_mbv2_hard"
BATCH = 50
TOLERANCE = 0.01  # relative
SHOWN = (0.24, 0.1, 0.05, 0.02)  # the recipe nearest to each is shown
EXACT = 0.05  # what a loss of exactly this costs is shown too
FLOATS = (0, 2, 4, 6, 8)  # most sensitive calls in float
BEGIN, END = "<!-- early rejection table -->", "<!-- end of early rejection table -->"
HEADINGS = ("the recipe loses", "recipe", "items: median", "mean", "95th percentile", "CPU seconds: median")

Scores = NDArray[np.bool_]  # (items,): whether each item is right, in their own order


@dataclass(frozen=True)
class Row:
    """A recipe and what its rejection took, as shares of a whole evaluation.

    Attributes:
        loss: of accuracy, in points of 1.
        recipe: in words.
        items: for each random order, (orders,); 1 where it was not rejected.
        seconds: CPU seconds, for each measured run; empty where the scores are no model's own.
    """

    loss: float
    recipe: str
    items: NDArray[np.float64]
    seconds: Sequence[float] = ()

    def __str__(self) -> str:
        spread = (np.median(self.items), self.items.mean(), np.quantile(self.items, 0.95))
        seconds = f"{np.median(self.seconds):.1%}" if self.seconds else ""
        cells = (f"{self.loss:.4f}", self.recipe, *(f"{share:.1%}" for share in spread), seconds)
        return markdown_row(cells)


class Recorded:
    """Scores as items, read a batch at once: thousands of evaluations are replayed."""

    def __init__(self, right: Scores) -> None:
        self._right = right

    def __len__(self) -> int:
        return len(self._right)

    def __getitem__(self, index: int) -> np.bool_:
        return self._right[index]  # type: ignore[no-any-return]

    def __getitems__(self, indices: list[int]) -> Scores:
        return self._right[indices]


def replay(right: Scores, seed: int) -> raysq.Evaluation:
    """Return an evaluation of recorded scores, in the order that any of as many items has with this seed."""
    return raysq.Evaluation(
        Recorded(right), lambda output, _: output, batch_size=BATCH, collate=torch.from_numpy, seed=seed
    )


def reference(fp32: Scores, seed: int) -> Units:
    """Return the fp32 model's scores in an order."""
    units = evaluation.evaluate(replay(fp32, seed), torch.nn.Identity(), raysq.Goal(TOLERANCE)).units
    assert units is not None
    return units


def items_taken(right: Scores, fp32: Scores, orders: int) -> NDArray[np.float64]:
    """Return the share of the items after which a recipe with these scores is rejected, for each random order."""
    shares = np.ones(orders)
    for seed in range(orders):
        score = evaluation.evaluate(
            replay(right, seed), torch.nn.Identity(), raysq.Goal(TOLERANCE), reference(fp32, seed)
        )
        if score.early is not None:
            shares[seed] = score.early.seen / score.early.items
    return shares


def seconds_taken(model: Any, items: TensorDataset, fp32: Scores, runs: int) -> list[float]:
    """Return the CPU seconds of evaluations that end early over those of whole ones, for some random orders."""

    def spent(seed: int, units: Units | None) -> float:
        eval_fn = raysq.Evaluation(
            items, lambda output, batch: output.argmax(1) == batch[1], batch_size=BATCH, seed=seed
        )
        begun = time.process_time()
        evaluation.evaluate(eval_fn, model, raysq.Goal(TOLERANCE), units)
        return time.process_time() - begun

    spent(0, reference(fp32, 0))  # warms up
    return [spent(seed, reference(fp32, seed)) / spent(seed, None) for seed in range(runs)]


def brought_to(right: Scores, fp32: Scores, net: int) -> Scores:
    """Return scores that lose so many items net, by turning randomly chosen lost ones right."""
    lost = np.flatnonzero(fp32 & ~right)
    surplus = int(fp32.sum()) - int(right.sum()) - net
    turned = right.copy()
    turned[np.random.default_rng(0).choice(lost, surplus, replace=False)] = True
    return turned


def recipes(space: SearchSpace) -> Iterator[tuple[str, Recipe]]:
    """Yield recipes that lose more or less, and their names."""
    default = space.default()
    ranking = next(iter(rankings(space).values()))
    algorithms = {next(iter(default.ops.values())).activation.algorithm: default}
    algorithms |= {v: with_feature(space, "algorithm", v, default) for v in other_values(space, "algorithm", default)}
    for algorithm, recipe in algorithms.items():
        for count in FLOATS:
            yield (
                f"{algorithm}, {count} of {len(ranking)} in fp32",
                in_float(space, ranking[:count], raysq.recipe.Precision.FP32, recipe),
            )


def measure(backend: str, orders: int, edge_orders: int, runs: int) -> tuple[list[Row], str]:
    """Return the table's rows, and a sentence about wrong rejections at the edge."""
    workloads = importlib.import_module("workloads")
    model, calib, *_ = workloads.load(WORKLOAD)
    inputs, labels = zip(*((x, y) for (x,), y in workloads.eval_batches(WORKLOAD)), strict=True)
    items = TensorDataset(torch.cat(inputs), torch.cat(labels))

    def scores(of: Any) -> Scores:
        with torch.no_grad():
            return np.concatenate([(of(x).argmax(1) == y).numpy() for x, y in zip(inputs, labels, strict=True)])

    prepared = raysq.prepare(model, calib, backend=backend, smoothing=False, num_threads=1)
    engine, fp32 = base.get(backend), scores(prepared.source.model)
    found: dict[str, tuple[Recipe, Scores]] = {}
    for name, recipe in recipes(prepared.space):
        found[name] = recipe, scores(engine.build(prepared.source, recipe).model)
        print(f"{name}: loses {fp32.mean() - found[name][1].mean():.4f}", file=sys.stderr)
    losses = {name: float(fp32.mean() - right.mean()) for name, (_, right) in found.items()}
    rows = []
    for name in dict.fromkeys(min(losses, key=lambda n: abs(losses[n] - target)) for target in SHOWN):
        recipe, right = found[name]
        seconds = seconds_taken(engine.build(prepared.source, recipe).model, items, fp32, runs)
        rows.append(Row(losses[name], name, items_taken(right, fp32, orders), seconds))

    def nearest(net: int) -> Scores:
        """Scores of the recipe that loses least of those that lose more, brought to this."""
        least = min((n for n in losses if losses[n] * len(fp32) >= net), key=lambda n: losses[n])
        return brought_to(found[least][1], fp32, net)

    exact = nearest(round(EXACT * len(fp32)))
    rows.append(Row(EXACT, "the next worse one, some items turned", items_taken(exact, fp32, orders)))
    allowed = TOLERANCE * float(fp32.mean())
    net = int(allowed * len(fp32))
    wrong = float((items_taken(nearest(net), fp32, edge_orders) < 1).mean())
    edge = (
        f"A recipe that loses {net / len(fp32):.4f}, where {allowed:.5f} is allowed, is rejected in {wrong:.1%} of "
        f"{edge_orders} orders."
    )
    return sorted(rows, key=lambda row: -row.loss), edge


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="onednn")
    parser.add_argument("--orders", type=int, default=400, help="random orders for each recipe")
    parser.add_argument("--edge-orders", type=int, default=1000, help="random orders for what just holds the goal")
    parser.add_argument("--runs", type=int, default=5, help="evaluations of which the CPU seconds are measured")
    parser.add_argument("--docs", type=Path, help="file between whose marks the table is written")
    options = parser.parse_args()
    check_marks(options.docs, BEGIN, END)
    torch.set_num_threads(1)
    rows, edge = measure(options.backend, options.orders, options.edge_orders, options.runs)
    head = markdown_head(HEADINGS)
    sentence = f"{options.orders} random orders. {where(1, ('torch',))[:-1]}, backend {options.backend}."
    content = "\n".join([*head, *map(str, rows), "", f"{edge} {sentence}"])
    publish(content, options.docs, BEGIN, END)


if __name__ == "__main__":
    main()
