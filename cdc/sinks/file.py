"""Events in files: JSON Lines, appended, on disk before they are acknowledged.

What a file may look like after a crash: whole lines, then perhaps a torn one. A torn last line was never
acknowledged, so it is cut off when the file is opened, and the event is delivered again. A write that fails half-way
(disk full, size limit) is cut off at once in the same way.

Several processes, or several databases, may share a file: every change to it is made under its flock, in append mode.
A file that was moved or removed (logrotate) is made anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event
from cdc.options import SinkOptions
from cdc.sinks.base import Sink

_PLACEHOLDERS = ("database", "schema", "table", "op")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_OPEN_FILES = 64
# What no later attempt with the same name will mend.
_HOPELESS = (errno.ENAMETOOLONG, errno.EISDIR, errno.EINVAL, errno.ENOTDIR, errno.ELOOP)


class FileOptions(SinkOptions):
    """Options of a ``file`` sink."""

    type: Literal["file"]
    path: str
    """Where to append; ``{database}``, ``{schema}``, ``{table}`` and ``{op}`` stand for the event's own."""

    @field_validator("path")
    @classmethod
    def _known_placeholders(cls, path: str) -> str:
        known = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
        if not path or path.endswith("/"):
            raise ValueError("not a file path (write something like ./out/{table}.jsonl)")
        if "\0" in path:
            raise ValueError("a file path cannot hold a NUL character (leave it out)")
        for name in _PLACEHOLDER.findall(path):
            if name not in _PLACEHOLDERS:
                raise ValueError(f"a placeholder that does not exist (known: {known})")
        if set("{}") & set(_PLACEHOLDER.sub("", path)):
            raise ValueError(f"a brace without its partner (placeholders: {known})")
        return path


class FileSink(Sink[FileOptions]):
    """Appends events to files named by a template; see the head of this module."""

    Options = FileOptions

    def __init__(self, name: str, options: FileOptions, encode: Callable[[Event], str] = Event.to_json) -> None:
        super().__init__(name, options, encode)
        self._files: OrderedDict[str, _LineFile] = OrderedDict()

    def deliver(self, batch: Sequence[Event]) -> None:
        by_path: dict[str, list[int]] = {}
        for index, event in enumerate(batch):
            by_path.setdefault(self._path(event), []).append(index)
        failures: dict[int, TransientFailure | PermanentFailure] = {}
        for path, indexes in by_path.items():
            lines = "".join(self.encode(batch[index]) + "\n" for index in indexes)
            try:
                # A lone surrogate inside a json column is legal JSON only as an escape, so this cannot fail on one.
                self._file(path).append(lines.encode())
            except OSError as error:
                self._files.pop(path).close()
                kind = PermanentFailure if error.errno in _HOPELESS else TransientFailure
                failure = kind(f"cannot write {path}: {error.strerror}")
                failures.update(dict.fromkeys(indexes, failure))
        if failures:
            raise PartialFailure(failures)

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _path(self, event: Event) -> str:
        parts = {
            "database": event.source.database,
            "schema": event.source.schema_name,
            "table": event.source.table,
            "op": event.op.value,
        }
        return _PLACEHOLDER.sub(lambda found: _file_name(parts[found[1]]), self.options.path)

    def _file(self, path: str) -> _LineFile:
        if path not in self._files:
            while len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[path] = _LineFile(Path(path))
        self._files.move_to_end(path)
        return self._files[path]


def _file_name(name: str) -> str:
    """A name from the database as one component of a path: nobody leaves the directory by naming a table ``../x``."""
    safe = name.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return {".": "%2E", "..": "%2E%2E"}.get(safe, safe)


class _LineFile:
    """One file of whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def append(self, data: bytes) -> None:
        """Add whole lines and wait until they are on disk; all of them, or, after an OSError, none."""
        descriptor = self._open()
        with _locked(descriptor):
            size = os.fstat(descriptor).st_size
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        if self._descriptor is not None and not self._is_current(self._descriptor):
            self.close()
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self._path.exists()
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            with _locked(self._descriptor):
                _cut_torn_line(self._descriptor)
            if is_new:
                _sync_directory(self._path.parent)
        return self._descriptor

    def _is_current(self, descriptor: int) -> bool:
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(descriptor))


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _cut_torn_line(descriptor: int) -> None:
    """Remove what follows the last line break."""
    end = size = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 65536)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
