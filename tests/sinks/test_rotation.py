"""Files that are closed, compressed and removed: every line once, whatever happens at whatever moment."""

from __future__ import annotations

import errno
import fcntl
import gzip
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import zstandard
from harness import is_stopped, until
from pydantic import ValidationError

from cdc.errors import PartialFailure
from cdc.event import Event
from cdc.sinks import _rotation as module
from cdc.sinks._rotation import RotateOptions, Rotation
from cdc.sinks.file import FileOptions, FileSink

Make = Callable[..., Event]


@pytest.fixture
def rotating(tmp_path: Path) -> Iterator[Callable[..., FileSink]]:
    """``rotating(size="1KiB", …)``: an open sink with these options of ``rotate``."""
    made: list[FileSink] = []

    def make(path: str = "{table}.jsonl", **rotate: object) -> FileSink:
        options = {"type": "file", "path": str(tmp_path / path), "rotate": rotate}
        sink = FileSink("files", FileOptions.model_validate(options))
        made.append(sink)
        sink.open()
        return sink

    yield make
    for sink in made:
        sink.close()


def read(path: Path) -> list[int]:
    """The seq of every line of a file, compressed or not; fails on a file that is not whole lines."""
    match path.suffix:
        case ".gz":
            data = gzip.decompress(path.read_bytes())
        case ".zst":
            data = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
        case _:
            data = path.read_bytes()
    assert data[-1:] in (b"", b"\n")
    return [Event.from_json(line).source.seq for line in data.decode().splitlines()]


def closed(directory: Path, stem: str = "orders") -> list[Path]:
    """Closed files, in the order of their names."""
    return sorted(directory.glob(f"{stem}-*Z.jsonl*"))


def everything(directory: Path, stem: str = "orders") -> list[int]:
    """All lines: those of closed files in the order of their names, then those of the current one."""
    current = directory / f"{stem}.jsonl"
    files = [*closed(directory, stem), *([current] if current.exists() else [])]
    return [seq for path in files for seq in read(path)]


def age(path: Path, seconds: float) -> None:
    """Let a file have been written so long ago."""
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


# -- closing ----------------------------------------------------------------------------------------------------------


def test_a_file_that_would_grow_beyond_its_size_is_closed_first(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make
) -> None:
    sink = rotating(size="2KiB")
    for seq in range(100):
        sink.deliver([make_event(seq)])
    assert everything(tmp_path) == list(range(100))
    sizes = [path.stat().st_size for path in closed(tmp_path)]
    assert len(sizes) > 5
    assert max(sizes) <= 2048
    assert min(sizes) > 1024


def test_a_batch_larger_than_the_size_is_one_file(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make
) -> None:
    sink = rotating(size="1KiB")
    sink.deliver([make_event(1)])
    sink.deliver([make_event(seq) for seq in range(2, 50)])
    sink.deliver([make_event(50)])
    assert [len(read(path)) for path in closed(tmp_path)] == [1, 48]
    assert everything(tmp_path) == list(range(1, 51))


def test_a_file_last_written_in_an_earlier_hour_is_closed_before_the_next_line(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make
) -> None:
    sink = rotating(every="1h")
    sink.deliver([make_event(1)])
    sink.deliver([make_event(2)])
    age(tmp_path / "orders.jsonl", 3600)
    sink.deliver([make_event(3)])
    assert [read(path) for path in closed(tmp_path)] == [[1, 2]]
    assert read(tmp_path / "orders.jsonl") == [3]


def test_a_file_nobody_writes_to_is_closed_when_its_time_has_come(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make
) -> None:
    sink = rotating(every="1s")
    sink.deliver([make_event(1)])
    until(lambda: bool(closed(tmp_path)), "it is closed")
    assert not (tmp_path / "orders.jsonl").exists()
    sink.deliver([make_event(2)])
    assert everything(tmp_path) == [1, 2]


def test_an_empty_file_is_not_closed(rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make) -> None:
    path = tmp_path / "orders.jsonl"
    path.touch()
    age(path, 7200)
    sink = rotating(every="1h", size="1B")
    sink.deliver([make_event(1)])
    assert closed(tmp_path) == []


