"""Places that are no local path: runs and artifacts at any URL that fsspec knows, such as s3://bucket/runs."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import fsspec

from raysq.errors import OptionError, ResumeError, StorageError

__all__ = ["Store", "continued", "is_url", "local_copy", "name_of", "parent_of", "read", "runs", "vacant", "written"]

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
BROKEN_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")  # what a pathlib.Path makes of one
CHECK = "Check the address, and that you may use it."
EXTRAS = {"s3": "s3", "s3a": "s3"}  # scheme to the extra that brings its package
PROBE = ".raysq-probe"
JOB_FILES = "working_dir_files"  # as Ray names the directory


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL.

    Raises:
        OptionError: it was one before it was made a `pathlib.Path`, which drops a slash.
    """
    if isinstance(place, Path) and BROKEN_URL.match(str(place)):
        raise OptionError(f"a URL is given as text: '{str(place).replace(':/', '://', 1)}', not as a pathlib.Path.")
    return bool(URL.match(str(place)))


def runs() -> Path:
    """Return the directory of runs that are not told where: raysq_runs, here.

    A Ray job that was submitted with files runs in Ray's copy of them, which Ray deletes: its runs are in the user's
    home directory.
    """
    return (Path.home() if JOB_FILES in Path.cwd().parts else Path()) / "raysq_runs"


def name_of(place: str | Path) -> str:
    """Return the last part of a path or URL."""
    return PurePosixPath(str(place)).name


def parent_of(place: str | Path) -> str:
    """Return the directory or URL that a path or URL lies in."""
    return str(place).rstrip("/").rpartition("/")[0] if is_url(place) else str(Path(place).parent)


def local_copy(url: str) -> Path:
    """Return the directory on this machine for the run at a URL: raysq_runs/s3/bucket/… for s3://bucket/….

    Raises:
        StorageError: the URL holds "..".
    """
    scheme, _, rest = url.partition("://")
    host, *folders = rest.split("/")
    parts = [part for part in (host.rpartition("@")[2], *folders) if part not in ("", ".")]
    if ".." in parts:
        raise StorageError(f"a URL must not hold '..', got {url}.")
    return runs().joinpath(scheme.lower(), *parts)


class Store:
    """A folder at a URL, or a file; credentials come from where its package looks for them, such as AWS_PROFILE.

    Raises:
        StorageError: from all that it does; the message names the URL and what the store says.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._made: set[str] = set()
        with self._told("reach"):
            self._fs, root = fsspec.core.url_to_fs(url)
            self._root = root.rstrip("/")

    def names(self) -> list[str]:
        """Return the names of all files below, relative to the folder; [""] if it is a file itself."""
        with self._told("read"):
            self._fs.invalidate_cache()
            found = [path.removeprefix(self._root).lstrip("/") for path in self._fs.find(self._root)]
        if any(".." in PurePosixPath(name).parts for name in found):
            raise StorageError(
                f"{self.url} holds a file whose name leads out of it, which nothing of raysq's does. Remove it."
            )
        return found

    def get(self, name: str, path: Path) -> None:
        """Copy a file to a local path, whose directory is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._told("read"):
            self._fs.get_file(self._path(name), str(path))

    def put(self, path: Path, name: str) -> None:
        """Copy a local file to a name."""
        with self._told("write"):
            self._make_parent(self._path(name))
            self._fs.put_file(str(path), self._path(name))

    def remove(self, name: str) -> None:
        """Delete a file."""
        with self._told("write"):
            self._fs.rm_file(self._path(name))

    def download(self, directory: Path, wanted: Callable[[str], bool] = lambda name: True) -> Path:
        """Copy the files whose names are wanted into a directory, and return that; of a file, return its copy."""
        names = self.names()
        if names == [""]:
            self.get("", directory / name_of(self.url))
            return directory / name_of(self.url)
        if not names:
            raise StorageError(f"there is nothing at {self.url}. Pass what a search or `save` was given.")
        for name in filter(wanted, names):
            self.get(name, directory / name)
        return directory

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _make_parent(self, path: str) -> None:
        parent = path.rpartition("/")[0]
        anchor = parent.partition("/")[0] or "/"
        if parent not in self._made and self._fs.exists(anchor):  # else s3fs would make the bucket, misspelt or not
            self._fs.makedirs(parent, exist_ok=True)
        self._made.add(parent)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as exc:  # each file system raises errors of its own, botocore's are no OSError
            extra = EXTRAS.get(self.url.partition("://")[0])
            reason = str(exc) or type(exc).__name__
            install = f"Run: pip install 'raysq[{extra}]'." if extra and isinstance(exc, ImportError) else None
            raise StorageError(f"can't {what} {self.url}: {reason.rstrip('.')}. {install or CHECK}") from exc


