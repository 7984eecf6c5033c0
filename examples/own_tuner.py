"""Plain Ray Tune: raysq as trainable, search space and stopper inside a Tuner of your own. Any searcher fits."""

from __future__ import annotations

from ray import tune
from ray.tune.search.optuna import OptunaSearch

import raysq
from raysq.demo import workload
from raysq.recipe import Recipe


def main() -> None:
    """Search with Optuna through a Tuner, then build the best recipe."""
    model, calib, accuracy = workload()
    prepared = raysq.prepare(model, calib)  # inspects and calibrates once; every trial shares it
    tuner = tune.Tuner(
        raysq.trainable(prepared, accuracy),
        param_space=raysq.search_space(prepared),
        tune_config=tune.TuneConfig(
            metric="latency_ratio",
            mode="min",
            search_alg=OptunaSearch(seed=0),
            num_samples=10,
            max_concurrent_trials=1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            stop=raysq.AccuracyConstraintStopper(tolerance=0.01),
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_at_end=False
            ),  # a trial's recipe is all there is to keep
            verbose=1,
        ),
    )
    results = tuner.fit()

    metrics = [results[index].metrics or {} for index in range(len(results))]
    feasible = [trial for trial in metrics if trial.get("feasible")]
    if not feasible:
        raise SystemExit("no trial held the accuracy; give it more samples")
    best = min(feasible, key=lambda trial: trial["latency_ratio"])
    print(f"accuracy {best['accuracy']:.4f}, {best['latency_ratio']:.3f} of the fastest fp32's time")
    int8 = raysq.quantize(model, calib, recipe=Recipe.from_json(best["recipe"]))
    print(f"rebuilt from its recipe: accuracy {accuracy(int8):.4f}")


if __name__ == "__main__":
    main()
