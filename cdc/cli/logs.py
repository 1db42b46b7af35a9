"""Log lines: a constant sentence plus fields, as text for people and journald or as JSON for machines.

To journald a line begins with its priority, ``<3>``, and carries no time: the journal has its own.

The daemon's log is written by a thread of its own (:func:`in_background`): a full disk, a reader that does not read or
a slow journald must not hold up a delivery. What does not fit into its queue is dropped, and counted aloud.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from types import TracebackType

QUEUED = 5000
"""Lines that may wait to be written."""
LAST_WORDS = 2.0
"""Seconds the end of the process waits for them."""

_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


class _Formatter(logging.Formatter):
    def __init__(self, *, to_journal: bool = False) -> None:
        super().__init__()
        self._to_journal = to_journal

    def _parts(self, record: logging.LogRecord) -> tuple[str, str, dict[str, object]]:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[0] is not None:
            # Where, not what: an exception's text may quote a row.
            fields["exception"] = record.exc_info[0].__name__
            fields["trace"] = places(record.exc_info[2])
        return moment.replace("+00:00", "Z"), record.getMessage(), fields

    def _prefix(self, record: logging.LogRecord) -> str:
        if not self._to_journal:
            return ""
        return f"<{next((number for level, number in _PRIORITIES if record.levelno >= level), 7)}>"


class TextFormatter(_Formatter):
    """``2026-11-22T08:01:02.123Z info    Listening.  database=shop channel=cdc``"""

    def format(self, record: logging.LogRecord) -> str:
        moment, message, fields = self._parts(record)
        shown = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
        head = self._prefix(record) or f"{moment} {record.levelname.lower():<7} "
        return head + message + (f"  {shown}" if shown else "")


class JsonFormatter(_Formatter):
    """The same as one JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        moment, message, fields = self._parts(record)
        parts = {"ts": moment, "level": record.levelname.lower(), "message": message, **fields}
        return self._prefix(record) + json.dumps(parts, default=str)


def places(trace: TracebackType | None) -> str:
    """Where an exception came through: ``file.py:12 other.py:3``, the innermost last."""
    found = []
    while trace is not None:
        found.append(f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(found)


def _shown(value: object) -> str:
    text = str(value)
    needs_quotes = not text or not text.isprintable() or any(c in text for c in ' "=')
    return json.dumps(text, ensure_ascii=False) if needs_quotes else text


def set_up_logging(level: str, format_: str, environ: Mapping[str, str] = os.environ) -> None:
    """Send the package's log to stderr; called again, change how much and in which shape.

    Args:
        level: debug, info, warning or error.
        format_: text or json.
        environ: ``JOURNAL_STREAM`` says whether stderr goes to journald.
    """
    to_journal = _is_journal(environ.get("JOURNAL_STREAM", ""))
    formatter = JsonFormatter(to_journal=to_journal) if format_ == "json" else TextFormatter(to_journal=to_journal)
    logger = logging.getLogger("cdc")
    logger.setLevel(level.upper())
    logger.propagate = False
    for handler in logger.handlers:
        if isinstance(handler, _Background):
            handler.setFormatter(formatter)
            return
    direct = logging.StreamHandler(sys.stderr)
    direct.setFormatter(formatter)
    logger.handlers[:] = [direct]


def _is_journal(stream: str) -> bool:
    """Whether stderr is the very stream systemd has connected to the journal, ``DEVICE:INODE``."""
    try:
        there = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # no stderr, or one without a descriptor
        return False
    return stream == f"{there.st_dev}:{there.st_ino}"


class _Background(logging.Handler):
    """Formats where it is called and leaves the writing to a thread."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[str | None] = queue.Queue(QUEUED)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001  a log line must not be the end of a pipeline
            line = record.msg
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def finish(self) -> None:
        """Write what waits, for a while."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=LAST_WORDS)
        self._thread.join(LAST_WORDS)

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                self._write(f"{dropped} log lines were dropped: the log is not read fast enough.")
            self._write(line)

    def _write(self, line: str) -> None:
        rest = (line + "\n").encode(errors="backslashreplace")
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # somebody has made it non-blocking
                time.sleep(0.01)
            except OSError:
                return  # a full disk, a closed pipe: this line is lost, and nothing else


@contextlib.contextmanager
def in_background() -> Iterator[None]:
    """Let the package's log be written by a thread, so that nobody who says something waits."""
    logger = logging.getLogger("cdc")
    direct = logger.handlers[:]
    try:
        descriptor = sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # nobody to hold us up
        yield
        return
    background = _Background(descriptor)
    if direct:
        background.setFormatter(direct[0].formatter)
    logger.handlers[:] = [background]
    try:
        yield
    finally:
        logger.handlers[:] = direct
        background.finish()
