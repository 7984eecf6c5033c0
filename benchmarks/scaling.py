"""Searches on 1, 2 and 4 nodes, each in a fresh process, and writes a table of trials per second.

Run it as `python benchmarks/scaling.py --docs docs/scaling.md`: the nodes are Ray nodes of this machine, each pinned to
a core as long as there are enough. On a cluster, run it on its head node with `--address auto`: a search then gets that
many slots. It prints the table, and with --docs writes it between that file's marks.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import check_marks, markdown_head, markdown_row, publish, where

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "workloads"))

COUNTS = (1, 2, 4)
PACKAGES = ("torch", "ray")
BEGIN, END = "<!-- scaling table -->", "<!-- end of scaling table -->"
HEADINGS = ("nodes", "trials (timed)", "trials a second", "of one node's", "seconds to a model that passes")


def measure(name: str, count: int, address: str | None, max_trials: int) -> dict[str, Any]:
    """Search on so many nodes; return when trials ended, in seconds from the begin of the search."""
    import ray
    import workloads

    import raysq
    from raysq import journal

    cluster = None if address else nodes(count)
    ray.init(address=cluster.address if cluster else address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        model, calib, eval_fn, _, _ = workloads.load(name)
        result = raysq.tune(
            model,
            calib,
            eval_fn,
            backend="onednn",
            strategy="tpe",  # never waits for the trials that run, as strategies in stages do
            max_trials=max_trials,
            num_threads=1,
            workers=raysq.Workers(count=count, wait_s=900),
            storage_path=tempfile.mkdtemp(prefix="raysq_scaling_"),
            verbose=0,
        )
    finally:
        ray.shutdown()
        if cluster:
            cluster.shutdown()
    assert result.journal is not None
    entries = journal.read(result.journal)[1]
    return {
        "count": count,
        "ended_s": [entry.ended_s for entry in entries],
        "passed": [entry.record.feasible and entry.record.ratio is not None for entry in entries],
    }


def nodes(count: int) -> Any:
    """Start a head node without room, and nodes of one slot, each on a core of its own as far as there are cores."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cores = sorted(os.sched_getaffinity(0))
    for index in range(count):
        os.sched_setaffinity(0, {cores[index % len(cores)]})
        cluster.add_node(num_cpus=1)
    os.sched_setaffinity(0, cores)
    return cluster


def rate(measured: Mapping[str, Any]) -> float:
    """Return trials per second from the end of the first, which waits for its worker, to the end of the last."""
    ended: list[float] = sorted(measured["ended_s"])
    return (len(ended) - 1) / (ended[-1] - ended[0])


def passed_s(measured: Mapping[str, Any]) -> float | None:
    """Return the seconds from the begin of the search to the first recipe that passes, timed; None where none did."""
    return min((s for s, ok in zip(measured["ended_s"], measured["passed"], strict=True) if ok), default=None)


def row(measured: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    """Return one line of the table, beside what one node did."""
    seconds = passed_s(measured)
    cells = (
        str(measured["count"]),
        f"{len(measured['ended_s'])} ({sum(measured['passed'])})",
        f"{rate(measured):.2f}",
        f"**{rate(measured) / rate(one):.2f}**",
        "none" if seconds is None else f"{seconds:.1f}",
    )
    return markdown_row(cells)


def table(name: str, rows: Sequence[Mapping[str, Any]], address: str | None, cores: int) -> str:
    """Return the whole table in Markdown, with where it was measured."""
    head = markdown_head(HEADINGS)
    lines = [row(measured, rows[0]) for measured in rows]
    here = (
        f"All nodes are Ray nodes of one machine with {cores} cores: more nodes than cores can't be faster, and "
        "timings on one machine wait for each other."
    )
    what = f"`{name}`, strategy `tpe`, backend `onednn`. {'Each node is a machine.' if address else here}"
    return "\n".join([*head, *lines, "", f"{what} {where(1, PACKAGES)}"])


def main() -> None:
    """Measure each number of nodes in a process of its own, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS)
    parser.add_argument("--workload", default="digits_cnn")
    parser.add_argument("--max-trials", type=int, default=24)
    parser.add_argument("--address", help="of a cluster, such as auto; default: nodes of this machine")
    parser.add_argument("--docs", type=Path, help="file between whose marks the table is written")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measured = measure(options.workload, options.measure, options.address, options.max_trials)
        options.out.write_text(json.dumps(measured))
        return
    check_marks(options.docs, BEGIN, END)
    out = Path(tempfile.mkdtemp(prefix="raysq_scaling_"))
    rows = []
    for count in options.counts:
        path = out / f"{count}.json"
        command = [sys.executable, __file__, "--measure", str(count), "--out", str(path)]
        command += ["--workload", options.workload, "--max-trials", str(options.max_trials)]
        subprocess.run([*command, *(["--address", options.address] if options.address else [])], check=True)
        rows.append(json.loads(path.read_text()))
    content = table(options.workload, rows, options.address, len(os.sched_getaffinity(0)))
    publish(content, options.docs, BEGIN, END)


if __name__ == "__main__":
    main()
