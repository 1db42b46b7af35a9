"""Log lines, and that saying something never holds anybody up."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from cdc.cli import logs
from cdc.cli.logs import JsonFormatter, TextFormatter, in_background, set_up_logging

log = logging.getLogger("cdc.test")
SECRET = "4929-1234-5678"


class Stderr:
    """A stderr with a descriptor of its own, in place of pytest's."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def write(self, text: str) -> int:
        return os.write(self._descriptor, text.encode())

    def flush(self) -> None:
        return


def record(level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("cdc.x", level, "x.py", 1, "Something happened.", (), None)
    made.fields = fields
    return made


def test_a_line_is_time_level_sentence_and_fields() -> None:
    line = TextFormatter().format(record(database="shop", error="no such file", empty=""))
    moment, _, rest = line.partition(" ")
    assert moment.endswith("Z")
    assert rest == 'info    Something happened.  database=shop error="no such file" empty=""'


@pytest.mark.parametrize("value", ["a\nb", "a=b", 'a"b', "\x1b[31mred", "a\u2028b"])
def test_a_value_can_neither_begin_a_line_nor_another_field_nor_colour_a_terminal(value: str) -> None:
    line = TextFormatter().format(record(error=value))
    shown = line.partition("error=")[2]
    assert json.loads(shown) == value
    assert len(line.splitlines()) == 1 or "\u2028" in value
    assert "\x1b" not in line


@pytest.mark.parametrize(
    ("level", "prefix"),
    [
        (logging.CRITICAL, "<3>"),
        (logging.ERROR, "<3>"),
        (logging.WARNING, "<4>"),
        (logging.INFO, "<6>"),
        (logging.DEBUG, "<7>"),
    ],
)
def test_to_journald_a_line_begins_with_its_priority(level: int, prefix: str) -> None:
    assert TextFormatter(to_journal=True).format(record(level, sink="a")) == f"{prefix}Something happened.  sink=a"
    line = JsonFormatter(to_journal=True).format(record(level, sink="a"))
    assert line.startswith(prefix + "{")
    assert json.loads(line.removeprefix(prefix))["sink"] == "a"


def test_stderr_is_the_journal_only_if_systemd_says_that_this_very_stream_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stream"
    with path.open("wb") as file:
        monkeypatch.setattr(sys, "stderr", Stderr(file.fileno()))
        there = path.stat()
        for stream in (f"{there.st_dev}:{there.st_ino}", "1:2"):
            set_up_logging("info", "text", {"JOURNAL_STREAM": stream})
            log.warning("Said.")
    first, second = path.read_text().splitlines()
    assert first == "<4>Said."
    assert second.endswith("warning Said.")


def test_an_exception_is_told_by_where_and_not_by_what() -> None:
    try:
        raise ValueError(f"cannot read {SECRET}")
    except ValueError:
        made = logging.LogRecord("cdc.x", logging.ERROR, "x.py", 1, "It failed.", (), sys.exc_info())
    for formatter in (TextFormatter(), JsonFormatter()):
        line = formatter.format(made)
        assert SECRET not in line
        assert "ValueError" in line
        assert "test_logs.py:" in line


def test_a_reader_that_does_not_read_holds_nobody_up_and_what_is_dropped_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logs, "QUEUED", 100)
    read, write = os.pipe()
    monkeypatch.setattr(sys, "stderr", Stderr(write))
    set_up_logging("info", "text", {})
    with in_background():
        began = time.monotonic()
        for number in range(20_000):  # far more than a pipe and the queue hold
            log.info("Line %s.", number)
        assert time.monotonic() - began < 10
        text: list[bytes] = []

        def drain() -> None:
            while data := os.read(read, 65536):
                text.append(data)

        reader = threading.Thread(target=drain)
        reader.start()
        deadline = time.monotonic() + 20
        while b"were dropped" not in b"".join(text):
            log.info("Again.")
            assert time.monotonic() < deadline
            time.sleep(0.01)
    os.close(write)
    reader.join(10)
    os.close(read)
    assert b"Line 0." in text[0]


def test_a_full_disk_loses_lines_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(sys, "stderr", Stderr(full))
    set_up_logging("info", "text", {})
    with in_background():
        for _ in range(100):
            log.info("Nobody will read this.")
    os.close(full)


def test_a_new_level_and_shape_take_hold_in_the_background_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        monkeypatch.setattr(sys, "stderr", Stderr(file.fileno()))
        set_up_logging("warning", "text", {})
        with in_background():
            log.info("Not said.")
            set_up_logging("info", "json", {})
            log.info("Said.")
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["message"] == "Said."
