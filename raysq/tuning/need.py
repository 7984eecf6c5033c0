"""How much memory a search takes, estimated before it begins."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import Tensor, nn

from raysq import memory
from raysq.job import Job
from raysq.tuning.shipping import Packed

__all__ = ["Need", "needed"]

PROCESS = 750 << 20  # bytes of a worker without a model: Python, torch, Ray, a backend; measured: 690 to 800
RAY = 750 << 20  # bytes of Ray's own processes on this machine; measured: 650 to 1000
COPIES = {"onednn": 4.0}  # of the weights in a worker: measured 3.8; divided by smoothing scales, in int8, temporaries
MOST_COPIES = 8.0  # for other backends: measured of ipex 7.5
GIB = 2**30

log = logging.getLogger("raysq")


@dataclass(frozen=True)
class Need:
    """Bytes that a search takes.

    Attributes:
        here: what this process and Ray's own hold.
        shared: what the workers of a node share: the model, its statistics, and what `eval_fn` holds.
        worker: of each worker beside that.
    """

    here: int
    shared: int
    worker: int

    def total(self, workers: int) -> int:
        """Return the bytes of all processes together."""
        return self.here + self.shared + workers * self.worker

    def line(self, workers: int) -> str:
        """Return one line for a person."""
        here, shared, worker = (f"{size / GIB:.1f}" for size in (self.here, self.shared, self.worker))
        return (
            f"memory: about {self.total(workers) / GIB:.1f} GiB at most: {here} here and in Ray's own processes, "
            f"{shared} in its object store, {worker} in each of {workers} workers"
        )

    def warn(self, workers: int, room: int) -> None:
        """Warn where the workers may take more than there is, and say what to do.

        Args:
            workers: how many there will be.
            room: bytes that they may take.
        """
        if workers * self.worker > room:
            fewer = f"set `max_concurrent_trials` to {max(1, room // self.worker)}, " if workers > 1 else ""
            log.warning(
                "memory may run out: %d workers take up to %.1f GiB, and Ray has %.1f GiB for them. If trials fail, %s"
                "evaluate in smaller batches, or free memory in this process.",
                *(workers, workers * self.worker / GIB, room / GIB, fewer),
            )


def needed(job: Job, packed: Packed) -> Need:
    """Estimate what the search of a job takes.

    Args:
        job: what its trials share.
        packed: the job as it is sent to workers.
    """
    copies = COPIES.get(job.prepared.engine, MOST_COPIES)
    shared = len(packed.payload) + sum(part.nbytes for part in packed.buffers)
    return Need(RAY + memory.resident(), shared, PROCESS + int(copies * _weights(job.prepared.source.model)))


def _weights(model: nn.Module) -> int:
    """Return the bytes of a model's tensors, shared ones once."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
