"""The stdout sink."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from cdc.errors import SinkDisabled, TransientFailure
from cdc.event import Event
from cdc.sinks.stdout import StdoutOptions, StdoutSink

Make = Callable[..., Event]


class Broken(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def flush(self) -> None:
        raise self.error


def test_each_event_is_one_line(make_event: Make, capsys: pytest.CaptureFixture[str]) -> None:
    StdoutSink("out", StdoutOptions(type="stdout")).deliver([make_event(1), make_event(2)])
    assert [Event.from_json(line).source.seq for line in capsys.readouterr().out.splitlines()] == [1, 2]


def test_a_reader_that_has_gone_stops_the_sink(make_event: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Broken(BrokenPipeError(32, "Broken pipe")))
    with pytest.raises(SinkDisabled, match="standard output is closed"):
        StdoutSink("out", StdoutOptions(type="stdout")).deliver([make_event(1)])


def test_a_full_disk_behind_stdout_is_transient(make_event: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Broken(OSError(28, "No space left on device")))
    with pytest.raises(TransientFailure, match="No space left"):
        StdoutSink("out", StdoutOptions(type="stdout")).deliver([make_event(1)])
