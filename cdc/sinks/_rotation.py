"""Files that have had their turn: closed by size or time, compressed, and in the end removed.

**Closing** is a rename, from ``orders.jsonl`` to ``orders-20261122T080102.123456Z.jsonl``: when it was closed, UTC, so
that names sort as the lines were written, also where the clock was set back: a name is always later than the last one.
It is done by who is about to append, holding the locks under which nobody else does (`_lines.py`), and, for files that
nobody appends to, by a thread when their time has come. The name never changes again, but for what compression adds. A
file that cannot be closed, because somebody is frozen in the middle of an append or the directory may not be written,
is appended to until it can.

*By size*: a file that would grow beyond it is closed first, so only one that took a single larger batch is larger. *By
time*: at each multiple of it since midnight of 1970, UTC: ``1h`` is the full hour. What a file's time is, its last
write says; so this needs no memory, and several processes, or one that was away, come to the same conclusion. Empty
files are not closed.

**Compressing**, outside the delivery, by the same thread: into ``NAME.gz.tmp``, synced, renamed to ``NAME.gz``, and
only then is the original removed. Whoever compresses a file holds the lock against cuts, so of several processes one
does. A crash leaves what the next look, also that after a start, finds: a ``.tmp`` is written anew; where the
compressed one is there with its name, it is whole, and the original is removed. In between a reader may see both: they
hold the same lines.

**Removing**: of each file the newest `keep` closed ones stay.

What goes wrong here holds up nobody: it is logged, and done again at the next look.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import gzip
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from cdc import crashpoints
from cdc.options import Duration, Size, StrictModel
from cdc.sinks._lines import cut_torn_line, is_torn, leads_to, lock_cuts, size_of, sync_directory
from cdc.sinks.base import how_to_get, require

if TYPE_CHECKING:
    import zstandard
else:
    zstandard = require("zstandard", extra="zstd")

log = logging.getLogger(__name__)

LOOK_INTERVAL = 60.0
"""Seconds between two looks at what there is to do, unless something happens."""
CLOSE_PATIENCE = 10.0
"""Seconds to wait, when the sink is closed, for the thread to notice."""

_STAMP: Final = "%Y%m%dT%H%M%S.%fZ"
_STAMPED: Final = r"-(\d{8}T\d{6}\.\d{6}Z)"
_PLACEHOLDER: Final = re.compile(r"\{[^{}]*\}")
_ENDINGS: Final = {"none": "", "gzip": ".gz", "zstd": ".zst"}
_CHUNK: Final = 1 << 20


def _installed(compress: str) -> str:
    if compress == "zstd" and find_spec("zstandard") is None:
        raise ValueError(f"zstandard is not installed ({how_to_get('zstd')}; or write gzip)")
    return compress


class RotateOptions(StrictModel):
    """When a file is closed and the next one begun, and what becomes of it; see the head of this module.

    Attributes:
        size: bytes; a file that would grow beyond is closed.
        every: seconds; a file is closed at each multiple of it.
        keep: how many closed ones of each file stay; None: all.
        compress: how closed files are compressed.
    """

    size: Size | None = Field(default=None, ge=1)
    every: Duration | None = Field(default=None, ge=1.0)
    keep: int | None = Field(default=None, ge=1)
    compress: Annotated[Literal["none", "gzip", "zstd"], AfterValidator(_installed)] = "none"

    @model_validator(mode="after")
    def _some_reason(self) -> RotateOptions:
        if self.size is None and self.every is None:
            raise ValueError("neither size nor every (write one of them, or leave rotate out)")
        return self


class Closed(NamedTuple):
    """A closed file.

    Attributes:
        path: of the file as it is, perhaps compressed.
        of: the name it had.
        stamp: when it was closed.
        ending: what compression has added.
    """

    path: Path
    of: Path
    stamp: str
    ending: str


class Rotation:
    """What a sink's files go through."""

    def __init__(self, name: str, template: str, options: RotateOptions) -> None:
        """
        Args:
            name: of the sink, for the log.
            template: of its paths.
            options: when and how.
        """
        self._name = name
        self._options = options
        self._kind = _kind_of(template)
        self._pattern = _as_glob(template.removesuffix(self._kind)) + "-*Z" + glob.escape(self._kind)
        self._closed = re.compile(rf"(.*){_STAMPED}{re.escape(self._kind)}(\.gz|\.zst)?", re.DOTALL)
        self._paths: set[Path] = set()
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._troubles: set[str] = set()

    # -- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to look after closed files; harmless when that has begun."""
        if self._thread is None:
            self._stopping.clear()
            self._woken.set()  # what an earlier process has left
            self._thread = threading.Thread(target=self._look_after, name=f"{self._name} rotation", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End that; what is half done is done by the next start. Harmless when it has ended."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping.set()
            self._woken.set()
            thread.join(CLOSE_PATIENCE)

    def watch(self, path: Path) -> None:
        """Close this file when its time has come, whether somebody appends to it or not."""
        with self._lock:
            self._paths.add(path)

    # -- closing ------------------------------------------------------------------------------------------------

    def close_if_due(self, path: Path, descriptor: int, coming: int) -> bool:
        """Close a file before something is appended to it, if it is time.

        Args:
            path: its name.
            descriptor: the file, whose flock is held.
            coming: bytes about to be appended; 0: none.

        Returns:
            Whether the name has ceased to lead to it.
        """
        if not self._is_due(descriptor, coming):
            return False
        closed = False
        try:
            closed = self._close(path, descriptor)
        except OSError as error:
            self._trouble(path, "close", error)
        finally:
            with contextlib.suppress(OSError):
                lock_cuts(descriptor, fcntl.F_UNLCK)
        if closed:
            self._woken.set()  # who compresses it needs the lock
        return closed

    def _is_due(self, descriptor: int, coming: int) -> bool:
        size = size_of(descriptor)
        if size == 0:
            return False
        options = self._options
        if options.size is not None and coming and size + coming > options.size:
            return True
        if options.every is None:
            return False
        return os.fstat(descriptor).st_mtime // options.every < time.time() // options.every

    def _close(self, path: Path, descriptor: int) -> bool:
        lock_cuts(descriptor, fcntl.F_WRLCK, patience=0.0)
        if not leads_to(path, descriptor):
            return True
        if is_torn(descriptor):
            cut_torn_line(descriptor)
        closed = self._next_name(path)
        crashpoints.reached("before-close")
        path.rename(closed)
        crashpoints.reached("after-close")
        sync_directory(path.parent)
        self._fine(path, "close")
        return True

    def _next_name(self, path: Path) -> Path:
        now = datetime.now(UTC)
        last = max((closed.stamp for closed in self._closed_of(path)), default="")
        if now.strftime(_STAMP) <= last:
            now = datetime.strptime(last, _STAMP).replace(tzinfo=UTC) + timedelta(microseconds=1)
        return path.with_name(path.name.removesuffix(self._kind) + f"-{now.strftime(_STAMP)}{self._kind}")

    def _closed_of(self, path: Path) -> Iterator[Closed]:
        directory = glob.escape(str(path.parent))
        stem = glob.escape(path.name.removesuffix(self._kind))
        for closed in self._matching(f"{directory}/{stem}-*Z{glob.escape(self._kind)}"):
            if closed.of == path:
                yield closed

    def _matching(self, pattern: str) -> Iterator[Closed]:
        """Closed files that a pattern finds, compressed or not."""
        for ending in _ENDINGS.values():
            for name in _found(pattern + ending):
                found = self._closed.fullmatch(name)
                if found is not None and (found[3] or "") == ending:
                    yield Closed(Path(name), Path(found[1] + self._kind), found[2], ending)

    # -- what the thread does -----------------------------------------------------------------------------------

    def _look_after(self) -> None:
        while not self._stopping.is_set():
            self._woken.wait(self._pause())
            self._woken.clear()
            try:
                self._close_due_files()
                self._compress_all()
                self._remove_old()
            except _Stopped:
                return
            except Exception:
                # The thread must outlive a bug of ours: nobody else would compress.
                log.exception("Closed files could not be looked after.", extra={"fields": {"sink": self._name}})

    def _pause(self) -> float:
        """Seconds until the next look."""
        every = self._options.every
        return LOOK_INTERVAL if every is None else min(LOOK_INTERVAL, every - time.time() % every + 0.01)

    def _close_due_files(self) -> None:
        if self._options.every is None:
            return
        with self._lock:
            paths = list(self._paths)
        for path in paths:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            except OSError:
                continue  # there is none now
            try:
                # Who has the lock is about to append, and closes it himself.
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.close_if_due(path, descriptor, 0)
            except OSError as error:
                self._trouble(path, "close", error)
            finally:
                os.close(descriptor)

    def _compress_all(self) -> None:
        ending = _ENDINGS[self._options.compress]
        if not ending:
            return
        for closed in sorted(self._matching(self._pattern)):
            if closed.ending:
                continue
            try:
                self._compress(closed.path, ending)
            except OSError as error:
                self._trouble(closed.path, "compress", error)
            else:
                self._fine(closed.path, "compress")
        for left in map(Path, _found(f"{self._pattern}{ending}.tmp")):
            if not left.with_name(left.name.removesuffix(f"{ending}.tmp")).exists():
                left.unlink(missing_ok=True)

    def _compress(self, path: Path, ending: str) -> None:
        whole, half = path.with_name(path.name + ending), path.with_name(f"{path.name}{ending}.tmp")
        try:
            # For writing, because only so can it be locked.
            source = path.open("rb+")
        except FileNotFoundError:
            return  # somebody else was faster
        with source:
            try:
                # Not its flock: who waits for that, from before it was closed, has to be told at once.
                lock_cuts(source.fileno(), fcntl.F_WRLCK, patience=0.0)
            except BlockingIOError:
                return  # somebody else is at it
            if not leads_to(path, source.fileno()):
                return
            if not whole.exists():
                try:
                    self._write_compressed(source, half)
                except BaseException:
                    half.unlink(missing_ok=True)
                    raise
                half.rename(whole)
                sync_directory(path.parent)
                crashpoints.reached("after-compress")
            path.unlink()
            sync_directory(path.parent)

    def _write_compressed(self, source: IO[bytes], path: Path) -> None:
        told = os.fstat(source.fileno())
        with path.open("wb") as file:
            os.fchmod(file.fileno(), told.st_mode & 0o777)
            with contextlib.suppress(PermissionError):  # then it is ours
                os.fchown(file.fileno(), told.st_uid, told.st_gid)
            with self._compressor(file) as compressed:
                while chunk := source.read(_CHUNK):
                    if self._stopping.is_set():
                        raise _Stopped
                    compressed.write(chunk)
                    crashpoints.reached("half-compressed")
            file.flush()
            os.fsync(file.fileno())

    def _compressor(self, file: IO[bytes]) -> contextlib.AbstractContextManager[Any]:
        if self._options.compress == "zstd":
            compressor = zstandard.ZstdCompressor(write_checksum=True)
            return compressor.stream_writer(file, closefd=False)
        return gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=6, mtime=0)

    def _remove_old(self) -> None:
        keep = self._options.keep
        if keep is None:
            return
        by_file: dict[Path, dict[str, list[Path]]] = {}
        for closed in self._matching(self._pattern):
            by_file.setdefault(closed.of, {}).setdefault(closed.stamp, []).append(closed.path)
        for stamps in by_file.values():
            for stamp in sorted(stamps)[:-keep]:
                for path in stamps[stamp]:
                    try:
                        path.unlink(missing_ok=True)
                    except OSError as error:
                        self._trouble(path, "remove", error)

    # -- trouble ------------------------------------------------------------------------------------------------

    def _trouble(self, path: Path, action: str, error: OSError) -> None:
        """Say once that something does not work."""
        if f"{action} {path}" not in self._troubles:
            self._troubles.add(f"{action} {path}")
            fields = {"sink": self._name, "action": action, "path": str(path), "error": error.strerror}
            log.warning("A file cannot be rotated for now; going on.", extra={"fields": fields})

    def _fine(self, path: Path, action: str) -> None:
        self._troubles.discard(f"{action} {path}")


class _Stopped(Exception):
    """The sink is being closed."""


def _kind_of(template: str) -> str:
    """The type of the files, ``.jsonl``, if the template ends in one; it stays at the end of their names."""
    suffix = PurePath(_PLACEHOLDER.sub("\0", template)).suffix
    return "" if "\0" in suffix else suffix


def _found(pattern: str) -> list[str]:
    return glob.glob(pattern, include_hidden=True)  # noqa: PTH207  # Path.glob knows no pattern with a root


def _as_glob(template: str) -> str:
    """A pattern for all paths that a template may make."""
    parts: list[str] = []
    at = 0
    for found in _PLACEHOLDER.finditer(template):
        parts += [glob.escape(template[at : found.start()]), "*"]
        at = found.end()
    return "".join([*parts, glob.escape(template[at:])])
