"""Events in RabbitMQ: persistent messages to an exchange, each confirmed by the broker, none lost for want of a queue.

**What is promised.** An event counts as delivered when the broker has confirmed its message and has not returned it. A
durable queue has it on disk then, a quorum queue on most of its nodes. ``mandatory`` is always set: a message that no
queue takes comes back, and its event is tried again, because a binding that is missing can be made
(``unroutable: permanent`` gives it up instead).

**Order.** A batch is published at once over one channel, and the broker keeps the order of a channel. But what it
returns or refuses (a queue that is full) does not stop what was published behind it. So for ``CAREFUL`` seconds after
such a failure only one event of a key is on its way at a time. In the very batch in which it begins, one that comes
after it may have been taken: the pipeline sends both again, in order.

**Waiting is not failing.** When nothing has come back within ``timeout``, ``deliver`` gives up the wait but neither the
connection nor the messages: the next attempt with the same events takes it up where it was. So a broker that is slow or
frozen, or that holds its publishers back (an alarm for memory or disk), makes no duplicates. A connection that breaks
does: what was on its way may have been taken, and is published again, under the same ids.

**Who closed the channel.** A message that is too large, and an exchange that is not there or not ours to write, make
the broker close the channel, without a word about which message it was. Those that were on their way are published
alone the next time, and what closes the channel then is the one.

=================================================  ======================================================
no confirm within ``timeout``                      transient; the wait goes on in the next attempt
connection refused or lost, credentials refused    transient
publishers are held back (alarm)                   transient, with the broker's reason
no queue bound                                     transient, or permanent: ``unroutable``
refused by a queue (full)                          transient
the exchange is missing, or not ours to write      transient: somebody can mend it
the message is too large                           permanent
=================================================  ======================================================

**Idle.** Nobody answers heartbeats while there is nothing to deliver, so there are none: the kernel's keepalives find a
peer that has gone, and a connection that was closed in the meantime is made anew before anything is published.

pika's own blocking connection waits for each confirm before the next message. Here its I/O loop is turned by hand, in
the pipeline's thread, and what a loop's turn has to send goes out in one piece.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator

from cdc.encoding import Encoder
from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event
from cdc.lanes import lanes
from cdc.options import Duration, Host, SinkOptions, TlsOptions
from cdc.sinks.base import Sink, require, tls_context
from cdc.template import CONTENT, ROUTE, Template, checked

if TYPE_CHECKING:
    import pika
    from pika import exceptions, spec
    from pika.adapters import select_connection
else:
    pika = require("pika", extra="rabbitmq")
    select_connection = require("pika.adapters.select_connection", extra="rabbitmq")
    exceptions = require("pika.exceptions", extra="rabbitmq")
    spec = require("pika.spec", extra="rabbitmq")

CAREFUL: Final = 60.0
"""Seconds after a failure during which only one event of a key is on its way."""
GRACE: Final = 1.0
"""Seconds that a broker may hold its publishers back before a batch fails."""

_NOWHERE = logging.NullHandler()
_SHORT = 255  # bytes of a name, in the protocol
_LOOK_UP = 0.1  # seconds of one turn
_PARTING = 0.5  # seconds for the broker to answer a goodbye
_CHUNK = 50  # messages; the broker is at work on one while the next is made
_PERSISTENT = 2
_TCP = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}

_ACCESS_REFUSED, _NOT_FOUND, _PRECONDITION_FAILED = 403, 404, 406
_REFUSALS: Final = {
    _ACCESS_REFUSED: "may not be written by this user (give him the right to write it)",
    _NOT_FOUND: "does not exist (create it, or set declare)",
}
_LOGIN: Final = {
    _ACCESS_REFUSED: "refuses the credentials (check username and password)",
    530: "refuses the vhost (create it, or give the user rights in it)",
}


# -- options ------------------------------------------------------------------------------------------------------


class Address(NamedTuple):
    """Where the broker is, and who we are there."""

    host: str
    port: int
    vhost: str
    username: str
    password: str
    tls: bool

    def __str__(self) -> str:
        return f"rabbitmq at {self.host}:{self.port}"


def _short(template: str) -> str:
    if len(re.sub(r"\{[^{}]*\}", "", template).encode()) > _SHORT:
        raise ValueError(f"longer than {_SHORT} bytes, which is all a message has room for")
    return template


_IN_PARTS = ("host", "port", "vhost", "username", "password")


class RabbitmqOptions(SinkOptions):
    """Options of a ``rabbitmq`` sink.

    Attributes:
        url: ``amqp://`` or ``amqps://`` (TLS), with user, password and vhost; instead of the next five.
        host, port, vhost, username, password: the broker, and the user.
        tls: how the connection is encrypted; None: not at all, unless the URL says so.
        exchange: template of the exchange's name; the empty one is the default exchange, whose routing keys are queues.
        routing_key: template of the routing key; a dot in what is filled in is written ``%2E``.
        declare: kind of a durable exchange to create where there is none; None: it has to be there.
        unroutable: whether an event that no queue takes is tried again, or is a permanent failure.
        timeout: seconds until a batch that is not confirmed counts as a transient failure.
    """

    type: Literal["rabbitmq"]
    url: SecretStr | None = None
    host: Host = "localhost"
    port: int | None = Field(default=None, ge=1, le=65535)
    vhost: str = "/"
    username: str = "guest"
    password: SecretStr = SecretStr("guest")
    tls: TlsOptions | None = None
    exchange: Annotated[str, AfterValidator(_short), checked(*ROUTE)]
    routing_key: Annotated[str, AfterValidator(_short), checked(*ROUTE, *CONTENT)] = "{database}.{schema}.{table}"
    declare: Literal["direct", "topic", "fanout", "headers"] | None = None
    unroutable: Literal["retry", "permanent"] = "retry"
    timeout: Duration = Field(default=20.0, ge=0.1)

    @field_validator("url")
    @classmethod
    def _is_address(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _parse(value.get_secret_value())
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> RabbitmqOptions:
        if self.url is not None and (also := [name for name in _IN_PARTS if name in self.model_fields_set]):
            raise ValueError(f"url, and {also[0]} beside it (keep one of the two)")
        if self.declare is not None and (not self.exchange or self.exchange.startswith("amq.")):
            raise ValueError("declare, and an exchange that the broker has made itself (leave declare out)")
        return self

    @property
    def address(self) -> Address:
        """What `url` says, or the keys in its stead."""
        if self.url is not None:
            address = _parse(self.url.get_secret_value())
            return address._replace(tls=address.tls or self.tls is not None)
        tls = self.tls is not None
        port = self.port or _port(tls)
        return Address(self.host, port, self.vhost, self.username, self.password.get_secret_value(), tls)


def _port(tls: bool) -> int:
    return 5671 if tls else 5672


def _parse(url: str) -> Address:
    """An address; ValueError, without the URL, for what is not one."""
    wrong = ValueError("not a RabbitMQ URL (write amqp://user:password@host:5672/vhost, or amqps://… for TLS)")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise wrong from None
    if parts.query or parts.fragment:
        raise ValueError("a RabbitMQ URL with options after ? or # (write them as keys of the sink)")
    if parts.scheme not in ("amqp", "amqps") or not parts.hostname or "/" in parts.path[1:]:
        raise wrong
    tls = parts.scheme == "amqps"
    vhost = unquote(parts.path[1:]) or "/"
    username, password = (unquote(part) if part else "guest" for part in (parts.username, parts.password))
    return Address(parts.hostname, port or _port(tls), vhost, username, password, tls)


def routing_word(name: str) -> str:
    """What is filled in as one word of a routing key: a binding's patterns count the words between dots."""
    return name.replace("%", "%25").replace(".", "%2E")


