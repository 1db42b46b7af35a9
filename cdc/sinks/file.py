"""Events in files: JSON Lines, appended, on disk before they are acknowledged.

What a file may look like after a crash: whole lines, then perhaps a torn one. A torn last line was never
acknowledged, so whoever appends next cuts it off, and the event is delivered again. A batch that cannot be written or
synced (disk full, size limit, bad disk) is cut off whole at once, for a failed fsync tells nothing about what is on
disk, and goes again whole. Almost every such failure is transient: somebody can mend it under our feet.

A file that was moved or removed (logrotate) is made anew, with its directory.

Several processes, or several databases, may share a file. They append one at a time, under its flock; but a process
that is frozen with the lock (SIGSTOP) must not stop the others, so after LOCK_PATIENCE they go on without it. What
keeps the file whole then, whenever the frozen one wakes, is a second lock, which says who may cut:

* an append holds it shared, from before its look at the end of the file until its lines are synced. Any number of
  frozen appends keep nobody from appending, and the kernel puts writes in append mode one after the other;
* who cuts something off, a torn line or its own failed batch, holds it exclusively. So nothing is cut while a frozen
  process may still finish the line, or while others are adding lines that will count;
* nobody appends to a torn line that cannot be cut; and should somebody's write fail in the very instant between that
  look and the write, a look back at what stands before the new lines finds it, and they do not count.

So half a line whose writer is frozen does stop the others, who say so and retry, until that process goes on or is
ended; and a failed batch that others have appended to stays: repeated, never lost. The locks want a local file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from cdc import crashpoints
from cdc.encoding import Encoder
from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event
from cdc.options import SinkOptions
from cdc.sinks.base import Sink
from cdc.template import ROUTE, Template, checked

_OPEN_FILES = 64
# What no later attempt with the same name will mend.
_HOPELESS = (errno.ENAMETOOLONG, errno.EINVAL)
_CURES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or raise the quota",
    errno.EFBIG: "move the file away, or raise the limit on file sizes",
    errno.EROFS: "mount it writable; under systemd, name it in ReadWritePaths=",
    errno.EIO: "check the disk and the kernel's log",
    errno.EACCES: "give the user cdc runs as the right to read and write it and its directory",
    errno.EPERM: "give the user cdc runs as the right to read and write it and its directory",
    errno.EISDIR: "path must name a file; move that directory away",
    errno.EEXIST: "move away what stands in the place of its directory",
    errno.ENOTDIR: "move away what stands in the place of its directory",
    errno.ESPIPE: "path must name a file; move that pipe away",
}

LOCK_PATIENCE = 1.0
"""Seconds to wait for a lock before its holder counts as frozen."""

_LOCK_PATIENCE_LATER = 0.05  # once it does, so that a backlog is not delivered at one batch per second
_LOCK_INTERVAL = 0.002
_UNFINISHED = "it ends in half a line, and a process that holds its lock does not move (end that, or let it go on)"

log = logging.getLogger(__name__)


def _file_path(path: str) -> str:
    if not path or path.endswith("/"):
        raise ValueError("not a file path (write something like ./out/{table}.jsonl)")
    if "\0" in path:
        raise ValueError("a file path cannot hold a NUL character (leave it out)")
    return path


class FileOptions(SinkOptions):
    """Options of a ``file`` sink."""

    type: Literal["file"]
    path: Annotated[str, AfterValidator(_file_path), checked(*ROUTE)]
    """Where to append; ``{database}``, ``{schema}``, ``{table}`` and ``{op}`` stand for the event's own."""


class FileSink(Sink[FileOptions]):
    """Appends events to files named by a template; see the head of this module."""

    Options = FileOptions

    def __init__(self, name: str, options: FileOptions, encoder: Encoder | None = None) -> None:
        super().__init__(name, options, encoder)
        self._path = Template(options.path, _file_name)
        self._files: OrderedDict[str, _LineFile] = OrderedDict()

    def deliver(self, batch: Sequence[Event]) -> None:
        by_path: dict[str, list[int]] = {}
        for index, event in enumerate(batch):
            by_path.setdefault(self._path.fill(event), []).append(index)
        failures: dict[int, TransientFailure | PermanentFailure] = {}
        for path, indexes in by_path.items():
            lines = "".join(self.encoder.encode(batch[index]) + "\n" for index in indexes)
            try:
                # A lone surrogate inside a json column is legal JSON only as an escape, so this cannot fail on one.
                self._file(path).append(lines.encode())
            except OSError as error:
                self._files[path].close()
                failures.update(dict.fromkeys(indexes, _failure(path, error)))
        if failures:
            raise PartialFailure(failures)

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

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


