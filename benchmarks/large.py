"""Tunes a large transformer with random weights, and shows how much memory all processes take at their peak.

`python benchmarks/large.py --docs docs/large.md` writes the table between that file's marks; have 17 GB free for it, or
say `--millions 20`. Each search runs in a process of its own, with one trial at a time.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from footprint import EVERY_S, watched
from tables import check_marks, markdown_head, markdown_row, publish, where
from torch import nn

BACKENDS = ("onednn", "ipex")
LAYERS = {350: (24, 1024, 2944), 20: (6, 384, 1088)}  # millions of parameters to layers, width, width of the MLP
HEAD = 64
TOKENS = 32  # in a sequence
VOCABULARY = {350: 32000, 20: 24000}
BATCHES = 2
TRIALS = 4
TOLERANCE = 0.2  # of the cosine between the logits and those of fp32; random weights are no trained ones
LIMIT = 16 * 2**30
PACKAGES = ("torch", "intel-extension-for-pytorch", "ray", "transformers")
BEGIN, END = "<!-- large table -->", "<!-- end of large table -->"
HEADINGS = (
    "parameters",
    "backend",
    "weights in fp32",
    "said beforehand",
    "peak",
    "driver",
    "worker",
    "Ray's own processes",
    "trials failed",
    "int8 / fp32 time",
)
GIB = 2**30


def llama(millions: int, seed: int = 0) -> nn.Module:
    """Return a model of the Llama architecture, its weights random, its embedding tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, hidden = LAYERS[millions]
    config = LlamaConfig(
        vocab_size=VOCABULARY[millions],
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="eager",  # fused attention has no int8 kernel
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def batches(millions: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return sequences of random tokens."""
    random = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(VOCABULARY[millions], (1, TOKENS), generator=random)} for _ in range(BATCHES)]


def fidelity(model: nn.Module, items: Sequence[Mapping[str, torch.Tensor]]) -> Callable[[Any], float]:
    """Return a score: how well the direction of the logits is that of the fp32 model's, 1 at best."""
    with torch.no_grad():
        exact = [model(**item).logits for item in items]

    def score(candidate: Any) -> float:
        cosines = [
            torch.nn.functional.cosine_similarity(candidate(**item).logits, logits, dim=-1).mean()
            for item, logits in zip(items, exact, strict=True)
        ]
        return float(torch.stack(cosines).mean())

    return score


def measure(millions: int, backend: str, threads: int) -> dict[str, Any]:
    """Tune in this process; return what a row needs beside the memory."""
    import raysq
    from raysq.errors import NoFeasibleRecipe
    from raysq.latency import Latency

    torch.set_num_threads(threads)
    model = llama(millions)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory(prefix="raysq_large_") as runs, redirect_stderr(io.StringIO()) as told:
        try:
            result = raysq.tune(
                model,
                batches(millions, 1),
                fidelity(model, batches(millions, 2)),
                tolerance=TOLERANCE,
                backend=backend,
                max_trials=TRIALS,
                max_concurrent_trials=1,
                num_threads=threads,
                latency=Latency(budget_s=0.5, final_budget_s=1.0),
                storage_path=runs,
            )
        except NoFeasibleRecipe as exc:
            result = exc.result
    return {
        "millions": millions,
        "backend": backend,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": weights,
        "said": float(re.findall(r"memory: about ([\d.]+) GiB", told.getvalue())[0]),
        "trials": len(result.trials),
        "failed": [trial.reason for trial in result.trials if trial.accuracy is None],
        "ratio": float(result.latency_ratio),
    }


def row(found: Mapping[str, Any]) -> str:
    """Return one line of the table."""
    peak, weights, peaks = found["peak"], found["weights"], found["peaks"]
    cells = (
        f"{found['parameters'] / 1e6:.0f} million",
        f"`{found['backend']}`",
        f"{weights / GIB:.2f}",
        f"{found['said']:.1f}",
        f"**{peak / GIB:.1f}**",
        *(f"{peaks[role] / GIB:.1f}" for role in ("driver", "workers", "Ray")),
        f"{len(found['failed'])} of {found['trials']}",
        f"{found['ratio']:.2f}",
    )
    return markdown_row(cells)


def table(rows: Sequence[Mapping[str, Any]], threads: int) -> str:
    """Return the whole table in Markdown, with where it was measured."""
    how = (
        "Memory in GiB: of all processes together, pages that they share counted once, sampled every "
        f"{EVERY_S:g} s; of each kind at its own peak. {TRIALS} trials of `auto`, one at a time, {TOKENS} tokens long."
    )
    return "\n".join([*markdown_head(HEADINGS), *map(row, rows), "", f"{how} {where(threads, PACKAGES)}"])


def main() -> None:
    """Measure each search in a process of its own, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, nargs="+", default=(20, 350), choices=LAYERS)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="directory for a JSON per search; those there are kept")
    parser.add_argument("--docs", type=Path, help="file between whose marks the table is written")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="raysq_large_"))
    if options.measure:
        millions, backend = options.measure
        found = measure(int(millions), backend, options.threads)
        (out / f"{millions}.{backend}.search.json").write_text(json.dumps(found))
        return

    check_marks(options.docs, BEGIN, END)
    out.mkdir(parents=True, exist_ok=True)
    every = [(str(millions), backend) for millions in options.millions for backend in options.backends]
    rows = []
    for millions, backend in every:
        file = out / f"{millions}.{backend}.json"
        if not file.exists():
            settings = ["--threads", str(options.threads), "--out", str(out)]
            seen = watched([sys.executable, __file__, "--measure", millions, backend, *settings], LIMIT)
            found = json.loads((out / f"{millions}.{backend}.search.json").read_text())
            file.write_text(json.dumps({**found, "peak": seen.peak, "parts": seen.parts, "peaks": seen.peaks}))
        rows.append(json.loads(file.read_text()))
    content = table(rows, options.threads)
    publish(content, options.docs, BEGIN, END)


if __name__ == "__main__":
    main()