# -- the connection -----------------------------------------------------------------------------------------------


class _Message:
    """One event on its way.

    Attributes:
        id: of the event.
        exchange, routing_key, body, headers: as RabbitMQ gets them.
        is_sent: whether it was published on the channel there is.
        is_returned: whether it has come back.
        outcome: None until the broker has settled it; then True, or why it did not take it.
    """

    __slots__ = ("body", "exchange", "headers", "id", "is_returned", "is_sent", "outcome", "routing_key")

    def __init__(self, id_: str, exchange: str, routing_key: str, body: bytes, headers: dict[str, str]) -> None:
        self.id = id_
        self.exchange = exchange
        self.routing_key = routing_key
        self.body = body
        self.headers = headers
        self.is_sent = False
        self.is_returned = False
        self.outcome: Literal[True] | TransientFailure | PermanentFailure | None = None

    def says_the_same_as(self, other: _Message) -> bool:
        return (self.exchange, self.routing_key, self.body) == (other.exchange, other.routing_key, other.body)


@cache
def _connection_class() -> type[Any]:
    """pika's connection, with a hold on what it writes; pika is imported when the first is made."""

    class Held(select_connection.SelectConnection):  # type: ignore[misc]  # pika has no types
        """Collects the small pieces that messages are written in, between `hold` and `release`."""

        _held: list[bytes] | None = None

        def hold(self) -> None:
            self._held = []

        def release(self) -> None:
            held, self._held = self._held, None
            if held:
                super()._adapter_emit_data(b"".join(held))

        def drop(self) -> None:
            """Close the socket, whatever the broker says to it."""
            self._adapter_disconnect_stream()

        # What pika's adapters are there to provide. Were it to be called otherwise one day, nothing would be held, and
        # everything would still be written.
        def _adapter_emit_data(self, data: bytes) -> None:
            if self._held is None:
                super()._adapter_emit_data(data)
            else:
                self._held.append(data)

    return Held