def test_a_torn_line_is_cut_off_before_a_file_is_closed(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make
) -> None:
    sink = rotating(size="1KiB")
    sink.deliver([make_event(1)])
    with (tmp_path / "orders.jsonl").open("a") as file:
        file.write("torn" * 300)
    sink.deliver([make_event(2)])
    assert [read(path) for path in closed(tmp_path)] == [[1]]


def test_names_say_when_a_file_was_closed_and_sort_also_when_the_clock_is_set_back(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = rotating(size="1B")

    class Clock(datetime):
        moments = [datetime(2026, 11, 22, 8, 1, 2, 3, UTC), datetime(2026, 11, 22, 7, 0, 0, 0, UTC)]  # noqa: RUF012

        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return cls.moments[0] if len(cls.moments) == 1 else cls.moments.pop(0)

    monkeypatch.setattr(module, "datetime", Clock)
    for seq in range(4):
        sink.deliver([make_event(seq)])
    assert [path.name for path in closed(tmp_path)] == [
        "orders-20261122T080102.000003Z.jsonl",
        "orders-20261122T080102.000004Z.jsonl",
        "orders-20261122T080102.000005Z.jsonl",
    ]
    assert everything(tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{table}.jsonl", "a.b.jsonl"),
        ("{table}", "a.b"),
        ("{table}.{op}", "a.b.insert"),
        ("[x]*/{table}.jsonl", "[x]*/a.b.jsonl"),
        (".{table}.log", ".a.b.log"),
        (".all", ".all"),
        ("all.json.log", "all.json.log"),
    ],
)
def test_the_type_stays_at_the_end_and_is_what_the_template_says(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make, template: str, name: str
) -> None:
    sink = rotating(path=template, size="1B", compress="gzip", keep=2)
    for seq in range(5):
        sink.deliver([make_event(seq, table="a.b")])
    kind = {"{table}": "", "{table}.{op}": "", ".all": ""}.get(template, "." + template.rpartition(".")[2])
    current = tmp_path / name
    stem = current.name.removesuffix(kind)

    def names() -> set[str]:
        return {path.name for path in current.parent.iterdir()} - {current.name}

    until(lambda: len(names()) == 2 and all(each.endswith(".gz") for each in names()), "two compressed ones are left")
    assert all(each.startswith(f"{stem}-2") and each.endswith(f"Z{kind}.gz") for each in names())


def test_a_file_that_others_moved_is_none_of_our_business(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make
) -> None:
    sink = rotating(size="1KiB", compress="gzip", keep=1)
    sink.deliver([make_event(1)])
    (tmp_path / "orders.jsonl").rename(tmp_path / "orders.jsonl.1")
    sink.deliver([make_event(2)])
    assert read(tmp_path / "orders.jsonl.1") == [1]
    assert everything(tmp_path) == [2]


def test_a_file_that_cannot_be_closed_is_appended_to_and_that_is_said_once(
    rotating: Callable[..., FileSink],
    tmp_path: Path,
    make_event: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = rotating(size="1B")

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Path, "rename", refuse)
        for seq in range(3):
            sink.deliver([make_event(seq)])
    assert read(tmp_path / "orders.jsonl") == [0, 1, 2]
    (record,) = caplog.records
    assert vars(record)["fields"] == {
        "sink": "files",
        "action": "close",
        "path": str(tmp_path / "orders.jsonl"),
        "error": "Permission denied",
    }
    sink.deliver([make_event(3)])
    assert [read(path) for path in closed(tmp_path)] == [[0, 1, 2]]


# -- compressing and removing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compress", "ending"), [("gzip", ".gz"), ("zstd", ".zst")])
def test_closed_files_are_compressed_and_keep_their_rights(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make, compress: str, ending: str
) -> None:
    sink = rotating(size="4KiB", compress=compress)
    sink.deliver([make_event(0)])
    (tmp_path / "orders.jsonl").chmod(0o604)
    for seq in range(1, 100):
        sink.deliver([make_event(seq)])
    until(lambda: all(path.suffix == ending for path in closed(tmp_path)), "all are compressed")
    assert everything(tmp_path) == list(range(100))
    assert closed(tmp_path)[0].stat().st_mode & 0o777 == 0o604
    assert not list(tmp_path.glob("*.tmp"))
    assert closed(tmp_path)[0].stat().st_size < 1000


