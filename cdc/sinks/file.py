"""Events in files: JSON Lines, appended, on disk before they are acknowledged.

A batch is appended to each of its files in one piece, synced, and only then acknowledged; how files stay whole over
crashes, full disks, frozen processes and people who move them is told in `_lines.py`, how they are closed by size or
time and compressed in `_rotation.py`. Almost every failure is transient: somebody can mend it under our feet. Only a
name made of an event that the file system will not have is that event's own. A file that was moved or removed
(logrotate) is made anew, with its directory. Several processes, or several databases, may share a file.

Where the template sends events of one key to several files (``{op}``), what comes after a failed event of its key waits
in all of them, but for what was written just before the failure.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from cdc.encoding import Encoder
from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event
from cdc.lanes import Held
from cdc.options import SinkOptions
from cdc.sinks._lines import LineFile, NameRefused
from cdc.sinks._rotation import RotateOptions, Rotation
from cdc.sinks.base import Sink
from cdc.template import ROUTE, Template, checked, fixed_part

_OPEN_FILES = 64
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
    errno.EINVAL: "path must name a file, on a file system that can sync it",
    errno.ENAMETOOLONG: "write a shorter path",
}


def _file_path(path: str) -> str:
    if not path or path.endswith("/"):
        raise ValueError("not a file path (write something like ./out/{table}.jsonl)")
    if "\0" in path:
        raise ValueError("a file path cannot hold a NUL character (leave it out)")
    return path


class FileOptions(SinkOptions):
    """Options of a ``file`` sink.

    Attributes:
        path: where to append; ``{database}``, ``{schema}``, ``{table}`` and ``{op}`` stand for the event's own.
        rotate: when a file is closed and the next one begun; None: never.
    """

    type: Literal["file"]
    path: Annotated[str, AfterValidator(_file_path), checked(*ROUTE)]
    rotate: RotateOptions | None = None


class FileSink(Sink[FileOptions]):
    """Appends events to files named by a template; see the head of this module."""

    Options = FileOptions

    def __init__(self, name: str, options: FileOptions, encoder: Encoder | None = None) -> None:
        super().__init__(name, options, encoder)
        self._path = Template(options.path, _file_name)
        self._files: OrderedDict[str, LineFile] = OrderedDict()
        self._rotation = Rotation(name, options.path, options.rotate) if options.rotate else None

    def open(self) -> None:
        if self._rotation:
            self._rotation.start()

    def deliver(self, batch: Sequence[Event]) -> None:
        by_path: dict[str, list[int]] = {}
        for index, event in enumerate(batch):
            by_path.setdefault(self._path.fill(event), []).append(index)
        failures: dict[int, TransientFailure | PermanentFailure] = {}
        for path, meant in by_path.items():
            indexes = _hold_back(batch, meant, failures) if failures else meant
            if not indexes:
                continue
            lines = "".join([self.encoder.encode(batch[index]) + "\n" for index in indexes])
            try:
                # A lone surrogate inside a json column is legal JSON only as an escape, so this cannot fail on one.
                self._file(path).append(lines.encode())
            except OSError as error:
                self._files[path].close()
                failures.update(dict.fromkeys(indexes, self._failure(path, error)))
        if failures:
            raise PartialFailure(failures)

    def close(self) -> None:
        if self._rotation:
            self._rotation.stop()
        while self._files:
            self._files.popitem()[1].close()

    def _file(self, path: str) -> LineFile:
        if path not in self._files:
            while len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            file, rotation = Path(path), self._rotation
            if rotation:
                rotation.watch(file)
            self._files[path] = LineFile(file, partial(rotation.close_if_due, file) if rotation else None)
        self._files.move_to_end(path)
        return self._files[path]

    def _failure(self, path: str, error: OSError) -> TransientFailure | PermanentFailure:
        # A name that no event has a part in is the configuration's fault.
        is_hopeless = isinstance(error, NameRefused) and fixed_part(self.options.path) != self.options.path
        kind = PermanentFailure if is_hopeless else TransientFailure
        cure = None if is_hopeless else _CURES.get(error.errno or 0)
        return kind(f"cannot write {path}: {error.strerror}" + (f" ({cure})" if cure else ""))


def _hold_back(
    batch: Sequence[Event], indexes: Sequence[int], failures: dict[int, TransientFailure | PermanentFailure]
) -> list[int]:
    """Let those of a batch's events at these indexes fail that come after a failed one of their key.

    Returns:
        The others. What is already written of a key stays: the pipeline delivers it again, behind what failed.
    """
    held, waits = Held(), TransientFailure("an event before it, of the same key, was not taken")
    for index in sorted({*indexes, *failures}):
        if index not in failures and held.holds(batch[index]):
            failures[index] = waits
        if index in failures:
            held.add(batch[index])
    return [index for index in indexes if index not in failures]


def _file_name(name: str) -> str:
    """A name from the database as one component of a path: nobody leaves the directory by naming a table ``../x``."""
    safe = name.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return {".": "%2E", "..": "%2E%2E"}.get(safe, safe)
