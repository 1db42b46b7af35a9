"""Events in Kafka topics, through librdkafka's idempotent producer.

**What is promised.** An event counts as delivered when all replicas in sync have it (``acks=all``). Events of one key
have one message key, so one partition, and within a partition the idempotent producer keeps their order over its own
retries. An event without a key (a table without a primary key, a truncate) has the name of its table as message key, as
JSON text: those of a table stay in order among themselves. Between partitions Kafka knows no order: an update that
changes its key goes to the new key's partition, a truncate to its own.

**Waiting is not failing.** librdkafka is told to try for ever (``message.timeout.ms=0``), because a message that it
gives up may be in the log already, or be overtaken by a later one. When nothing has come back within ``timeout``,
``deliver`` gives up the wait but not the messages: the next attempt with the same events takes it up where it was. So a
broker that is down, slow or frozen makes no duplicates, and cannot mix up an old attempt and a new one. Messages of
events that the pipeline does not come back with (after a rewind; ephemeral changes) are purged.

**A failure stops the producer.** When the brokers refuse a message for good, what was sent after it must not overtake
it. ``enable.gapless.guarantee`` makes that error fatal to the producer, and the brokers themselves refuse what comes
after a gap in the sequence of a partition. Whatever was on its way with it is sent again, in order, by a new producer;
a message of it that had arrived after all comes twice. The same happens after any fatal error (fenced, out of
sequence).

**Files are read by a new producer.** librdkafka reads those of ``tls`` once, when a producer is made. So when a TLS
handshake has failed and the files have changed since then, the next attempt makes a new producer, which sends what
waited for a connection, in order. What was on its way when the last connection broke may come twice, as it would if the
daemon were started again for the same end.

**Which one is too large.** The brokers refuse a set of messages as a whole. Those refused in company are sent one by
one the next time, and what is refused then is refused for good. What exceeds ``message.max.bytes`` is not sent at all.

=============================================  ==========================================================
no answer within ``timeout``                   transient; the wait goes on in the next attempt
all brokers down, not to be trusted, or not    transient, at once
willing to let us in
the topic is missing, or not ours to write     transient: somebody can mend it
too large, not a valid record                  permanent
a topic name Kafka does not allow              permanent
=============================================  ==========================================================

**Options of the client** are an allow-list: who can set any option of librdkafka can load code, read files and call
URLs. No line of its log is louder than debug: what matters of it stands in the failure.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, Field, SecretStr, create_model, model_validator

from cdc.encoding import Encoder
from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event, quote
from cdc.options import Binding, Distinct, Duration, SinkOptions, StrictModel, TlsOptions
from cdc.sinks.base import Sink, require
from cdc.template import ROUTE, Template, checked

if TYPE_CHECKING:
    import confluent_kafka
else:
    confluent_kafka = require("confluent_kafka", extra="kafka")

log = logging.getLogger(__name__)

TOPIC_LENGTH: Final = 249
"""Characters of a topic's name, at most; Kafka's own limit."""

GRACE: Final = 1.0
"""Seconds that a cluster which seems to be gone has to come back before a batch fails."""

IDLE_INTERVAL: Final = 30.0
"""Seconds between two looks at what librdkafka has to say while there is nothing to deliver."""

_LOOK_UP = 0.1  # seconds; how soon a wait notices that it makes no sense
_PARTING = 1.0  # seconds for librdkafka to hand back what was purged
_LONGEST_PROPAGATION = 3_600_000  # milliseconds; what librdkafka allows
_OF_TLS = "SSL routines"  # in every text of OpenSSL's; who is refused by TLS 1.3 is told of a lost connection only

# Names of librdkafka's errors.
_HOPELESS: Final = frozenset({"_ALL_BROKERS_DOWN", "_AUTHENTICATION", "_SSL"})
_PERMANENT: Final = frozenset(
    {"MSG_SIZE_TOO_LARGE", "INVALID_MSG_SIZE", "RECORD_LIST_TOO_LARGE", "INVALID_RECORD", "TOPIC_EXCEPTION"}
)
_PURGED: Final = frozenset({"_PURGE_QUEUE", "_PURGE_INFLIGHT", "_FATAL", "_GAPLESS_GUARANTEE"})
_CURES: Final[Mapping[str, str]] = {
    "_AUTHENTICATION": "check username, password and mechanism",
    "_SSL": "check tls",
    "_UNKNOWN_TOPIC": "create the topic, or let the brokers do it: auto.create.topics.enable",
    "UNKNOWN_TOPIC_OR_PART": "create the topic, or let the brokers do it: auto.create.topics.enable",
    "TOPIC_AUTHORIZATION_FAILED": "let the user write it",
    "CLUSTER_AUTHORIZATION_FAILED": "let the user write idempotently: IdempotentWrite on the cluster",
    "MSG_SIZE_TOO_LARGE": "raise message.max.bytes here and on the topic, or capture fewer columns",
}

_Version = tuple[int, int, int]  # of a file: when it was changed, which one it is, and how large

# -- options ------------------------------------------------------------------------------------------------------

_Milliseconds = Annotated[int, Field(ge=0, le=3_600_000)]
_OPTIONS: Final[Mapping[str, Any]] = {
    "batch.num.messages": Annotated[int, Field(ge=1, le=1_000_000)],
    "batch.size": Annotated[int, Field(ge=1, le=2**31 - 1)],
    "broker.address.family": Literal["any", "v4", "v6"],
    "client.id": Annotated[str, Field(min_length=1)],
    "compression.level": Annotated[int, Field(ge=-1, le=12)],
    "compression.type": Literal["none", "gzip", "snappy", "lz4", "zstd"],
    "connections.max.idle.ms": Annotated[int, Field(ge=0, le=2**31 - 1)],
    "linger.ms": Annotated[float, Field(ge=0, le=900_000)],
    "max.in.flight.requests.per.connection": Annotated[int, Field(ge=1, le=5)],
    "message.max.bytes": Annotated[int, Field(ge=1000, le=1_000_000_000)],
    "metadata.max.age.ms": Annotated[int, Field(ge=1, le=86_400_000)],
    "partitioner": Literal["consistent", "consistent_random", "murmur2", "murmur2_random", "fnv1a", "fnv1a_random"],
    "reconnect.backoff.max.ms": _Milliseconds,
    "reconnect.backoff.ms": _Milliseconds,
    "request.timeout.ms": Annotated[int, Field(ge=1, le=900_000)],
    "retry.backoff.max.ms": Annotated[int, Field(ge=1, le=300_000)],
    "retry.backoff.ms": Annotated[int, Field(ge=1, le=300_000)],
    "socket.connection.setup.timeout.ms": Annotated[int, Field(ge=1000, le=2**31 - 1)],
    "socket.keepalive.enable": bool,
    "socket.nagle.disable": bool,
    "socket.timeout.ms": Annotated[int, Field(ge=10, le=300_000)],
    "topic.metadata.refresh.interval.ms": Annotated[int, Field(ge=-1, le=3_600_000)],
}
"""Option of librdkafka that may be set → what it may be."""

_FIELDS: Final[dict[str, Any]] = {
    name.replace(".", "_"): (kind | None, Field(default=None, alias=name)) for name, kind in _OPTIONS.items()
}
_Options: Final = create_model("_Options", __base__=StrictModel, **_FIELDS)

_REFUSED: Final[Sequence[tuple[str, str]]] = (
    ("bootstrap.servers", "write brokers"),
    ("metadata.broker.list", "write brokers"),
    ("security.protocol", "it follows from tls and username"),
    ("sasl.mechanism*", "write mechanism"),
    ("sasl.username", "write username"),
    ("sasl.password", "write password, which is kept out of logs"),
    ("ssl.ca.location", "write tls.ca"),
    ("ssl.certificate.location", "write tls.certificate"),
    ("ssl.key.location", "write tls.key"),
    ("enable.ssl.certificate.verification", "write tls.verify"),
    ("plugin.library.paths", "it loads code"),
    ("ssl.engine.location", "it loads code"),
    ("ssl.providers", "it loads code"),
    ("sasl.kerberos.*", "it runs a command"),
    ("*oauthbearer*", "it reads files and calls URLs"),
    ("https.*", "it reads files and calls URLs"),
    ("ssl.*", "files and secrets have keys of their own, in tls"),
    ("acks", "what the sink promises rests on it"),
    ("request.required.acks", "what the sink promises rests on it"),
    ("enable.*", "what the sink promises rests on it"),
    ("retries", "what the sink promises rests on it"),
    ("message.send.max.retries", "what the sink promises rests on it"),
    ("message.timeout.ms", "what the sink promises rests on it; write timeout"),
    ("delivery.timeout.ms", "what the sink promises rests on it; write timeout"),
    ("transactional.id", "what the sink promises rests on it"),
    ("debug", "its lines may hold rows and secrets"),
    ("statistics.interval.ms", "it costs a thread's time and nobody reads it"),
    ("test.*", "it is for librdkafka's own tests"),
)
"""Name or pattern of an option of librdkafka → why it may not be set, or where it is written instead."""


def _client_option(name: str) -> str:
    if name in _OPTIONS:
        return name
    for pattern, reason in _REFUSED:
        if fnmatchcase(name, pattern):
            raise ValueError(f"an option that may not be set: {reason} (leave it out)")
    raise ValueError(f"not an option that may be set (known: {', '.join(_OPTIONS)})")


def _values_fit(options: dict[str, Any]) -> dict[str, Any]:
    _Options.model_validate(options)
    return options


def _broker(address: str) -> str:
    if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}", address):
        raise ValueError("not the address of a broker (write HOST:PORT, such as kafka1:9092)")
    return address


def _topic(template: str) -> str:
    literal = re.sub(r"\{[^{}]*\}", "", template)
    if not template or re.search(r"[^A-Za-z0-9._-]", literal):
        raise ValueError("not a topic name (letters, digits, ., _ and -; placeholders such as {table})")
    if template in (".", "..") or len(literal) > TOPIC_LENGTH:
        raise ValueError(f"a topic name that Kafka does not allow (1 to {TOPIC_LENGTH} characters, not . or ..)")
    return template


class KafkaOptions(SinkOptions):
    """Options of a ``kafka`` sink.

    Attributes:
        brokers: ``host:port`` of some of the cluster's brokers; the others are learnt from them.
        topic: where an event goes; ``{database}``, ``{schema}``, ``{table}`` and ``{op}`` stand for the event's own.
        username, password: of a SASL user; both or neither.
        mechanism: how the user proves to be the one.
        tls: how the connection is encrypted; None: not at all.
        timeout: seconds until a batch that is not acknowledged counts as a transient failure.
        options: of librdkafka, those of an allow-list.
    """

    binding: ClassVar[Binding | None] = "kafka"

    type: Literal["kafka"]
    brokers: Annotated[tuple[Annotated[str, AfterValidator(_broker)], ...], Distinct]
    topic: Annotated[str, AfterValidator(_topic), checked(*ROUTE)] = "{database}.{schema}.{table}"
    username: str | None = None
    password: SecretStr | None = None
    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    tls: TlsOptions | None = None
    timeout: Duration = Field(default=20.0, ge=0.1)
    options: Annotated[dict[Annotated[str, AfterValidator(_client_option)], Any], AfterValidator(_values_fit)] = Field(
        default_factory=dict
    )

    @model_validator(mode="after")
    def _user_and_password(self) -> KafkaOptions:
        if (self.username is None) != (self.password is None):
            raise ValueError("username without password, or the other way round (write both or neither)")
        return self

    def for_client(self, name: str) -> dict[str, str]:
        """The configuration of librdkafka; it holds secrets.

        Args:
            name: the sink's.
        """
        found: dict[str, Any] = {
            "client.id": f"cdc-{name}",
            # As Java's producers do, so that Kafka Streams finds our keys where it looks for them.
            "partitioner": "murmur2_random",
            "reconnect.backoff.max.ms": 2000,
            # So that a missing topic is told as such.
            "topic.metadata.propagation.max.ms": min(int(self.timeout * 500), _LONGEST_PROPAGATION),
            **self.options,
            "bootstrap.servers": ",".join(self.brokers),
            "acks": "all",
            "enable.idempotence": True,
            "enable.gapless.guarantee": True,
            "message.timeout.ms": 0,
            "security.protocol": ("SASL_" if self.username else "") + ("SSL" if self.tls else "PLAINTEXT"),
        }
        if self.username is not None and self.password is not None:
            found["sasl.mechanism"] = self.mechanism
            found["sasl.username"] = self.username
            found["sasl.password"] = self.password.get_secret_value()
        if self.tls:
            found["enable.ssl.certificate.verification"] = self.tls.verify
            files = {
                "ca": self.tls.ca,
                "certificate": self.tls.certificate,
                "key": self.tls.key or self.tls.certificate,
            }
            found.update({f"ssl.{key}.location": path for key, path in files.items() if path is not None})
        return {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in found.items()}


def topic_word(name: str) -> str:
    """A name from the database in the letters Kafka allows; what it does not, and a dot, is written ``-xHEX-``."""
    return re.sub(r"[^A-Za-z0-9_-]", lambda found: f"-x{ord(found[0]):x}-", name)


# -- the sink -----------------------------------------------------------------------------------------------------


class _Message:
    """One event on its way.

    Attributes:
        id: of the event.
        topic, key, value, headers: as Kafka gets them.
        arrived: whether all replicas in sync have it.
        error: why they never will, or None.
    """

    __slots__ = ("arrived", "error", "headers", "id", "key", "topic", "value")

    def __init__(
        self, id_: str, topic: str, key: bytes, value: bytes, headers: list[tuple[str, str | bytes | None]]
    ) -> None:
        self.id = id_
        self.topic = topic
        self.key = key
        self.value = value
        self.headers = headers
        self.arrived = False
        self.error: confluent_kafka.KafkaError | None = None

    def reported(self, error: confluent_kafka.KafkaError | None, _: object) -> None:
        """The delivery report."""
        self.arrived = error is None
        self.error = error

    def says_the_same_as(self, other: _Message) -> bool:
        return (self.topic, self.key, self.value) == (other.topic, other.key, other.value)


class KafkaSink(Sink[KafkaOptions]):
    """Produces events into topics named by a template; see the head of this module."""

    Options = KafkaOptions
    clients = ("confluent_kafka",)

    def __init__(self, name: str, options: KafkaOptions, encoder: Encoder | None = None) -> None:
        super().__init__(name, options, encoder)
        self._topic = Template(options.topic, topic_word)
        self._producer: confluent_kafka.Producer | None = None
        self._sent: dict[str, _Message] = {}  # by event id: given to the producer, and not yet looked at
        self._alone: set[str] = set()  # ids of events that were refused in company
        self._is_broken = False  # the producer will take nothing more
        self._files: tuple[_Version | None, ...] = ()  # of tls, as they were when it was made
        self._is_shut_out = False  # a handshake has failed, and no batch has arrived since
        self._trouble: str | None = None  # what the client complained of, and
        self._worth = 0  # how telling that is
        self._give_up_at = math.inf
        self._lock = threading.Lock()  # of all the above
        self._is_closed = threading.Event()
        self._attendant: threading.Thread | None = None

    def open(self) -> None:
        with self._lock:
            self._open()
        if self._attendant is None:
            self._is_closed.clear()
            self._attendant = threading.Thread(target=self._attend, name=f"kafka {self.name}", daemon=True)
            self._attendant.start()

    def deliver(self, batch: Sequence[Event]) -> None:
        with self._lock:
            self._deliver(batch)

    def close(self) -> None:
        self._is_closed.set()
        attendant, self._attendant = self._attendant, None
        if attendant is not None:
            attendant.join()
        with self._lock:
            self._drop()

    def _attend(self) -> None:
        """While nothing is delivered, hear what the client says: it keeps that, as long as its brokers are gone."""
        while not self._is_closed.wait(IDLE_INTERVAL):
            if self._lock.acquire(blocking=False):
                try:
                    if self._producer is not None:
                        self._listen(0)
                finally:
                    self._lock.release()

    def _deliver(self, batch: Sequence[Event]) -> None:
        messages = [self._message(event) for event in batch]  # all of them before any is sent
        self._forget_all_but({message.id for message in messages})
        self._listen(0)  # to what was said while nobody did
        if self._is_shut_out and self._files != _versions(self.options.tls):
            self._drop()
        self._trouble, self._give_up_at = None, math.inf
        deadline = time.monotonic() + self.options.timeout
        failures: dict[int, TransientFailure | PermanentFailure] = {}
        for index, message in enumerate(messages):
            if (refusal := self._send(message, deadline)) is not None:
                # What comes after it must not overtake it.
                rest = TransientFailure("an event before it could not be sent")
                failures = {**dict.fromkeys(range(index + 1, len(batch)), rest), index: refusal}
                break
        self._wait(deadline)
        for index, message in enumerate(messages):
            if index not in failures and (failure := self._outcome(message.id)) is not None:
                failures[index] = failure
        if self._is_broken:
            self._drop()
        if not failures:
            self._is_shut_out = False
            return
        if len(failures) == len(batch) and isinstance(first := failures[0], TransientFailure):
            raise first
        raise PartialFailure(failures)

    # -- one message ------------------------------------------------------------------------------------------------

    def _message(self, event: Event) -> _Message:
        topic = self._topic.fill(event)
        if len(topic) > TOPIC_LENGTH:
            raise PermanentFailure(f"the name of its topic would be longer than {TOPIC_LENGTH} characters")
        if topic in (".", ".."):
            raise PermanentFailure("Kafka does not allow the name of its topic")
        key = event.key.raw if event.key else quote(f"{event.source.schema_name}.{event.source.table}")
        headers: list[tuple[str, str | bytes | None]] = [
            ("cdc-id", event.id),
            ("cdc-op", event.op.value),
            ("content-type", self.encoder.content_type),
            *self.encoder.headers(event).items(),
        ]
        return _Message(event.id, topic, key.encode(), self.encoder.encode(event).encode(), headers)

    def _send(self, message: _Message, deadline: float) -> TransientFailure | PermanentFailure | None:
        """Give a message to the producer, unless it has it already; returns why that was not possible."""
        is_alone = message.id in self._alone
        if is_alone and not self._wait(deadline):
            return self._unanswered()
        before = self._sent.get(message.id)
        if before is None or not before.says_the_same_as(message):
            if (failure := self._produce(message, deadline)) is not None:
                return failure
            self._sent[message.id] = message
        if is_alone:
            self._wait(deadline)
            return self._outcome(message.id, is_certain=True)
        return None

    def _produce(self, message: _Message, deadline: float) -> TransientFailure | PermanentFailure | None:
        producer = self._open()
        while True:
            try:
                producer.produce(
                    message.topic, message.value, message.key, headers=message.headers, on_delivery=message.reported
                )
            except BufferError:  # the client's queue is full
                if time.monotonic() >= min(deadline, self._give_up_at):
                    return self._unanswered()
                self._listen(_LOOK_UP)
            except confluent_kafka.KafkaException as exception:
                error = exception.args[0]
                self._is_broken = self._is_broken or error.fatal()
                return _failure(error, message.topic)
            else:
                return None

    def _outcome(self, id_: str, *, is_certain: bool = False) -> TransientFailure | PermanentFailure | None:
        """Why a message that was sent is not known to have arrived.

        Args:
            id_: of its event.
            is_certain: nothing else was sent with it, so that a refusal is meant for it.
        """
        message = self._sent.get(id_)
        if message is None:  # sent alone, and settled
            return None
        if message.arrived:
            del self._sent[id_]
            self._alone.discard(id_)
            return None
        if message.error is None:
            return self._unanswered()
        del self._sent[id_]
        self._is_broken = True  # what was sent after it must not arrive before it is sent again
        failure = _failure(message.error, message.topic)
        if isinstance(failure, PermanentFailure) and not is_certain:
            self._alone.add(id_)
            return TransientFailure(f"{failure}; it will be sent alone")
        self._alone.discard(id_)
        return failure

    # -- the producer -----------------------------------------------------------------------------------------------

    def _open(self) -> confluent_kafka.Producer:
        if self._producer is None:
            self._is_broken = self._is_shut_out = False
            self._files = _versions(self.options.tls)  # before librdkafka does, so that no later change is missed
            try:
                self._producer = confluent_kafka.Producer(
                    {**self.options.for_client(self.name), "error_cb": self._complained, "logger": _Lines()}
                )
            except confluent_kafka.KafkaException as exception:
                raise TransientFailure(f"the client cannot be set up: {exception.args[0].str()}") from None
        return self._producer

    def _wait(self, deadline: float) -> bool:
        """Wait for reports of everything sent; False when waiting has become pointless."""
        while self._listen(_LOOK_UP, is_flush=True):
            if self._is_broken:
                # It has thrown away what it had not sent; of what was on its way it still hears.
                deadline = min(deadline, time.monotonic() + _PARTING)
            if time.monotonic() >= min(deadline, self._give_up_at):
                return False
        return not self._is_broken

    def _listen(self, seconds: float, *, is_flush: bool = False) -> int:
        """Take reports and complaints; returns how many messages are on their way.

        Args:
            seconds: to wait for the first, or with `is_flush` for all reports.
            is_flush: send at once, and do not wait for more messages to go with those there are.
        """
        producer = self._open()
        try:
            return producer.flush(seconds) if is_flush else producer.poll(seconds)
        except confluent_kafka.KafkaException as exception:  # a fatal error, once; reports come before and after it
            self._is_broken = True
            self._trouble = _with_cure(exception.args[0])
            return len(producer)

    def _complained(self, error: confluent_kafka.KafkaError) -> None:
        """What librdkafka says about itself and the brokers, between two reports."""
        name = error.name()
        if name in _HOPELESS:
            self._give_up_at = min(self._give_up_at, time.monotonic() + GRACE)
        if name == "_SSL" or _OF_TLS in error.str():
            self._is_shut_out = True
        # Of one failed handshake it says more than one thing, in any order: what has a cure is the most telling.
        worth = 2 if name in _CURES else 0 if name == "_ALL_BROKERS_DOWN" else 1
        if self._trouble is None or worth >= self._worth:
            self._trouble, self._worth = _with_cure(error), worth

    def _unanswered(self) -> TransientFailure:
        if self._trouble is not None:
            return TransientFailure(self._trouble)
        return TransientFailure(f"no acknowledgement within {self.options.timeout:g} s")

    def _forget_all_but(self, ids: set[str]) -> None:
        self._alone &= ids
        if self._sent.keys() - ids:
            self._drop()

    def _drop(self) -> None:
        """Let go of the producer, and of all that it was not seen to deliver."""
        producer, self._producer = self._producer, None
        self._sent.clear()
        if producer is not None and len(producer):
            producer.purge(blocking=False)
            producer.flush(_PARTING)


def _versions(tls: TlsOptions | None) -> tuple[_Version | None, ...]:
    """The files as they are now."""
    return () if tls is None else tuple(map(_version, (tls.ca, tls.certificate, tls.key)))


def _version(path: str | None) -> _Version | None:
    """What tells a file from what it was before; None: there is none."""
    if path is None:
        return None
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _with_cure(error: confluent_kafka.KafkaError) -> str:
    cure = _CURES.get(error.name())
    return error.str() + (f" ({cure})" if cure else "")


def _failure(error: confluent_kafka.KafkaError, topic: str) -> TransientFailure | PermanentFailure:
    name = error.name()
    if name in _PURGED:
        return TransientFailure("the producer was stopped by a failure; a new one sends it again")
    kind = PermanentFailure if name in _PERMANENT else TransientFailure
    return kind(f"topic {topic}: {_with_cure(error)}")


class _Lines:
    """Where librdkafka's own log goes."""

    def log(self, _level: int, message: str, *arguments: object) -> None:
        log.debug("librdkafka says something.", extra={"fields": {"line": message % arguments}})
