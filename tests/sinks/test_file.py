"""The file sink: whole lines, on disk, whatever happens to the file or the disk."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event
from cdc.sinks.file import FileOptions, FileSink

Make = Callable[..., Event]


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[FileSink]:
    sink = FileSink("files", FileOptions(type="file", path=str(tmp_path / "{table}.jsonl")))
    sink.open()
    yield sink
    sink.close()


def seqs(path: Path) -> list[int]:
    return [Event.from_json(line).source.seq for line in path.read_text().splitlines()]


def test_each_event_is_one_line_in_order(sink: FileSink, tmp_path: Path, make_event: Make) -> None:
    sink.deliver([make_event(1), make_event(2, table="items"), make_event(3)])
    assert seqs(tmp_path / "orders.jsonl") == [1, 3]
    assert seqs(tmp_path / "items.jsonl") == [2]


def test_directories_are_made(tmp_path: Path, make_event: Make) -> None:
    path = tmp_path / "{database}" / "{schema}" / "{table}-{op}.jsonl"
    sink = FileSink("files", FileOptions(type="file", path=str(path)))
    sink.deliver([make_event(1)])
    sink.close()
    assert seqs(tmp_path / "shop" / "public" / "orders-insert.jsonl") == [1]


@pytest.mark.parametrize("name", ["../../escape", "..", ".", "a/b", "nul\0byte"])
def test_no_table_name_leads_out_of_the_directory(sink: FileSink, tmp_path: Path, make_event: Make, name: str) -> None:
    sink.deliver([make_event(1, table=name)])
    (written,) = tmp_path.iterdir()
    assert written.parent == tmp_path
    assert seqs(written) == [1]


def test_a_torn_last_line_is_cut_off_before_the_next_event(sink: FileSink, tmp_path: Path, make_event: Make) -> None:
    path = tmp_path / "orders.jsonl"
    sink.deliver([make_event(1)])
    sink.close()
    with path.open("a") as file:
        file.write('{"version":1,"id":"torn' + "x" * 200_000)
    sink.deliver([make_event(2)])
    assert seqs(path) == [1, 2]


def test_a_file_that_is_one_torn_line_is_emptied(sink: FileSink, tmp_path: Path, make_event: Make) -> None:
    (tmp_path / "orders.jsonl").write_text("torn")
    sink.deliver([make_event(1)])
    assert seqs(tmp_path / "orders.jsonl") == [1]


def test_a_file_moved_away_is_made_anew(sink: FileSink, tmp_path: Path, make_event: Make) -> None:
    sink.deliver([make_event(1)])
    (tmp_path / "orders.jsonl").rename(tmp_path / "orders.jsonl.1")
    sink.deliver([make_event(2)])
    (tmp_path / "orders.jsonl").unlink()
    sink.deliver([make_event(3)])
    assert seqs(tmp_path / "orders.jsonl.1") == [1]
    assert seqs(tmp_path / "orders.jsonl") == [3]


def test_a_full_disk_is_transient_and_names_the_file(make_event: Make) -> None:
    sink = FileSink("files", FileOptions(type="file", path="/dev/full"))
    with pytest.raises(PartialFailure) as raised:
        sink.deliver([make_event(1), make_event(2)])
    assert set(raised.value.failures) == {0, 1}
    failure = raised.value.failures[0]
    assert isinstance(failure, TransientFailure)
    assert str(failure) == "cannot write /dev/full: No space left on device"


# A size limit gives a short write first and the error only then, as a disk that fills up may.
SHORT_WRITE = """
import resource, signal, sys
from cdc.errors import PartialFailure
from cdc.event import Event
from cdc.sinks.file import FileOptions, FileSink
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
event = Event.from_json(sys.argv[2])
sink = FileSink("files", FileOptions(type="file", path=sys.argv[1]))
sink.deliver([event])
whole = len(event.to_json()) + 1
resource.setrlimit(resource.RLIMIT_FSIZE, (whole * 2 + 10, whole * 100))
try:
    sink.deliver([event] * 3)
except PartialFailure as error:
    print(type(error.failures[0]).__name__)
"""


def test_a_short_write_leaves_no_part_of_the_batch(tmp_path: Path, make_event: Make) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    path = tmp_path / "out.jsonl"
    arguments = [sys.executable, "-c", SHORT_WRITE, str(path), make_event(1).to_json()]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "TransientFailure"
    assert seqs(path) == [1]


def test_what_no_retry_can_mend_is_permanent(sink: FileSink, make_event: Make) -> None:
    with pytest.raises(PartialFailure) as raised:
        sink.deliver([make_event(1), make_event(2, table="t" * 300)])
    assert list(raised.value.failures) == [1]
    assert isinstance(raised.value.failures[1], PermanentFailure)


def test_events_are_synced_before_deliver_returns(
    sink: FileSink, make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_size), real(descriptor)))
    sink.deliver([make_event(1)])
    assert len(make_event(1).to_json()) + 1 in synced


def test_a_failing_sync_acknowledges_nothing(
    sink: FileSink, tmp_path: Path, make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink.deliver([make_event(1)])

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(PartialFailure):
            sink.deliver([make_event(2)])
    assert seqs(tmp_path / "orders.jsonl") == [1]
    sink.deliver([make_event(2)])
    assert seqs(tmp_path / "orders.jsonl") == [1, 2]


def test_two_sinks_may_share_a_file(tmp_path: Path, make_event: Make) -> None:
    def write(first: int) -> None:
        sink = FileSink("files", FileOptions(type="file", path=str(tmp_path / "shared.jsonl")))
        for seq in range(first, first + 100):
            sink.deliver([make_event(seq)])
        sink.close()

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 1000, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = seqs(tmp_path / "shared.jsonl")
    assert len(written) == 300
    for first in (0, 1000, 2000):
        assert [seq for seq in written if first <= seq < first + 100] == list(range(first, first + 100))


def test_more_files_than_may_be_open_at_once(sink: FileSink, tmp_path: Path, make_event: Make) -> None:
    for round_ in (0, 1000):
        sink.deliver([make_event(round_ + number, table=f"t{number}") for number in range(100)])
    assert all(seqs(tmp_path / f"t{number}.jsonl") == [number, 1000 + number] for number in range(100))
    assert len(list(Path("/proc/self/fd").iterdir())) < 100


@pytest.mark.parametrize("path", ["", "out/", "{tabel}.jsonl", "{table.jsonl", "table}.jsonl", "{}", "a\0b"])
def test_a_path_that_cannot_work_is_refused_at_start(path: str) -> None:
    with pytest.raises(ValidationError):
        FileOptions(type="file", path=path)


def test_closing_twice_is_harmless(sink: FileSink, make_event: Make) -> None:
    sink.deliver([make_event(1)])
    sink.close()
    sink.close()
