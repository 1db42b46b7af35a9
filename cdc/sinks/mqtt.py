"""Events on MQTT topics, with quality of service 1: each acknowledged by the broker.

What a broker acknowledges it has, and hands on to who is subscribed at that moment or has a session; where nobody is,
it is gone. Behind the broker the delivery is as good as the subscribers' sessions; `require_subscriber` waits at least
until there is one.

Events of one key, and those of a table without a key, are published one after another, each after the acknowledgement
of the one before; different keys go side by side, as many as the broker lets us have in flight.

* No answer for `timeout` seconds, or a lost connection: what was not acknowledged has failed, and what waited for it.
* An acknowledgement that refuses (no right to the topic, over a quota): that event has failed, and the later ones of
  its key. Too large, or a topic the broker does not accept: for good.
* A broker that closes the connection over a message does not say over which. It is the first without an answer, so its
  topic goes last from then on, behind those of other keys, until it is taken. Where it is closed over what no later
  attempt will mend (a size, a malformed packet), the pipeline halves the batch until it has found the event.
* After a failure the connection is given up, and the next attempt makes a new one with a new session, so that a client
  does not repeat behind our back what the pipeline is about to repeat.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

from pydantic import AfterValidator, Field, SecretStr, model_validator

from cdc.encoding import Encoder
from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event
from cdc.lanes import in_waves
from cdc.options import Duration, Host, SinkOptions, TlsOptions
from cdc.sinks.base import Sink, network_reason, require, tls_context
from cdc.template import CONTENT, ROUTE, Template, checked

if TYPE_CHECKING:
    import paho.mqtt.client as mqtt
    from paho.mqtt import enums, packettypes, properties, reasoncodes
else:
    mqtt = require("paho.mqtt.client", extra="mqtt")
    enums = require("paho.mqtt.enums", extra="mqtt")
    packettypes = require("paho.mqtt.packettypes", extra="mqtt")
    properties = require("paho.mqtt.properties", extra="mqtt")

IN_FLIGHT: Final = 1000
"""Messages that may wait for their acknowledgement, where the broker does not ask for fewer."""
KEEPALIVE: Final = 30
"""Seconds of silence after which the client pings the broker."""

_OVERHEAD: Final = (
    32  # of a packet, beside topic, properties and payload: at most 5 + 2 + 2 + 4 and what is counted there
)
_LONGEST_TOPIC: Final = 65535
_UNSAFE: Final = re.compile(r"[+#/%\x00-\x1f\x7f-\x9f]|^\$")
_UNHEARD: Final = 0x10
_HOPELESS: Final = (0x90, 0x95, 0x99)  # topic name invalid, packet too large, payload format invalid
_OVER_A_MESSAGE: Final = (0x81, 0x82, *_HOPELESS)  # malformed packet, protocol error
_REFUSED: Final = (0x84, 0x85, 0x86, 0x87, 0x8A, 0x8C)

Failure = TransientFailure | PermanentFailure


def _topic(template: str) -> str:
    if not template or template.startswith("$") or set("+#\0") & set(template):
        raise ValueError("not a topic (write levels with slashes between them, without + # and a leading $)")
    return template


class MqttOptions(SinkOptions):
    """Options of an ``mqtt`` sink.

    Attributes:
        host, port: the broker, which speaks MQTT 5; the port is 1883, or 8883 with TLS.
        tls: how the connection is encrypted; None: not at all.
        username, password: who we are.
        client_id: what the client's name begins with; the rest is drawn at each connection.
        topic: template; what is filled in never adds a level.
        retain: the broker keeps the last message of each topic for those who subscribe later.
        require_subscriber: a message has failed when the broker says that nobody is subscribed to its topic.
        timeout: seconds to wait for a connection, and for the next answer.
    """

    type: Literal["mqtt"]
    host: Host = "localhost"
    port: int | None = Field(default=None, ge=1, le=65535)
    tls: TlsOptions | None = None
    username: str | None = None
    password: SecretStr | None = None
    client_id: Annotated[str, Field(min_length=1, max_length=100, pattern="^[A-Za-z0-9_-]*$")] = "cdc"
    topic: Annotated[str, checked(*ROUTE, *CONTENT), AfterValidator(_topic)] = "cdc/{database}/{schema}/{table}"
    retain: bool = False
    require_subscriber: bool = False
    timeout: Duration = Field(default=10.0, gt=0)

    @model_validator(mode="after")
    def _who(self) -> MqttOptions:
        if self.password is not None and self.username is None:
            raise ValueError("password without username (write both)")
        return self


class Message(NamedTuple):
    """What is published of an event."""

    topic: str
    payload: bytes
    properties: properties.Properties


class MqttSink(Sink[MqttOptions]):
    """Publishes events to topics; see the head of this module."""

    Options = MqttOptions
    clients = ("paho.mqtt",)

    def __init__(self, name: str, options: MqttOptions, encoder: Encoder | None = None) -> None:
        super().__init__(name, options, encoder)
        self._topic = Template(options.topic, _level)
        self._connection: _Connection | None = None
        self._blamed: dict[str, int] = {}  # topics over which a connection may have been closed; the latest has most

    def open(self) -> None:
        self.close()
        self._connected()

    def deliver(self, batch: Sequence[Event]) -> None:
        connection = self._connected()
        messages = [self._message(event, connection.largest) for event in batch]
        down: TransientFailure | None = None

        def send(wave: Sequence[int]) -> Mapping[int, Failure]:
            nonlocal down
            if down is None:
                try:
                    return self._send(messages, wave)
                except TransientFailure as error:
                    down = error
            return dict.fromkeys(wave, down)

        try:
            failures = in_waves(batch, send, at_once=connection.at_once)
        except PermanentFailure:
            self.close()
            raise
        if not failures:
            return
        transient = [failure for failure in failures.values() if isinstance(failure, TransientFailure)]
        if transient:
            self.close()
        if len(transient) == len(batch):
            raise transient[0]
        raise PartialFailure(failures)

    def _send(self, messages: Sequence[Message], wave: Sequence[int]) -> dict[int, Failure]:
        """Publish some, over a new connection if the last one was closed over one of them.

        Raises:
            TransientFailure: there is no answer to any; PermanentFailure: the connection was closed over one of them.
        """
        connection = self._connected()
        in_order = sorted(wave, key=lambda index: self._blamed.get(messages[index].topic, 0))
        answers = connection.publish(messages, in_order)
        failures = {index: failure for index, failure in answers.items() if failure is not None}
        for index in answers:
            self._blamed.pop(messages[index].topic, None)
        blamed = list(failures)
        if unanswered := [index for index in in_order if index not in answers]:
            silence = connection.silence()
            if isinstance(silence, PermanentFailure) or (not answers and not connection.is_lost()):
                raise silence
            failures.update(dict.fromkeys(unanswered, silence))
            blamed = blamed or unanswered[:1]
        for index in blamed:
            self._blamed[messages[index].topic] = max(self._blamed.values(), default=0) + 1
        return failures

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _connected(self) -> _Connection:
        if self._connection is not None and self._connection.is_lost():
            self.close()  # it was lost while nothing was delivered, which is no failure
        if self._connection is None:
            self._connection = _Connection(self.options)
        return self._connection

    def _message(self, event: Event, largest: int | None) -> Message:
        topic = self._topic.fill(event)
        payload = self.encoder.encode(event).encode()
        if len(topic.encode()) > _LONGEST_TOPIC:
            raise PermanentFailure(f"its topic would have more than {_LONGEST_TOPIC} bytes")
        beside = properties.Properties(packettypes.PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]  # theirs to type
        beside.ContentType = self.encoder.content_type
        beside.UserProperty = named = [("id", event.id), *self.encoder.headers(event).items()]
        if largest is not None:
            pairs = (self.encoder.content_type, *(part for pair in named for part in pair))
            size = len(payload) + len(topic.encode()) + sum(len(part.encode()) + 3 for part in pairs) + _OVERHEAD
            if size > largest:
                raise PermanentFailure(f"the message has about {size} bytes, the broker takes {largest} at most")
        return Message(topic, payload, beside)


def _send_at_once(client: mqtt.Client, _: object, line: Any) -> None:
    # Else a message waits until the broker's kernel acknowledges the one before: 40 ms for each of a key.
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _level(value: str) -> str:
    """Text as one level of a topic, or part of it; what a topic gives a meaning to is written as in a URL."""
    return _UNSAFE.sub(lambda found: f"%{ord(found[0]):02X}", value)


class _Connection:
    """One connection, from its beginning to its end, with the client's thread that serves it.

    Attributes:
        largest: bytes of a packet that the broker takes, or None if it does not say.
        at_once: messages that may wait for their acknowledgement.
    """

    def __init__(self, options: MqttOptions) -> None:
        """Connect. Raises TransientFailure."""
        self.largest: int | None = None
        self.at_once = 1
        self._is_lost = False
        self._options = options
        port = options.port or (1883 if options.tls is None else 8883)
        self._where = f"mqtt at {options.host}:{port}"
        self._greeting: reasoncodes.ReasonCode | None = None
        self._farewell: reasoncodes.ReasonCode | None = None
        self._answers: dict[int, reasoncodes.ReasonCode] = {}
        self._changed = threading.Condition()
        self._client = mqtt.Client(
            enums.CallbackAPIVersion.VERSION2,
            client_id=f"{options.client_id}-{secrets.token_hex(6)}",
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
        )
        if options.username is not None:
            password = None if options.password is None else options.password.get_secret_value()
            self._client.username_pw_set(options.username, password)
        if options.tls is not None:
            self._client.tls_set_context(tls_context(options.tls))
        self._client.connect_timeout = options.timeout
        self._client.max_inflight_messages_set(IN_FLIGHT)
        self._client.on_socket_open = _send_at_once
        self._client.on_connect = self._on_connect
        self._client.on_connect_fail = self._on_connect_fail
        self._client.on_disconnect = self._on_disconnect
        self._client.on_publish = self._on_publish
        try:
            self._client.connect(options.host, port, KEEPALIVE)
            self._client.loop_start()
            self._wait(self._is_greeted)
            self._check_greeting()
        except OSError as error:
            self.close()
            raise TransientFailure(f"{self._where} cannot be reached: {network_reason(error)}") from None
        except TransientFailure:
            self.close()
            raise

    def _is_greeted(self) -> bool:
        return self._greeting is not None or self._is_lost

    def _check_greeting(self) -> None:
        greeting = self._greeting
        if greeting is None or greeting.is_failure:
            raise TransientFailure(str(self.silence() if greeting is None else self._refusal(greeting)))

    def is_lost(self) -> bool:
        """Whether it can no longer be used."""
        return self._is_lost

    def close(self) -> None:
        """Let go of it; what waits to be sent is not sent."""
        self._client.disconnect()
        # The client's thread goes on until everything is acknowledged, unless the line is cut.
        line: Any = self._client.socket()
        if line is not None:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        self._client.loop_stop()

    def publish(self, messages: Sequence[Message], wave: Sequence[int]) -> dict[int, Failure | None]:
        """Publish and wait for the answers, as long as they keep coming.

        Returns:
            For each that was answered, by index, why it was refused, or None.
        """
        with self._changed:
            self._answers.clear()
        indexes: dict[int, int] = {}  # by the client's number
        for index in wave:
            message = messages[index]
            handed = self._client.publish(
                message.topic, message.payload, qos=1, retain=self._options.retain, properties=message.properties
            )
            indexes[handed.mid] = index
        answered = -1
        while len(self._answers) < len(wave) and not self.is_lost() and answered < len(self._answers):
            answered = len(self._answers)
            self._wait(lambda: len(self._answers) == len(wave) or self.is_lost())
        with self._changed:
            return {
                index: self._refusal(self._answers[number])
                for number, index in indexes.items()
                if number in self._answers
            }

    def _wait(self, condition: Any) -> None:
        with self._changed:
            self._changed.wait_for(condition, self._options.timeout)

    # -- what the client's thread says ------------------------------------------------------------------------------

    def _on_connect(
        self, client: mqtt.Client, _: object, flags: object, code: reasoncodes.ReasonCode, said: Any
    ) -> None:
        with self._changed:
            self._greeting = code
            self.largest = getattr(said, "MaximumPacketSize", None)
            self.at_once = min(IN_FLIGHT, getattr(said, "ReceiveMaximum", IN_FLIGHT))
            self._changed.notify_all()

    def _on_connect_fail(self, client: mqtt.Client, _: object) -> None:
        self._lose(None)

    def _on_disconnect(
        self, client: mqtt.Client, _: object, flags: object, code: reasoncodes.ReasonCode, said: object
    ) -> None:
        self._lose(code)

    def _lose(self, code: reasoncodes.ReasonCode | None) -> None:
        with self._changed:
            self._is_lost = True
            self._farewell = code
            self._changed.notify_all()

    def _on_publish(
        self, client: mqtt.Client, _: object, number: int, code: reasoncodes.ReasonCode, said: object
    ) -> None:
        line: Any = client.socket()
        if line is not None:
            # A broker may gather what it sends until our kernel acknowledges this, which would take its time: 40 ms.
            with contextlib.suppress(OSError):
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        with self._changed:
            self._answers[number] = code
            self._changed.notify_all()

    # -- failures -----------------------------------------------------------------------------------------------

    def silence(self) -> Failure:
        """Why there is no answer; permanent: because the broker, or the client, cannot stand one of the messages."""
        farewell = self._farewell
        if farewell is not None and farewell.value in _OVER_A_MESSAGE:
            return PermanentFailure(f"{self._where} has closed the connection over it: {farewell}")
        if self.is_lost():
            why = f": {farewell}" if farewell is not None else ""
            return TransientFailure(f"{self._where} has closed the connection{why}")
        return TransientFailure(f"{self._where} did not answer within {self._options.timeout:g} s")

    def _refusal(self, code: reasoncodes.ReasonCode) -> Failure | None:
        """What an answer says, if not that the broker has the message."""
        if code.value == _UNHEARD and self._options.require_subscriber:
            return TransientFailure(f"nobody at {self._where} is subscribed to the topic")
        if not code.is_failure:
            return None
        text = f"{self._where} answers: {code}"
        if code.value in _REFUSED:
            text += " (check username, password, and the rights to the topics)"
        return PermanentFailure(text) if code.value in _HOPELESS else TransientFailure(text)
