"""The NATS sink: what stands in a stream, in which order after a refusal, and ways to say who we are."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import nats
import nkeys
import pytest
from authority import Authority
from harness import until
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import DiscardPolicy
from pydantic import ValidationError
from service import Service, free_port, needed

from cdc.encoding import Encoder
from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event
from cdc.sinks.nats import IN_FLIGHT, NatsOptions, NatsSink, _Connection

Make = Callable[..., Event]
ResultT = TypeVar("ResultT")
SECRET = "4929-1234-5678"


class Server:
    """A NATS server of the test's own.

    Attributes:
        client: how :meth:`call` connects.
    """

    def __init__(self, directory: Path, config: dict[str, object], client: dict[str, Any]) -> None:
        self.port = free_port()
        self.client = client
        path = directory / "nats.conf"
        path.write_text(json.dumps({"host": "127.0.0.1", "port": self.port, **config}))
        self.service = Service([needed("nats-server"), "-c", path], self.port, directory / "log")

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def call(self, what: Callable[[Client], Awaitable[ResultT]]) -> ResultT:
        """Do something over a connection of its own."""

        async def call() -> ResultT:
            client = await nats.connect(self.url, **self.client)
            try:
                return await what(client)
            finally:
                await client.close()

        return asyncio.run(call())

    def add_stream(self, **config: Any) -> None:
        """Stream cdc, of all subjects below cdc."""
        config = {"name": "cdc", "subjects": ["cdc.>"], **config}
        self.call(lambda client: client.jetstream().add_stream(**config))

    def messages(self) -> list[Any]:
        """What stands in stream cdc, in its order."""

        async def read(client: Client) -> list[Any]:
            stream = client.jetstream()
            state = (await stream.stream_info("cdc")).state
            return [await stream.get_msg("cdc", seq) for seq in range(max(1, state.first_seq), state.last_seq + 1)]

        return self.call(read)

    def ids(self) -> list[str]:
        """Of the events in stream cdc."""
        return [message.headers["Nats-Msg-Id"] for message in self.messages()]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """``start(client={}, **config)``: a server with JetStream unless the config says otherwise."""
    made: list[Server] = []

    def make(client: dict[str, Any] | None = None, **config: object) -> Server:
        jetstream = {"jetstream": {"store_dir": str(tmp_path / "store")}}
        made.append(Server(tmp_path, {**jetstream, **config}, client or {}))
        return made[-1]

    yield make
    for server in made:
        server.service.kill()


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    """One with a stream."""
    made = start()
    made.add_stream()
    return made


@pytest.fixture
def connect() -> Iterator[Callable[..., NatsSink]]:
    """``connect(server, **options)``: a sink, closed after the test."""
    made: list[NatsSink] = []

    def make(server: Server, encoder: Encoder | None = None, **options: object) -> NatsSink:
        given = {"type": "nats", "servers": (server.url,), "timeout": "5s", **options}
        made.append(NatsSink("stream", NatsOptions.model_validate(given), encoder))
        return made[-1]

    yield make
    for sink in made:
        sink.close()


def transient(sink: NatsSink, batch: Sequence[Event]) -> str:
    """What the sink says of a batch it cannot deliver for now."""
    with pytest.raises(TransientFailure) as raised:
        sink.deliver(batch)
    assert SECRET not in str(raised.value)
    return str(raised.value)


# -- messages -----------------------------------------------------------------------------------------------------


def test_a_message_has_the_events_id_and_its_text(
    server: Server, connect: Callable[..., NatsSink], make_event: Make
) -> None:
    event = make_event(1)
    connect(server).deliver([event])
    (message,) = server.messages()
    assert message.subject == "cdc.shop.public.orders"
    assert message.headers == {"Nats-Msg-Id": event.id, "Nats-Expected-Stream": "cdc"}
    assert message.data.decode() == event.to_json()


@pytest.mark.parametrize(
    ("table", "level"),
    [
        ("a.b", "a%2Eb"),
        ("*", "%2A"),
        (">", "%3E"),
        ("a b\tc", "a%20b%09c"),
        ("50%", "50%25"),
        ("ü🐘", "ü🐘"),
        ("$JS", "$JS"),
    ],
)
def test_no_name_adds_a_level_to_a_subject(
    server: Server, connect: Callable[..., NatsSink], make_event: Make, table: str, level: str
) -> None:
    connect(server).deliver([make_event(1, table=table)])
    (message,) = server.messages()
    assert message.subject == f"cdc.shop.public.{level}"


def test_an_empty_key_is_a_level_too(server: Server, connect: Callable[..., NatsSink], make_event: Make) -> None:
    event = Event.from_json(make_event(1).to_json().replace('"key":{"id":1}', '"key":{"id":""}'))
    connect(server, subject="cdc.{key.id}").deliver([event])
    (message,) = server.messages()
    assert message.subject == "cdc.%"


def test_a_subject_longer_than_a_line_is_refused_before_anything_is_sent(
    server: Server, connect: Callable[..., NatsSink], make_event: Make
) -> None:
    event = Event.from_json(make_event(1).to_json().replace('"key":{"id":1}', '"key":{"id":"' + SECRET * 200 + '"}'))
    with pytest.raises(PermanentFailure, match="its subject would have more than 2048 bytes"):
        connect(server, subject="cdc.{key.id}").deliver([make_event(2), event])
    assert server.ids() == []


def test_what_comes_again_is_dropped_by_the_stream(
    server: Server, connect: Callable[..., NatsSink], make_event: Make
) -> None:
    batch = [make_event(seq) for seq in range(1, 4)]
    connect(server).deliver(batch)
    connect(server).deliver([*batch, make_event(4)])
    assert server.ids() == [f"shop-{seq}-1" for seq in range(1, 5)]


def test_each_key_is_in_order_however_many_are_in_flight(
    server: Server, connect: Callable[..., NatsSink], make_event: Make
) -> None:
    batch = [make_event(seq, key=seq % (IN_FLIGHT + 300)) for seq in range(1, 2 * IN_FLIGHT)]
    connect(server).deliver(batch)
    connect(server).deliver(hot := [make_event(10_000 + seq, key=1) for seq in range(100)])
    ids = server.ids()
    assert sorted(ids) == sorted(event.id for event in batch + hot)
    seqs = [int(id_.split("-")[1]) for id_ in ids]
    for key in range(IN_FLIGHT + 300):
        own = [seq for seq in seqs if seq < 10_000 and seq % (IN_FLIGHT + 300) == key]
        assert own == sorted(own)
    assert seqs[-100:] == [10_000 + seq for seq in range(100)]


# -- what a stream may refuse -------------------------------------------------------------------------------------


def test_nothing_of_a_key_is_stored_after_something_of_it_was_refused(
    start: Callable[..., Server], connect: Callable[..., NatsSink], make_event: Make
) -> None:
    server = start()
    server.add_stream(max_msgs=3, discard=DiscardPolicy.NEW)
    sink = connect(server)
    batch = [make_event(seq, key=seq % 2) for seq in range(1, 7)]
    with pytest.raises(PartialFailure) as raised:
        sink.deliver(batch)
    assert sorted(raised.value.failures) == [3, 4, 5]
    assert "refuses it: maximum messages exceeded" in str(raised.value.failures[3])
    assert "of the same key, was not taken" in str(raised.value.failures[5])
    assert server.ids() == ["shop-1-1", "shop-2-1", "shop-3-1"]
    server.call(lambda client: client.jetstream().purge_stream("cdc"))
    sink.deliver([batch[index] for index in sorted(raised.value.failures)])
    assert server.ids() == ["shop-4-1", "shop-5-1", "shop-6-1"]


def test_an_event_above_the_streams_limit_is_refused_before_anything_is_sent(
    start: Callable[..., Server], connect: Callable[..., NatsSink], make_event: Make
) -> None:
    server = start()
    server.add_stream(max_msg_size=1000)
    with pytest.raises(PermanentFailure, match="the stream takes 1000 at most"):
        connect(server).deliver([make_event(1), make_event(2, text=SECRET * 100)])
    assert server.ids() == []


def test_headers_that_make_a_message_too_large_are_a_permanent_failure(
    start: Callable[..., Server], connect: Callable[..., NatsSink], make_event: Make
) -> None:
    class Decorated(Encoder):
        def headers(self, event: Event) -> Mapping[str, str]:
            return {"Long": SECRET * 1000 if event.source.seq == 2 else "short"}

    server = start(max_payload=10_000)
    server.add_stream()
    sink = connect(server, Decorated())
    sink.open()
    assert sink._connection is not None
    sink._connection.largest = 100_000  # as if the server's limit had been lowered meanwhile
    for batch in ([make_event(1), make_event(2), make_event(3)], [make_event(2)]):
        with pytest.raises(PermanentFailure) as raised:
            sink.deliver(batch)
        assert SECRET not in str(raised.value)
    sink.deliver([make_event(3)])
    assert "shop-3-1" in server.ids()


def test_a_limit_the_stream_was_given_meanwhile_is_a_permanent_failure_of_that_event(
    server: Server, connect: Callable[..., NatsSink], make_event: Make
) -> None:
    sink = connect(server)
    sink.deliver([make_event(1)])
    server.call(lambda client: client.jetstream().update_stream(name="cdc", subjects=["cdc.>"], max_msg_size=1000))
    with pytest.raises(PartialFailure) as raised:
        sink.deliver([make_event(2), make_event(3, text=SECRET * 100), make_event(4)])
    ((index, failure),) = raised.value.failures.items()
    assert (index, type(failure)) == (1, PermanentFailure)
    assert SECRET not in str(failure)
    assert sorted(server.ids()) == ["shop-1-1", "shop-2-1", "shop-4-1"]


def test_subjects_that_no_stream_takes_are_told_by_their_template(
    start: Callable[..., Server], connect: Callable[..., NatsSink], make_event: Make
) -> None:
    server = start()
    server.add_stream(subjects=["cdc.1"])
    sink = connect(server, subject="cdc.{key.id}")
    with pytest.raises(PartialFailure) as raised:
        sink.deliver([make_event(1), make_event(4929)])
    ((index, failure),) = raised.value.failures.items()
    assert (index, type(failure)) == (1, TransientFailure)
    assert str(failure) == (
        f"no stream of nats at 127.0.0.1:{server.port} takes the subject "
        "(let stream cdc have the subjects of cdc.{key.id})"
    )


def test_another_stream_than_the_one_that_was_named_is_refused(
    start: Callable[..., Server], connect: Callable[..., NatsSink], make_event: Make
) -> None:
    server = start()
    server.add_stream(subjects=["other"])
    server.call(lambda client: client.jetstream().add_stream(name="taken", subjects=["cdc.>"]))
    assert "expected stream does not match" in transient(connect(server), [make_event(1)])


def test_a_stream_that_is_missing_is_made_if_one_may(
    start: Callable[..., Server], connect: Callable[..., NatsSink], make_event: Make
) -> None:
    server = start()
    said = transient(connect(server), [make_event(1)])
    assert said.endswith("has no stream cdc (create it, or set create_stream: true)")
    sink = connect(server, create_stream=True, subject="cdc.v1-{schema}.{table}.{key.a.b}")
    with pytest.raises(PermanentFailure, match="no key column"):
        sink.deliver([make_event(1)])
    info = server.call(lambda client: client.jetstream().stream_info("cdc"))
    assert info.config.subjects == ["cdc.*.*.*"]
    connect(server, subject="cdc.v1-{schema}.{table}.{key.id}").deliver([make_event(1)])
    assert server.ids() == ["shop-1-1"]


def test_a_stream_that_was_removed_is_missed_and_made_again(
    server: Server, connect: Callable[..., NatsSink], make_event: Make
) -> None:
    sink = connect(server, create_stream=True)
    sink.deliver([make_event(1)])
    server.call(lambda client: client.jetstream().delete_stream("cdc"))
    transient(sink, [make_event(2)])
    sink.deliver([make_event(2)])
    assert server.ids() == ["shop-2-1"]


def test_a_server_without_jetstream_is_told_from_one_without_the_stream(
    start: Callable[..., Server], connect: Callable[..., NatsSink], make_event: Make
) -> None:
    server = start(jetstream=False)
    assert "has no JetStream (start the server with it)" in transient(connect(server), [make_event(1)])


# -- who else may answer ------------------------------------------------------------------------------------------


@pytest.fixture
def serve() -> Iterator[Callable[..., None]]:
    """``serve(server, answer)``: a service that answers every request to a subject below cdc."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    clients: list[Client] = []

    def call(what: Coroutine[Any, Any, ResultT]) -> ResultT:
        return asyncio.run_coroutine_threadsafe(what, loop).result(30)

    def start(server: Server, answer: bytes) -> None:
        async def listen() -> None:
            client = await nats.connect(server.url)
            clients.append(client)
            await client.subscribe("cdc.>", cb=reply)
            await client.flush()

        async def reply(request: Msg) -> None:
            await request.respond(answer)

        call(listen())

    yield start
    for client in clients:
        call(client.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


ANSWERS = [
    b"ok",
    b"",
    b"\xff",
    b"[" * 100_000,
    b"[1]",
    b'{"seq":1}',
    b'{"stream":"cdc"}',
    b'{"stream":"other","seq":1}',
    b'{"stream":"cdc","seq":"1"}',
    b'{"stream":"cdc","seq":true}',
    b'{"error":"no"}',
    b'{"stream":"cdc","seq":1,"error":{}}',
]


@pytest.mark.parametrize("answer", ANSWERS, ids=[str(answer[:40]) for answer in ANSWERS])
def test_what_a_service_answers_is_no_acknowledgement(
    start: Callable[..., Server],
    connect: Callable[..., NatsSink],
    serve: Callable[..., None],
    make_event: Make,
    answer: bytes,
) -> None:
    server = start()
    server.add_stream(subjects=["cdc.1"])
    serve(server, answer)
    sink = connect(server, subject="cdc.{key.id}", timeout="300ms")
    with pytest.raises(PartialFailure) as raised:
        sink.deliver([make_event(1), make_event(4929), make_event(4930, key=4929)])
    assert sorted(raised.value.failures) == [1, 2]
    assert isinstance(raised.value.failures[1], TransientFailure)
    assert str(raised.value.failures[1]) == (
        f"stream cdc of nats at 127.0.0.1:{server.port} did not acknowledge within 0.3 s, and something else answers "
        "(let the stream have the subjects of cdc.{key.id})"
    )
    assert server.ids() == ["shop-1-1"]


def test_the_streams_acknowledgement_is_waited_for_when_a_service_answers_first(
    server: Server, connect: Callable[..., NatsSink], serve: Callable[..., None], make_event: Make
) -> None:
    serve(server, b"ok")
    sink = connect(server)
    sink.deliver([make_event(seq, key=seq % 3) for seq in range(1, 31)])
    assert sorted(server.ids()) == sorted(f"shop-{seq}-1" for seq in range(1, 31))


def test_an_acknowledgement_may_be_written_in_any_way(
    server: Server, connect: Callable[..., NatsSink], make_event: Make
) -> None:
    connection = _Connection(connect(server).options, "stream")
    for written in (
        b'{"stream":"cdc", "seq":1}',
        b'{"stream":"cdc","seq":1,"duplicate":true}',
        b'{"domain": "leaf", "seq": 7, "stream": "cdc"}',
        b'{"stream":"\\u0063dc","seq":1}',
    ):
        assert connection._is_acknowledged(written), written


# -- the connection -----------------------------------------------------------------------------------------------


def test_a_server_that_was_restarted_meanwhile_is_no_failure(
    server: Server, connect: Callable[..., NatsSink], make_event: Make
) -> None:
    sink = connect(server)
    sink.deliver([make_event(1)])
    server.service.kill()
    server.service.start()
    connection = sink._connection
    assert connection is not None
    until(connection.is_lost, "it is noticed")
    sink.deliver([make_event(2)])
    assert server.ids() == ["shop-1-1", "shop-2-1"]


def test_the_servers_pings_are_answered_while_nothing_is_delivered(
    start: Callable[..., Server], connect: Callable[..., NatsSink], make_event: Make
) -> None:
    monitor = free_port()
    server = start(http=f"127.0.0.1:{monitor}", ping_interval="100ms", ping_max=2)
    server.add_stream()
    sink = connect(server)
    sink.deliver([make_event(1)])

    def age() -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{monitor}/connz") as answer:
            found = json.load(answer)
        ours = [one for one in found["connections"] if one.get("name") == "cdc/stream"]
        assert ours, "the server has closed the connection"
        return float(ours[0]["uptime"].rstrip("s"))

    until(lambda: age() >= 1, "ten pings are answered")
    assert sink._connection is not None
    assert not sink._connection.is_lost()


def test_a_server_that_stalls_is_waited_for_once(
    server: Server, connect: Callable[..., NatsSink], make_event: Make
) -> None:
    sink = connect(server, timeout="1s")
    sink.deliver([make_event(1)])
    server.service.freeze()
    began = time.monotonic()
    said = transient(sink, [make_event(seq, key=seq % 2, text="x" * 10_000) for seq in range(2, 500)])
    assert time.monotonic() - began < 8
    assert said.endswith("did not answer within 1 s")
    server.service.thaw()
    sink.deliver([make_event(2)])


def test_a_server_that_stalls_is_waited_for_once_however_much_was_to_be_sent(
    server: Server, connect: Callable[..., NatsSink], make_event: Make
) -> None:
    sink = connect(server, timeout="500ms")
    sink.open()
    server.service.freeze()
    began = time.monotonic()
    said = transient(sink, [make_event(seq, text="x" * 25_000) for seq in range(1, 501)])
    assert time.monotonic() - began < 8
    assert said.endswith("did not answer within 0.5 s")
    server.service.thaw()
    sink.deliver([make_event(501)])


def test_closing_leaves_no_thread_behind(server: Server, connect: Callable[..., NatsSink], make_event: Make) -> None:
    before = set(threading.enumerate())
    sink = connect(server)
    sink.deliver([make_event(1)])
    assert set(threading.enumerate()) - before
    sink.close()
    assert set(threading.enumerate()) <= before


def test_any_server_of_a_cluster_will_do(server: Server, connect: Callable[..., NatsSink], make_event: Make) -> None:
    connect(server, servers=("nats://127.0.0.1:1", server.url)).deliver([make_event(1)])
    assert server.ids() == ["shop-1-1"]
    said = transient(connect(server, servers=("nats://127.0.0.1:1", "nats://127.0.0.1:2")), [make_event(1)])
    assert said == "nats at 127.0.0.1:1, 127.0.0.1:2 cannot be reached: Connection refused"


# -- who we are ---------------------------------------------------------------------------------------------------


def seed(kind: int) -> bytes:
    """A new key pair's seed."""
    return bytes(nkeys.encode_seed(os.urandom(32), kind))


def public(seed_: bytes) -> str:
    return nkeys.from_seed(bytearray(seed_)).public_key.decode()


def jwt(issuer: bytes, subject: str, name: str, claims: dict[str, object]) -> str:
    """A claim, signed."""

    def part(content: bytes) -> str:
        return base64.urlsafe_b64encode(content).rstrip(b"=").decode()

    body: dict[str, object] = {"iss": public(issuer), "sub": subject, "name": name, "iat": 1, "nats": claims}
    body["jti"] = base64.b32encode(hashlib.sha256(json.dumps(body).encode()).digest()).rstrip(b"=").decode()
    signed = f"{part(json.dumps({'typ': 'JWT', 'alg': 'ed25519-nkey'}).encode())}.{part(json.dumps(body).encode())}"
    return f"{signed}.{part(nkeys.from_seed(bytearray(issuer)).sign(signed.encode()))}"


def test_a_file_of_credentials_says_who_we_are(
    start: Callable[..., Server], connect: Callable[..., NatsSink], make_event: Make, tmp_path: Path
) -> None:
    operator, user = seed(nkeys.PREFIX_BYTE_OPERATOR), seed(nkeys.PREFIX_BYTE_USER)
    account, system = seed(nkeys.PREFIX_BYTE_ACCOUNT), seed(nkeys.PREFIX_BYTE_ACCOUNT)
    unlimited = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
    storage = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
    limits = {**unlimited, **storage, "wildcards": True}
    permissions = {"pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1}
    claim = jwt(account, public(user), "cdc", {**permissions, "type": "user", "version": 2})
    credentials = tmp_path / "cdc.creds"
    credentials.write_text(
        f"-----BEGIN NATS USER JWT-----\n{claim}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.decode()}\n------END USER NKEY SEED------\n"
    )
    accounts = {
        public(account): jwt(operator, public(account), "shop", {"limits": limits, "type": "account", "version": 2}),
        public(system): jwt(operator, public(system), "sys", {"limits": unlimited, "type": "account", "version": 2}),
    }
    server = start(
        {"user_credentials": str(credentials)},
        operator=jwt(operator, public(operator), "op", {"type": "operator", "version": 2}),
        resolver="MEMORY",
        resolver_preload=accounts,
        system_account=public(system),
    )
    server.add_stream()
    connect(server, credentials=str(credentials)).deliver([make_event(1)])
    assert server.ids() == ["shop-1-1"]
    assert "refuses the credentials" in transient(connect(server), [make_event(2)])
    missing = transient(connect(server, credentials=str(tmp_path / "no.creds")), [make_event(2)])
    assert missing == "the credentials cannot be read: No such file or directory"
    credentials.write_text(SECRET)
    said = transient(connect(server, credentials=str(credentials)), [make_event(2)])
    assert said == "the file with the credentials does not hold any (check it)"


def test_a_seed_says_who_we_are(
    start: Callable[..., Server], connect: Callable[..., NatsSink], make_event: Make, tmp_path: Path
) -> None:
    ours, others = seed(nkeys.PREFIX_BYTE_USER), seed(nkeys.PREFIX_BYTE_USER)
    server = start({"nkeys_seed_str": ours.decode()}, authorization={"users": [{"nkey": public(ours)}]})
    server.add_stream()
    path = tmp_path / "user.nk"
    path.write_bytes(ours + b"\n")
    connect(server, nkey=str(path)).deliver([make_event(1)])
    assert server.ids() == ["shop-1-1"]
    path.write_bytes(others)
    assert "refuses the credentials" in transient(connect(server, nkey=str(path)), [make_event(2)])
    path.write_text(SECRET)
    assert "does not hold any" in transient(connect(server, nkey=str(path)), [make_event(2)])


def test_a_token_says_who_we_are(
    start: Callable[..., Server], connect: Callable[..., NatsSink], make_event: Make
) -> None:
    server = start({"token": SECRET}, authorization={"token": SECRET})
    server.add_stream()
    connect(server, token=SECRET).deliver([make_event(1)])
    assert server.ids() == ["shop-1-1"]
    assert "refuses the credentials" in transient(connect(server, token=f"{SECRET}9"), [make_event(2)])


def test_a_user_who_may_not_publish_is_told_so(
    start: Callable[..., Server], connect: Callable[..., NatsSink], make_event: Make
) -> None:
    may = {"publish": ["$JS.API.STREAM.INFO.cdc", "cdc.1"], "subscribe": ["_INBOX.>"]}
    users = [{"user": "cdc", "password": SECRET, "permissions": may}, {"user": "all", "password": "x"}]
    server = start({"user": "all", "password": "x"}, authorization={"users": users})
    server.add_stream()
    sink = connect(server, username="cdc", password=SECRET, subject="cdc.{key.id}", timeout="1s")
    with pytest.raises(PartialFailure) as raised:
        sink.deliver([make_event(1), make_event(4929)])
    assert {index: str(failure) for index, failure in raised.value.failures.items()} == {
        1: f"nats at 127.0.0.1:{server.port} does not let us publish (look at the permissions of the user)"
    }


def test_tls_with_certificates_on_both_sides(
    start: Callable[..., Server], connect: Callable[..., NatsSink], make_event: Make, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    files = {"cert_file": str(authority.server), "key_file": str(authority.server_key), "ca_file": str(authority.ca)}
    server = start(tls={**files, "verify": True})
    ours = {"certificate": str(authority.client), "key": str(authority.client_key)}
    sink = connect(server, tls={"ca": str(authority.ca), **ours}, create_stream=True)
    sink.deliver([make_event(1)])
    said = transient(connect(server, servers=(server.url.replace("nats:", "tls:"),)), [make_event(2)])
    assert "certificate verify failed" in said.lower()
    connect(server, tls={"verify": False, **ours}).deliver([make_event(2)])
    missing = transient(connect(server, tls={"ca": "/nowhere/ca.pem"}), [make_event(3)])
    assert missing == "tls.ca cannot be used: No such file or directory"


def test_a_secret_is_not_told_to_a_server_that_does_not_offer_the_tls_we_want(
    start: Callable[..., Server], connect: Callable[..., NatsSink], make_event: Make
) -> None:
    # The right password: that it is refused shows that it was not said.
    for identity, authorization in (
        ({"username": "cdc", "password": SECRET}, {"user": "cdc", "password": SECRET}),
        ({"token": SECRET}, {"token": SECRET}),
    ):
        server = start(authorization=authorization)
        said = transient(connect(server, tls={"verify": False}, **identity), [make_event(1)])
        assert said == f"nats at 127.0.0.1:{server.port} cannot be reached: it does not offer TLS"
        server.service.kill()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"servers": (f"nats://cdc:{SECRET}@db1",)}, "credentials in a server's URL"),
        ({"servers": ("http://db1",)}, "not a NATS URL"),
        ({"servers": ("nats://db1:port",)}, "not a NATS URL"),
        ({"servers": ()}, "an empty list"),
        ({"stream": "a.b"}, "not a stream's name"),
        ({"subject": "cdc..x"}, "not a subject"),
        ({"subject": "cdc.>"}, "not a subject"),
        ({"subject": "{schema} {table}"}, "not a subject"),
        ({"subject": "$JS.{table}"}, "not a subject"),
        ({"username": "cdc"}, "username and password go together"),
        ({"token": SECRET, "nkey": "x"}, "token and nkey (keep one way to say who we are)"),
    ],
)
def test_what_does_not_fit_together_is_refused_without_its_value(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as raised:
        NatsOptions.model_validate({"type": "nats", **options})
    assert said in str(raised.value)
    assert SECRET not in str(raised.value)
