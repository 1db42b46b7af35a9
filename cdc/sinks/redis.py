"""Events in Redis: entries of streams (XADD), or messages on channels (PUBLISH).

A batch is one transaction (MULTI), so that it is taken whole or not at all: what stands in a stream is in order, and
after a failure the same batch goes again. In a cluster there is one transaction for each stream, because a transaction
cannot leave its slot: a node that fails holds back its own streams only.

* What the server refuses before the transaction is run (out of memory, a read-only replica, no right, still loading)
  refuses all of it. A name that is taken by something other than a stream fails alone, and is waited for.
* After any failure the connection is given up. The next attempt resolves the name, reads the certificates and, in a
  cluster, asks who has which slots, anew. An answer that was lost makes a batch stand there twice, under the same ids.
* An entry larger than the server takes (``proto-max-bulk-len``, where the server tells) is a permanent failure.

PUBLISH reaches whoever listens at that moment and nobody later: behind the server, at most once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator

from cdc.encoding import Encoder
from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event
from cdc.options import Duration, Host, SinkOptions, TlsOptions, checked_host
from cdc.sinks.base import Sink, network_reason, require, tls_context
from cdc.template import CONTENT, ROUTE, Template, checked

if TYPE_CHECKING:
    import redis
    import redis.backoff
    import redis.cluster
    import redis.exceptions
    import redis.retry
else:
    redis = require("redis", extra="redis")

_LARGEST = 512 * 2**20
"""Bytes of one argument: the server's default, for where it does not tell."""
_IN_PARTS = ("host", "port", "db", "username", "password")
_CURES = {
    "NOAUTH": "refuses us without a password (set username and password)",
    "WRONGPASS": "refuses the credentials (check username and password)",
    "NOPERM": "gives us no right to do this (let the user run MULTI, EXEC, XADD and PUBLISH on these names)",
    "OOM": "is out of memory (trim streams with maxlen, or raise maxmemory)",
    "READONLY": "is a read-only replica (name the primary)",
    "MASTERDOWN": "is a replica without its primary",
    "LOADING": "is still loading its data",
    "BUSY": "is busy with a script",
    "MISCONF": "cannot write its data to disk (its log says why)",
    "NOREPLICAS": "has fewer replicas than min-replicas-to-write asks for",
    "CLUSTERDOWN": "says that the cluster is down",
    "MOVED": "is part of a cluster (set cluster: true)",
    "ASK": "is part of a cluster (set cluster: true)",
    "CROSSSLOT": "is part of a cluster (set cluster: true)",
    "WRONGTYPE": "has something else under the name of a stream (name another stream, or remove that key)",
}
"""By the code an error begins with: what is the matter with the server."""
_SEPARATORS = re.compile(r"[.:{}%]")
_KEY = re.compile(r"(\{key\})")

Name = Annotated[str, Field(min_length=1), checked(*ROUTE, *CONTENT)]
Command = tuple[Any, ...]
"""The command, the name of the stream or channel, and the other arguments."""


def _node(value: str) -> str:
    if not re.fullmatch(r".+:[0-9]{1,5}", value):
        raise ValueError("not a node (write host:port)")
    checked_host(_host_and_port(value)[0])
    return value


def _host_and_port(node: str) -> tuple[str, int]:
    host, _, port = node.rpartition(":")
    return host.strip("[]"), int(port)


class Address(NamedTuple):
    """Where a server is, and who we are there."""

    host: str
    port: int
    db: int
    username: str | None
    password: str | None
    tls: bool
    path: str | None = None

    def __str__(self) -> str:
        return f"redis at {self.path or f'{self.host}:{self.port}'}"