class _Link:
    """A connection and its channel, moved by :meth:`turn` alone.

    Attributes:
        failure: why it is of no more use, or None.
        channel_closed: code the broker closed the channel with, or None.
        is_ready: whether messages can be published.
        blocked: why the broker takes none for now, or None.
        on_confirm: called with a delivery tag, whether it means all up to it, and whether they were taken.
        on_return: called with the id of a message that has come back.
    """

    def __init__(
        self,
        address: Address,
        tls: TlsOptions,
        *,
        name: str,
        seconds: float,
        on_confirm: Callable[[int, bool, bool], None],
        on_return: Callable[[str], None],
    ) -> None:
        """Begin to connect; :meth:`turn` until `is_ready` or `failure` says more.

        Args:
            address, tls: of the broker.
            name: what the broker shows for the connection.
            seconds: in which the caller means to be there.
            on_confirm, on_return: as above.

        Raises:
            TransientFailure: a file of `tls` cannot be used.
        """
        self.failure: TransientFailure | None = None
        self.channel_closed: int | None = None
        self.is_ready = False
        self.blocked: str | None = None
        self.declared: set[str] = set()
        self._address = address
        self._on_confirm = on_confirm
        self._on_return = on_return
        self._channel: Any = None
        self._was_open = False
        self._loop = select_connection.IOLoop()
        self._loop.activate_poller()
        self._connection = _connection_class()(
            pika.ConnectionParameters(
                host=address.host,
                port=address.port,
                virtual_host=address.vhost,
                credentials=pika.PlainCredentials(address.username, address.password),
                ssl_options=pika.SSLOptions(tls_context(tls), address.host) if address.tls else None,
                heartbeat=0,
                connection_attempts=1,
                socket_timeout=2 * seconds,  # whoever turns gives up before, and says so in his words
                stack_timeout=2 * seconds,
                client_properties={"connection_name": name},
                tcp_options=_TCP,
            ),
            on_open_callback=self._opened,
            on_open_error_callback=self._failed,
            on_close_callback=self._failed,
            custom_ioloop=self._loop,
        )
        self._connection.add_on_connection_blocked_callback(self._was_blocked)
        self._connection.add_on_connection_unblocked_callback(self._was_unblocked)

    def turn(self, seconds: float) -> None:
        """Write and read what can be, and wait for it at most so long."""
        alarm = self._loop.call_later(seconds, lambda: None)
        self._loop.poll()
        self._loop.process_timeouts()
        self._loop.remove_timeout(alarm)

    def publish(self, messages: Sequence[_Message], content_type: str) -> None:
        """Hand messages to the channel; only :meth:`turn` sends them."""
        self._connection.hold()
        try:
            for message in messages:
                properties = pika.BasicProperties(
                    content_type=content_type,
                    delivery_mode=_PERSISTENT,
                    message_id=message.id,
                    app_id="cdc",
                    headers=message.headers,
                )
                self._channel.basic_publish(
                    message.exchange, message.routing_key, message.body, properties, mandatory=True
                )
        finally:
            self._connection.release()

    def open_channel(self) -> None:
        """Begin to open a channel, the first or one in place of one that was closed."""
        self.is_ready = False
        self.channel_closed = None
        self._connection.channel(on_open_callback=self._channel_opened)

    def declare(self, exchange: str, kind: str, done: Callable[[int | None], None]) -> None:
        """Begin to create an exchange, on a channel of its own; `done` is told the code of a refusal, or None."""

        def opened(channel: Any) -> None:
            channel.add_on_close_callback(
                lambda _, error: done(error.reply_code if isinstance(error, exceptions.ChannelClosedByBroker) else None)
            )
            channel.exchange_declare(exchange, kind, durable=True, callback=lambda _: channel.close())

        self._connection.channel(on_open_callback=opened)

    def close(self) -> None:
        """Say goodbye, and do not wait for the answer."""
        try:
            self._part()
        except AssertionError:
            # Closed in the middle of its handshake, pika 1.4 closes the socket and then stumbles over itself.
            if self._was_open:
                raise
        finally:
            self._loop.deactivate_poller()
            self._loop.close()

    def _part(self) -> None:
        if not (self._connection.is_closed or self._connection.is_closing):
            self._connection.close()
        deadline = time.monotonic() + _PARTING
        while not self._connection.is_closed and time.monotonic() < deadline:
            self.turn(_PARTING)
        if not self._connection.is_closed:
            self._connection.drop()
            self.turn(0)

    # -- what pika tells --------------------------------------------------------------------------------------------

    def _opened(self, _: object) -> None:
        self._was_open = True
        self.open_channel()

    def _channel_opened(self, channel: Any) -> None:
        self._channel = channel
        channel.add_on_close_callback(self._channel_failed)
        channel.add_on_return_callback(self._returned)
        channel.confirm_delivery(self._confirmed, callback=self._selected)

    def _selected(self, _: object) -> None:
        self.is_ready = True

    def _confirmed(self, frame: Any) -> None:
        method = frame.method
        self._on_confirm(method.delivery_tag, method.multiple, isinstance(method, spec.Basic.Ack))

    def _returned(self, _: object, __: object, properties: Any, ___: object) -> None:
        self._on_return(properties.message_id)

    def _channel_failed(self, _: object, error: BaseException) -> None:
        self.is_ready = False
        if isinstance(error, exceptions.ChannelClosedByBroker):
            self.channel_closed = error.reply_code

    def _was_blocked(self, _: object, frame: Any) -> None:
        self.blocked = str(frame.method.reason)

    def _was_unblocked(self, _: object, __: object) -> None:
        self.blocked = None

    def _failed(self, _: object, error: BaseException) -> None:
        self.is_ready = False
        self.failure = TransientFailure(f"{self._address} {_in_words(error)}")


