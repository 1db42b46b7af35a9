"""Log lines: a constant sentence plus fields, as text for people and journald or as JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime


class _Formatter(logging.Formatter):
    def _parts(self, record: logging.LogRecord) -> tuple[str, str, dict[str, object]]:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[0] is not None:
            # Where, not what: an exception's text may quote a row.
            fields["exception"] = record.exc_info[0].__name__
            trace = record.exc_info[2]
            places = []
            while trace is not None:
                places.append(f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}")
                trace = trace.tb_next
            fields["trace"] = " ".join(places)
        return moment.replace("+00:00", "Z"), record.getMessage(), fields


class TextFormatter(_Formatter):
    """``2026-11-22T08:01:02.123Z info    Listening.  database=shop channel=cdc``"""

    def format(self, record: logging.LogRecord) -> str:
        moment, message, fields = self._parts(record)
        shown = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
        return f"{moment} {record.levelname.lower():<7} {message}" + (f"  {shown}" if shown else "")


class JsonFormatter(_Formatter):
    """The same as one JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        moment, message, fields = self._parts(record)
        return json.dumps({"ts": moment, "level": record.levelname.lower(), "message": message, **fields}, default=str)


def _shown(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or " " in text or '"' in text or "\n" in text else text


def set_up_logging(level: str, format_: str) -> None:
    """Send the package's log to stderr.

    Args:
        level: debug, info, warning or error.
        format_: text or json.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format_ == "json" else TextFormatter())
    logger = logging.getLogger("cdc")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
