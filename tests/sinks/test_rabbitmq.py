"""The rabbitmq sink, against a broker of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme
from harness import until
from rabbit import PASSWORD, Rabbit
from service import free_port
from wire import wire

from cdc import config as configuration
from cdc.encoding import Encoder
from cdc.errors import ConfigError, PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event, Image
from cdc.sinks import option_models
from cdc.sinks import rabbitmq as module
from cdc.sinks.rabbitmq import RabbitmqOptions, RabbitmqSink, routing_word

Make = Callable[..., Event]
LIMIT = 300_000
TLS_PORT = free_port()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory, authority: trustme.CA) -> Iterator[Rabbit]:
    """One broker for all tests; each makes exchanges and queues under names of its own."""
    directory = tmp_path_factory.mktemp("rabbit")
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    certificate.private_key_and_cert_chain_pem.write_to_path(directory / "server.pem")
    settings = {
        "max_message_size": LIMIT,
        "listeners.ssl.1": f"127.0.0.1:{TLS_PORT}",
        "ssl_options.cacertfile": directory / "ca.pem",
        "ssl_options.certfile": directory / "server.pem",
        "ssl_options.keyfile": directory / "server.pem",
        "ssl_options.verify": "verify_peer",
        "ssl_options.fail_if_no_peer_cert": "true",
    }
    try:
        made = Rabbit(directory, settings)
    except FileNotFoundError as error:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no {error} on this machine")
    yield made
    made.close()


class Place(NamedTuple):
    """An exchange of kind topic, and a queue bound to all of it."""

    exchange: str
    queue: str
    channel: Any

    def bind(self, pattern: str = "#") -> None:
        self.channel.queue_bind(self.queue, self.exchange, pattern)

    def unbind(self, pattern: str = "#") -> None:
        self.channel.queue_unbind(self.queue, self.exchange, pattern)

    def messages(self) -> list[tuple[Any, Any, bytes]]:
        """Method, properties and body of each, taken out of the queue."""
        found = []
        while (answer := self.channel.basic_get(self.queue, auto_ack=True))[0] is not None:
            found.append(answer)
        return found

    def seqs(self) -> list[int]:
        return [Event.from_json(body.decode()).source.seq for _, _, body in self.messages()]


@pytest.fixture
def place(broker: Rabbit) -> Iterator[Place]:
    with contextlib.closing(broker.connection()) as connection:
        channel = connection.channel()
        name = f"test-{uuid.uuid4().hex[:8]}"
        channel.exchange_declare(name, "topic", durable=True)
        channel.queue_declare(name, durable=True)
        channel.queue_bind(name, name, "#")
        yield Place(name, name, channel)
        channel.queue_delete(name)
        channel.exchange_delete(name)


@pytest.fixture
def sink_to(broker: Rabbit) -> Iterator[Callable[..., RabbitmqSink]]:
    """``sink_to(exchange, **keys)``: a sink, closed after the test."""
    made: list[RabbitmqSink] = []

    def make(exchange: str, encoder: Encoder | None = None, **keys: object) -> RabbitmqSink:
        where = {} if "host" in keys or "url" in keys else {"url": broker.url()}
        options = {"type": "rabbitmq", "exchange": exchange, "timeout": "30s", **where, **keys}
        made.append(RabbitmqSink("events", RabbitmqOptions.model_validate(options), encoder))
        return made[-1]

    yield make
    for sink in made:
        sink.close()


SinkTo = Callable[..., RabbitmqSink]


def failures_of(sink: RabbitmqSink, batch: list[Event]) -> Mapping[int, TransientFailure | PermanentFailure]:
    """What a sink that does not take all of a batch says, by index."""
    with pytest.raises((PartialFailure, TransientFailure)) as raised:
        sink.deliver(batch)
    if isinstance(raised.value, PartialFailure):
        return raised.value.failures
    return dict.fromkeys(range(len(batch)), raised.value)


# -- messages -----------------------------------------------------------------------------------------------------


class Adds(Encoder):
    content_type = "application/cloudevents+json"

    def headers(self, event: Event) -> Mapping[str, str]:
        return {"ce-type": event.op.value}


def test_a_message_is_persistent_and_has_the_events_id_text_and_headers(
    place: Place, sink_to: SinkTo, make_event: Make
) -> None:
    event = make_event(7, key=42)
    sink_to(place.exchange, Adds(), routing_key="{database}.{table}.{op}.{key.id}").deliver([event])
    ((method, properties, body),) = place.messages()
    assert method.routing_key == "shop.orders.insert.42"
    assert body == event.to_json().encode()
    assert properties.message_id == event.id
    assert properties.delivery_mode == 2
    assert properties.content_type == "application/cloudevents+json"
    assert properties.app_id == "cdc"
    assert properties.headers == {"cdc-op": "insert", "ce-type": "insert"}


def test_a_batch_arrives_whole_and_in_order(place: Place, sink_to: SinkTo, make_event: Make) -> None:
    sink = sink_to(place.exchange)
    for first in range(0, 3000, 1000):
        sink.deliver([make_event(first + number, key=number % 7) for number in range(1000)])
    assert place.seqs() == list(range(3000))


def test_the_default_exchange_leads_to_a_queue_by_its_name(place: Place, sink_to: SinkTo, make_event: Make) -> None:
    sink_to("", routing_key=place.queue).deliver([make_event(1)])
    assert place.seqs() == [1]


@pytest.mark.parametrize(
    ("name", "word"), [("orders", "orders"), ("a.b", "a%2Eb"), ("100%", "100%25"), ("größe", "größe"), ("#", "#")]
)
def test_a_name_is_one_word_of_a_routing_key(name: str, word: str) -> None:
    assert routing_word(name) == word


@pytest.mark.parametrize(
    "keys", [{"exchange": "x-{table}"}, {"exchange": "x", "routing_key": "{table}.{table}.{table}"}]
)
def test_a_name_that_would_be_too_long_is_a_permanent_failure(
    sink_to: SinkTo, make_event: Make, keys: dict[str, str]
) -> None:
    with pytest.raises(PermanentFailure, match="longer than 255 bytes"):
        sink_to(**keys).deliver([make_event(1, table="ö" * 150)])


# -- messages that are not taken ----------------------------------------------------------------------------------


def test_an_event_no_queue_takes_waits_for_a_binding_and_holds_back_no_other(
    place: Place, sink_to: SinkTo, make_event: Make
) -> None:
    place.unbind()
    place.bind("orders.#")
    sink = sink_to(place.exchange, routing_key="{table}.{key.id}")
    batch = [make_event(1), make_event(2, table="items", key=77), make_event(3)]
    failures = failures_of(sink, batch)
    assert list(failures) == [1]
    assert isinstance(failures[1], TransientFailure)
    expected = f"exchange '{place.exchange}': no queue takes it (bind one, to the routing keys of {{table}}.{{key.id}})"
    assert str(failures[1]) == expected  # and not the key itself, which is the row's
    place.bind("items.77")
    sink.deliver([batch[1]])
    assert place.seqs() == [1, 3, 2]


def test_an_event_no_queue_takes_is_given_up_where_that_is_wanted(
    place: Place, sink_to: SinkTo, make_event: Make
) -> None:
    place.unbind()
    failures = failures_of(sink_to(place.exchange, unroutable="permanent"), [make_event(1), make_event(2)])
    assert {type(failure) for failure in failures.values()} == {PermanentFailure}
    assert list(failures) == [0, 1]


def test_a_full_queue_is_a_transient_failure_and_then_one_event_of_a_key_is_on_its_way_at_a_time(
    place: Place, sink_to: SinkTo, make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{place.queue}-small"
    place.channel.queue_declare(name, durable=True, arguments={"x-max-length": 4, "x-overflow": "reject-publish"})
    sink = sink_to("", routing_key=name)
    batch = [make_event(seq, key=seq % 2) for seq in range(20)]
    wanted = batch
    rounds: list[list[str]] = []
    publish = module._Link.publish

    def spy(link: Any, messages: Any, content_type: str) -> None:
        rounds.append([message.id for message in messages])
        publish(link, messages, content_type)

    monkeypatch.setattr(module._Link, "publish", spy)
    arrived: list[int] = []
    while wanted:
        try:
            sink.deliver(wanted)
        except (PartialFailure, TransientFailure) as error:
            failed = error.failures if isinstance(error, PartialFailure) else dict.fromkeys(range(len(wanted)), error)
            assert "a queue refuses it (it is full, or has failed)" in str(next(iter(failed.values())))
            # As the pipeline does: from the first that failed of each key on.
            first = {key: min(i for i in failed if wanted[i].key == key) for key in {wanted[i].key for i in failed}}
            wanted = [event for i, event in enumerate(wanted) if i >= first.get(event.key, len(wanted))]
        else:
            wanted = []
        while (answer := place.channel.basic_get(name, auto_ack=True))[0] is not None:
            arrived.append(Event.from_json(answer[2].decode()).source.seq)
    place.channel.queue_delete(name)
    assert rounds[0] == [event.id for event in batch]
    assert len(rounds) > 5
    keys = {event.id: event.key for event in batch}
    assert all(len({keys[id_] for id_ in ids}) == len(ids) for ids in rounds[1:])
    assert set(arrived) == set(range(20))


def test_a_missing_exchange_is_told_with_its_cure_and_holds_back_no_other(
    place: Place, sink_to: SinkTo, make_event: Make
) -> None:
    sink = sink_to("{table}")
    good = place.exchange
    batch = [make_event(seq, table=good if seq % 2 else "absent") for seq in range(6)]
    wanted = batch
    for _ in range(3):
        failures = failures_of(sink, wanted)
        assert {type(failure) for failure in failures.values()} == {TransientFailure}
        wanted = [wanted[index] for index in sorted(failures)]
        if [event.source.table for event in wanted] == ["absent"] * 3:
            break
    assert [event.source.table for event in wanted] == ["absent"] * 3
    assert str(failures_of(sink, wanted)[0]) == "exchange 'absent' does not exist (create it, or set declare)"
    assert set(place.seqs()) == {1, 3, 5}
    place.channel.exchange_declare("absent", "topic", durable=True)
    place.channel.queue_bind(place.queue, "absent", "#")
    sink.deliver(wanted)
    place.channel.exchange_delete("absent")
    assert place.seqs() == [0, 2, 4]


def test_an_exchange_is_declared_where_that_is_wanted(place: Place, sink_to: SinkTo, make_event: Make) -> None:
    names = [f"{place.exchange}-{table}" for table in ("orders", "items")]
    sink = sink_to(f"{place.exchange}-{{table}}", declare="topic")
    batch = [make_event(1), make_event(2, table="items")]
    assert "no queue takes it" in str(failures_of(sink, batch)[0])
    for name in names:
        place.channel.exchange_declare(name, "topic", durable=True)  # it is there, of this kind and durable
        place.channel.queue_bind(place.queue, name, "#")
    sink.deliver(batch)
    assert sorted(place.seqs()) == [1, 2]
    for name in names:
        place.channel.exchange_delete(name)


def test_an_exchange_of_another_kind_is_told(place: Place, sink_to: SinkTo, make_event: Make) -> None:
    failures = failures_of(sink_to(place.exchange, declare="fanout"), [make_event(1), make_event(2)])
    assert {type(failure) for failure in failures.values()} == {TransientFailure}
    assert "cannot be declared (there is one of another kind; make declare the same, or leave it out)" in str(
        failures[0]
    )
    assert place.seqs() == []


def test_nothing_is_published_behind_a_channel_that_was_closed(
    place: Place, sink_to: SinkTo, make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CAREFUL", 0.0)  # as after a long pause: what is under suspicion still goes in order
    sink = sink_to(place.exchange)
    wanted = [make_event(seq, key=1, text="y" * (LIMIT if seq == 70 else 10)) for seq in range(300)]
    arrived: list[int] = []
    while wanted:
        try:
            sink.deliver(wanted)
            wanted = []
        except (PartialFailure, TransientFailure) as error:
            failed = error.failures if isinstance(error, PartialFailure) else dict.fromkeys(range(len(wanted)), error)
            wanted = [wanted[index] for index, why in sorted(failed.items()) if isinstance(why, TransientFailure)]
        arrived += place.seqs()
    assert list(dict.fromkeys(arrived)) == [seq for seq in range(300) if seq != 70]


def test_of_messages_on_their_way_only_the_one_that_is_too_large_is_given_up(
    place: Place, sink_to: SinkTo, make_event: Make
) -> None:
    sink = sink_to(place.exchange)
    batch = [make_event(seq, key=1, text="y" * (LIMIT if seq == 3 else 10)) for seq in range(6)]
    wanted, given_up = batch, []
    for _ in range(4):
        try:
            sink.deliver(wanted)
        except (PartialFailure, TransientFailure) as error:
            failed = error.failures if isinstance(error, PartialFailure) else dict.fromkeys(range(len(wanted)), error)
            given_up += [failure for failure in failed.values() if isinstance(failure, PermanentFailure)]
            wanted = [wanted[index] for index, why in sorted(failed.items()) if isinstance(why, TransientFailure)]
        else:
            wanted = []
        if not wanted:
            break
    assert len(given_up) == 1
    assert "(see its max_message_size)" in str(given_up[0])
    assert "yyy" not in str(given_up[0])
    found = place.seqs()
    assert list(dict.fromkeys(found)) == [0, 1, 2, 4, 5]


# -- the broker ---------------------------------------------------------------------------------------------------


def test_publishers_held_back_by_an_alarm_wait_and_make_no_duplicate(
    broker: Rabbit, place: Place, sink_to: SinkTo, make_event: Make
) -> None:
    sink = sink_to(place.exchange)
    sink.deliver([make_event(0)])
    broker.control("set_vm_memory_high_watermark", "0.0000001")
    try:
        batch = [make_event(seq) for seq in range(1, 301)]
        started = time.monotonic()
        assert (
            str(failures_of(sink, batch)[0])
            == f"rabbitmq at 127.0.0.1:{broker.port} takes nothing for now: low on memory"
        )
        assert time.monotonic() - started < 15  # and not the 30 s of its patience
        failures_of(sink, batch)
    finally:
        broker.control("set_vm_memory_high_watermark", "0.4")

    def arrived() -> bool:
        try:
            sink.deliver(batch)
        except (TransientFailure, PartialFailure):
            return False
        return True

    until(arrived, "the alarm is over", 60)
    assert place.seqs() == list(range(301))


def test_a_wait_that_was_too_short_goes_on_in_the_next_attempt_without_a_duplicate(
    broker: Rabbit, place: Place, sink_to: SinkTo, make_event: Make
) -> None:
    sink = sink_to(place.exchange, timeout="500ms")

    def arrived(batch: list[Event]) -> bool:
        try:
            sink.deliver(batch)
        except TransientFailure:
            return False
        return True

    until(lambda: arrived([make_event(0)]), "it is connected", 30)
    place.messages()
    batch = [make_event(seq) for seq in range(1, 200)]
    broker.service.freeze()
    try:
        for _ in range(3):
            assert "confirmed nothing within 0.5 s" in str(failures_of(sink, batch)[0])
    finally:
        broker.service.thaw()
    until(lambda: arrived(batch), "the broker has confirmed", 60)
    assert place.seqs() == list(range(1, 200))


def test_an_event_that_was_edited_while_it_waited_arrives_as_it_is_now(
    broker: Rabbit, place: Place, sink_to: SinkTo, make_event: Make
) -> None:
    sink = sink_to(place.exchange)
    sink.deliver([make_event(0)])
    sink.options = sink.options.model_copy(update={"timeout": 0.3})
    broker.service.freeze()
    try:
        failures_of(sink, [make_event(1)])
        edited = make_event(1).model_copy(update={"after": Image('{"id":1,"text":"edited"}')})
        failures_of(sink, [edited])
    finally:
        broker.service.thaw()
    sink.options = sink.options.model_copy(update={"timeout": 30.0})
    sink.deliver([edited])
    assert place.messages()[-1][2].decode() == edited.to_json()


def test_closing_a_connection_to_a_frozen_broker_is_quick(
    broker: Rabbit, place: Place, sink_to: SinkTo, make_event: Make
) -> None:
    sink = sink_to(place.exchange)
    sink.deliver([make_event(0)])
    broker.service.freeze()
    try:
        started = time.monotonic()
        sink.close()
        sink.close()
        assert time.monotonic() - started < 5
        sink.options = sink.options.model_copy(update={"timeout": 0.5})
        with pytest.raises(TransientFailure, match="did not answer"):
            sink.open()
    finally:
        broker.service.thaw()


def test_a_connection_closed_while_there_was_nothing_to_deliver_is_made_anew_without_a_failure(
    broker: Rabbit, place: Place, sink_to: SinkTo, make_event: Make
) -> None:
    sink = sink_to(place.exchange)
    sink.deliver([make_event(0)])
    listed = broker.control("list_connections", "--no-table-headers", "pid", "timeout", "client_properties")
    (ours,) = (line.split("\t") for line in listed.splitlines() if "cdc events" in line)
    assert ours[1] == "0"  # no heartbeats, which nobody would answer
    broker.control("close_connection", ours[0], "maintenance")
    sink.deliver([make_event(1)])
    assert place.seqs() == [0, 1]


def test_a_connection_that_breaks_is_a_transient_failure_and_then_made_anew(
    broker: Rabbit, place: Place, sink_to: SinkTo, make_event: Make, tmp_path: Path
) -> None:
    port = free_port()
    between = wire(port, broker.port, tmp_path)
    sink = sink_to(place.exchange, host="127.0.0.1", port=port, username="cdc", password=PASSWORD, timeout="30s")
    sink.deliver([make_event(0)])
    broker.service.freeze()
    failures: list[BaseException] = []

    def deliver() -> None:
        try:
            sink.deliver([make_event(1), make_event(2)])
        except TransientFailure as error:
            failures.append(error)

    thread = threading.Thread(target=deliver)
    thread.start()
    until(lambda: bool(sink._by_tag), "it is published", 30)
    between.kill()
    thread.join(30)
    broker.service.thaw()
    assert len(failures) == 1
    with pytest.raises(TransientFailure, match=f"rabbitmq at 127.0.0.1:{port} cannot be reached: Connection refused"):
        sink.deliver([make_event(1), make_event(2)])
    between.start()
    sink.deliver([make_event(1), make_event(2)])
    assert list(dict.fromkeys(place.seqs())) == [0, 1, 2]
    sink.close()
    between.kill()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ({"password": "wrong-word"}, "refuses the credentials (check username and password)"),
        ({"vhost": "nowhere"}, "refuses the vhost (create it, or give the user rights in it)"),
    ],
)
def test_who_is_not_let_in_is_told_why(
    broker: Rabbit, sink_to: SinkTo, make_event: Make, url: dict[str, str], reason: str
) -> None:
    sink = sink_to("x", url=broker.url(**url))
    with pytest.raises(TransientFailure) as raised:
        sink.deliver([make_event(1)])
    assert str(raised.value) == f"rabbitmq at 127.0.0.1:{broker.port} {reason}"


def test_an_exchange_that_is_not_ours_to_write_is_told_with_its_cure(
    broker: Rabbit, place: Place, sink_to: SinkTo, make_event: Make
) -> None:
    broker.control("add_user", "reader", "word")
    broker.control("set_permissions", "reader", "", f"^{place.exchange}$", ".*")
    sink = sink_to("{table}", host="127.0.0.1", port=broker.port, username="reader", password="word")
    batch = [make_event(1, table="amq.topic"), make_event(2, table=place.exchange)]
    wanted = batch
    for _ in range(2):
        failures = failures_of(sink, wanted)
        wanted = [wanted[index] for index in sorted(failures)]
    assert str(failures_of(sink, wanted)[0]) == (
        "exchange 'amq.topic' may not be written by this user (give him the right to write it)"
    )
    assert [event.source.seq for event in wanted] == [1]
    assert set(place.seqs()) == {2}
    sink.close()
    broker.control("delete_user", "reader")


def test_nothing_is_logged_by_default_and_no_secret_ever(
    broker: Rabbit, place: Place, sink_to: SinkTo, make_event: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    sink = sink_to(place.exchange)
    sink.deliver([make_event(1, text="what-stands-in-a-row")])
    sink.close()
    with pytest.raises(TransientFailure):
        sink_to("x", host="127.0.0.1", port=free_port(), password="wrong-word").open()
    lines = [str(record.__dict__) for record in caplog.records] + [repr(sink.options)]
    for secret in (PASSWORD, "wrong-word", "what-stands-in-a-row"):
        assert not any(secret in line for line in lines)
    assert logging.getLogger("pika").handlers, "what pika says goes to stderr"


# -- TLS ----------------------------------------------------------------------------------------------------------


def test_a_broker_behind_tls_and_a_client_certificate(
    place: Place, sink_to: SinkTo, make_event: Make, authority: trustme.CA, tmp_path: Path
) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("client").private_key_and_cert_chain_pem.write_to_path(tmp_path / "client.pem")
    files = {"ca": str(tmp_path / "ca.pem"), "certificate": str(tmp_path / "client.pem")}
    where = {"host": "127.0.0.1", "port": TLS_PORT, "username": "cdc", "password": PASSWORD}
    sink_to(place.exchange, tls=files, **where).deliver([make_event(1)])
    assert place.seqs() == [1]
    for tls in ({"certificate": files["certificate"]}, {"ca": files["ca"]}):
        with pytest.raises(TransientFailure):
            sink_to(place.exchange, tls=tls, **where).deliver([make_event(2)])
    assert place.seqs() == []


# -- configuration ------------------------------------------------------------------------------------------------


def findings(directory: Path, sink: dict[str, object]) -> list[str]:
    """What is wrong with a sink, without the file's name."""
    path = directory / "config.yaml"
    content = {
        "databases": {"shop": {"dsn": "dbname=shop", "tables": {"public.item": {}}}},
        "sinks": {"events": {"type": "rabbitmq", "exchange": "changes", **sink}},
    }
    path.write_text(json.dumps(content))
    try:
        configuration.load(path, option_models(), {})
    except ConfigError as error:
        return [finding.removeprefix(f"{path}: sinks.events") for finding in error.findings]
    return []


