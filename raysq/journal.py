"""The journal of a run: a header, then one line of JSON per finished trial, on disk before the next one counts.

Ray's own snapshot may lose every trial of a run that is killed; a line that stands here is never lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

from raysq.checks import is_whole
from raysq.errors import InputError, ResumeError, StorageError, shown
from raysq.journal_lines import entry_from_dict, header_from_dict, to_dict
from raysq.plain_data import from_json
from raysq.run import Entry, Header

__all__ = ["FILE", "SCHEMA", "Journal", "read", "vacant"]

T = TypeVar("T")

FILE = "journal.jsonl"  # of a run's directory
SCHEMA = 1  # grows by additions only: a reader of schema n accepts every schema <= n


class Journal:
    """Appends entries to one file, which no other process may write meanwhile.

    Use `Journal.create` or `Journal.resume`; close it, or use it in a `with` block.
    """

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self._file = file

    @classmethod
    def create(cls, path: Path, header: Header) -> Journal:
        """Start a journal; its directory is made.

        Raises:
            StorageError: the path can't be written, or stands already.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = FileIO(path, "x")
        except FileExistsError as exc:
            raise _taken(path) from exc
        except OSError as exc:
            raise StorageError(f"can't write {path}: {exc.strerror}. Pass another `storage_path`.") from exc
        _lock(path, file)
        journal = cls(path, file)
        journal._write({"schema": SCHEMA, **to_dict(header)})
        with contextlib.suppress(OSError):  # the file's name must survive too; not every file system can
            _sync_directory(path.parent)
        return journal

    @classmethod
    def resume(
        cls, path: Path, fingerprints: Mapping[str, str], settings: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[Journal, Header, tuple[Entry, ...]]:
        """Continue a journal, dropping a last line that was torn by a crash.

        Args:
            path: of the journal.
            fingerprints: what the run that goes on is about.
            settings: "backend" and arguments by which trials are judged and measured.

        Raises:
            ResumeError: missing, damaged, in use, of a run with other fingerprints, or with other settings.
            StorageError: the path can't be written.
        """
        header, entries = read(path)
        differ = [k for k in sorted({*header.fingerprints, *fingerprints}) if _get(header, k) != fingerprints.get(k)]
        if differ:
            what = "; ".join(f"{k}: {_get(header, k)} there, {fingerprints.get(k)} now" for k in differ)
            raise ResumeError(f"{path} belongs to another run ({what}). Start a new one: leave out `resume`.")
        before = {"backend": header.backend, **header.arguments}
        others = [k for k, value in settings.items() if before.get(k) != value]
        if others:
            what = "; ".join(f"{k}: {before.get(k)} there, {settings[k]} now" for k in others)
            raise ResumeError(
                f"the trials of {path} were judged or measured otherwise ({what}). Pass it as `warm_start` instead of "
                "`resume`: a new run judges them anew, and repeats what it must."
            )
        try:
            file = FileIO(path, "r+")
        except OSError as exc:
            raise StorageError(f"can't write {path}: {exc.strerror}. Resume a copy of its directory.") from exc
        _lock(path, file)
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        return cls(path, file), header, entries

    def append(self, entry: Entry) -> None:
        """Write one entry; it is on disk when this returns.

        Raises:
            StorageError: the disk is full or gone; what was written before is whole.
        """
        self._write(to_dict(entry))

    def close(self) -> None:
        """Let others write the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, data: Mapping[str, Any]) -> None:
        line = json.dumps(data, allow_nan=False).encode() + b"\n"
        whole = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as exc:
            with contextlib.suppress(OSError):  # a line that follows a torn one would be damaged too
                self._file.truncate(whole)
                self._file.seek(whole)
            raise StorageError(
                f"can't write {self.path}: {exc.strerror}. The trials that stand there are whole: make room, then go "
                f"on with `resume={str(self.path)!r}`."
            ) from exc
        if not os.fstat(self._file.fileno()).st_nlink and not self.path.exists():
            raise StorageError(
                f"{self.path} was removed while the run wrote it. Start anew, with another `storage_path`."
            )


def vacant(path: Path) -> Path:
    """Return the path of a new journal after making sure that it can be created; nothing is left there yet.

    Raises:
        StorageError: it can't be written, or stands already.
    """
    made: list[Path] = []
    try:
        for folder in reversed(path.parents):
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                made.append(folder)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as exc:
        raise StorageError(f"can't write {path.parent}: {exc.strerror}. Pass another `storage_path`.") from exc
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another run has begun in it meanwhile
                folder.rmdir()
    if path.exists():
        raise _taken(path)
    return path


def read(path: Path) -> tuple[Header, tuple[Entry, ...]]:
    """Read a journal; a last line without its end is left out, as a crash leaves it.

    Raises:
        ResumeError: it can't be read, or a line is damaged; the message names it.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as exc:
        raise ResumeError(f"can't read a journal at {path}: {exc.strerror}. Pass the directory of a run.") from exc
    if not lines:
        raise ResumeError(f"{path} holds no header: the run ended before its baseline. Start a new one.")
    parsed = [_parsed(path, number, line) for number, line in enumerate(lines, 1)]
    schema = parsed[0].pop("schema", None)
    if not is_whole(schema) or not 1 <= schema <= SCHEMA:
        raise ResumeError(f"{path}: its schema must be at most {SCHEMA}, got {shown(schema)}. Update raysq to read it.")
    header = _understood(path, 1, header_from_dict, parsed[0])
    entries = (_understood(path, number, entry_from_dict, data) for number, data in enumerate(parsed[1:], 2))
    return header, tuple(entries)


def _understood(path: Path, number: int, read_line: Callable[[Mapping[str, Any]], T], data: Mapping[str, Any]) -> T:
    try:
        return read_line(data)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, InputError) as exc:
        what = f"{type(exc).__name__}: {exc}"
        raise ResumeError(f"{path}, line {number} is not what raysq wrote ({what}). Remove that line.") from exc


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        data = from_json(line)
    except ValueError as exc:
        raise ResumeError(f"{path}, line {number} is damaged: {exc}. Remove that line.") from exc
    if not isinstance(data, dict):
        raise ResumeError(f"{path}, line {number} must be an object, got {type(data).__name__}. Remove that line.")
    return data


def _taken(path: Path) -> StorageError:
    return StorageError(f"{path} stands already. Pass `resume={str(path)!r}` or another name.")


def _get(header: Header, name: str) -> str | None:
    return header.fingerprints.get(name)


def _lock(path: Path, file: FileIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        file.close()
        raise ResumeError(f"{path} is being written by another run. Wait for it, or start a new one.") from exc


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
