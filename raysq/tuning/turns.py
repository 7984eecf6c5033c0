"""A reader/writer lock for one node: evaluations run side by side, a timing runs alone."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["TakesTurns", "Turns"]


class Turns:
    """File locks in a directory that all processes of a run on this node share.

    They are the kernel's (`flock`), so a process that dies leaves none behind. Whoever wants to be alone closes
    the door first: nobody else gets in, and those inside finish. Survives pickling; threads are independent.

    Args:
        directory: made on first use; on a local disk.

    Example:
        >>> import tempfile
        >>> turns = Turns(Path(tempfile.mkdtemp()))
        >>> with turns.alone():
        ...     pass  # nobody else on this node is inside shared() or alone()
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._held = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, (self.directory,)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock together with others; inside another `shared` or `alone` of this thread it does nothing."""
        if self._inside:
            yield
            return
        with self._locked("room", fcntl.LOCK_SH, through_door=fcntl.LOCK_SH):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock with nobody else on this node.

        Raises:
            RuntimeError: this thread holds it already, so that it would wait for itself.
        """
        if self._inside:
            raise RuntimeError("`alone` inside `shared` or `alone` would wait for itself.")
        with self._locked("door", fcntl.LOCK_EX), self._locked("room", fcntl.LOCK_EX):
            yield

    @property
    def _inside(self) -> int:
        return getattr(self._held, "depth", 0)

    @contextmanager
    def _locked(self, name: str, mode: int, through_door: int | None = None) -> Iterator[None]:
        descriptor = self._open(name)
        try:
            if through_door is None:
                fcntl.flock(descriptor, mode)
            else:
                door = self._open("door")
                try:
                    fcntl.flock(door, through_door)
                    fcntl.flock(descriptor, mode)
                finally:
                    os.close(door)
            self._held.depth = self._inside + 1
            try:
                yield
            finally:
                self._held.depth -= 1
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may still hold the descriptor open
        finally:
            os.close(descriptor)

    def _open(self, name: str) -> int:
        self.directory.mkdir(parents=True, exist_ok=True)
        return os.open(self.directory / name, os.O_RDWR | os.O_CREAT, 0o600)


class TakesTurns(nn.Module):
    """A model each of whose forwards holds the shared side of `turns`; all else is the model's own."""

    def __init__(self, model: nn.Module, turns: Turns) -> None:
        super().__init__()
        self.train(model.training)
        self.model = model
        self._turns = turns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with self._turns.shared():
            return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's own, without a prefix."""
        return self.model.state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's own, without a prefix."""
        return self.model.named_parameters(*args, **kwargs)