def test_the_newest_closed_files_of_each_file_are_kept(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make
) -> None:
    sink = rotating(size="1B", keep=3, compress="gzip")
    for seq in range(10):
        sink.deliver(
            [make_event(seq), make_event(100 + seq, table="items"), make_event(200 + seq, table="orders-items")]
        )
    for stem, first in (("orders", 0), ("items", 100), ("orders-items", 200)):
        expected = list(range(first + 6, first + 10))

        def kept(stem: str = stem, expected: list[int] = expected) -> bool:
            files = [path for path in closed(tmp_path, stem) if path.name.startswith(f"{stem}-2")]
            return len(files) == 3 and all(path.suffix == ".gz" for path in files)

        until(kept, f"three of {stem} are left")
        files = [path for path in closed(tmp_path, stem) if path.name.startswith(f"{stem}-2")]
        assert [seq for path in files for seq in read(path)] == expected[:3]


def test_delivery_goes_on_while_files_are_compressed_and_a_stop_does_not_wait_for_it(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(point: str) -> None:
        if point == "half-compressed":
            begun.set()
            go_on.wait(20)

    monkeypatch.setattr(module.crashpoints, "reached", slow)
    monkeypatch.setattr(module, "_CHUNK", 100)
    sink = rotating(size="1KiB", compress="gzip")
    for seq in range(10):
        sink.deliver([make_event(seq)])
    assert begun.wait(20)
    for seq in range(10, 20):
        sink.deliver([make_event(seq)])
    assert all(path.suffix != ".gz" or path.name.endswith(".tmp") for path in closed(tmp_path))
    stopped = threading.Thread(target=sink.close)
    stopped.start()
    until(lambda: sink._rotation is not None and sink._rotation._stopping.is_set(), "it is told to stop")
    go_on.set()
    stopped.join(20)
    assert not list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob("*.gz"))
    monkeypatch.undo()
    sink.open()
    until(lambda: all(path.suffix == ".gz" for path in closed(tmp_path)), "the next start does it")
    assert everything(tmp_path) == list(range(20))


def test_a_compression_that_fails_is_said_once_and_done_again(
    rotating: Callable[..., FileSink],
    tmp_path: Path,
    make_event: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "LOOK_INTERVAL", 0.02)
    tries: list[Path] = []
    real = Rotation._write_compressed

    def full(self: Rotation, source: Any, path: Path) -> None:
        tries.append(path)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Rotation, "_write_compressed", full)
        sink = rotating(size="1B", compress="gzip")
        for seq in range(2):
            sink.deliver([make_event(seq)])
        until(lambda: len(tries) > 3, "it was tried")
        assert [read(path) for path in closed(tmp_path) if not path.name.endswith(".tmp")] == [[0]]
        patch.setattr(Rotation, "_write_compressed", real)
        until(lambda: [path.suffix for path in closed(tmp_path)] == [".gz"], "it works")
    (record,) = caplog.records
    assert record.getMessage() == "A file cannot be rotated for now; going on."
    assert not list(tmp_path.glob("*.tmp"))


# -- deaths and others ------------------------------------------------------------------------------------------------

# Delivers what it reads, a batch for each line, and tells each one that is delivered.
WRITER = """
import os, signal, sys, time
from cdc import crashpoints
from cdc.errors import PartialFailure, TransientFailure
from cdc.event import Event
from cdc.sinks import _rotation
from cdc.sinks.file import FileOptions, FileSink
path, point, compress = sys.argv[1:]
_rotation._CHUNK = 500
if point:
    crashpoints.arm(point)
rotate = {"size": "2KiB", "compress": compress}
sink = FileSink("files", FileOptions.model_validate({"type": "file", "path": path, "rotate": rotate}))
sink.open()
for line in sys.stdin:
    batch = [Event.from_json(event) for event in line.rstrip("\\n").split("\\x1f")]
    while batch:
        try:
            sink.deliver(batch)
        except PartialFailure as failure:  # on a busy machine the others may hold the lock for too long
            batch = [batch[index] for index in failure.failures]
            assert all(isinstance(each, TransientFailure) for each in failure.failures.values()), failure.failures
        else:
            break
    print(line.count("\\x1f") + 1, flush=True)
while point and ("compress" in point):
    time.sleep(0.01)  # the other thread dies
sink.close()
"""