class RedisOptions(SinkOptions):
    """Options of a ``redis`` sink.

    Attributes:
        url: ``redis://``, ``rediss://`` (TLS) or ``unix://``, with user and password; instead of the next five.
        host, port, db, username, password: the server, and the user.
        tls: how the connection is encrypted; None: not at all, unless the URL says so.
        cluster: the server is a node of a cluster; the others are asked for.
        nodes: ``host:port`` of other nodes, to be asked when that one is not there.
        mode: entries of streams, or messages on channels.
        stream, channel: template of the name.
        maxlen: entries a stream is cut to, roughly, as it grows; None: it is not cut.
        timeout: seconds to wait for a connection, and for an answer.
    """

    type: Literal["redis"]
    url: SecretStr | None = None
    host: Host = "localhost"
    port: int = Field(default=6379, ge=1, le=65535)
    db: int = Field(default=0, ge=0, le=2**31 - 1)
    username: str | None = None
    password: SecretStr | None = None
    tls: TlsOptions | None = None
    cluster: bool = False
    nodes: tuple[Annotated[str, AfterValidator(_node)], ...] = ()
    mode: Literal["stream", "pubsub"] = "stream"
    stream: Name = "cdc:{schema}.{table}"
    channel: Name = "cdc:{schema}.{table}"
    maxlen: int | None = Field(default=None, ge=1, le=2**63 - 1)
    timeout: Duration = Field(default=10.0, gt=0)

    @field_validator("url")
    @classmethod
    def _is_address(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _parse(value.get_secret_value())
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> RedisOptions:
        if self.url is not None and (also := [name for name in _IN_PARTS if name in self.model_fields_set]):
            raise ValueError(f"url, and {also[0]} beside it (keep one of the two)")
        if self.nodes and not self.cluster:
            raise ValueError("nodes, and not cluster: true (write both)")
        if self.cluster and self.mode == "pubsub":
            raise ValueError(
                "cluster: true, and mode: pubsub (leave cluster out: every node passes a message on to all)"
            )
        if self.cluster and (self.address.db or self.address.path):
            raise ValueError("cluster: true, and a db or a socket (a cluster has neither)")
        for key, mode in (("stream", "stream"), ("maxlen", "stream"), ("channel", "pubsub")):
            if getattr(self, key) != type(self).model_fields[key].default and mode != self.mode:
                raise ValueError(f"{key}, and mode: {self.mode} (leave {key} out)")
        return self

    @property
    def address(self) -> Address:
        """What `url` says, or the keys in its stead."""
        if self.url is not None:
            address = _parse(self.url.get_secret_value())
            return address._replace(tls=address.tls or self.tls is not None)
        password = None if self.password is None else self.password.get_secret_value()
        return Address(self.host, self.port, self.db, self.username, password, self.tls is not None)


def _parse(url: str) -> Address:
    """An address; ValueError, without the URL, for what is not one."""
    wrong = ValueError("not a Redis URL (write redis://user:password@host:6379/0, rediss://… for TLS, or unix:///path)")
    try:
        parts = urlsplit(url)
        port = parts.port or 6379
    except ValueError:
        raise wrong from None
    username, password = (None if part is None else unquote(part) for part in (parts.username, parts.password))
    if parts.query or parts.fragment:
        raise ValueError("a Redis URL with options after ? or # (write them as keys of the sink)")
    if parts.scheme == "unix" and not parts.hostname and parts.path:
        return Address("", 0, 0, username, password, tls=False, path=unquote(parts.path))
    db = parts.path.strip("/") or "0"
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or not re.fullmatch("[0-9]{1,9}", db):
        raise wrong
    return Address(parts.hostname, port, int(db), username or None, password, parts.scheme == "rediss")


class RedisSink(Sink[RedisOptions]):
    """Adds events to streams, or publishes them; see the head of this module."""

    Options = RedisOptions
    clients = ("redis",)

    def __init__(self, name: str, options: RedisOptions, encoder: Encoder | None = None) -> None:
        super().__init__(name, options, encoder)
        self._address = options.address
        template = options.stream if options.mode == "stream" else options.channel
        # The key as JSON ends where it ends, and would be hard to read if its braces were quoted.
        self._name = [Template(part, str if part == "{key}" else _word) for part in _KEY.split(template) if part]
        self._cut = ("MAXLEN", "~", options.maxlen) if options.maxlen is not None else ()
        self._largest = _LARGEST
        self._client: Any = None

    def open(self) -> None:
        self.close()
        self._connected()

    def deliver(self, batch: Sequence[Event]) -> None:
        self._connected()
        make = self._entry if self.options.mode == "stream" else self._message
        commands = [make(event) for event in batch]
        if not self.options.cluster:
            failures = self._transact(commands, range(len(commands)))
        else:
            failures = self._deliver_to_cluster(commands)
        if failures:
            raise PartialFailure(failures)

    def _deliver_to_cluster(self, commands: Sequence[Command]) -> dict[int, TransientFailure]:
        by_stream: dict[str, list[int]] = {}
        for index, command in enumerate(commands):
            by_stream.setdefault(command[1], []).append(index)
        failures: dict[int, TransientFailure] = {}
        down: dict[str | None, TransientFailure] = {}  # nodes that do not answer, each waited for once; None: all
        for stream, indexes in by_stream.items():
            name: str | None = None
            try:
                if None not in down:
                    name = self._node_of(stream).name
                if name in down:
                    raise down[name]
                failures |= self._transact(commands, indexes)
            except TransientFailure as error:
                down[name] = error
                failures.update(dict.fromkeys(indexes, error))
        if down:
            self.close()
        return failures

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    # -- commands -----------------------------------------------------------------------------------------------

    def _entry(self, event: Event) -> Command:
        """XADD: the id and where the event comes from, what the format adds, and the event."""
        source = event.source
        fields = [
            *("id", event.id, "op", event.op.value),
            *("database", source.database, "schema", source.schema_name, "table", source.table),
        ]
        for header in self.encoder.headers(event).items():
            fields += header
        return ("XADD", self._named(event), *self._cut, "*", *fields, "event", self._body(event))

    def _message(self, event: Event) -> Command:
        return ("PUBLISH", self._named(event), self._body(event))

    def _named(self, event: Event) -> str:
        """The stream or channel of an event."""
        return "".join([part.fill(event) for part in self._name])

    def _body(self, event: Event) -> bytes:
        body = self.encoder.encode(event).encode()
        if len(body) > self._largest:
            raise PermanentFailure(f"the event has {len(body)} bytes, the server takes {self._largest} at most")
        return body

    # -- the server ---------------------------------------------------------------------------------------------

    def _transact(self, commands: Sequence[Command], indexes: Sequence[int]) -> dict[int, TransientFailure]:
        """Run one transaction; returns what failed alone in it, and raises TransientFailure when all of it did."""
        try:
            try:
                answers = self._execute(commands, indexes)
            except redis.exceptions.AskError:  # or MovedError
                if not self.options.cluster:
                    raise
                self.close()  # the stream has moved, and a new look at the cluster finds it
                self._connected()
                answers = self._execute(commands, indexes)
        except _errors() as error:
            self.close()
            raise self._failure(error) from None
        return {
            index: self._failure(answer)
            for index, answer in zip(indexes, answers, strict=True)
            if isinstance(answer, Exception)
        }

    def _execute(self, commands: Sequence[Command], indexes: Sequence[int]) -> list[Any]:
        client = self._connected()
        if self.options.cluster:
            client = client.get_redis_connection(self._node_of(commands[indexes[0]][1]))
        with client.pipeline(transaction=True) as pipeline:
            for index in indexes:
                pipeline.execute_command(*commands[index])
            answers: list[Any] = pipeline.execute(raise_on_error=False)
            return answers

    def _node_of(self, stream: str) -> Any:
        """Which node of a cluster has a stream. Raises TransientFailure: none has."""
        try:
            return self._connected().get_node_from_key(stream)
        except _errors() as error:
            raise self._failure(error) from None

    def _connected(self) -> Any:  # a Redis or RedisCluster, which type half of themselves
        if self._client is not None:
            return self._client
        where = self._address
        options: dict[str, Any] = {
            "username": where.username,
            "password": where.password,
            "socket_timeout": self.options.timeout,
            "socket_connect_timeout": self.options.timeout,
            "protocol": 2,  # understood by all of them, and no more than a batch needs
            **self._tls(),
        }
        try:
            # Trying again is the pipeline's business.
            options["retry"] = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
            if self.options.cluster:
                node: Any = redis.cluster.ClusterNode
                nodes = [node(where.host, where.port), *(node(*_host_and_port(other)) for other in self.options.nodes)]
                self._client = redis.RedisCluster(startup_nodes=nodes, **options)
            elif where.path is not None:
                self._client = redis.Redis(unix_socket_path=where.path, db=where.db, **options)
            else:
                self._client = redis.Redis(host=where.host, port=where.port, db=where.db, **options)
            self._largest = self._ask_for_largest(self._client)
        except _errors() as error:
            self.close()
            raise self._failure(error) from None
        return self._client

    def _tls(self) -> dict[str, Any]:
        if not self._address.tls:
            return {}
        tls = self.options.tls or TlsOptions()
        tls_context(tls)  # says which file is wrong, as the client does not
        return {
            "ssl": True,
            "ssl_ca_certs": tls.ca,
            "ssl_certfile": tls.certificate,
            "ssl_keyfile": tls.key,
            "ssl_cert_reqs": "required" if tls.verify else "none",
            "ssl_check_hostname": tls.verify,
        }

    def _ask_for_largest(self, client: Any) -> int:
        try:
            answer = client.config_get("proto-max-bulk-len")
        except redis.ResponseError:
            return _LARGEST  # many servers do not let us ask
        return int(answer.get("proto-max-bulk-len") or _LARGEST)

    def _failure(self, error: BaseException) -> TransientFailure:
        """An error of the client's in our words: its own may quote the command, and so the row."""
        where = self._address
        chain = list(_chain(error))
        for link in chain:
            if (code := _code(link)) in _CURES:
                return TransientFailure(f"{where} {_CURES[code]}")
        if any(isinstance(link, redis.TimeoutError | TimeoutError) for link in chain):
            return TransientFailure(f"{where} did not answer within {self.options.timeout:g} s")
        for link in chain:
            if isinstance(link, OSError):
                return TransientFailure(f"{where} cannot be reached: {network_reason(link)}")
        if isinstance(error, redis.ResponseError):
            return TransientFailure(f"{where} answered with {_code(error) or type(error).__name__}")
        return TransientFailure(f"{where} cannot be reached: the connection was closed, or never made")


def _word(value: str) -> str:
    """Text as one part of a name: what stands between parts, or is a cluster's hash tag, is written as in a URL."""
    return _SEPARATORS.sub(lambda found: f"%{ord(found[0]):02X}", value)


def _errors() -> tuple[type[Exception], ...]:
    """What the client raises when it is the server's fault, or the network's."""
    return redis.RedisError, redis.exceptions.RedisClusterException, OSError


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it, the last first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_CODES = {
    "AuthenticationError": "WRONGPASS",
    "NoPermissionError": "NOPERM",
    "OutOfMemoryError": "OOM",
    "ReadOnlyError": "READONLY",
    "MasterDownError": "MASTERDOWN",
    "BusyLoadingError": "LOADING",
    "ClusterDownError": "CLUSTERDOWN",
    "MovedError": "MOVED",
    "AskError": "ASK",
    "ClusterCrossSlotError": "CROSSSLOT",
}
"""Classes of the client's for which it takes the code away; newer ones keep it beside."""


def _code(error: BaseException) -> str:
    """The word with which the server's answer began, or nothing."""
    if code := getattr(error, "status_code", None) or _CODES.get(type(error).__name__):
        return str(code)
    # In a pipeline the client puts the command before the answer.
    found = re.match(r"[A-Z]{2,}\b", str(error).rpartition("of pipeline caused error: ")[2])
    return found[0] if found and isinstance(error, redis.ResponseError) else ""