def _in_words(error: BaseException) -> str:
    """Why a connection was not made or is no more, in our words: the broker's may name what stands in a row."""
    links = list(_chain(error))
    text = repr(links)
    for link in links:
        if isinstance(link, exceptions.ProbableAuthenticationError) or (
            isinstance(link, exceptions.ConnectionClosedByBroker) and link.reply_code in _LOGIN
        ):
            code = getattr(link, "reply_code", _ACCESS_REFUSED)
            return _LOGIN[code]
        if isinstance(link, exceptions.ProbableAccessDeniedError):
            return _LOGIN[530]
    for link in links:
        if isinstance(link, exceptions.ConnectionClosedByBroker):
            word = re.match(r"[A-Z_]+", link.reply_text or "")
            return f"closed the connection: {word[0] if word else link.reply_code}"
        if isinstance(link, OSError) and link.strerror:
            return f"cannot be reached: {link.strerror}"
    if "Timeout" in text or "TIMEOUT" in text:
        return "did not answer in time"
    return "closed the connection"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that led to it, by any of the ways in which pika keeps them."""
    waiting: deque[object] = deque([error])
    while waiting:
        link = waiting.popleft()
        if isinstance(link, BaseException):
            yield link
            waiting.extend((link.__cause__, link.__context__, getattr(link, "exception", None)))
            waiting.extend(getattr(link, "exceptions", ()))
            waiting.extend(argument for argument in link.args if isinstance(argument, BaseException))


# -- the sink -----------------------------------------------------------------------------------------------------


class RabbitmqSink(Sink[RabbitmqOptions]):
    """Publishes events to exchanges named by a template; see the head of this module."""

    Options = RabbitmqOptions
    clients = ("pika",)

    def __init__(self, name: str, options: RabbitmqOptions, encoder: Encoder | None = None) -> None:
        super().__init__(name, options, encoder)
        self._address = options.address
        self._exchange = Template(options.exchange)
        self._routing_key = Template(options.routing_key, routing_word)
        self._link: _Link | None = None
        self._sent: dict[str, _Message] = {}  # by event id: given to the broker, or about to be
        self._by_tag: dict[int, _Message] = {}  # published on the channel there is, and not confirmed
        self._last_tag = 0
        self._lowest_tag = 1
        self._alone: set[str] = set()  # ids of events that were on their way when the channel was closed
        self._refused: dict[str, TransientFailure] = {}  # exchanges that take nothing, for one attempt
        self._careful_until = -math.inf
        self._has_failed = False  # an event of this attempt
        self._give_up_at = math.inf
        self._trouble: TransientFailure | None = None

    def open(self) -> None:
        # pika logs each failure of a connection several times; what matters of it stands in what is raised.
        logging.getLogger("pika").addHandler(_NOWHERE)
        self._connect(time.monotonic() + self.options.timeout)

    def deliver(self, batch: Sequence[Event]) -> None:
        messages = [self._message(event) for event in batch]  # all of them before any is sent
        self._take_up(messages)
        deadline = time.monotonic() + self.options.timeout
        self._give_up_at, self._trouble, self._has_failed = math.inf, None, False
        self._refused.clear()
        self._connect(deadline)
        if self._alone or time.monotonic() < self._careful_until:
            self._publish_by_lane(batch, messages, deadline)
        else:
            self._publish_all(messages, deadline)
        failures = {
            index: failure for index, message in enumerate(messages) if (failure := self._outcome(message)) is not None
        }
        if not failures:
            return
        if len(failures) == len(batch) and isinstance(first := failures[0], TransientFailure):
            raise first
        raise PartialFailure(failures)

    def close(self) -> None:
        self._drop()

    # -- messages ---------------------------------------------------------------------------------------------------

    def _message(self, event: Event) -> _Message:
        exchange, routing_key = self._exchange.fill(event), self._routing_key.fill(event)
        for what, name in (("exchange", exchange), ("routing key", routing_key)):
            if len(name.encode()) > _SHORT:
                raise PermanentFailure(f"its {what} would be longer than {_SHORT} bytes")
        headers = {"cdc-op": event.op.value, **self.encoder.headers(event)}
        return _Message(event.id, exchange, routing_key, self.encoder.encode(event).encode(), headers)

    def _take_up(self, messages: list[_Message]) -> None:
        """Put those that an earlier attempt has left on their way in the place of the new ones."""
        ids = {message.id for message in messages}
        self._alone &= ids
        if self._sent.keys() - ids:
            self._drop()  # the pipeline does not come back with them: nobody waits for their confirms
        if self._link is not None:
            self._link.turn(0)  # what was said while nobody listened
            self._look_after_link()
        for index, message in enumerate(messages):
            before = self._sent.get(message.id)
            if before is not None and before.says_the_same_as(message):
                messages[index] = before
            else:
                self._sent[message.id] = message

    def _outcome(self, message: _Message) -> TransientFailure | PermanentFailure | None:
        """Why a message is not known to have been taken."""
        if message.outcome is None and message.is_sent:
            return self._unanswered()
        self._sent.pop(message.id, None)
        if message.outcome is None:
            return self._trouble or TransientFailure("an event before it was not delivered")
        self._alone.discard(message.id)
        return None if message.outcome is True else message.outcome

    def _unanswered(self) -> TransientFailure:
        if self._link is not None and self._link.blocked:
            return TransientFailure(f"{self._address} takes nothing for now: {self._link.blocked}")
        return TransientFailure(f"{self._address} confirmed nothing within {self.options.timeout:g} s")

    # -- publishing -------------------------------------------------------------------------------------------------

    def _publish_all(self, messages: Sequence[_Message], deadline: float) -> None:
        """Publish in one go, up to the first failure that is seen, and wait until the broker has settled it."""
        new = [message for message in messages if message.outcome is None and not message.is_sent]
        for first in range(0, len(new), _CHUNK):
            self._hand_over(new[first : first + _CHUNK], deadline)
            if self._has_failed:
                break
        self._wait(deadline)

    def _publish_by_lane(self, batch: Sequence[Event], messages: Sequence[_Message], deadline: float) -> None:
        """Publish so that of events tied to each other only one is on its way."""
        chains = [deque(messages[index] for index in lane) for lane in lanes(batch)]
        while chains:
            self._publish_untied([chain[0] for chain in chains], deadline)
            chains = [chain for chain in chains if chain.popleft().outcome is True and chain]

    def _publish_untied(self, messages: Sequence[_Message], deadline: float) -> None:
        """The same for messages in any order; those under suspicion go one by one."""
        new = [message for message in messages if message.outcome is None and not message.is_sent]
        together = [message for message in new if message.id not in self._alone]
        for first in range(0, len(together), _CHUNK):
            self._hand_over(together[first : first + _CHUNK], deadline)
        self._wait(deadline)
        for message in new:
            if message.id in self._alone and not self._by_tag:
                self._hand_over([message], deadline)
                self._wait(deadline)

    def _hand_over(self, messages: Sequence[_Message], deadline: float) -> None:
        link = self._link
        while link is not None and link.blocked and not self._is_over(deadline):
            self._turn()
        if link is None or not self._is_ready(deadline) or link.blocked:
            return
        self._declare({message.exchange for message in messages}, deadline)
        for message in messages:
            message.outcome = self._refused.get(message.exchange)
        messages = [message for message in messages if message.outcome is None]
        if self._link is link and link.is_ready and messages:
            for message in messages:
                self._last_tag += 1
                self._by_tag[self._last_tag] = message
                message.is_sent = True
            link.publish(messages, self.encoder.content_type)
            self._turn(0)

    def _declare(self, exchanges: set[str], deadline: float) -> None:
        """Create the exchanges this connection has not seen, where the configuration wants that."""
        link = self._link
        if link is None or self.options.declare is None:
            return
        for exchange in sorted(exchanges - link.declared - self._refused.keys()):
            answers: list[int | None] = []
            link.declare(exchange, self.options.declare, answers.append)
            while not answers and link.failure is None and not self._is_over(deadline):
                link.turn(_LOOK_UP)
            if answers == [None]:
                link.declared.add(exchange)
            elif answers:
                cure = "there is one of another kind; make declare the same, or leave it out"
                if answers[0] == _ACCESS_REFUSED:
                    cure = "give the user the right to configure it, or create it and leave declare out"
                self._refused[exchange] = TransientFailure(f"exchange {exchange!r} cannot be declared ({cure})")

    def _wait(self, deadline: float) -> None:
        """Until the broker has settled all that it was given."""
        while self._by_tag and not self._is_over(deadline):
            self._turn()

    def _turn(self, seconds: float = _LOOK_UP) -> None:
        if self._link is not None:
            self._link.turn(seconds)
            if not self._link.blocked:
                self._give_up_at = math.inf
            elif self._give_up_at == math.inf:
                self._give_up_at = time.monotonic() + GRACE
            self._look_after_link()

    def _is_over(self, deadline: float) -> bool:
        return time.monotonic() >= min(deadline, self._give_up_at)

    # -- what the broker says ---------------------------------------------------------------------------------------

    def _confirmed(self, tag: int, is_multiple: bool, is_taken: bool) -> None:
        for number in range(self._lowest_tag, tag + 1) if is_multiple else (tag,):
            if (message := self._by_tag.pop(number, None)) is not None:
                self._settle(message, is_taken)
        if is_multiple:
            self._lowest_tag = tag + 1

    def _settle(self, message: _Message, is_taken: bool) -> None:
        where = f"exchange {message.exchange!r}"
        message.is_sent = False
        if is_taken and not message.is_returned:
            message.outcome = True
            return
        self._has_failed = True
        self._careful_until = time.monotonic() + CAREFUL
        if not is_taken:
            message.outcome = TransientFailure(f"{where}: a queue refuses it (it is full, or has failed)")
        elif self.options.unroutable == "permanent":
            message.outcome = PermanentFailure(f"{where}: no queue takes it")
        else:
            key = self.options.routing_key
            message.outcome = TransientFailure(f"{where}: no queue takes it (bind one, to the routing keys of {key})")

    def _returned(self, id_: str) -> None:
        if id_ in self._sent:
            self._sent[id_].is_returned = True

    def _look_after_link(self) -> None:
        """See to a connection that is no more, or a channel the broker has closed."""
        link = self._link
        if link is None or (link.failure is None and link.channel_closed is None):
            return
        lost = list(self._by_tag.values())
        self._by_tag.clear()
        self._last_tag, self._lowest_tag = 0, 1
        self._has_failed = True
        for message in lost:
            message.is_sent = message.is_returned = False
        if link.failure is not None:
            self._trouble = link.failure
            self._link = None
            link.close()
            return
        code = link.channel_closed or 0
        self._careful_until = time.monotonic() + CAREFUL
        refused = {message.exchange for message in lost}
        if len(lost) == 1 or (len(refused) == 1 and code in _REFUSALS):
            for message in lost:
                message.outcome = self._verdict(code, message)
        else:
            self._alone.update(message.id for message in lost)
            self._trouble = TransientFailure("the broker closed the channel; what was on its way goes again one by one")
        link.declared.clear()
        link.open_channel()

    def _verdict(self, code: int, message: _Message) -> TransientFailure | PermanentFailure:
        """What closing the channel means for the only message that was on its way."""
        if code in _REFUSALS:
            failure = TransientFailure(f"exchange {message.exchange!r} {_REFUSALS[code]}")
            self._refused[message.exchange] = failure
            return failure
        if code == _PRECONDITION_FAILED:
            size = len(message.body)
            return PermanentFailure(f"the broker does not take this message of {size} bytes (see its max_message_size)")
        return TransientFailure(f"{self._address} closed the channel with code {code}")

    # -- the connection ---------------------------------------------------------------------------------------------

    def _connect(self, deadline: float) -> None:
        """Have a connection and a channel, or raise TransientFailure."""
        if self._link is None:
            self._by_tag.clear()
            self._last_tag, self._lowest_tag = 0, 1
            self._link = _Link(
                self._address,
                self.options.tls or TlsOptions(),
                name=f"cdc {self.name}",
                seconds=self.options.timeout,
                on_confirm=self._confirmed,
                on_return=self._returned,
            )
        if not self._is_ready(deadline):
            trouble = self._trouble or TransientFailure(
                f"{self._address} did not answer within {self.options.timeout:g} s"
            )
            self._drop()
            raise trouble

    def _is_ready(self, deadline: float) -> bool:
        """Turn until messages can be published; False: that will not be."""
        while (link := self._link) is not None and not link.is_ready:
            if self._is_over(deadline):
                return False
            self._turn()
        return self._link is not None

    def _drop(self) -> None:
        """Let go of the connection, and of all that it was not seen to deliver."""
        link, self._link = self._link, None
        self._give_up_at = math.inf
        self._sent.clear()
        self._by_tag.clear()
        if link is not None:
            link.close()