@pytest.mark.parametrize(
    "sink",
    [
        {"url": "http://cdc:seecret@mq1/"},
        {"url": "amqp://"},
        {"url": "amqp://cdc:seecret@mq1:port/"},
        {"url": "amqp://cdc:seecret@mq1/a/b"},
        {"url": "amqp://cdc:seecret@mq1/?heartbeat=5"},
        {"url": "amqp://cdc:seecret@mq1/", "vhost": "seecret"},
        {"exchange": None},
        {"exchange": "x" * 256},
        {"exchange": "{key.id}"},
        {"routing_key": "{tabel}"},
        {"exchange": "", "declare": "topic"},
        {"exchange": "amq.topic", "declare": "topic"},
        {"declare": "x-delayed-message"},
        {"unroutable": "drop"},
        {"timeout": "1ms"},
        {"port": 0},
    ],
    ids=json.dumps,
)
def test_what_cannot_work_is_refused_at_start(tmp_path: Path, sink: dict[str, object]) -> None:
    (finding,) = findings(tmp_path, sink)
    assert "seecret" not in finding


@pytest.mark.parametrize(
    ("keys", "address"),
    [
        ({}, ("localhost", 5672, "/", "guest", "guest", False)),
        ({"tls": {}}, ("localhost", 5671, "/", "guest", "guest", True)),
        (
            {"host": "mq1", "port": 1, "vhost": "a/b", "username": "u", "password": "p"},
            ("mq1", 1, "a/b", "u", "p", False),
        ),
        ({"url": "amqp://mq1"}, ("mq1", 5672, "/", "guest", "guest", False)),
        ({"url": "amqps://u:p%40@mq1/a%2Fb"}, ("mq1", 5671, "a/b", "u", "p@", True)),
        ({"url": "amqp://u:p@mq1:99/", "tls": {}}, ("mq1", 99, "/", "u", "p", True)),
    ],
)
def test_where_the_broker_is(keys: dict[str, object], address: tuple[object, ...]) -> None:
    options = RabbitmqOptions.model_validate({"type": "rabbitmq", "exchange": "x", **keys})
    assert tuple(options.address) == address
    assert "p%40" not in repr(options)
