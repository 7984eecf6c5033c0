"""`raysq.sensitivity`: what int8 costs each call of a model, as a table; remembered on disk, parallel over Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from raysq import fingerprint, sensitivities
from raysq.checks import is_whole
from raysq.errors import CalibrationError, OptionError
from raysq.prepared import Prepared, prepare
from raysq.recipe import Recipe
from raysq.sensitivities import Sensitivity, rank
from raysq.sensitivities.base import measurable
from raysq.sensitivity_cache import Costs, SensitivityCache

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["sensitivity"]

SHARE = 8  # calls that are measured together: the more, the less often the whole recipe, and the more a crash loses


def sensitivity(
    model: torch.nn.Module | str,
    calib: Any,
    method: str | Sensitivity = "mse",
    *,
    method_kwargs: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    backend: str | None = None,
    approach: str = "static",
    example_inputs: Any = None,
    cache: str | Path | None = None,
    parallel: bool | int = False,
    seed: int = 0,
) -> pd.DataFrame:
    """Return what int8 costs each call, the most sensitive first; the model is not changed.

    Costs of one method compare with each other, not with those of another. A call that a method can't tell is left
    out: one in float, one that calibration never reached, for `hawq_v2` one without a weight.

    Args:
        model: fp32 module on the CPU, or "module:function" that returns it.
        calib: calibration batches, read once; or `raysq.Calibration`. Labels serve methods that have a loss.
        method: "mse" (statistics alone), "mse_v2", "hawq_v2", "fisher" or "probe", see `raysq.sensitivities`; or an
            instance of one, or of your own `Sensitivity`.
        method_kwargs: arguments of a named method, such as {"loss": torch.nn.functional.cross_entropy}.
        recipe: how each call is quantized; default the one that `raysq.quantize` takes.
        backend: "ipex", "onednn", "openvino" or "reference"; None takes the first that can run here. It decides
            which calls can be int8, and how.
        approach: "static", "dynamic" or "auto".
        example_inputs: what the model is traced with; default the first calibration batch.
        cache: directory of a file that keeps costs; the same question finds them there, and one that was cut short
            goes on. It goes by model, calibration data, recipe, method and raysq's version; of a loss it sees the
            code, not the data that this reads.
        parallel: True spreads methods that look at one call after the other over Ray; a number >= 1: over so many
            tasks at once.
        seed: of the kept calibration samples.

    Returns:
        A row per call: call, op, block, cost, share (of the sum of all positive costs), macs.

    Raises:
        InputError: an argument that can't be used.
        StorageError: the cache can't be written or read.

    Example:
        >>> raysq.sensitivity(model, calib, "mse_v2").head()  # doctest: +SKIP
    """
    if isinstance(method, str):
        method = sensitivities.get(method, **(method_kwargs or {}))
    elif method_kwargs:
        raise OptionError("`method_kwargs` go with a method's name; give an instance its own arguments.")
    elif isinstance(method, type) or not callable(getattr(method, "scores", None)):
        raise OptionError(f"`method` must be a name or a Sensitivity, got {method!r}.")
    if not isinstance(parallel, bool) and (not is_whole(parallel) or parallel < 1):
        raise OptionError(f"`parallel` must be True, False or a whole number of at least 1, got {parallel!r}.")
    if calib is None:
        raise CalibrationError("a sensitivity is what int8 does to calibration data: pass `calib`.")
    prepared = prepare(model, calib, backend=backend, approach=approach, example_inputs=example_inputs, seed=seed)
    recipe = recipe or prepared.space.default()
    calls = measurable(prepared.source, recipe)
    kept = None if cache is None else SensitivityCache(Path(cache), _question(prepared, recipe, method, seed))
    known = {} if kept is None else kept.read()
    for costs in _measured(method, prepared, recipe, [call for call in calls if call not in known], parallel):
        if kept is not None:
            kept.append(costs)
        known |= costs
    return _table(prepared, {call: cost for call in calls if (cost := known[call]) is not None})


def _measured(
    method: Sensitivity, prepared: Prepared, recipe: Recipe, calls: Sequence[str], parallel: bool | int
) -> Iterator[Costs]:
    """Yield the costs of all calls, part by part; None for those that the method leaves out."""
    size = len(calls) if method.one_pass else SHARE
    parts = [calls[i : i + size] for i in range(0, len(calls), max(size, 1))]
    if parallel and len(parts) > 1:
        from raysq.tuning.measuring import in_parallel

        found = in_parallel(method, prepared.source, recipe, parts, None if parallel is True else parallel)
    else:
        found = ((part, method.scores(prepared.source, recipe, part)) for part in parts)
    for part, scores in found:
        yield {call: scores.get(call) for call in part}


def _question(prepared: Prepared, recipe: Recipe, method: Sensitivity, seed: int) -> dict[str, str]:
    """Return what costs depend on."""
    items = prepared.source.stats.items if prepared.source.stats is not None else ()
    labels = [leaf for leaf in tree_leaves([item.target for item in items]) if isinstance(leaf, np.ndarray)]
    return {
        **prepared.fingerprints,
        "labels": fingerprint.of_tensors(map(torch.from_numpy, labels))[:16],
        "seed": str(seed),
        "recipe": recipe.digest,
        "method": method.name,
        "code": fingerprint.of_function(method.scores),
        "arguments": repr([(name, _spelled(value)) for name, value in sorted(vars(method).items())]),
        "raysq": metadata.version("raysq"),
    }


def _spelled(value: Any) -> str:
    """Return what an argument does, the same in every process."""
    if isinstance(value, torch.nn.Module):
        settings = {name: item for name, item in vars(value).items() if not name.startswith("_")}
        return repr((fingerprint.of_model(value), sorted(settings.items())))
    if isinstance(value, partial):
        given = [_spelled(item) for item in value.args], {name: _spelled(v) for name, v in value.keywords.items()}
        return repr((_spelled(value.func), given))
    return fingerprint.of_function(value) if callable(value) else repr(value)


def _table(prepared: Prepared, costs: Mapping[str, float]) -> pd.DataFrame:
    import pandas as pd

    total = sum(cost for cost in costs.values() if cost > 0)
    rows = []
    for name in rank(costs):
        call, cost = prepared.source.graph[name], costs[name]
        share = max(cost, 0.0) / total if total else 0.0
        rows.append((name, call.op.value, call.block, cost, share, call.macs))
    return pd.DataFrame(rows, columns=["call", "op", "block", "cost", "share", "macs"])
