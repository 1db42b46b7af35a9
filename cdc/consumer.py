"""For those who receive events: from whatever carried them to :class:`~cdc.event.Event`, each of them once.

It reads the native format, alone or as the data of a CloudEvent, from files (:class:`EventFile`), from HTTP
(:func:`parse_webhook`), from the messages of brokers (:func:`parse_message`). No client library is imported: a message
is looked at for what the known ones call its body and its headers. What to do with an event it knows itself:
:meth:`Event.apply <cdc.event.Event.apply>` and :meth:`Event.apply_to <cdc.event.Event.apply_to>`.

Events come at least once and in order per key. :class:`Seen` leaves out what has come before.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from cdc.event import Event, Image, Json, Op, Source, split_object

__all__ = [
    "Event",
    "EventFile",
    "Image",
    "Json",
    "Op",
    "Seen",
    "SignatureError",
    "Source",
    "headers_of",
    "parse",
    "parse_message",
    "parse_webhook",
    "verify",
]

Body = str | bytes | bytearray | memoryview

_BRACKET_OR_STRING: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]')


# -- texts ------------------------------------------------------------------------------------------------------


def parse(body: Body) -> list[Event]:
    """The events of a body: one, several as a JSON array, or several as JSON Lines.

    Args:
        body: bytes are UTF-8. Each event is in the native format, or the data of a structured CloudEvent.

    Raises:
        ValueError: it is nothing of that kind.
    """
    text = (body if isinstance(body, str) else bytes(body).decode()).strip()
    if text.startswith("["):
        if not text.endswith("]"):
            raise ValueError("the JSON array ends too early")
        return [_event(part) for part in _objects(text[1:-1], between=",")]
    return [_event(part) for part in _objects(text, between="")]


def _event(text: str) -> Event:
    if '"specversion"' in text:
        members = split_object(text)
        if "specversion" in members and "data" in members:
            return Event.from_json(members["data"])
    return Event.from_json(text)


def _objects(text: str, *, between: str) -> Iterator[str]:
    """The JSON objects in a text, as they were written; whether they are any is for others to see."""
    depth = end = start = 0
    expected = ""
    for found in _BRACKET_OR_STRING.finditer(text):
        bracket = found[0]
        if bracket in ("{", "["):
            if depth == 0:
                start = found.start()
                if text[end:start].strip() != expected:
                    raise ValueError("there is something between the JSON objects")
            depth += 1
        elif bracket in ("}", "]"):
            depth -= 1
            if depth < 0:
                break
            if depth == 0:
                end, expected = found.end(), between
                yield text[start:end]
    if depth != 0 or text[end:].strip():
        raise ValueError("not a JSON object, an array of them or JSON Lines")


class EventFile:
    """A file of JSON Lines, such as the file sink writes; a ``for`` loop reads on from where the last one ended.

    A last line without its end is not read: it is being written, or was when its writer died, and is then cut off and
    written again.

    Attributes:
        path: the file.
        position: bytes of it that are dealt with: up to the last event that a loop was done with. Keep it to go on
            from here in another process.
    """

    def __init__(self, path: str | Path, *, position: int = 0) -> None:
        """
        Args:
            path: the file; one that is not there yet is empty.
            position: where to begin.
        """
        self.path = Path(path)
        self.position = position

    def __iter__(self) -> Iterator[Event]:
        """Each event of the whole lines that are there now.

        Raises:
            ValueError: a line is no event; or the file is shorter than `position`, another one in its place.
            OSError: it cannot be read.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            if file.seek(0, 2) < self.position:
                raise ValueError(
                    f"{self.path} is shorter than {self.position} bytes (it has been replaced: begin at 0)"
                )
            file.seek(self.position)
            while (line := file.readline()).endswith(b"\n"):
                try:
                    event = _event(line.decode())
                except ValueError as error:
                    reason = type(error).__name__  # its text may show the row
                    raise ValueError(f"{self.path}: the line at byte {self.position} is no event: {reason}") from None
                yield event
                self.position += len(line)


# -- webhooks ---------------------------------------------------------------------------------------------------


class SignatureError(ValueError):
    """A request that was not signed with one of our secrets, or not just now: whoever sent it, do not believe it."""


def parse_webhook(
    body: Body, headers: Mapping[str, str] | None = None, secret: str | Sequence[str] | None = None
) -> list[Event]:
    """The events of a request, in their order.

    Args:
        body: exactly as it came.
        headers: for the signature.
        secret: see :func:`verify`; None: believe whoever has sent it.

    Raises:
        SignatureError: see :func:`verify`.
        ValueError: see :func:`parse`.
    """
    if secret is not None:
        verify(body, headers or {}, secret)
    return parse(body)