@contextmanager
def read(place: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """Give a local path for what is at a place: a path itself, or what a URL has, for as long as the block lasts.

    Args:
        place: file or directory, a path or a URL.
        wanted: which files of a folder at a URL are needed, by their names.

    Raises:
        StorageError: a URL has nothing, or can't be read.
    """
    if not is_url(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="raysq-") as scratch:
        yield Store(str(place)).download(Path(scratch), wanted)


@contextmanager
def written(place: str | Path) -> Iterator[Path]:
    """Give a local directory to write into: a path itself; or a scratch one, whose files go to the URL at the end.

    Raises:
        StorageError: the URL can't be written.
    """
    if not is_url(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="raysq-") as scratch:
        directory = Path(scratch)
        yield directory
        store = Store(str(place))
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            store.put(path, path.relative_to(directory).as_posix())


def vacant(url: str, name: str) -> None:
    """Make sure that a file can be made in the folder at a URL, where it must not stand yet.

    Raises:
        StorageError: it stands already, or nothing can be written there.
    """
    store = Store(url)
    if name in store.names():
        raise StorageError(f"{url}/{name} stands already. Pass `resume={url!r}` or another name.")
    with tempfile.NamedTemporaryFile() as empty:
        store.put(Path(empty.name), PROBE)
    with suppress(StorageError):  # a key that may write but not delete is enough for a run
        store.remove(PROBE)


def continued(url: str, name: str) -> tuple[Path, str]:
    """Return the local journal of a run at a URL, and the URL of its folder.

    What this machine has of the run and what the URL has may differ where a run was killed, or where it went on
    elsewhere: the one that holds the other is taken.

    Args:
        url: of the run's folder, or of its journal.
        name: of the journal in it.

    Raises:
        ResumeError: there is no journal at either place, or they are of different runs.
        StorageError: the URL can't be read.
    """
    folder = url.rstrip("/").removesuffix(f"/{name}")
    directory = local_copy(folder)
    path = directory / name
    try:
        store = Store(folder)
        names = store.names()
    except StorageError as exc:
        hint = f" This machine has a copy: `resume={str(path)!r}` goes on without the URL." if path.exists() else ""
        raise StorageError(f"{exc}{hint}") from exc
    if name in names:
        with tempfile.TemporaryDirectory(prefix="raysq-") as scratch:
            store.get(name, Path(scratch) / name)
            there = (Path(scratch) / name).read_bytes()
        here = path.read_bytes() if path.exists() else b""
        if _whole(there).startswith(_whole(here)):
            directory.mkdir(parents=True, exist_ok=True)
            path.write_bytes(there)
        elif not _whole(here).startswith(_whole(there)):
            raise ResumeError(
                f"{folder} and its copy {path} went different ways. Move one of them away, and resume the other."
            )
    elif not path.exists():
        raise ResumeError(f"there is no journal at {folder}. `resume` takes the folder of an earlier run.")
    for other in names:
        if other != name and "/" not in other and not (directory / other).exists():
            store.get(other, directory / other)
    return path, folder


def _whole(journal: bytes) -> bytes:
    """Return a journal without a last line that was torn."""
    return journal[: journal.rfind(b"\n") + 1]