def write(
    path: Path, batches: Sequence[Sequence[Event]], *, point: str = "", compress: str = "gzip"
) -> tuple[int, int]:
    """A process of its own; returns how it ended, and how many events it has said to be delivered."""
    text = "".join("\x1f".join(event.to_json() for event in batch) + "\n" for batch in batches)
    command = [sys.executable, "-c", WRITER, str(path), point, compress]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, sum(map(int, done.stdout.split()))


@pytest.mark.parametrize(
    "point", ["before-close", "after-close", "half-compressed", "after-compress", "half-written", "after-write"]
)
@pytest.mark.parametrize("number", [1, 3])
def test_a_death_at_any_point_loses_nothing_and_repeats_at_most_one_batch(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make, point: str, number: int
) -> None:
    path = tmp_path / "orders.jsonl"
    batches = [[make_event(3 * batch + n) for n in range(3)] for batch in range(30)]
    code, delivered = write(path, batches, point=f"{point}:{number}")
    assert code == -signal.SIGKILL
    if "compress" in point:
        assert list(tmp_path.glob("*.gz*")), "it has not come to that"
    code, again = write(path, batches[delivered // 3 :])
    assert (code, again) == (0, 90 - delivered)
    rotating(size="2KiB", compress="gzip")
    until(lambda: all(each.suffix == ".gz" for each in closed(tmp_path)), "all are compressed")
    found = everything(tmp_path)
    assert sorted(set(found)) == list(range(90))
    assert list(dict.fromkeys(found)) == list(range(90)), "in order"
    assert len(found) <= 93
    assert not list(tmp_path.glob("*.tmp"))


def test_processes_that_share_a_file_rotate_it_one_at_a_time(tmp_path: Path, make_event: Make) -> None:
    path = tmp_path / "orders.jsonl"
    ended: list[tuple[int, int]] = []

    def run(first: int) -> None:
        rng = random.Random(first)
        events = iter(range(first, first + 400))
        batches = []
        while batch := [
            make_event(seq) for seq in (next(events, None) for _ in range(rng.randint(1, 5))) if seq is not None
        ]:
            batches.append(batch)
        ended.append(write(path, batches))

    threads = [threading.Thread(target=run, args=(first,)) for first in (0, 1000, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == [(0, 400)] * 3
    found = everything(tmp_path)
    assert len(found) == 1200
    for first in (0, 1000, 2000):
        assert [seq for seq in found if first <= seq < first + 400] == list(range(first, first + 400))
    assert len(closed(tmp_path)) > 50
    assert all(each.stat().st_size <= 2048 for each in closed(tmp_path))


# Opens the file, and stops at the first of its locks, or in the middle of a write, until it is continued.
FROZEN = """
import fcntl, os, signal, sys
from cdc import crashpoints
from cdc.event import Event
from cdc.sinks.file import FileOptions, FileSink
path, where = sys.argv[1:]
def stop():
    os.kill(os.getpid(), signal.SIGSTOP)
if where == "before-lock":
    flock = fcntl.flock
    fcntl.flock = lambda *arguments: (stop() if arguments[1] & fcntl.LOCK_EX else None, flock(*arguments))[1]
else:
    crashpoints.armed = lambda at: at == where
    crashpoints.reached = lambda at: at == where and stop()
sink = FileSink("files", FileOptions(type="file", path=path))
sink.deliver([Event.from_json(line) for line in sys.stdin])
"""


@pytest.fixture
def freeze(tmp_path: Path) -> Iterator[Callable[[str, Sequence[Event]], subprocess.Popen[str]]]:
    """``freeze(where, batch)``: a process that does not rotate, stopped there; killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(where: str, batch: Sequence[Event]) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", FROZEN, str(tmp_path / "orders.jsonl"), where]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdin is not None
        process.stdin.write("".join(event.to_json() + "\n" for event in batch))
        process.stdin.close()
        until(lambda: is_stopped(process.pid), "it is stopped")
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_who_was_frozen_before_his_turn_adds_nothing_to_a_closed_file(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make, freeze: Callable[..., subprocess.Popen[str]]
) -> None:
    sink = rotating(size="1KiB", compress="gzip")
    sink.deliver([make_event(0)])
    frozen = freeze("before-lock", [make_event(1000)])
    for seq in range(1, 20):
        sink.deliver([make_event(seq)])
    until(lambda: all(path.suffix == ".gz" for path in closed(tmp_path)), "all are compressed")

    def goes_on() -> bool:
        frozen.send_signal(signal.SIGCONT)  # it stops before each look
        return frozen.poll() is not None

    until(goes_on, "it is done")
    assert frozen.returncode == 0
    found = everything(tmp_path)
    assert sorted(found) == [*range(20), 1000]
    assert 1000 in read(tmp_path / "orders.jsonl")


def test_a_file_with_somebody_frozen_in_it_is_not_closed_until_he_moves(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make, freeze: Callable[..., subprocess.Popen[str]]
) -> None:
    sink = rotating(size="1KiB")
    sink.deliver([make_event(0)])
    frozen = freeze("after-write", [make_event(1000)])
    for seq in range(1, 10):
        sink.deliver([make_event(seq)])
    assert closed(tmp_path) == []
    os.kill(frozen.pid, signal.SIGCONT)
    assert frozen.wait() == 0
    sink.deliver([make_event(10)])
    assert len(closed(tmp_path)) == 1
    assert sorted(everything(tmp_path)) == [*range(11), 1000]


def test_nothing_is_cut_off_or_closed_under_one_who_went_on_without_his_turn(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make, freeze: Callable[..., subprocess.Popen[str]]
) -> None:
    sink = rotating(size="1KiB", compress="gzip")
    sink.deliver([make_event(0)])
    with (tmp_path / "orders.jsonl").open("rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # so does a frozen one, who has done nothing yet
        frozen = freeze("half-written", [make_event(seq) for seq in range(1000, 1009)])
    with pytest.raises(PartialFailure):
        sink.deliver([make_event(1)])
    assert closed(tmp_path) == []
    os.kill(frozen.pid, signal.SIGCONT)
    assert frozen.wait() == 0
    sink.deliver([make_event(1)])
    sink.close()  # nobody is compressing from here on
    assert everything(tmp_path) == [0, *range(1000, 1009), 1]
    assert len(closed(tmp_path)) == 1


def test_a_file_that_somebody_locks_is_not_compressed_until_he_lets_go(
    rotating: Callable[..., FileSink], tmp_path: Path, make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_INTERVAL", 0.02)
    sink = rotating(size="1B")
    for seq in range(2):
        sink.deliver([make_event(seq)])
    (path,) = closed(tmp_path)
    with path.open("rb+") as held:
        module.lock_cuts(held.fileno(), fcntl.F_RDLCK)
        other = rotating(size="1B", compress="gzip")
        assert other._rotation is not None
        looks: list[float] = []
        monkeypatch.setattr(other._rotation, "_remove_old", lambda: looks.append(0))
        until(lambda: len(looks) > 2, "it has looked")
        assert closed(tmp_path) == [path]
    until(lambda: closed(tmp_path) == [path.with_name(path.name + ".gz")], "it is compressed")


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rotate", "said"),
    [
        ({}, "neither size nor every (write one of them, or leave rotate out)"),
        ({"keep": 3}, "neither size nor every"),
        ({"size": "1MiB", "keep": 0}, "greater than or equal to 1"),
        ({"size": 0}, "greater than or equal to 1"),
        ({"every": "500ms"}, "greater than or equal to 1"),
        ({"every": "1h", "compress": "bzip2"}, "'none', 'gzip' or 'zstd'"),
    ],
)
def test_a_rotation_that_cannot_work_is_refused_at_start(rotate: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as raised:
        RotateOptions.model_validate(rotate)
    assert said in str(raised.value)


def test_zstd_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(
        ValidationError, match=r"zstandard is not installed \(pip install 'table-cdc\[zstd\]'; or write gzip"
    ):
        RotateOptions.model_validate({"size": "1MiB", "compress": "zstd"})
    RotateOptions.model_validate({"size": "1MiB", "compress": "gzip"})


def test_a_sink_that_rotates_nothing_has_no_thread(tmp_path: Path, make_event: Make) -> None:
    before = threading.active_count()
    sink = FileSink("files", FileOptions(type="file", path=str(tmp_path / "a.jsonl")))
    sink.open()
    sink.deliver([make_event(1)])
    assert threading.active_count() == before
    sink.close()


def test_the_thread_ends_with_the_sink(rotating: Callable[..., FileSink]) -> None:
    before = threading.active_count()
    sink = rotating(every="1h")
    sink.open()
    assert threading.active_count() == before + 1
    sink.close()
    sink.close()
    assert threading.active_count() == before