def verify(body: Body, headers: Mapping[str, str], secret: str | Sequence[str]) -> None:
    """Check the signature of a request, by Standard Webhooks, and that it was made within the last five minutes.

    Args:
        body: exactly as it came.
        headers: whose names may be in upper or lower case.
        secret: ``whsec_…``; during a rotation several, one of which has to fit.

    Raises:
        SignatureError: none fits.
        ValueError: what was given is no secret.
        ImportError: the extra ``webhook`` is not installed.
    """
    try:
        from standardwebhooks import Webhook, WebhookVerificationError  # noqa: PLC0415  for those who use it
    except ImportError:
        raise ImportError("standardwebhooks is not installed (pip install 'table-cdc[webhook]')") from None
    secrets = [secret] if isinstance(secret, str) else list(secret)
    try:
        verifiers = [Webhook(one) for one in secrets]
    except Exception:  # noqa: BLE001  of several kinds, and some of them quote the secret
        raise ValueError("not a secret of Standard Webhooks (whsec_ and Base64)") from None
    data = body if isinstance(body, str) else bytes(body)
    reason = "no secret"
    for verifier in verifiers:
        try:
            verifier.verify(data, dict(headers), json_parse=False)
        except WebhookVerificationError as error:
            reason = str(error)
        except ValueError:  # Base64, UTF-8, a version without a signature
            reason = "malformed"
        else:
            return
    raise SignatureError(f"the signature does not fit: {reason}")


# -- messages ---------------------------------------------------------------------------------------------------


def parse_message(message: object) -> list[Event]:
    """The events of a broker's message; none where it has no body, such as Kafka's tombstones and Redis' confirmations.

    Args:
        message: of confluent-kafka, kafka-python or aiokafka; nats-py; aio-pika; paho-mqtt; an entry of a Redis stream,
            with its id or without, or a message of a Redis channel; what pika's ``basic_get`` returns; or the body.

    Raises:
        TypeError: it has none of the known attributes.
        ValueError: see :func:`parse`.
    """
    body = _body_of(message)
    return [] if body is None else parse(body)


def headers_of(message: object) -> dict[str, str]:
    """What stands beside the body of a message: headers of Kafka, NATS and RabbitMQ, user properties of MQTT, the other
    fields of a Redis entry.

    Args:
        message: as for :func:`parse_message`.
    """
    found: Any = None
    if isinstance(fields := _fields_of(message), Mapping):
        found = {name: value for name, value in fields.items() if _text(name) != "event"}
    elif isinstance(message, tuple) and len(message) == 3:
        found = getattr(message[1], "headers", None)
    else:
        found = _called(getattr(message, "headers", None))
        if found is None:
            properties = getattr(message, "properties", None)
            found = getattr(properties, "headers", None) or getattr(properties, "UserProperty", None)
    pairs = found.items() if isinstance(found, Mapping) else found or ()
    return {_text(name): _text(value) for name, value in pairs}


def _body_of(message: object) -> Body | None:
    if isinstance(message, Body):
        return message
    if isinstance(fields := _fields_of(message), Mapping):
        by_name = {_text(name): value for name, value in fields.items()}
        is_other = "channel" in by_name and _text(by_name.get("type")) not in ("message", "pmessage", "smessage")
        found = None if is_other else by_name.get("event", by_name.get("data"))
    elif isinstance(message, tuple) and len(message) == 3:
        found = message[2]
    else:
        for name in ("value", "data", "body", "payload"):
            if hasattr(message, name):
                found = _called(getattr(message, name))
                break
        else:
            raise TypeError(f"not a message of a known client library: {type(message).__name__}")
    if found is not None and not isinstance(found, Body):
        raise TypeError(f"a message whose body is no text but {type(found).__name__} (leave it as it came)")
    return found


def _fields_of(message: object) -> object:
    """The fields of a Redis entry, which may come with its id."""
    if isinstance(message, tuple | list) and len(message) == 2 and isinstance(message[1], Mapping):
        return message[1]
    return message


def _called(value: Any) -> Any:
    return value() if callable(value) else value


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes | bytearray) else str(value)


# -- once -------------------------------------------------------------------------------------------------------


class Seen:
    """The ids of the last events: what comes again, comes soon, so there is no need to remember them all.

    Only what was dealt with is to be remembered: what failed has to get through when it comes again.
    """

    def __init__(self, size: int = 100_000) -> None:
        """
        Args:
            size: how many ids; more than one batch of the sink, times the sources.
        """
        self._size = size
        self._ids: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, event: Event) -> bool:
        return event.id in self._ids

    def add(self, event: Event) -> None:
        """Remember an event that has been dealt with."""
        self._ids[event.id] = None
        self._ids.move_to_end(event.id)
        if len(self._ids) > self._size:
            self._ids.popitem(last=False)

    def new(self, events: Iterable[Event]) -> Iterator[Event]:
        """Those that have not been seen; each is remembered when the loop comes for the next."""
        for event in events:
            if event not in self:
                yield event
                self.add(event)
