"""A reader/writer lock for one node: evaluations run side by side, a timing runs alone."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
        waiting: gives a context in which this process waits for others; it is not pickled.

    Example:
        >>> import tempfile
        >>> turns = Turns(Path(tempfile.mkdtemp()))
        >>> with turns.alone():
        ...     pass  # nobody else on this node is inside shared() or alone()
    """

    def __init__(self, directory: Path, waiting: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.directory = directory
        self._waiting = waiting
        self._thread = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, (self.directory,)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock together with others; inside another `shared` or `alone` of this thread it does nothing."""
        if self._inside:
            yield
            return
        with ExitStack() as stack:
            with self._flock("door", fcntl.LOCK_SH):
                stack.enter_context(self._flock("room", fcntl.LOCK_SH))
            stack.enter_context(self._entered())
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock with nobody else on this node.

        Raises:
            RuntimeError: this thread holds it already, so that it would wait for itself.
        """
        if self._inside:
            raise RuntimeError("`alone` inside `shared` or `alone` would wait for itself.")
        with self._flock("door", fcntl.LOCK_EX), self._flock("room", fcntl.LOCK_EX), self._entered():
            yield

    @property
    def _inside(self) -> bool:
        return getattr(self._thread, "holder", None) == os.getpid()  # a forked child holds nothing

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self._thread.holder = os.getpid()
        try:
            yield
        finally:
            self._thread.holder = None

    @contextmanager
    def _flock(self, name: str, mode: int) -> Iterator[None]:
        self.directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.directory / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._lock(descriptor, mode)
            try:
                yield
            finally:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing isn't enough where a forked child has it open too
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int, mode: int) -> None:
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            with self._waiting():
                fcntl.flock(descriptor, mode)


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