def _failure(path: str, error: OSError) -> TransientFailure | PermanentFailure:
    kind = PermanentFailure if error.errno in _HOPELESS else TransientFailure
    cure = _CURES.get(error.errno or 0)
    return kind(f"cannot write {path}: {error.strerror}" + (f" ({cure})" if cure else ""))


class _LineFile:
    """One file of whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._is_stuck = False

    def append(self, data: bytes) -> None:
        """Add whole lines and wait until they are on disk; all of them, or, after an OSError, none."""
        descriptor = self._open()
        try:
            self._wait_for_turn(descriptor)
            _lock_cuts(descriptor, fcntl.F_RDLCK)
            if _is_torn(descriptor):
                _lock_cuts(descriptor, fcntl.F_WRLCK)
                _cut_torn_line(descriptor)
                _lock_cuts(descriptor, fcntl.F_RDLCK)
            _append(descriptor, data)
        finally:
            _lock_cuts(descriptor, fcntl.F_UNLCK)
            fcntl.flock(descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):  # what counts was synced before
                os.close(descriptor)

    def _open(self) -> int:
        if self._descriptor is not None and not self._is_current(self._descriptor):
            self.close()
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            # Also for a file that was there: whoever made it may have died before this.
            _sync_directory(self._path.parent)
        return self._descriptor

    def _is_current(self, descriptor: int) -> bool:
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(descriptor))

    def _wait_for_turn(self, descriptor: int) -> None:
        patience = _LOCK_PATIENCE_LATER if self._is_stuck else LOCK_PATIENCE
        locked = _try(lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB), patience)
        if not locked and not self._is_stuck:
            fields = {"path": str(self._path), "waited": patience}
            log.warning("Who holds a file's lock does not move; going on without it.", extra={"fields": fields})
        self._is_stuck = not locked


def _try(lock: Callable[[], object], patience: float) -> bool:
    """Take a lock, or give up after so many seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            lock()
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOCK_INTERVAL)
        else:
            return True


def _lock_cuts(descriptor: int, kind: int) -> None:
    """Take the lock that says who may cut (the head of this module tells), or give it back.

    Args:
        descriptor: the file.
        kind: F_RDLCK (shared), F_WRLCK (exclusive) or F_UNLCK; from one to the other nobody comes between.
    """
    # Of the open file, not of the process: two sinks of one process may share a file, too.
    flock = struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)
    if not _try(lambda: fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, flock), LOCK_PATIENCE):
        raise OSError(errno.EAGAIN, _UNFINISHED)


def _size(descriptor: int) -> int:
    # Not fstat: this fails where nothing can be appended and synced, on a pipe, before anything is written.
    return os.lseek(descriptor, 0, os.SEEK_END)


def _is_torn(descriptor: int, end: int | None = None) -> bool:
    """Whether the file, or what is before `end` in it, ends in the middle of a line."""
    end = _size(descriptor) if end is None else end
    return end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"


def _append(descriptor: int, data: bytes) -> None:
    """Write all of it and sync it, or leave nothing of it behind."""
    rest = memoryview(data)
    step = (len(data) + 1) // 2 if crashpoints.armed("half-written") else len(data)
    end = -1
    try:
        while rest:
            if end >= 0 and _size(descriptor) != end:
                raise OSError(errno.EAGAIN, "another process wrote in between")
            rest = rest[os.write(descriptor, rest[:step]) :]
            end = os.lseek(descriptor, 0, os.SEEK_CUR)  # where our bytes end, whoever else appends
            if rest:
                crashpoints.reached("half-written")
        crashpoints.reached("after-write")
        os.fsync(descriptor)
        if _is_torn(descriptor, end - len(data)):
            raise OSError(errno.EAGAIN, "another process wrote half a line in between")
    except OSError:
        with contextlib.suppress(OSError):
            if _size(descriptor) == end:
                _lock_cuts(descriptor, fcntl.F_WRLCK)
            if _size(descriptor) == end:
                os.ftruncate(descriptor, end - len(data) + len(rest))
        raise


def _cut_torn_line(descriptor: int) -> None:
    """Remove what follows the last line break."""
    end = size = _size(descriptor)
    while end > 0:
        start = max(0, end - 65536)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
