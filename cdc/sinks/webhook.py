"""Events over HTTP: one request each, or one for many, signed as Standard Webhooks (1.0.0) says.

**Order.** A batch is split into lanes (`cdc.lanes`). Requests of one lane are made one after the other, lanes side by
side, up to ``concurrency`` of them. What fails holds back the rest of its lane in the same delivery, so nothing
overtakes. In batch mode requests are made one after the other, and an event never stands in an earlier request than
one before it of its lane, wherever templates send the two.

**What an answer means.**

====================  ==============================================================================================
2xx                   delivered
410                   the sink is disabled: the receiver wants nothing more
3xx                   transient: redirects are not followed, and a wrong ``url`` says nothing against an event
401, 403, 407         transient: refused credentials say nothing against an event either
408, 425, 429, 5xx    transient; Retry-After is kept to, up to ``retry.max``
other 4xx             permanent: the receiver will never take this event
no answer             transient: no connection, a broken one, or ``timeout`` is over, however much has come in
====================  ==============================================================================================

Where a failure is the receiver's and no event's (no connection, 429, 5xx with Retry-After; or many failures and no
success between), the rest of the batch is not tried. A receiver may have taken an event of which we saw no answer: it
comes again, under the same ``webhook-id``, which is the event's id, or in batch mode made of the first id, the last and
the number of events. A request that fails on a connection that had been idle is made once more at once, on a new one,
for a server may close such a connection at any moment.

**What is not said.** No text of a failure holds anything of the answer but its status, nor the path of the URL: an
answer may echo the row, and many a path is a password.
"""

from __future__ import annotations

import base64
import binascii
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from importlib import metadata
from ipaddress import ip_network
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.parse import quote as percent_encoded

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo, field_validator, model_validator

from cdc.addresses import Allowed, Refused, literal
from cdc.encoding import Encoder
from cdc.errors import DeliveryError, PartialFailure, PermanentFailure, SinkDisabled, TransientFailure
from cdc.event import Event
from cdc.lanes import lanes
from cdc.options import Binding, Duration, SinkOptions, Size, TlsOptions
from cdc.sinks.base import Sink, require, tls_context
from cdc.template import CONTENT, ROUTE, Template, check, fixed_part

if TYPE_CHECKING:
    import httpcore
    import standardwebhooks

    from cdc import egress
else:
    httpcore = require("httpcore", extra="webhook")
    standardwebhooks = require("standardwebhooks", extra="webhook")
    egress = require("cdc.egress", extra="webhook")

log = logging.getLogger(__name__)

KEPT_IDLE: Final = 4.0
"""Seconds an idle connection is kept: less than what common servers give one (5 s and more)."""
DRAIN: Final = 1.0
"""Seconds, and bytes below, that the body of an answer may take; after that its connection is closed."""
DRAIN_BYTES: Final = 65536

_CREDENTIALS: Final = frozenset({401, 403, 407})
_PASSING: Final = frozenset({408, 425, 429})
_PORTS: Final = {"http": 80, "https": 443}
_PHRASES: Final = {status.value: status.phrase for status in HTTPStatus}  # the receiver's own words may be anything
_PRINTABLE: Final = "".join(character for character in map(chr, range(0x21, 0x7F)) if character != "%")
_HOST: Final = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)
_OURS: Final = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "keep-alive", "te", "trailer", "upgrade", "expect"}
)


# -- what the configuration may say -------------------------------------------------------------------------------


