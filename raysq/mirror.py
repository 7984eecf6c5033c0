"""Keeps the folder at a URL like a run's directory: object stores can't append, so the local files are the run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raysq.errors import StorageError
from raysq.storage import Store

__all__ = ["Mirror", "mirrored"]

INTERVAL_S = 1.0  # from one look at the directory to the next
SHARE = 9  # times as long as copying took it waits, if that is more: a slow store isn't written to all the time
LAST_TRIES = 3  # at the end of a run
GRACE_S = 60.0  # and how long that may take; botocore alone tries five times a minute each
UNFINISHED = ".part"  # suffix of files that will be renamed

log = logging.getLogger("raysq")


class Mirror:
    """Copies the files of a directory that changed to a store, whole, until it is closed.

    A store that fails is told of once, and tried again: the run goes on with its local files.

    Args:
        directory: what is copied, with all below it; it may come into being later.
        store: where to.
    """

    def __init__(self, directory: Path, store: Store) -> None:
        self.directory = directory
        self.failure: StorageError | None = None  # of the last look; None: the store has all there is
        self._store = store
        self._sent: dict[Path, tuple[int, int]] = {}  # to size and time of what was copied
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="raysq-mirror", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy what is left, and tell where the run is if the store hasn't got it."""
        self._closing.set()
        self._thread.join(GRACE_S)
        if self._thread.is_alive() or self.failure is not None:
            why = self.failure or f"it has not answered for {GRACE_S:.0f} s."
            log.error("%s lacks the end of this run: %s The whole run is in %s.", self._store.url, why, self.directory)

    def _work(self) -> None:
        while not self._closing.is_set():
            begun = time.monotonic()
            self._look()
            self._closing.wait(max(INTERVAL_S, SHARE * (time.monotonic() - begun)))
        for left in reversed(range(LAST_TRIES)):
            self._look()
            if self.failure is None:
                return
            time.sleep(INTERVAL_S if left else 0.0)

    def _look(self) -> None:
        try:
            for path in sorted(self.directory.rglob("*")):
                self._copy(path)
        except (StorageError, OSError) as exc:
            if self.failure is None and not self._closing.is_set():
                log.warning("%s The run goes on in %s; copying is tried again.", exc, self.directory)
            self.failure = exc if isinstance(exc, StorageError) else StorageError(str(exc))
        else:
            if self.failure is not None:
                log.warning("%s can be written again.", self._store.url)
            self.failure = None

    def _copy(self, path: Path) -> None:
        if path.suffix == UNFINISHED or not path.is_file():
            return
        status = path.stat()
        state = status.st_size, status.st_mtime_ns
        if self._sent.get(path) != state:
            self._store.put(path, path.relative_to(self.directory).as_posix())
            self._sent[path] = state


@contextmanager
def mirrored(directory: Path, url: str | None) -> Iterator[None]:
    """Mirror a run's directory at a URL while the block lasts; do nothing where there is no URL.

    Raises:
        StorageError: the URL can't be reached; never later on.
    """
    if url is None:
        yield
        return
    mirror = Mirror(directory, Store(url))
    try:
        yield
    finally:
        mirror.close()
