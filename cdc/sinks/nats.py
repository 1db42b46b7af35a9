"""Events in NATS JetStream: published with the event's id as message id, each acknowledged by the stream.

The stream drops a message whose id it has had within its ``duplicate_window`` (two minutes unless it says otherwise).
That makes a repeated delivery disappear, and it forbids what other sinks do after a failure, to send a key's later
events once more: they would be dropped, and would stand before the earlier one for ever. So events of one key, and
those of a table without a key, are published one after another, each after the acknowledgement of the one before;
different keys go side by side, IN_FLIGHT at a time.

* No answer for `timeout` seconds, or a lost connection: what was not acknowledged has failed, and what waited for it.
* An error of the stream (full, not the one that was named, nobody takes the subject): that event has failed, and the
  later ones of its key. Too large for the stream or the server: for good.
* Whoever listens on the subject may answer, such as a service that takes requests. Only what the stream says counts;
  it may come after another's answer, and is waited for.
* After a failure the connection is given up; the next attempt resolves names and reads files anew.

The client is asyncio's. Its loop runs in a thread of its own, so that the server's pings are answered, and a lost
connection is noticed, while nothing is delivered; what is said to it is said from one thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, model_validator

from cdc.encoding import Encoder
from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event
from cdc.lanes import in_waves
from cdc.options import Distinct, Duration, SinkOptions, TlsOptions
from cdc.sinks.base import Sink, network_reason, require, tls_context
from cdc.template import CONTENT, ROUTE, Template, checked

if TYPE_CHECKING:
    import nats
    import nats.aio.client
    import nats.aio.msg
    import nats.errors
    import nats.js.api
    import nats.js.errors
    import nkeys
else:
    nats = require("nats", extra="nats")
    nkeys = require("nkeys", extra="nats")

IN_FLIGHT: Final = 1000
"""Messages that may wait for their acknowledgement."""

_SENT_AT_ONCE: Final = 50
_HEADER: Final = len(b"NATS/1.0\r\n\r\n")
_ROOM: Final = 8192  # more than headers take; where they take more, the server says so
_LONGEST_SUBJECT: Final = 2048  # the server's line has room for 4096 bytes, and the reply's subject stands in it too
_TOO_LARGE: Final = 10054  # JetStream's number for a message above the stream's max_msg_size
_GRACE: Final = 1.0
_UNSAFE: Final = re.compile(r"[.*>%\s\x00-\x1f\x7f]")
_SUBJECT: Final = re.compile(r"[^\s.*>]+(\.[^\s.*>]+)*")
_PLACEHOLDER: Final = re.compile(r"\{[^{}]*\}")

Failure = TransientFailure | PermanentFailure
ResultT = TypeVar("ResultT")


def _server(url: str) -> str:
    right = "(write nats://host:4222, or tls://host:4222)"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError(f"not a NATS URL {right}") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("credentials in a server's URL (write username and password, or token)")
    if parts.scheme not in ("nats", "tls") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError(f"not a NATS URL {right}")
    return url


def _subject(template: str) -> str:
    filled = _PLACEHOLDER.sub("x", template)
    if not _SUBJECT.fullmatch(filled) or filled.startswith("$"):
        raise ValueError("not a subject (write words with dots between them: cdc.{schema}.{table})")
    return template


def _stream_name(name: str) -> str:
    if not re.fullmatch(r"[^\s.*>/\\]+", name):
        raise ValueError("not a stream's name (no dots, wildcards, slashes or spaces)")
    return name


class NatsOptions(SinkOptions):
    """Options of a ``nats`` sink.

    Attributes:
        servers: URLs of one or more servers of a cluster.
        stream: name of the stream that takes the subjects.
        create_stream: make the stream where it is missing, with the server's defaults.
        subject: template; what is filled in never adds a level.
        username, password, token: one way to say who we are.
        credentials: file with a user's JWT and seed (``.creds``).
        nkey: file with a user's seed.
        tls: how the connection is encrypted; None: not at all, unless a URL says ``tls://``.
        timeout: seconds to wait for a connection, and for the next answer.
    """

    type: Literal["nats"]
    servers: Annotated[tuple[Annotated[str, AfterValidator(_server)], ...], Distinct] = ("nats://localhost:4222",)
    stream: Annotated[str, AfterValidator(_stream_name)] = "cdc"
    create_stream: bool = False
    subject: Annotated[str, checked(*ROUTE, *CONTENT), AfterValidator(_subject)] = "cdc.{database}.{schema}.{table}"
    username: str | None = None
    password: SecretStr | None = None
    token: SecretStr | None = None
    credentials: str | None = None
    nkey: str | None = None
    tls: TlsOptions | None = None
    timeout: Duration = Field(default=10.0, gt=0)

    @model_validator(mode="after")
    def _one_identity(self) -> NatsOptions:
        if (self.username is None) != (self.password is None):
            raise ValueError("username and password go together (write both, or neither)")
        ways = {"username": self.username, "token": self.token, "credentials": self.credentials, "nkey": self.nkey}
        if len(given := [name for name, value in ways.items() if value is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} (keep one way to say who we are)")
        return self


class Message(NamedTuple):
    """What is published of an event."""

    subject: str
    headers: dict[str, str]
    payload: bytes


class NatsSink(Sink[NatsOptions]):
    """Publishes events to a stream; see the head of this module."""

    Options = NatsOptions
    clients = ("nats", "nkeys")

    def __init__(self, name: str, options: NatsOptions, encoder: Encoder | None = None) -> None:
        super().__init__(name, options, encoder)
        self._subject = Template(options.subject, _token)
        self._loop: _Loop | None = None
        self._connection: _Connection | None = None

    def open(self) -> None:
        self.close()
        self._connected()

    def deliver(self, batch: Sequence[Event]) -> None:
        connection = self._connected()
        messages = [self._message(event, connection.largest) for event in batch]
        try:
            failures = in_waves(batch, lambda wave: self._run(connection.publish(messages, wave)), at_once=IN_FLIGHT)
        except PermanentFailure:
            self._disconnect()
            raise
        if not failures:
            return
        transient = [failure for failure in failures.values() if isinstance(failure, TransientFailure)]
        if transient:
            self._disconnect()
        if len(transient) == len(batch):
            raise transient[0]
        raise PartialFailure(failures)

    def close(self) -> None:
        self._disconnect()
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.stop()

    def _message(self, event: Event, largest: int) -> Message:
        subject = self._subject.fill(event)
        if len(subject.encode()) > _LONGEST_SUBJECT:
            raise PermanentFailure(f"its subject would have more than {_LONGEST_SUBJECT} bytes")
        headers = {
            "Nats-Msg-Id": event.id,
            "Nats-Expected-Stream": self.options.stream,
            **self.encoder.headers(event),
        }
        payload = self.encoder.encode(event).encode()
        if len(payload) + _ROOM > largest:
            size = len(payload) + _HEADER + sum(len(f"{name}: {value}\r\n".encode()) for name, value in headers.items())
            if size > largest:
                raise PermanentFailure(f"the message has {size} bytes, the stream takes {largest} at most")
        return Message(subject, headers, payload)

    def _connected(self) -> _Connection:
        if self._connection is not None and self._connection.is_lost():
            self._disconnect()  # it was lost while nothing was delivered, which is no failure
        if self._connection is None:
            connection = _Connection(self.options, self.name)
            try:
                self._run(connection.connect())
            except BaseException:
                self._run(connection.close())
                raise
            self._connection = connection
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._run(connection.close())

    def _run(self, what: Coroutine[Any, Any, ResultT]) -> ResultT:
        self._loop = self._loop or _Loop(self.name)
        return self._loop.run(what)


def _token(value: str) -> str:
    """Text as one level of a subject, or part of it; what a subject gives a meaning to is written as in a URL."""
    # An empty level is not allowed, and a % by itself stands for nothing else.
    return _UNSAFE.sub(lambda found: f"%{ord(found[0]):02X}", value) or "%"


class _Loop:
    """An event loop and its thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"{name}/nats", daemon=True)
        self._thread.start()

    def run(self, what: Coroutine[Any, Any, ResultT]) -> ResultT:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result()

    def stop(self) -> None:
        self.run(_end_all_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _end_all_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Connection:
    """One connection, from its beginning to its end; all of it runs in the loop's thread.

    Attributes:
        largest: bytes of a message, headers included, that the server and the stream take.
    """

    def __init__(self, options: NatsOptions, name: str) -> None:
        self.largest = 0
        self._options = options
        self._name = name
        self._where = "nats at " + ", ".join(urlsplit(server).netloc for server in options.servers)
        self._client = nats.aio.client.Client()
        self._error: BaseException | None = None
        self._is_forbidden = False
        self._is_silent = False
        self._is_stuck = False  # what was to be sent has not been taken from us in time
        self._has_stranger = False  # somebody else than the stream answers
        self._inbox = ""
        self._wave = 0
        self._outcomes: dict[str, Failure | None] = {}  # by index: None, it is stored; or why not
        self._awaited = 0
        # What a server writes to acknowledge, so that not each of them need be read as JSON.
        stream = re.escape(json.dumps(options.stream, ensure_ascii=False).encode())
        self._usual = re.compile(rb'\{"stream":%b, ?"seq":[0-9]+[,}]' % stream)
        self._changed = asyncio.Event()

    # -- life ---------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Get ready to publish. Raises TransientFailure."""
        options = self._options
        tls = options.tls
        if tls is None and any(server.startswith("tls:") for server in options.servers):
            tls = TlsOptions()
        try:
            await self._client.connect(
                list(options.servers),
                name=f"cdc/{self._name}",
                tls=None if tls is None else tls_context(tls),
                **self._identity(is_secret=tls is not None),
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                connect_timeout=options.timeout,  # type: ignore[arg-type]  # it takes fractions
                flush_timeout=options.timeout,
                error_cb=self._note,
                closed_cb=self._lose,
            )
            self._inbox = self._client.new_inbox()
            await self._client.subscribe(f"{self._inbox}.*.*", cb=self._take)
            self.largest = await self._find_stream()
        except (nats.errors.Error, nkeys.NkeysError, OSError, ValueError) as error:
            raise self._failure(error) from None

    def _identity(self, *, is_secret: bool) -> dict[str, Any]:
        """Who we are, as the client wants to hear it."""
        options = self._options

        def guarded(secret: SecretStr) -> Any:
            def tell() -> str:
                # The client goes on in plain text where the server does not ask for TLS, and this is the last word
                # before it says everything.
                if is_secret and not self._client._server_info.get("tls_required"):
                    raise ConnectionError("it does not offer TLS")
                return secret.get_secret_value()

            return tell

        if options.token is not None:
            return {"token": guarded(options.token)}
        if options.password is not None:
            return {"user": options.username, "password": guarded(options.password)}
        if options.credentials is not None:
            held = _read(options.credentials)
            if "BEGIN NATS USER JWT" not in held or "BEGIN USER NKEY SEED" not in held:
                raise ValueError  # the client would stumble over it
            return {"user_credentials": options.credentials}
        if options.nkey is not None:
            return {"nkeys_seed_str": _read(options.nkey)}
        return {}

    async def close(self) -> None:
        """Let go of it; what waits to be sent is not sent."""
        transport = self._client._transport
        if not transport:
            return
        if self._is_silent or self._error is not None:
            # Else the client waits until a server that stalls has read everything.
            transport._io_writer.transport.abort()  # type: ignore[attr-defined]  # it is a TcpTransport
        with contextlib.suppress(nats.errors.Error, OSError):
            await asyncio.wait_for(self._client.close(), _GRACE)

    def is_lost(self) -> bool:
        """Whether it can no longer be used."""
        return self._client.is_closed

    async def _note(self, error: BaseException) -> None:
        self._error = error
        if "permissions violation" in str(error).lower():
            self._is_forbidden = True
        if isinstance(error, nats.errors.FlushTimeoutError):
            self._is_stuck = True
        self._changed.set()

    async def _lose(self) -> None:
        self._changed.set()

    # -- the stream ---------------------------------------------------------------------------------------------

    async def _find_stream(self) -> int:
        """Make sure that the stream is there; returns what it takes."""
        options = self._options
        stream = self._client.jetstream(timeout=options.timeout)
        try:
            config = (await stream.stream_info(options.stream)).config
        except nats.js.errors.NotFoundError:
            if not options.create_stream:
                cure = "create it, or set create_stream: true"
                raise TransientFailure(f"{self._where} has no stream {options.stream} ({cure})") from None
            subjects = ".".join("*" if "{" in level else level for level in _levels(options.subject))
            config = (await stream.add_stream(name=options.stream, subjects=[subjects])).config
        except (nats.js.errors.ServiceUnavailableError, nats.errors.NoRespondersError):
            raise TransientFailure(f"{self._where} has no JetStream (start the server with it)") from None
        except nats.errors.TimeoutError:
            if not self._is_forbidden:
                raise
            return self._client.max_payload  # we may not ask
        limit = config.max_msg_size or -1
        return min(limit, self._client.max_payload) if limit > 0 else self._client.max_payload

    # -- publishing ---------------------------------------------------------------------------------------------

    async def publish(self, messages: Sequence[Message], wave: Sequence[int]) -> dict[int, Failure]:
        """Publish and wait for the answers, as long as they keep coming; returns what failed, by index.

        Raises:
            PermanentFailure: the server has closed the connection over one of them; the pipeline finds out which.
        """
        if self.is_lost() or self._is_silent:
            return dict.fromkeys(wave, self._silence())
        options = self._options
        self._wave += 1
        self._outcomes = {}
        self._is_forbidden = self._is_stuck = self._has_stranger = False
        self._awaited = len(wave)
        self._changed.clear()
        seen = 0
        try:
            for number, index in enumerate(wave):
                subject, headers, payload = messages[index]
                reply = f"{self._inbox}.{self._wave}.{index}"
                await self._client.publish(subject, payload, reply, headers=headers)
                if self._is_stuck:
                    if len(self._outcomes) == seen:
                        break  # each of the others would be waited for as long
                    seen, self._is_stuck = len(self._outcomes), False
                if number % _SENT_AT_ONCE == 0:
                    await asyncio.sleep(0)  # to the task that sends, so that the server has something to do
            while len(self._outcomes) < len(wave) and not self.is_lost() and not self._is_stuck:
                # To a message we have no right to publish there is no answer, and the others have theirs soon.
                patience = min(_GRACE, options.timeout) if self._is_forbidden else options.timeout
                seen = len(self._outcomes)
                self._changed.clear()
                try:
                    await asyncio.wait_for(self._changed.wait(), patience)
                except TimeoutError:
                    if len(self._outcomes) == seen:
                        break
        except nats.errors.Error as error:
            self._error = error
        if self.is_lost() and "maximum payload" in str(self._client.last_error).lower():
            raise PermanentFailure(f"{self._where} has closed the connection over its size")
        failures: dict[int, Failure] = {}
        for index in wave:
            failure = self._outcomes[str(index)] if str(index) in self._outcomes else self._silence()
            if failure is not None:
                failures[index] = failure
        self._is_silent = len(self._outcomes) < len(wave)
        self._outcomes = {}
        return failures

    async def _take(self, answer: nats.aio.msg.Msg) -> None:
        _, wave, index = answer.subject.rsplit(".", 2)
        if wave != str(self._wave):
            return
        if self._is_acknowledged(answer.data):
            self._outcomes[index] = None
        elif (refusal := self._refusal(answer)) is not None:
            self._outcomes.setdefault(index, refusal)
        else:
            self._has_stranger = True
            return
        if len(self._outcomes) == self._awaited:
            self._changed.set()

    def _is_acknowledged(self, answer: bytes) -> bool:
        """Whether an answer says that our stream has the message."""
        if self._usual.match(answer) and b'"error"' not in answer:
            return True
        found = _object(answer)
        return found.get("stream") == self._options.stream and type(found.get("seq")) is int and "error" not in found

    # -- failures -----------------------------------------------------------------------------------------------

    def _silence(self) -> TransientFailure:
        if self._is_forbidden:
            return TransientFailure(f"{self._where} does not let us publish (look at the permissions of the user)")
        if self.is_lost():
            return self._failure(self._error)
        if self._has_stranger:
            options = self._options
            said = f"did not acknowledge within {options.timeout:g} s, and something else answers"
            cure = f"let the stream have the subjects of {options.subject}"
            return TransientFailure(f"stream {options.stream} of {self._where} {said} ({cure})")
        return self._failure(TimeoutError())

    def _refusal(self, answer: nats.aio.msg.Msg) -> Failure | None:
        """Why JetStream does not take the message, or None, if the answer is none of its errors."""
        options = self._options
        if answer.headers and answer.headers.get("Status") == "503":
            cure = f"let stream {options.stream} have the subjects of {options.subject}"
            return TransientFailure(f"no stream of {self._where} takes the subject ({cure})")
        error = _object(answer.data).get("error")
        if not isinstance(error, dict) or type(error.get("err_code")) is not int:
            return None
        text = f"stream {options.stream} of {self._where} refuses it: {error.get('description')}"
        return PermanentFailure(text) if error["err_code"] == _TOO_LARGE else TransientFailure(text)

    def _failure(self, error: BaseException | None) -> TransientFailure:
        """An error of the connection, in our words."""
        if isinstance(error, TransientFailure):
            return error
        if isinstance(error, nats.errors.NoServersError):
            error = self._error or error  # why it could not connect to the last of them
        if isinstance(error, nats.errors.Error) and "authorization" in str(error).lower():
            return TransientFailure(f"{self._where} refuses the credentials (check who the sink says it is)")
        if isinstance(error, TimeoutError):
            return TransientFailure(f"{self._where} did not answer within {self._options.timeout:g} s")
        if isinstance(error, OSError):
            return TransientFailure(f"{self._where} cannot be reached: {network_reason(error)}")
        if isinstance(error, nkeys.NkeysError | nats.errors.InvalidUserCredentialsError | ValueError):
            return TransientFailure("the file with the credentials does not hold any (check it)")
        return TransientFailure(f"{self._where} has closed the connection")


def _object(answer: bytes) -> dict[str, Any]:
    """An answer as the JSON object it is; of anything else, an empty one."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _levels(template: str) -> list[str]:
    """The levels of a subject, a dot inside of a placeholder being none between them."""
    return re.findall(r"(?:\{[^{}]*\}|[^.{}])+", template)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError as error:
        raise TransientFailure(f"the credentials cannot be read: {error.strerror}") from None