def _header_name(name: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise ValueError("not the name of a header (letters, digits and -, such as X-Origin)")
    if name.lower() in _OURS or name.lower().startswith(("webhook-", "ce-", "proxy-")):
        raise ValueError("a header that the sink makes itself (leave it out)")
    return name


def _header_value(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    check(text, *ROUTE, *CONTENT)
    if text != text.strip() or not re.fullmatch(r"[\x20-\x7e]*", fixed_part(text)) or not text:
        raise ValueError("not the value of a header (printable ASCII, no line breaks, no blanks around it)")
    return value


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str | SecretStr) else value


def _signing_secrets(secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    if not 1 <= len(secrets) <= 2:
        raise ValueError("none, or more than two secrets (write one; while it is changed, the new and the old)")
    for secret in secrets:
        text = secret.get_secret_value()
        try:
            key = base64.b64decode(text.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            key = b""
        if not text.startswith("whsec_") or not 24 <= len(key) <= 64:
            raise ValueError("not a Standard Webhooks secret (whsec_ and then 24 to 64 random bytes in base64)")
    return secrets


def _networks(value: object) -> object:
    if isinstance(value, bool):
        return value
    if not isinstance(value, tuple) or not value or not all(isinstance(network, str) for network in value):
        raise ValueError("not a list of networks (write true, false, or networks such as [10.1.0.0/16])")
    for network in value:
        try:
            ip_network(network)
        except ValueError:
            raise ValueError("not a network (write it as 10.1.0.0/16, with no bit set beyond the prefix)") from None
    return value


def _split(url: str, schemes: Sequence[str]) -> SplitResult:
    """The parts of a URL that names a server; ValueError, fit for a finding, when it does not."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("not a URL (write https://HOST/PATH)") from None
    if parts.scheme not in schemes or not parts.hostname or port == 0:
        raise ValueError(f"not a URL (write {schemes[0]}://HOST/PATH)")
    if not re.fullmatch(r"[\x21-\x7e]+", url) or "\\" in url:
        raise ValueError("a character that no URL has (write a host in its xn-- form, and %XX in a path)")
    if literal(parts.hostname) is None and not _HOST.fullmatch(parts.hostname):
        raise ValueError("not the name of a host (labels of at most 63 letters, digits and -, with dots between)")
    return parts


def _proxy(value: SecretStr) -> SecretStr:
    parts = _split(value.get_secret_value(), ("http",))
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("a proxy with a path (write http://USER:PASSWORD@HOST:PORT)")
    return value


class WebhookOptions(SinkOptions):
    """Options of a ``webhook`` sink."""

    binding: ClassVar[Binding | None] = "http"

    type: Literal["webhook"]
    allow_private: Annotated[bool | tuple[str, ...], BeforeValidator(_networks)] = False
    """Whether loopback and private addresses may be connected to; a list: these networks, whatever they are."""
    allow_http: bool = False
    """Whether HTTP without TLS may leave for public addresses; to those of `allow_private` it always may."""
    proxy: Annotated[SecretStr, AfterValidator(_proxy)] | None = None
    """URL of a proxy, which then looks the receiver's name up and decides what may be reached."""
    url: SecretStr
    """Where to; placeholders in its path."""
    method: Literal["POST", "PUT"] = "POST"
    """Of the requests."""
    headers: dict[Annotated[str, AfterValidator(_header_name)], Annotated[SecretStr, AfterValidator(_header_value)]] = (
        Field(default_factory=dict)
    )
    """More headers of every request, templates."""
    mode: Literal["single", "batch"] = "single"
    """One event in a request, or many."""
    batch_body: Literal["array", "lines"] = "array"
    """In batch mode: a JSON array, or JSON Lines."""
    secret: Annotated[tuple[SecretStr, ...], BeforeValidator(_one_or_more), AfterValidator(_signing_secrets)] | None = (
        None
    )
    """What requests are signed with; two while it is being changed."""
    concurrency: int = Field(default=8, ge=1, le=256)
    """Requests under way at a time, in single mode."""
    timeout: Duration = Field(default=20.0, gt=0)
    """Seconds an attempt may take, all in all."""
    connect_timeout: Duration = Field(default=5.0, gt=0)
    """Seconds of it that connecting may take."""
    max_body: Size = Field(default=10 * 2**20, ge=1)
    """Bytes of a request's body; an event that is larger is never delivered."""
    tls: TlsOptions = TlsOptions()
    """Whom to trust, and who we are."""

    @property
    def allowed(self) -> Allowed:
        """What may be connected to."""
        public = self.allow_http or self.url.get_secret_value().startswith("https:")
        if isinstance(self.allow_private, bool):
            return Allowed(private=self.allow_private, public=public)
        return Allowed(networks=tuple(ip_network(network) for network in self.allow_private), public=public)

    @field_validator("url")
    @classmethod
    def _names_a_receiver(cls, value: SecretStr, info: ValidationInfo) -> SecretStr:
        url = value.get_secret_value()
        outside = url.partition("://")[2].partition("/")[0] + url.partition("?")[2] + url.partition("#")[2]
        if set("{}") & set(outside):
            raise ValueError("a placeholder outside of the path (placeholders: only between the host and a ?)")
        check(url, *ROUTE, *CONTENT)
        parts = _split(fixed_part(url), ("https", "http"))
        if "@" in parts.netloc:
            raise ValueError("a password in the URL (write it as a header, such as Authorization)")
        if parts.fragment:
            raise ValueError("a URL with a # (leave out what follows it: it never reaches the receiver)")
        if not {"allow_private", "allow_http", "proxy"} <= info.data.keys():
            return value  # one of them is wrong and has a finding of its own
        options = cls.model_construct(url=value, **info.data)
        inside = options.allow_private and not options.proxy
        if parts.scheme == "http" and not (options.allow_http or inside):
            raise ValueError(
                "HTTP without TLS (write https; or allow_private: true for an address of your own, such as 127.0.0.1; "
                "or allow_http: true)"
            )
        address = literal(parts.hostname or "")
        if address is not None and not options.proxy:
            try:
                options.allowed.check(address)
            except Refused as refused:
                raise ValueError(f"an address that {refused.reason}") from None
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> WebhookOptions:
        if self.mode == "batch" and self.format == "cloudevents-binary":
            raise ValueError("mode: batch with format: cloudevents-binary (its headers are one event's: cloudevents)")
        if self.mode == "single" and self.batch_body != "array":
            raise ValueError("batch_body without mode: batch (leave one out)")
        return self


# -- the sink -----------------------------------------------------------------------------------------------------

Failure = TransientFailure | PermanentFailure


@dataclass(frozen=True, slots=True)
class _Destination:
    """Attributes: target: path and query. headers: what templates and the format make of an event."""

    target: str
    headers: tuple[tuple[str, str], ...]


class WebhookSink(Sink[WebhookOptions]):
    """Makes HTTP requests of events; see the head of this module."""

    Options = WebhookOptions
    clients = ("httpcore", "standardwebhooks")

    def __init__(self, name: str, options: WebhookOptions, encoder: Encoder | None = None) -> None:
        super().__init__(name, options, encoder)
        parts = urlsplit(options.url.get_secret_value())
        self._path = Template(parts.path or "/", _in_path)
        self._query = f"?{parts.query}" if parts.query else ""
        self._headers = [
            (name, Template(value.get_secret_value(), _in_header)) for name, value in options.headers.items()
        ]
        self._lines = options.batch_body == "lines"
        self._content_type = self.encoder.content_type
        if options.mode == "batch":
            self._content_type = "application/x-ndjson" if self._lines else self.encoder.batch_content_type
        self._client: _Client | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._not_before = 0.0  # the receiver asked for a pause until then
        self._unlucky: set[str] = set()  # what was tried and failed, and is to come again: the others go first

    def open(self) -> None:
        if not self.options.tls.verify:
            log.warning(
                "The receiver's certificate is not checked: anybody on the way can read the events.",
                extra={"fields": {"sink": self.name}},
            )
        if self._threads is None and self.options.mode == "single" and self.options.concurrency > 1:
            self._threads = ThreadPoolExecutor(self.options.concurrency, thread_name_prefix=f"webhook-{self.name}")
        self._client = self._client or _Client(self.options, self._content_type)

    def deliver(self, batch: Sequence[Event]) -> None:
        early = self._not_before - time.monotonic()
        if early > 0.01:
            raise TransientFailure("the receiver asked for a pause", retry_after=early)
        client = self._client = self._client or _Client(self.options, self._content_type)
        delivery = _Delivery(batch, patience=max(3, self.options.concurrency))
        try:
            if self.options.mode == "single":
                self._deliver_singly(client, delivery)
            else:
                self._deliver_together(client, delivery)
        finally:
            if client.is_broken:
                # The next one reads the files of certificates again.
                self._client = None
                client.close()
        self._not_before = time.monotonic() + delivery.pause
        again = {batch[index].id for index in delivery.failures}
        self._unlucky = (self._unlucky & again) | {batch[index].id for index in delivery.tried}
        delivery.conclude()

    def close(self) -> None:
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown()
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _destination(self, event: Event) -> _Destination:
        headers = [(name, template.fill(event)) for name, template in self._headers]
        return _Destination(self._path.fill(event) + self._query, (*headers, *self.encoder.headers(event).items()))

    # -- one event in a request ---------------------------------------------------------------------------------

    def _deliver_singly(self, client: _Client, delivery: _Delivery) -> None:
        batch = delivery.batch
        waiting = deque(sorted(delivery.lanes, key=lambda lane: batch[lane[0]].id in self._unlucky))

        def work() -> None:
            while True:
                try:
                    lane = waiting.popleft()
                except IndexError:
                    return
                self._deliver_lane(client, delivery, lane)

        workers = min(self.options.concurrency, len(waiting))
        if self._threads is None or workers < 2:
            work()
            return
        running = [self._threads.submit(work) for _ in range(workers)]
        wait(running)
        for worker in running:
            worker.result()

    def _deliver_lane(self, client: _Client, delivery: _Delivery, lane: list[int]) -> None:
        for position, index in enumerate(lane):
            if delivery.end is not None:
                delivery.hold_back(lane[position:], delivery.end)
                return
            event = delivery.batch[index]
            try:
                client.send(event.id, self._destination(event), self.encoder.encode(event))
            except DeliveryError as error:
                delivery.failed([index], error)
                delivery.hold_back(lane[position + 1 :], error)
                return
            delivery.succeeded()

    # -- many events in a request -------------------------------------------------------------------------------

    def _deliver_together(self, client: _Client, delivery: _Delivery) -> None:
        lane_of = {index: number for number, lane in enumerate(delivery.lanes) for index in lane}
        held: dict[int, DeliveryError] = {}  # lanes that wait

        def send(destination: _Destination, content: list[_Text]) -> None:
            ready = [text for text in content if lane_of[text.index] not in held]
            for text in content:
                if (reason := held.get(lane_of[text.index], delivery.end)) is not None:
                    delivery.hold_back([text.index], reason)
            if delivery.end is not None or not ready:
                return
            first, last = delivery.batch[ready[0].index], delivery.batch[ready[-1].index]
            indexes = [text.index for text in ready]
            try:
                client.send(f"{first.id}_{last.id}_{len(ready)}", destination, self._body(ready))
            except PermanentFailure as error:
                if len(ready) > 1:
                    # One of them is the culprit: halves find it in few requests, in order.
                    middle = len(ready) // 2
                    send(destination, ready[:middle])
                    send(destination, ready[middle:])
                    return
                delivery.failed(indexes, error)
                held[lane_of[indexes[0]]] = error
            except DeliveryError as error:
                delivery.failed(indexes, error)
                held.update((lane_of[index], error) for index in indexes)
            else:
                delivery.succeeded()

        for destination, content in self._plan(delivery, lane_of):
            send(destination, content)

    def _plan(self, delivery: _Delivery, lane_of: dict[int, int]) -> list[tuple[_Destination, list[_Text]]]:
        """The requests to make, one after the other; what cannot be said at all is noted as a failure."""
        requests: list[tuple[_Destination, list[_Text]]] = []
        sizes: list[int] = []
        current: dict[_Destination, int] = {}
        reached: dict[int, int] = {}  # lane → the last request that holds something of it
        refused: dict[int, DeliveryError] = {}
        for index, event in enumerate(delivery.batch):
            lane = lane_of[index]
            if lane in refused:
                delivery.hold_back([index], refused[lane])
                continue
            try:
                destination, text = self._destination(event), self.encoder.encode(event)
                size = len(text) if text.isascii() else len(text.encode())
                _check_size(size + 2, self.options.max_body)
            except PermanentFailure as error:
                delivery.failed([index], error)
                refused[lane] = error
                continue
            number = current.get(destination)
            if number is None or number < reached.get(lane, 0) or sizes[number] + size + 1 > self.options.max_body:
                number = current[destination] = len(requests)
                requests.append((destination, []))
                sizes.append(1)
            requests[number][1].append(_Text(index, text))
            sizes[number] += size + 1
            reached[lane] = number
        return requests

    def _body(self, content: Sequence[_Text]) -> str:
        if self._lines:
            return "".join(f"{text.json}\n" for text in content)
        return "[" + ",".join(text.json for text in content) + "]"


@dataclass(frozen=True, slots=True)
class _Text:
    """An event of the batch, as it is sent. Attributes: index: its place in the batch. json: it."""

    index: int
    json: str


class _ReceiverFailure(TransientFailure):
    """One that has nothing to do with the event: the rest of the batch would meet it too."""


class _Delivery:
    """What becomes of one batch; several threads report to it.

    Attributes:
        batch: the events.
        lanes: as in `cdc.lanes`.
        failures: index → why it failed.
        tried: those of them that failed by themselves, and not for others.
        end: why the rest is not tried any more, or None.
        pause: seconds the receiver asked for.
    """

    def __init__(self, batch: Sequence[Event], patience: int) -> None:
        """
        Args:
            batch: the events.
            patience: transient failures in a row after which the rest is not tried.
        """
        self.batch = batch
        self.lanes = lanes(batch)
        self.failures: dict[int, Failure] = {}
        self.tried: set[int] = set()
        self.end: TransientFailure | SinkDisabled | None = None
        self.pause = 0.0
        self._patience = patience
        self._in_a_row = 0
        self._lock = threading.Lock()

    def succeeded(self) -> None:
        """Note that a request was answered as it should be."""
        self._in_a_row = 0

    def failed(self, indexes: Sequence[int], error: DeliveryError) -> None:
        """Note why these events failed."""
        with self._lock:
            if isinstance(error, SinkDisabled):
                self.end = error
            elif isinstance(error, PermanentFailure):
                self._in_a_row = 0
                self.failures.update(dict.fromkeys(indexes, error))
            elif isinstance(error, TransientFailure):
                self._in_a_row += 1
                self.tried.update(indexes)
                self.failures.update(dict.fromkeys(indexes, error))
                self.pause = max(self.pause, error.retry_after or 0.0)
                if isinstance(error, _ReceiverFailure) or self._in_a_row >= self._patience:
                    self.end = self.end or error

    def hold_back(self, indexes: Sequence[int], error: DeliveryError) -> None:
        """Note that these events were not tried, because of what happened to others."""
        reason = (
            error if isinstance(error, TransientFailure) else TransientFailure("an event before it has to go first")
        )
        with self._lock:
            self.failures.update(dict.fromkeys(indexes, reason))

    def conclude(self) -> None:
        """Raise what there is to raise."""
        if isinstance(self.end, SinkDisabled):
            raise self.end
        passing = [failure for failure in self.failures.values() if isinstance(failure, TransientFailure)]
        if passing and len(passing) == len(self.batch):
            raise max(passing, key=lambda failure: failure.retry_after or 0.0)
        if self.failures:
            raise PartialFailure(self.failures)


# -- one request --------------------------------------------------------------------------------------------------


class _Client:
    """Makes signed requests, from many threads.

    Attributes:
        is_broken: a connection has failed.
    """

    def __init__(self, options: WebhookOptions, content_type: str) -> None:
        """Raises TransientFailure: a file of certificates cannot be read."""
        self.is_broken = False
        self._options = options
        parts = urlsplit(options.url.get_secret_value())
        host, default = str(parts.hostname), _PORTS[parts.scheme]
        port = parts.port or default
        authority = (f"[{host}]" if ":" in host else host) + ("" if port == default else f":{port}")
        self._where = f"{parts.scheme}://{authority}"
        self._origin = parts.scheme.encode(), host.encode(), port
        fixed = {
            "Host": authority,
            "User-Agent": f"cdc/{metadata.version('table-cdc')}",
            "Content-Type": content_type,
        }
        own = {name.lower() for name in options.headers}
        self._fixed = [(name.encode(), text.encode()) for name, text in fixed.items() if name.lower() not in own]
        self._signers = [standardwebhooks.Webhook(secret.get_secret_value()) for secret in options.secret or ()]
        self._method = options.method.encode()
        self._patience = min(options.connect_timeout, options.timeout)
        self._limits = {"timeout": {"connect": self._patience, "pool": options.timeout}}
        self._network = egress.Network(None if options.proxy else options.allowed)
        context = tls_context(options.tls) if parts.scheme == "https" else None
        self._connections: egress.Connections | httpcore.ConnectionPool
        if options.proxy:
            self._connections = httpcore.ConnectionPool(
                context,
                _proxy_of(options.proxy),
                max_connections=options.concurrency,
                keepalive_expiry=KEPT_IDLE,
                network_backend=self._network,
            )
        else:
            self._connections = egress.Connections(
                httpcore.Origin(*self._origin), self._network, kept_idle=KEPT_IDLE, ssl_context=context
            )

    def send(self, id_: str, destination: _Destination, text: str) -> None:
        """Make one request and wait for its answer.

        Args:
            id_: the webhook-id.
            destination: where to, and the headers that are its own.
            text: the body.

        Raises:
            TransientFailure, PermanentFailure, SinkDisabled: as in the head of this module.
        """
        body = text.encode()
        _check_size(len(body), self._options.max_body)
        request = httpcore.Request(
            self._method,
            httpcore.URL(
                scheme=self._origin[0], host=self._origin[1], port=self._origin[2], target=destination.target.encode()
            ),
            headers=self._headers(id_, destination, text, len(body)),
            content=body,
            extensions=self._limits,
        )
        self._network.begin(self._options.timeout)
        try:
            try:
                response = self._connections.handle_request(request)
            except (httpcore.NetworkError, httpcore.RemoteProtocolError):
                if self._network.connected:
                    raise
                response = self._connections.handle_request(request)
        except httpcore.ConnectTimeout:
            self.is_broken = True
            raise _ReceiverFailure(f"no connection to {self._where} within {self._patience:g} s") from None
        except httpcore.TimeoutException:
            raise TransientFailure(f"no answer from {self._where} within {self._options.timeout:g} s") from None
        except httpcore.ConnectError as error:
            self.is_broken = True
            raise _ReceiverFailure(f"no connection to {self._where}: {error}") from None
        except httpcore.ProxyError:
            self.is_broken = True
            raise _ReceiverFailure(f"the proxy refuses to connect to {self._where}") from None
        except httpcore.NetworkError as error:
            self.is_broken = True
            raise TransientFailure(f"the connection to {self._where} broke: {error}") from None
        except httpcore.RemoteProtocolError:
            raise TransientFailure(f"{self._where} closed the connection, or its answer is not HTTP") from None
        except httpcore.LocalProtocolError:
            raise PermanentFailure("the event cannot be put into an HTTP request") from None
        self._drain(response)
        if not 200 <= response.status < 300:
            raise self._failure(response)

    def close(self) -> None:
        self._connections.close()

    def _headers(self, id_: str, destination: _Destination, text: str, size: int) -> list[tuple[bytes, bytes]]:
        now = datetime.now(UTC)
        headers = [
            *self._fixed,
            (b"Content-Length", b"%d" % size),
            (b"webhook-id", id_.encode()),
            (b"webhook-timestamp", b"%d" % int(now.timestamp())),
        ]
        if self._signers:
            signatures = " ".join([signer.sign(id_, now, text) for signer in self._signers])
            headers.append((b"webhook-signature", signatures.encode()))
        headers += [(name.encode(), value.encode()) for name, value in destination.headers]
        return headers

    def _drain(self, response: httpcore.Response) -> None:
        """Read what follows the status, a little of it, so that the connection can be used again."""
        self._network.shorten(DRAIN)
        size = 0
        try:
            for part in response.iter_stream():
                size += len(part)
                if size > DRAIN_BYTES:
                    break
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.RemoteProtocolError):
            pass  # the status has said all
        finally:
            response.close()

    def _failure(self, response: httpcore.Response) -> DeliveryError:
        status = response.status
        says = f"{self._where} answered {status}" + (f" {_PHRASES[status]}" if status in _PHRASES else "")
        if status == 410:
            return SinkDisabled(f"{says}: it wants no more events (remove the sink, or start the daemon again)")
        if status in _CREDENTIALS:
            return TransientFailure(f"{says} (check headers and secret)")
        if 300 <= status < 400:
            return TransientFailure(f"{says}: redirects are not followed (write the new address as url)")
        if 400 <= status < 500 and status not in _PASSING:
            return PermanentFailure(says)
        asked = [value for name, value in response.headers if name.lower() == b"retry-after"]
        pause = _seconds(asked[0].decode("latin-1"), datetime.now(UTC), self._options.retry.max) if asked else None
        if status == 429 or pause is not None:
            return _ReceiverFailure(says, retry_after=pause)
        return TransientFailure(says)


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise PermanentFailure(f"a request of {size} bytes, which is more than max_body ({most})")


def _proxy_of(url: SecretStr) -> httpcore.Proxy:
    parts = urlsplit(url.get_secret_value())
    auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
    return httpcore.Proxy(
        httpcore.URL(scheme="http", host=str(parts.hostname), port=parts.port or 80, target="/"), auth
    )


def _in_path(name: str) -> str:
    if name in (".", ".."):
        raise PermanentFailure("a name of dots alone, which in a path means another place")
    return percent_encoded(name, safe="")


def _in_header(text: str) -> str:
    return percent_encoded(text, safe=_PRINTABLE)


def _seconds(retry_after: str, now: datetime, most: float) -> float | None:
    """What a Retry-After header asks for, in seconds; None when it asks for nothing that makes sense."""
    text = retry_after.strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        seconds = float(text) if len(text) < 20 else most
    else:
        try:
            moment = parsedate_to_datetime(text)
            seconds = ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - now).total_seconds()
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    return min(seconds, most) if seconds > 0 else None
