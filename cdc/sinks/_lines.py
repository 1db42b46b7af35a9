"""A file of whole lines that several processes append to, and that is never seen half changed.

What it may look like after a crash: whole lines, then perhaps a torn one. A torn last line was never acknowledged, so
whoever appends next cuts it off, and the event is delivered again. A batch that cannot be written or synced (disk full,
size limit, bad disk) is cut off whole at once, for a failed fsync tells nothing about what is on disk, and goes again
whole.

Processes append one at a time, under the file's flock; but a process that is frozen with the lock (SIGSTOP) must not
stop the others, so after LOCK_PATIENCE they go on without it. What keeps the file whole then, whenever the frozen one
wakes, is a second lock, which says who may cut:

* an append holds it shared, from before its look at the end of the file until its lines are synced. Any number of
  frozen appends keep nobody from appending, and the kernel puts writes in append mode one after the other;
* who cuts something off, a torn line or its own failed batch, holds it exclusively. So nothing is cut while a frozen
  process may still finish the line, or while others are adding lines that will count;
* nobody appends to a torn line that cannot be cut; and should somebody's write fail in the very instant between that
  look and the write, a look back at what stands before the new lines finds it, and they do not count.

So half a line whose writer is frozen does stop the others, who say so and retry, until that process goes on or is
ended; and a failed batch that others have appended to stays: repeated, never lost.

The name may lead to another file at any time: it was moved or removed (logrotate), or closed (`_rotation.py`). A file
is closed by whoever holds its flock and, exclusively, the second lock; and whoever appends looks, with that lock
shared, whether the name still leads to the file it has open, else it opens the file anew. So once a file is closed
nobody adds a line, not even one who was frozen before. The locks want a local file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

from cdc import crashpoints

LOCK_PATIENCE = 1.0
"""Seconds to wait for a lock before its holder counts as frozen."""

_LOCK_PATIENCE_LATER = 0.05  # once it does, so that a backlog is not delivered at one batch per second
_LOCK_INTERVAL = 0.002
_TRIES = 20  # to find the file in its place
_UNFINISHED = "it ends in half a line, and a process that holds its lock does not move (end that, or let it go on)"

log = logging.getLogger(__name__)


class NameRefused(OSError):
    """The file system will not have a file or a directory of this name; of any other it may."""


class LineFile:
    """One file of whole lines. Belongs to one thread."""

    def __init__(self, path: Path, close_if_due: Callable[[int, int], bool] | None = None) -> None:
        """
        Args:
            path: the file; it and its directory are made when they are not there.
            close_if_due: called with the descriptor and how many bytes are to come, while the file's flock is held;
                returns whether the name has ceased to lead to that file.
        """
        self._path = path
        self._close_if_due = close_if_due
        self._descriptor: int | None = None
        self._is_stuck = False

    def append(self, data: bytes) -> None:
        """Add whole lines and wait until they are on disk; all of them, or, after an OSError, none.

        Raises:
            NameRefused: no later attempt will do better.
            OSError: another may.
        """
        for _ in range(_TRIES):
            descriptor = self._open()
            try:
                self._wait_for_turn(descriptor)
                if not leads_to(self._path, descriptor):
                    continue  # and who compresses it holds the other lock
                if self._close_if_due and not self._is_stuck and self._close_if_due(descriptor, len(data)):
                    continue
                lock_cuts(descriptor, fcntl.F_RDLCK)
                if not leads_to(self._path, descriptor):
                    continue
                if is_torn(descriptor):
                    lock_cuts(descriptor, fcntl.F_WRLCK)
                    cut_torn_line(descriptor)
                    lock_cuts(descriptor, fcntl.F_RDLCK)
                _append(descriptor, data)
                return
            finally:
                lock_cuts(descriptor, fcntl.F_UNLCK)
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        raise OSError(errno.EAGAIN, "it is moved away again and again")

    def close(self) -> None:
        """Close the descriptor; harmless when there is none."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):  # what counts was synced before
                os.close(descriptor)

    def _open(self) -> int:
        if self._descriptor is not None and not leads_to(self._path, self._descriptor):
            self.close()
        if self._descriptor is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            except OSError as error:
                # Of anything but a name these say something else: so does a sync that the file system has not got.
                if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):
                    raise NameRefused(error.errno, error.strerror) from None
                raise
            # Also for a file that was there: whoever made it may have died before this.
            sync_directory(self._path.parent)
        return self._descriptor

    def _wait_for_turn(self, descriptor: int) -> None:
        patience = _LOCK_PATIENCE_LATER if self._is_stuck else LOCK_PATIENCE
        locked = _try(lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB), patience)
        if not locked and not self._is_stuck:
            fields = {"path": str(self._path), "waited": patience}
            log.warning("Who holds a file's lock does not move; going on without it.", extra={"fields": fields})
        self._is_stuck = not locked


def leads_to(path: Path, descriptor: int) -> bool:
    """Whether a name leads to the file that is open."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


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


def lock_cuts(descriptor: int, kind: int, patience: float | None = None) -> None:
    """Take the lock that says who may cut (the head of this module tells), or give it back.

    Args:
        descriptor: the file.
        kind: F_RDLCK (shared), F_WRLCK (exclusive) or F_UNLCK; from one to the other nobody comes between.
        patience: seconds to wait for those who hold it; None: `LOCK_PATIENCE`.

    Raises:
        OSError: it is not to be had.
    """
    # Of the open file, not of the process: two sinks of one process may share a file, too.
    flock = struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)
    if not _try(
        lambda: fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, flock), LOCK_PATIENCE if patience is None else patience
    ):
        raise OSError(errno.EAGAIN, _UNFINISHED)


def size_of(descriptor: int) -> int:
    """Bytes in an open file."""
    # Not fstat: this fails where nothing can be appended and synced, on a pipe, before anything is written.
    return os.lseek(descriptor, 0, os.SEEK_END)


def is_torn(descriptor: int, end: int | None = None) -> bool:
    """Whether the file, or what is before `end` in it, ends in the middle of a line."""
    end = size_of(descriptor) if end is None else end
    return end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"


def _append(descriptor: int, data: bytes) -> None:
    """Write all of it and sync it, or leave nothing of it behind."""
    rest = memoryview(data)
    step = (len(data) + 1) // 2 if crashpoints.armed("half-written") else len(data)
    end = -1
    try:
        while rest:
            if end >= 0 and size_of(descriptor) != end:
                raise OSError(errno.EAGAIN, "another process wrote in between")
            rest = rest[os.write(descriptor, rest[:step]) :]
            end = os.lseek(descriptor, 0, os.SEEK_CUR)  # where our bytes end, whoever else appends
            if rest:
                crashpoints.reached("half-written")
        crashpoints.reached("after-write")
        os.fsync(descriptor)
        if is_torn(descriptor, end - len(data)):
            raise OSError(errno.EAGAIN, "another process wrote half a line in between")
    except OSError:
        with contextlib.suppress(OSError):
            if size_of(descriptor) == end:
                lock_cuts(descriptor, fcntl.F_WRLCK)
            if size_of(descriptor) == end:
                os.ftruncate(descriptor, end - len(data) + len(rest))
        raise


def cut_torn_line(descriptor: int) -> None:
    """Remove what follows the last line break."""
    end = size = size_of(descriptor)
    while end > 0:
        start = max(0, end - 65536)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)


def sync_directory(directory: Path) -> None:
    """Let what was made, renamed or removed in a directory be on disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
