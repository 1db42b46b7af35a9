"""The file sink: whole lines, on disk, whatever happens to the file or the disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError

from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event, Op
from cdc.sinks import _lines as module
from cdc.sinks.file import FileOptions, FileSink

Make = Callable[..., Event]


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[FileSink]:
    sink = FileSink("files", FileOptions(type="file", path=str(tmp_path / "{table}.jsonl")))
    sink.open()
    yield sink
    sink.close()


def seqs(path: Path) -> list[int]:
    """The seq of every line; fails on a file that is not whole lines."""
    assert path.read_bytes()[-1:] in (b"", b"\n")
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


def test_a_torn_line_of_somebody_else_is_cut_off_too(sink: FileSink, tmp_path: Path, make_event: Make) -> None:
    path = tmp_path / "orders.jsonl"
    other = FileSink("other", FileOptions(type="file", path=str(path)))
    for seq, each in enumerate((sink, other, sink, other)):
        each.deliver([make_event(seq)])  # both have the file open all the time
        with path.open("a") as file:
            file.write("torn")
    sink.deliver([make_event(4)])
    other.close()
    assert seqs(path) == [0, 1, 2, 3, 4]


# -- what the disk and people do to a file ------------------------------------------------------------------------


def refused(sink: FileSink, batch: Sequence[Event]) -> str:
    """What a sink that takes nothing of a batch, and is to be tried again, says."""
    with pytest.raises(PartialFailure) as raised:
        sink.deliver(batch)
    assert list(raised.value.failures) == list(range(len(batch)))
    assert {type(failure) for failure in raised.value.failures.values()} == {TransientFailure}
    (message,) = {str(failure) for failure in raised.value.failures.values()}
    return message


def test_a_full_disk_is_transient_and_names_the_file_and_the_cure(make_event: Make) -> None:
    sink = FileSink("files", FileOptions(type="file", path="/dev/full"))
    message = refused(sink, [make_event(1), make_event(2)])
    assert message == "cannot write /dev/full: No space left on device (free some space)"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "cdc-tests", str(directory)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"cannot mount: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_disk_that_fills_up_takes_whole_batches_or_nothing(small_disk: Path, make_event: Make) -> None:
    path = small_disk / "out.jsonl"
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 300_000)
    sink = FileSink("files", FileOptions(type="file", path=str(path)))
    batches = [[make_event(10 * number + n, text="x" * 5000) for n in range(10)] for number in range(20)]
    taken = 0
    with contextlib.suppress(PartialFailure):
        for batch in batches:
            sink.deliver(batch)
            taken += 1
    assert 5 < taken < 20
    for _ in range(3):
        assert refused(sink, batches[taken]) == f"cannot write {path}: No space left on device (free some space)"
        assert seqs(path) == list(range(10 * taken))
    ballast.unlink()
    sink.deliver(batches[taken])
    sink.close()
    assert seqs(path) == list(range(10 * taken + 10))


def test_a_read_only_file_system_is_transient(small_disk: Path, make_event: Make) -> None:
    path = small_disk / "out.jsonl"
    sink = FileSink("files", FileOptions(type="file", path=str(path)))
    sink.deliver([make_event(1)])
    sink.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only file system (mount it writable" in refused(sink, [make_event(2)])
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    sink.deliver([make_event(2)])
    sink.close()
    assert seqs(path) == [1, 2]


# A size limit gives a short write first and the error only then, as a disk that fills up may.
SHORT_WRITE = """
import resource, sys
from cdc.errors import PartialFailure
from cdc.event import Event
from cdc.sinks.file import FileOptions, FileSink
event = Event.from_json(sys.argv[2])
sink = FileSink("files", FileOptions(type="file", path=sys.argv[1]))
sink.deliver([event])
whole = len(event.to_json()) + 1
resource.setrlimit(resource.RLIMIT_FSIZE, (whole * 2 + 10, whole * 100))
for _ in range(2):
    try:
        sink.deliver([event] * 3)
    except PartialFailure as error:
        print(type(error.failures[0]).__name__, error.failures[0])
    print(open(sys.argv[1]).read() == event.to_json() + "\\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole * 100, whole * 100))
"""


def test_a_size_limit_leaves_no_part_of_the_batch(tmp_path: Path, make_event: Make) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    path = tmp_path / "out.jsonl"
    arguments = [sys.executable, "-c", SHORT_WRITE, str(path), make_event(1).to_json()]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    failure, first, second = result.stdout.splitlines()
    assert failure.startswith(f"TransientFailure cannot write {path}: File too large (move the file away, or ")
    assert (first, second) == ("True", "False")
    assert seqs(path) == [1, 1, 1, 1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EPERM])
@pytest.mark.parametrize("written", [0, 10, 300])
def test_a_write_that_fails_after_a_short_one_leaves_nothing(
    sink: FileSink, tmp_path: Path, make_event: Make, monkeypatch: pytest.MonkeyPatch, *, code: int, written: int
) -> None:
    path = tmp_path / "orders.jsonl"
    sink.deliver([make_event(1)])
    before = path.read_bytes()
    real = os.write
    left = [written]

    def short(descriptor: int, data: memoryview) -> int:
        allowed, left[0] = left[0], 0
        if not allowed:
            raise OSError(code, os.strerror(code))
        return real(descriptor, data[:allowed])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        message = refused(sink, [make_event(2), make_event(3)])
    assert message.startswith(f"cannot write {path}: {os.strerror(code)} (")
    assert path.read_bytes() == before
    sink.deliver([make_event(2), make_event(3)])
    assert seqs(path) == [1, 2, 3]


def test_a_directory_removed_while_running_is_made_anew(tmp_path: Path, make_event: Make) -> None:
    sink = FileSink("files", FileOptions(type="file", path=str(tmp_path / "a" / "b" / "out.jsonl")))
    sink.deliver([make_event(1)])
    (tmp_path / "a" / "b" / "out.jsonl").unlink()
    (tmp_path / "a" / "b").rmdir()
    (tmp_path / "a").rmdir()
    sink.deliver([make_event(2)])
    sink.close()
    assert seqs(tmp_path / "a" / "b" / "out.jsonl") == [2]


def test_a_file_in_the_place_of_the_directory_is_transient(tmp_path: Path, make_event: Make) -> None:
    sink = FileSink("files", FileOptions(type="file", path=str(tmp_path / "a" / "b" / "out.jsonl")))
    sink.deliver([make_event(1)])
    for directory in (tmp_path / "a" / "b", tmp_path / "a"):
        directory.rename(tmp_path / "aside")
        directory.write_text("in the way")
        for _ in range(2):
            assert "(move away what stands in the place of its directory)" in refused(sink, [make_event(2)])
        directory.unlink()
        (tmp_path / "aside").rename(directory)
    sink.deliver([make_event(2)])
    sink.close()
    assert seqs(tmp_path / "a" / "b" / "out.jsonl") == [1, 2]


def test_a_directory_in_the_place_of_one_file_holds_back_that_file_only(
    sink: FileSink, tmp_path: Path, make_event: Make
) -> None:
    items = tmp_path / "items.jsonl"
    sink.deliver([make_event(1), make_event(2, table="items")])
    items.rename(tmp_path / "aside")
    items.mkdir()
    batch = [make_event(seq, table=table) for seq, table in ((3, "items"), (4, "orders"), (5, "items"), (6, "orders"))]
    with pytest.raises(PartialFailure) as raised:
        sink.deliver(batch)
    assert list(raised.value.failures) == [0, 2]
    assert {type(failure) for failure in raised.value.failures.values()} == {TransientFailure}
    assert "Is a directory (path must name a file; move that" in str(raised.value.failures[0])
    items.rmdir()
    (tmp_path / "aside").rename(items)
    sink.deliver([batch[0], batch[2]])
    assert seqs(tmp_path / "orders.jsonl") == [1, 4, 6]
    assert seqs(items) == [2, 3, 5]


def test_a_pipe_is_refused_before_anything_is_written_to_it(sink: FileSink, tmp_path: Path, make_event: Make) -> None:
    os.mkfifo(tmp_path / "orders.jsonl")
    reader = os.open(tmp_path / "orders.jsonl", os.O_RDWR | os.O_NONBLOCK)
    assert "path must name a file" in refused(sink, [make_event(1)])
    with pytest.raises(BlockingIOError):
        os.read(reader, 1)
    os.close(reader)


def test_what_no_retry_can_mend_is_permanent(sink: FileSink, make_event: Make) -> None:
    with pytest.raises(PartialFailure) as raised:
        sink.deliver([make_event(1), make_event(2, table="t" * 300)])
    assert list(raised.value.failures) == [1]
    assert isinstance(raised.value.failures[1], PermanentFailure)


def test_a_name_that_is_nobodys_but_the_configurations_is_waited_for(tmp_path: Path, make_event: Make) -> None:
    sink = FileSink("files", FileOptions(type="file", path=str(tmp_path / ("t" * 300))))
    assert refused(sink, [make_event(1), make_event(2)]).endswith("File name too long (write a shorter path)")


def test_a_device_that_cannot_be_synced_loses_nothing_to_dead_letters(make_event: Make) -> None:
    sink = FileSink("files", FileOptions(type="file", path="/dev/null"))
    assert refused(sink, [make_event(1)]) == (
        "cannot write /dev/null: Invalid argument (path must name a file, on a file system that can sync it)"
    )


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENAMETOOLONG])
@pytest.mark.parametrize("of", [stat.S_ISDIR, stat.S_ISREG], ids=["directory", "file"])
def test_what_a_sync_fails_with_says_nothing_against_a_name(
    sink: FileSink,
    tmp_path: Path,
    make_event: Make,
    monkeypatch: pytest.MonkeyPatch,
    *,
    code: int,
    of: Callable[[int], bool],
) -> None:
    real = os.fsync

    def sync(descriptor: int) -> None:
        if of(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        refused(sink, [make_event(1)])
    sink.deliver([make_event(1)])
    assert seqs(tmp_path / "orders.jsonl") == [1]


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_name_that_the_file_system_does_not_take_is_permanent(
    tmp_path: Path, make_event: Make, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real = getattr(os, call)

    def pick(path: os.PathLike[str], *arguments: object, **keywords: object) -> object:
        if "?" in os.fspath(path):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(os, call, pick)
    sink = FileSink("files", FileOptions(type="file", path=str(tmp_path / "{table}" / "{table}.jsonl")))
    with pytest.raises(PartialFailure) as raised:
        sink.deliver([make_event(1), make_event(2, table="what?")])
    sink.close()
    assert {index: type(failure) for index, failure in raised.value.failures.items()} == {1: PermanentFailure}


def test_what_comes_later_of_a_key_waits_in_other_files_too(tmp_path: Path, make_event: Make) -> None:
    sink = FileSink("files", FileOptions(type="file", path=str(tmp_path / "{op}.jsonl")))
    (tmp_path / "insert.jsonl").mkdir()
    update, delete = ({"op": op} for op in (Op.UPDATE, Op.DELETE))
    batch = [
        make_event(1, key=1),
        make_event(2, key=1).model_copy(update=update),
        make_event(3, key=2).model_copy(update=update),
        make_event(4, key=2).model_copy(update=delete),
        make_event(5, key=1).model_copy(update=delete),
        make_event(6, key=2),
    ]
    for _ in range(3):
        with pytest.raises(PartialFailure) as raised:
            sink.deliver(batch)
        failures = raised.value.failures
        assert {type(failure) for failure in failures.values()} == {TransientFailure}
        assert "Is a directory" in str(failures[0])
        said = {str(failure) for index, failure in failures.items() if batch[index].op is not Op.INSERT}
        assert said == {"an event before it, of the same key, was not taken"}
        batch = [batch[index] for index in sorted(failures)]
        assert [event.source.seq for event in batch] == [1, 2, 5, 6]  # nothing of it was written
    assert seqs(tmp_path / "update.jsonl") == [3]
    assert seqs(tmp_path / "delete.jsonl") == [4]
    (tmp_path / "insert.jsonl").rmdir()
    sink.deliver(batch)
    sink.close()
    assert [seqs(tmp_path / f"{op}.jsonl") for op in ("insert", "update", "delete")] == [[1, 6], [3, 2], [4, 5]]


def test_events_are_synced_before_deliver_returns(
    sink: FileSink, make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_size), real(descriptor)))
    sink.deliver([make_event(1)])
    assert len(make_event(1).to_json()) + 1 in synced


def test_a_directory_is_synced_too_even_when_an_earlier_try_failed(
    sink: FileSink, tmp_path: Path, make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    synced: list[bool] = []

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def note(descriptor: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    refused(sink, [make_event(1)])
    monkeypatch.setattr(os, "fsync", note)
    sink.deliver([make_event(1)])
    assert synced == [True, False]
    assert seqs(tmp_path / "orders.jsonl") == [1]


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


# -- deaths --------------------------------------------------------------------------------------------------------

# Delivers what it reads as one batch. At the point it is told it dies, or, for a frozen one, stops until continued.
WRITER = """
import os, signal, sys
from cdc import crashpoints
from cdc.event import Event
from cdc.sinks.file import FileOptions, FileSink
path, way, point = sys.argv[1:]
if way == "die":
    crashpoints.arm(point)
elif point == "before-write":
    write = os.write
    os.write = lambda *arguments: (os.kill(os.getpid(), signal.SIGSTOP), write(*arguments))[1]
else:
    crashpoints.armed = lambda at: at == point
    crashpoints.reached = lambda at: at == point and os.kill(os.getpid(), signal.SIGSTOP)
sink = FileSink("files", FileOptions(type="file", path=path))
sink.deliver([Event.from_json(line) for line in sys.stdin])
"""


def writer(path: Path, way: str, point: str, batch: Sequence[Event]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), way, point]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write("".join(event.to_json() + "\n" for event in batch))
    process.stdin.close()
    return process


def test_a_kill_half_way_through_a_write_leaves_a_torn_line_that_goes(
    sink: FileSink, tmp_path: Path, make_event: Make
) -> None:
    path = tmp_path / "orders.jsonl"
    sink.deliver([make_event(1)])
    batch = [make_event(seq) for seq in (2, 3, 4)]
    assert writer(path, "die", "half-written", batch).wait() == -signal.SIGKILL
    assert not path.read_bytes().endswith(b"\n")
    sink.close()
    sink.deliver(batch)
    assert seqs(path) == [1, 2, 2, 3, 4]  # the whole line of the dead stays: nobody knows whose it is


@pytest.mark.parametrize("lost", [0, 1, 10])
def test_a_kill_between_write_and_sync_loses_nothing(
    sink: FileSink, tmp_path: Path, make_event: Make, lost: int
) -> None:
    path = tmp_path / "orders.jsonl"
    batch = [make_event(1), make_event(2)]
    assert writer(path, "die", "after-write", batch).wait() == -signal.SIGKILL
    os.truncate(path, path.stat().st_size - lost)  # what a machine that goes down with it may do
    sink.deliver(batch)
    assert seqs(path) == ([1, 1, 2] if lost else [1, 2, 1, 2])


# -- a lock whose holder is frozen -----------------------------------------------------------------------------------


@pytest.fixture
def freeze(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``freeze(point, batch)``: a process that holds the lock of orders.jsonl and is stopped in a delivery."""
    started: list[subprocess.Popen[str]] = []

    def start(point: str, batch: Sequence[Event]) -> subprocess.Popen[str]:
        process = writer(tmp_path / "orders.jsonl", "freeze", point, batch)
        started.append(process)
        state = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert state is not None
        assert state.si_status == signal.SIGSTOP
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def warnings() -> Iterator[list[logging.LogRecord]]:
    """What the sink logs, whatever the command line has made of the package's logging in this process."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    module.log.addHandler(handler)
    yield records
    module.log.removeHandler(handler)


Freeze = Callable[..., subprocess.Popen[str]]


@pytest.mark.parametrize("point", ["before-write", "after-write"])
def test_a_frozen_holder_of_the_lock_stops_nobody_and_loses_nothing(
    sink: FileSink,
    tmp_path: Path,
    make_event: Make,
    freeze: Freeze,
    warnings: list[logging.LogRecord],
    *,
    point: str,
) -> None:
    path = tmp_path / "orders.jsonl"
    path.write_text("torn")  # the frozen one has cut something before
    frozen = freeze(point, [make_event(seq) for seq in (1001, 1002, 1003)])
    began = time.monotonic()
    sink.deliver([make_event(1), make_event(2)])
    assert time.monotonic() - began < 3
    for seq in range(3, 23):  # and a backlog does not go at one batch per second
        sink.deliver([make_event(seq)])
    assert time.monotonic() - began < 6
    assert sorted(seqs(path)) == [*range(1, 23), *([1001, 1002, 1003] if point == "after-write" else [])]
    (warning,) = warnings
    assert (warning.levelname, vars(warning)["fields"]) == ("WARNING", {"path": str(path), "waited": 1.0})
    frozen.send_signal(signal.SIGCONT)
    assert frozen.wait() == 0
    sink.deliver([make_event(23)])
    written = seqs(path)
    assert [seq for seq in written if seq < 1000] == list(range(1, 24))
    assert [seq for seq in written if seq > 1000] == [1001, 1002, 1003]


def test_nothing_is_glued_to_half_a_line_whose_writer_is_frozen(
    sink: FileSink, tmp_path: Path, make_event: Make, freeze: Freeze, warnings: list[logging.LogRecord]
) -> None:
    path = tmp_path / "orders.jsonl"
    sink.deliver([make_event(1)])
    frozen = freeze("half-written", [make_event(seq) for seq in (1001, 1002, 1003)])
    half = path.read_bytes()
    for _ in range(2):
        message = refused(sink, [make_event(2)])
        assert message.startswith(
            f"cannot write {path}: it ends in half a line, and a process that holds its lock does"
        )
        assert path.read_bytes() == half
    assert len(warnings) == 1
    frozen.send_signal(signal.SIGCONT)
    assert frozen.wait() == 0
    sink.deliver([make_event(2)])
    assert seqs(path) == [1, 1001, 1002, 1003, 2]


def test_half_a_line_goes_when_its_frozen_writer_is_killed(
    sink: FileSink, tmp_path: Path, make_event: Make, freeze: Freeze
) -> None:
    frozen = freeze("half-written", [make_event(seq) for seq in (1001, 1002, 1003)])
    refused(sink, [make_event(1)])
    frozen.kill()
    frozen.wait()
    sink.deliver([make_event(1)])
    assert seqs(tmp_path / "orders.jsonl") == [1001, 1]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_PATIENCE", 0.05)


@pytest.mark.usefixtures("impatient")
def test_every_frozen_holder_is_told_of_once(
    sink: FileSink, tmp_path: Path, make_event: Make, warnings: list[logging.LogRecord]
) -> None:
    sink.deliver([make_event(1)])
    for seq in (2, 4):
        with (tmp_path / "orders.jsonl").open() as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            sink.deliver([make_event(seq)])
            sink.deliver([make_event(seq + 1)])
        sink.deliver([make_event(seq + 10)])
    assert len(warnings) == 2


@pytest.mark.usefixtures("impatient")
def test_a_failed_sync_cuts_off_nobody_elses_lines(
    sink: FileSink, tmp_path: Path, make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = FileSink("other", FileOptions(type="file", path=str(tmp_path / "orders.jsonl")))
    sink.deliver([make_event(1)])
    real = os.fsync

    def fail(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        other.deliver([make_event(3)])  # while the first, for all it can see, is frozen with the lock
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    assert "Input/output error (check the disk" in refused(sink, [make_event(2)])
    sink.deliver([make_event(2)])
    other.close()
    assert seqs(tmp_path / "orders.jsonl") == [1, 2, 3, 2]


@pytest.mark.usefixtures("impatient")
def test_a_failed_batch_stays_while_a_frozen_process_may_append(
    sink: FileSink, tmp_path: Path, make_event: Make, freeze: Freeze, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = freeze("before-write", [make_event(1001)])

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(module, "sync_directory", lambda _: None)
        patch.setattr(os, "fsync", fail)
        refused(sink, [make_event(1)])
    sink.deliver([make_event(1)])
    frozen.send_signal(signal.SIGCONT)
    assert frozen.wait() == 0
    assert seqs(tmp_path / "orders.jsonl") == [1, 1, 1001]


@pytest.mark.usefixtures("impatient")
def test_nobody_cuts_into_a_write_that_goes_on_without_the_lock(
    sink: FileSink, tmp_path: Path, make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = FileSink("other", FileOptions(type="file", path=str(tmp_path / "orders.jsonl")))
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        monkeypatch.setattr(os, "write", real)
        written = real(descriptor, data[:10])
        fcntl.flock(held, fcntl.LOCK_UN)  # the frozen one wakes, the other has the lock now, and sees half a line
        assert "it ends in half a line" in refused(other, [make_event(2)])
        return written

    with (tmp_path / "orders.jsonl").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(os, "write", write)
        sink.deliver([make_event(1)])
    other.deliver([make_event(2)])
    other.close()
    assert seqs(tmp_path / "orders.jsonl") == [1, 2]


def test_a_write_cut_short_does_not_go_on_behind_somebody_elses_line(
    sink: FileSink, tmp_path: Path, make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "orders.jsonl"
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        monkeypatch.setattr(os, "write", real)
        written = real(descriptor, data[:10])
        with path.open("a") as other:
            other.write("theirs\n")
        return written

    monkeypatch.setattr(os, "write", write)
    assert "another process wrote in between" in refused(sink, [make_event(1)])
    sink.deliver([make_event(1)])
    first, second = path.read_text().splitlines()
    assert first.endswith("theirs")
    assert second == make_event(1).to_json()


def test_lines_behind_half_a_line_written_that_instant_do_not_count(
    sink: FileSink, tmp_path: Path, make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        monkeypatch.setattr(os, "write", real)
        real(descriptor, b"torn")
        return real(descriptor, data)

    sink.deliver([make_event(1)])
    monkeypatch.setattr(os, "write", write)
    assert "another process wrote half a line in between" in refused(sink, [make_event(2)])
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
    before = len(list(Path("/proc/self/fd").iterdir()))
    for round_ in (0, 1000):
        sink.deliver([make_event(round_ + number, table=f"t{number}") for number in range(100)])
    assert all(seqs(tmp_path / f"t{number}.jsonl") == [number, 1000 + number] for number in range(100))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 64


@pytest.mark.parametrize("path", ["", "out/", "{tabel}.jsonl", "{table.jsonl", "table}.jsonl", "{}", "a\0b"])
def test_a_path_that_cannot_work_is_refused_at_start(path: str) -> None:
    with pytest.raises(ValidationError):
        FileOptions(type="file", path=path)


def test_closing_twice_is_harmless(sink: FileSink, make_event: Make) -> None:
    sink.deliver([make_event(1)])
    sink.close()
    sink.close()
