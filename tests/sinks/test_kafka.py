"""The kafka sink: what librdkafka is told, and what becomes of its errors; conformance has the real broker."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import confluent_kafka
import mock_kafka as mock
import pytest
import trustme
from authority import Authority
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka_event
from confluent_kafka.admin import AdminClient, NewTopic
from harness import until
from mock_kafka import MockKafka
from pydantic import ValidationError
from rig_kafka import tansu
from service import Service, free_port
from wire import wire

from cdc import config as configuration
from cdc.encoding import Encoder
from cdc.errors import ConfigError, PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event, Image, Op
from cdc.formats import encoder
from cdc.options import Format
from cdc.sinks import kafka as module
from cdc.sinks import option_models
from cdc.sinks.kafka import KafkaOptions, KafkaSink, topic_word

Make = Callable[..., Event]
TOPIC = "shop.public.orders"


@pytest.fixture
def cluster() -> Iterator[MockKafka]:
    """One mock broker, with a topic of one partition: everything is in order there."""
    with mock.mock_kafka() as made:
        made.create(TOPIC)
        yield made


@pytest.fixture
def sink_to() -> Iterator[Callable[..., KafkaSink]]:
    """``sink_to(cluster, options={}, **keys)``: an open sink; closed after the test."""
    made: list[KafkaSink] = []

    def make(cluster: MockKafka, encoder: Encoder | None = None, **keys: object) -> KafkaSink:
        options = KafkaOptions.model_validate(
            {"type": "kafka", "brokers": tuple(cluster.brokers), "timeout": "20s", **keys}
        )
        made.append(KafkaSink("events", options, encoder))
        made[-1].open()
        return made[-1]

    yield make
    for sink in made:
        sink.close()


def messages(cluster: MockKafka, topic: str = TOPIC) -> list[confluent_kafka.Message]:
    """What is in a topic, partition by partition, as another client reads it."""
    consumer = confluent_kafka.Consumer(
        {"bootstrap.servers": cluster.brokers[0], "group.id": "test", "enable.partition.eof": True, "log_level": 0}
    )
    found: list[confluent_kafka.Message] = []
    try:
        partitions = consumer.list_topics(topic, timeout=30).topics[topic].partitions
        for number in partitions:
            consumer.assign([confluent_kafka.TopicPartition(topic, number, 0)])
            while (message := consumer.poll(30)) is not None and message.error() is None:
                found.append(message)
            assert message is not None, "the end of a partition was not reached"
    finally:
        consumer.close()
    return found


def headers(message: confluent_kafka.Message) -> dict[str, str]:
    return {name: bytes(value or b"").decode() for name, value in dict(message.headers() or []).items()}  # type: ignore[arg-type]


def seqs(cluster: MockKafka, topic: str = TOPIC) -> list[int]:
    return [Event.from_json((message.value() or b"").decode()).source.seq for message in messages(cluster, topic)]


def failures_of(sink: KafkaSink, batch: list[Event]) -> Mapping[int, TransientFailure | PermanentFailure]:
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
        return {"ce_type": event.op.value}


def test_a_message_has_the_events_key_text_and_headers(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    event = make_event(7, key=42)
    sink_to(cluster, Adds()).deliver([event])
    (message,) = messages(cluster)
    assert message.key() == b'{"id":42}'
    assert message.value() == event.to_json().encode()
    assert headers(message) == {
        "cdc-id": event.id,
        "cdc-op": "insert",
        "content-type": "application/cloudevents+json",
        "ce_type": "insert",
    }


@pytest.mark.parametrize("name", ["cloudevents", "cloudevents-binary"])
def test_the_cloudevents_sdk_reads_a_message_in_either_mode(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make, name: Format
) -> None:
    event = make_event(7, key=42)
    sink_to(cluster, encoder(name, KafkaOptions.binding), format=name).deliver([event])
    (message,) = messages(cluster)
    found = from_kafka_event(
        KafkaMessage(dict(message.headers() or []), message.key(), message.value() or b"")  # type: ignore[arg-type]
    )
    assert (found.get_id(), found.get_type(), found.get_subject()) == (event.id, "cdc.insert", '{"id":42}')
    assert found.get_data() == json.loads(event.to_json())


def test_events_of_a_key_share_a_partition_and_those_without_one_the_tables(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    cluster.create("all", partitions=8)
    batch = [make_event(seq, key=seq % 20) for seq in range(100)]
    batch += [make_event(seq).model_copy(update={"key": None}) for seq in range(100, 110)]
    sink_to(cluster, topic="all").deliver(batch)
    found = messages(cluster, "all")
    places: dict[bytes, set[int | None]] = {}
    for message in found:
        places.setdefault(message.key() or b"", set()).add(message.partition())
    assert set(places) == {b'{"id":%d}' % key for key in range(20)} | {b'"public.orders"'}
    assert all(len(partitions) == 1 for partitions in places.values())
    assert len(set.union(*places.values())) > 1
    in_order = [Event.from_json((message.value() or b"").decode()) for message in found]
    for key in (*range(20), None):
        of_key = [event.source.seq for event in in_order if (event.key["id"] if event.key else None) == key]
        assert of_key == sorted(of_key)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("orders", "orders"),
        ("Order_2-x", "Order_2-x"),
        ("a.b", "a-x2e-b"),
        ("größe", "gr-xf6--xdf-e"),
        ("..", "-x2e--x2e-"),
        ("a b/c\0", "a-x20-b-x2f-c-x0-"),
    ],
)
def test_a_name_that_kafka_does_not_allow_is_written_so_that_it_does(name: str, word: str) -> None:
    assert topic_word(name) == word


def test_odd_names_arrive_in_a_topic_of_their_own(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    cluster.create("cdc.größe".replace("größe", "gr-xf6--xdf-e"))
    sink_to(cluster, topic="cdc.{table}").deliver([make_event(1, table="größe")])
    assert seqs(cluster, "cdc.gr-xf6--xdf-e") == [1]


def test_a_topic_name_that_would_be_too_long_is_a_permanent_failure(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    with pytest.raises(PermanentFailure, match="longer than 249 characters"):
        sink_to(cluster).deliver([make_event(1, table="ö" * 60)])


# -- errors of brokers --------------------------------------------------------------------------------------------


def test_of_messages_refused_as_a_set_only_the_one_meant_is_given_up(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    sink = sink_to(cluster, options={"batch.num.messages": 3})
    sink.deliver([make_event(0, key=1)])
    batch = [make_event(seq, key=1) for seq in range(1, 7)]
    cluster.answer(mock.PRODUCE, mock.NO_ERROR, mock.MSG_SIZE_TOO_LARGE)
    first = failures_of(sink, batch)
    assert set(first) >= {3, 4, 5}
    assert {type(failure) for failure in first.values()} == {TransientFailure}
    again = [batch[index] for index in sorted(first)]
    cluster.answer(mock.PRODUCE, mock.NO_ERROR, mock.MSG_SIZE_TOO_LARGE)
    second = failures_of(sink, again)
    assert [index for index, failure in second.items() if isinstance(failure, PermanentFailure)] == [1]
    assert 0 not in second
    assert "raise message.max.bytes" in str(second[1])
    sink.deliver([again[index] for index in sorted(second) if index != 1])
    assert seqs(cluster) == [0, 1, 2, 3, 4, 6]


def test_an_event_larger_than_the_client_sends_is_given_up_and_those_after_it_wait(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    sink = sink_to(cluster, options={"message.max.bytes": 1000})
    failures = failures_of(sink, [make_event(1), make_event(2, text="y" * 2000), make_event(3)])
    assert isinstance(failures[1], PermanentFailure)
    assert isinstance(failures[2], TransientFailure)
    assert "y" * 10 not in str(failures[1])
    sink.deliver([make_event(3)])
    assert seqs(cluster) == [1, 3]


@pytest.mark.parametrize(
    "error", [mock.INVALID_PRODUCER_EPOCH, mock.OUT_OF_ORDER_SEQUENCE_NUMBER], ids=["fenced", "out of sequence"]
)
def test_a_producer_that_can_not_go_on_is_replaced(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make, error: int
) -> None:
    sink = sink_to(cluster)
    sink.deliver([make_event(1)])
    cluster.answer(mock.PRODUCE, error)
    batch = [make_event(2), make_event(3)]
    assert {type(failure) for failure in failures_of(sink, batch).values()} == {TransientFailure}
    sink.deliver(batch)
    assert seqs(cluster) == [1, 2, 3]


def test_errors_that_pass_are_waited_out_in_order(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    sink = sink_to(cluster, options={"batch.num.messages": 5})
    sink.deliver([make_event(0)])
    cluster.answer(mock.PRODUCE, mock.NOT_LEADER, mock.NOT_ENOUGH_REPLICAS, mock.NO_ERROR, mock.NOT_LEADER)
    sink.deliver([make_event(seq) for seq in range(1, 50)])
    assert seqs(cluster) == list(range(50))


def test_a_partition_that_changes_its_leader_keeps_its_order(
    sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    with mock.mock_kafka(brokers=3) as cluster:
        cluster.create(TOPIC)
        sink = sink_to(cluster, options={"batch.num.messages": 5})
        for number in range(12):
            cluster.lead(TOPIC, 0, number % 3 + 1)
            sink.deliver([make_event(number * 20 + seq) for seq in range(20)])
        assert seqs(cluster) == list(range(240))


def test_a_missing_topic_is_told_with_its_cure_and_holds_back_no_other(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    sink = sink_to(cluster, topic="{table}", timeout="2s")
    cluster.create("items")
    cluster.deny("orders", 3)
    failures = failures_of(sink, [make_event(1), make_event(2, table="items"), make_event(3)])
    assert set(failures) == {0, 2}
    assert {type(failure) for failure in failures.values()} == {TransientFailure}
    assert str(failures[0]).startswith("topic orders: ")
    assert "(create the topic, or let the brokers do it: auto.create.topics.enable)" in str(failures[0])
    assert seqs(cluster, "items") == [2]
    cluster.deny("orders", mock.NO_ERROR)
    sink.deliver([make_event(1), make_event(3)])
    assert seqs(cluster, "orders") == [1, 3]


def test_a_topic_that_is_not_ours_to_write_is_told_with_its_cure(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    cluster.deny(TOPIC, mock.TOPIC_AUTHORIZATION_FAILED)
    failures = failures_of(sink_to(cluster), [make_event(1)])
    assert isinstance(failures[0], TransientFailure)
    assert "Topic authorization failed (let the user write it)" in str(failures[0])


# -- waiting ------------------------------------------------------------------------------------------------------


def test_a_wait_that_was_too_short_goes_on_in_the_next_attempt_without_a_duplicate(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    sink = sink_to(cluster, timeout="300ms")
    batch = [make_event(seq, key=1) for seq in range(1, 4)]
    cluster.slow_down(2000)
    assert str(failures_of(sink, batch)[0]) == "no acknowledgement within 0.3 s"

    def arrived() -> bool:
        try:
            sink.deliver(batch)
        except TransientFailure:
            return False
        return True

    until(arrived, "the brokers have answered", 30)
    cluster.slow_down(0)
    sink.deliver([make_event(4, key=1)])
    assert seqs(cluster) == [1, 2, 3, 4]


def test_brokers_that_are_gone_are_named_at_once_and_get_everything_once_when_they_are_back(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    sink = sink_to(cluster)
    sink.deliver([make_event(0)])
    cluster.down()
    batch = [make_event(1), make_event(2)]
    started = time.monotonic()
    failures = failures_of(sink, batch)
    assert time.monotonic() - started < 10  # and not the 20 s of its patience
    assert cluster.brokers[0] in str(failures[0])
    cluster.up()
    sink.deliver(batch)
    assert seqs(cluster) == [0, 1, 2]


def test_what_the_pipeline_does_not_come_back_with_is_not_sent_any_more(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    sink = sink_to(cluster, timeout="2s")
    sink.deliver([make_event(0)])
    cluster.down()
    failures_of(sink, [make_event(1)])
    failures_of(sink, [make_event(2)])
    cluster.up()

    def arrived() -> bool:
        try:
            sink.deliver([make_event(2)])
        except TransientFailure:
            return False
        return True

    until(arrived, "the brokers are back", 30)
    assert seqs(cluster) == [0, 2]


def test_an_event_that_was_edited_while_it_waited_arrives_as_it_is_now(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    sink = sink_to(cluster, timeout="300ms")
    cluster.slow_down(1000)
    failures_of(sink, [make_event(1)])
    cluster.slow_down(0)
    edited = make_event(1).model_copy(update={"after": Image('{"id":1,"text":"edited"}')})

    def arrived() -> bool:
        try:
            sink.deliver([edited])
        except TransientFailure:
            return False
        return True

    until(arrived, "the brokers have answered", 30)
    assert (messages(cluster)[-1].value() or b"").decode() == edited.to_json()


def test_a_full_queue_of_the_client_is_waited_for(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = KafkaOptions.for_client
    small = {"queue.buffering.max.messages": "10", "linger.ms": "0"}
    monkeypatch.setattr(KafkaOptions, "for_client", lambda options, name: {**told(options, name), **small})
    sink = sink_to(cluster)
    sink.deliver([make_event(seq) for seq in range(200)])
    assert seqs(cluster) == list(range(200))


def test_a_full_queue_that_does_not_empty_is_a_transient_failure(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = KafkaOptions.for_client
    small = {"queue.buffering.max.messages": "10"}
    monkeypatch.setattr(KafkaOptions, "for_client", lambda options, name: {**told(options, name), **small})
    sink = sink_to(cluster, timeout="500ms")
    cluster.slow_down(5000)
    failures = failures_of(sink, [make_event(seq) for seq in range(50)])
    assert len(failures) == 50
    assert {type(failure) for failure in failures.values()} == {TransientFailure}
    cluster.slow_down(0)


def test_closing_gives_up_what_is_on_its_way_and_is_quick(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    sink = sink_to(cluster, timeout="300ms")
    cluster.down()
    failures_of(sink, [make_event(1)])
    started = time.monotonic()
    sink.close()
    sink.close()
    assert time.monotonic() - started < 10


def test_what_the_client_says_while_there_is_nothing_to_deliver_is_not_kept(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_INTERVAL", 0.05)
    before = threading.active_count()
    sink = sink_to(cluster)
    sink.deliver([make_event(1)])
    cluster.down()
    until(lambda: sink._trouble is not None, "the client's complaint is heard", 30)
    sink.close()
    assert threading.active_count() == before


# -- TLS and credentials ------------------------------------------------------------------------------------------


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A broker behind TLS: its address, and the file of the authority it is certified by."""
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    port, behind = free_port(), free_port()
    try:
        program = tansu(tmp_path)
    except FileNotFoundError as error:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no {error} on this machine")
    listeners = [f"--listener-url=tcp://127.0.0.1:{behind}", f"--advertised-listener-url=tcp://127.0.0.1:{port}"]
    broker = Service([str(program), "broker", *listeners], behind, tmp_path / "tansu.log")
    between = wire(port, behind, tmp_path, tmp_path / "server.pem")
    yield f"127.0.0.1:{port}", str(tmp_path / "ca.pem")
    between.kill()
    broker.kill()


def sink_with_tls(address: str, **tls: object) -> KafkaSink:
    return KafkaSink(
        "events",
        KafkaOptions.model_validate({"type": "kafka", "brokers": (address,), "timeout": "10s", "tls": tls}),
    )


def test_a_broker_behind_tls_is_believed_by_its_authority(secured: tuple[str, str], make_event: Make) -> None:
    address, authority = secured
    admin = AdminClient({"bootstrap.servers": address, "security.protocol": "SSL", "ssl.ca.location": authority})
    admin.create_topics([NewTopic(TOPIC, 1, 1)])[TOPIC].result(30)
    sink = sink_with_tls(address, ca=authority)
    sink.deliver([make_event(1)])
    sink.close()
    unsure = sink_with_tls(address, verify=False)
    unsure.deliver([make_event(2)])
    unsure.close()


def test_a_broker_that_cannot_prove_who_it_is_gets_nothing(secured: tuple[str, str], make_event: Make) -> None:
    address, _ = secured
    sink = sink_with_tls(address)
    with pytest.raises(TransientFailure, match="check tls"):
        sink.deliver([make_event(1)])
    sink.close()


@pytest.fixture
def doorkeeper(tmp_path: Path) -> Iterator[Callable[..., tuple[str, Callable[[], int]]]]:
    """``doorkeeper(authority, version)``: who speaks TLS and lets nobody in whom the authority does not know.

    Made: the address, and how to learn how many it has let in. It is no broker, and says nothing to them.
    """
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def make(authority: Authority, version: ssl.TLSVersion) -> tuple[str, Callable[[], int]]:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.minimum_version = tls.maximum_version = version
        tls.load_cert_chain(authority.server, authority.server_key)
        tls.load_verify_locations(authority.ca)
        tls.verify_mode = ssl.CERT_REQUIRED
        listener = socket.create_server(("127.0.0.1", 0))
        entered: list[bytes] = []

        def look() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    client.settimeout(5)
                    with contextlib.suppress(OSError), tls.wrap_socket(client, server_side=True) as inside:
                        if said := inside.recv(100):
                            entered.append(said)

        listeners.append(listener)
        threads.append(threading.Thread(target=look))
        threads[-1].start()
        return f"127.0.0.1:{listener.getsockname()[1]}", lambda: len(entered)

    yield make
    for listener, thread in zip(listeners, threads, strict=True):
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("wrong", ["ca", "certificate"])
def test_files_that_were_put_right_are_read_by_a_new_producer(
    doorkeeper: Callable[..., tuple[str, Callable[[], int]]],
    tmp_path: Path,
    make_event: Make,
    version: ssl.TLSVersion,
    wrong: str,
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    stranger, authority = Authority(ours), Authority(theirs)
    address, entered = doorkeeper(authority, version)
    files = {"ca": "ca", "certificate": "client", "key": "client_key"}
    for name, source in files.items():
        believed = stranger if (wrong == "ca") == (name == "ca") else authority
        shutil.copyfile(getattr(believed, source), tmp_path / name)
    tls = {name: str(tmp_path / name) for name in files}
    options = {"type": "kafka", "brokers": (address,), "timeout": "2s", "tls": tls}
    sink = KafkaSink("events", KafkaOptions.model_validate(options))
    for _ in range(2):
        with pytest.raises(TransientFailure, match="SSL"):
            sink.deliver([make_event(1)])
    producer = sink._producer
    with pytest.raises(TransientFailure, match="SSL"):
        sink.deliver([make_event(1)])
    assert sink._producer is producer
    assert entered() == 0
    for name, source in files.items():
        shutil.copyfile(getattr(authority, source), tmp_path / name)

    def is_let_in() -> bool:
        with pytest.raises(TransientFailure):
            sink.deliver([make_event(1)])
        return entered() > 0

    until(is_let_in, "it is let in")
    sink.close()


def test_a_producer_that_waits_for_its_brokers_is_kept_whatever_becomes_of_the_files(
    tmp_path: Path, make_event: Make
) -> None:
    authority = Authority(tmp_path)
    sink = sink_with_tls(f"127.0.0.1:{free_port()}", ca=str(authority.ca))
    sink.open()
    producer = sink._producer
    authority.ca.touch()
    for _ in range(2):
        with pytest.raises(TransientFailure, match=r"refused|down"):
            sink.deliver([make_event(1)])
    assert sink._producer is producer
    sink.close()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    sink = sink_with_tls("127.0.0.1:1", ca=str(tmp_path / "absent.pem"))
    with pytest.raises(TransientFailure, match="ca"):
        sink.open()


def test_librdkafkas_lines_are_debug_and_hold_no_secret(make_event: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    options = {
        "type": "kafka",
        "brokers": (f"127.0.0.1:{free_port()}",),
        "username": "somebody",
        "password": "a-word-nobody-may-see",
        "timeout": "1s",
    }
    sink = KafkaSink("events", KafkaOptions.model_validate(options))

    def says_something() -> bool:
        with pytest.raises(TransientFailure):
            sink.deliver([make_event(1)])
        return bool(caplog.records)

    until(says_something, "librdkafka has a word to say", 30)
    sink.close()
    lines = [str(record.__dict__) for record in caplog.records]
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    assert not any("a-word-nobody-may-see" in line for line in lines)
    assert "a-word-nobody-may-see" not in repr(sink.options)


# -- configuration ------------------------------------------------------------------------------------------------


def findings(directory: Path, sink: dict[str, object]) -> list[str]:
    """What is wrong with a sink, without the file's name."""
    path = directory / "config.yaml"
    content = {
        "databases": {"shop": {"dsn": "dbname=shop", "tables": {"public.item": {}}}},
        "sinks": {"events": {"type": "kafka", "brokers": ["kafka1:9092"], **sink}},
    }
    path.write_text(json.dumps(content))
    try:
        configuration.load(path, option_models(), {})
    except ConfigError as error:
        return [finding.removeprefix(f"{path}: sinks.events") for finding in error.findings]
    return []


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("plugin.library.paths", "it loads code"),
        ("ssl.engine.location", "it loads code"),
        ("sasl.kerberos.kinit.cmd", "it runs a command"),
        ("sasl.oauthbearer.token.endpoint.url", "it reads files and calls URLs"),
        ("enable.sasl.oauthbearer.unsecure.jwt", "it reads files and calls URLs"),
        ("https.ca.location", "it reads files and calls URLs"),
        ("ssl.keystore.location", "files and secrets have keys of their own, in tls"),
        ("ssl.ca.location", "write tls.ca"),
        ("bootstrap.servers", "write brokers"),
        ("sasl.password", "write password, which is kept out of logs"),
        ("sasl.mechanisms", "write mechanism"),
        ("security.protocol", "it follows from tls and username"),
        ("acks", "what the sink promises rests on it"),
        ("enable.idempotence", "what the sink promises rests on it"),
        ("message.timeout.ms", "what the sink promises rests on it; write timeout"),
        ("debug", "its lines may hold rows and secrets"),
        ("test.mock.num.brokers", "it is for librdkafka's own tests"),
    ],
)
def test_an_option_that_is_not_ours_to_pass_on_is_refused_with_the_reason(
    tmp_path: Path, option: str, reason: str
) -> None:
    (finding,) = findings(tmp_path, {"options": {option: "a-word-nobody-may-see"}})
    assert finding == f".options.{option}: an option that may not be set: {reason} (leave it out)"


def test_an_option_nobody_knows_is_answered_with_those_there_are(tmp_path: Path) -> None:
    (finding,) = findings(tmp_path, {"options": {"compresion.type": "lz4"}})
    assert finding.startswith(".options.compresion.type: not an option that may be set (known: batch.num.messages, ")


@pytest.mark.parametrize(
    ("option", "value", "finding"),
    [
        ("compression.type", "lzma", "not a known word (write none, gzip, snappy, lz4 or zstd)"),
        ("partitioner", "random", "not a known word (write consistent, consistent_random, murmur2, murmur2_random, "),
        ("max.in.flight.requests.per.connection", 6, "too large (at most 5)"),
        ("linger.ms", "5", "found text (expected a number)"),
        ("socket.keepalive.enable", "yes", "found text (expected true or false)"),
    ],
)
def test_the_value_of_an_option_is_checked(tmp_path: Path, option: str, value: object, finding: str) -> None:
    (found,) = findings(tmp_path, {"options": {option: value}})
    assert found.startswith(f".options.{option}: {finding}")


@pytest.mark.parametrize(
    "sink",
    [
        {"brokers": []},
        {"brokers": ["kafka1"]},
        {"brokers": ["kafka1:9092,kafka2:9092"]},
        {"topic": ""},
        {"topic": "my topic"},
        {"topic": "größe"},
        {"topic": ".."},
        {"topic": "x" * 250},
        {"topic": "{tabel}"},
        {"topic": "{key.id}"},
        {"username": "somebody"},
        {"password": "secret"},
        {"mechanism": "GSSAPI"},
        {"mechanism": "OAUTHBEARER"},
        {"timeout": "1ms"},
        {"tls": {"key": "key.pem"}},
    ],
    ids=json.dumps,
)
def test_what_cannot_work_is_refused_at_start(tmp_path: Path, sink: dict[str, object]) -> None:
    assert len(findings(tmp_path, sink)) == 1
    assert "somebody" not in str(findings(tmp_path, sink))


def test_what_the_sink_promises_cannot_be_configured_away() -> None:
    every = {
        "batch.num.messages": 100,
        "batch.size": 100_000,
        "broker.address.family": "v4",
        "client.id": "ours",
        "compression.level": 3,
        "compression.type": "zstd",
        "connections.max.idle.ms": 60_000,
        "linger.ms": 1.5,
        "max.in.flight.requests.per.connection": 1,
        "message.max.bytes": 5_000_000,
        "metadata.max.age.ms": 900_000,
        "partitioner": "fnv1a",
        "reconnect.backoff.max.ms": 1000,
        "reconnect.backoff.ms": 10,
        "request.timeout.ms": 1000,
        "retry.backoff.max.ms": 1000,
        "retry.backoff.ms": 10,
        "socket.connection.setup.timeout.ms": 1000,
        "socket.keepalive.enable": True,
        "socket.nagle.disable": False,
        "socket.timeout.ms": 1000,
        "topic.metadata.refresh.interval.ms": 1000,
    }
    assert set(every) == set(module._OPTIONS)
    options = KafkaOptions(
        type="kafka", brokers=("a:1", "b:2"), username="u", password="p", mechanism="PLAIN", options=every
    )
    told = options.for_client("events")
    confluent_kafka.Producer(told)  # librdkafka knows each of them
    assert told["bootstrap.servers"] == "a:1,b:2"
    assert told["acks"] == "all"
    assert told["enable.idempotence"] == told["enable.gapless.guarantee"] == "true"
    assert told["security.protocol"] == "SASL_PLAINTEXT"
    assert told["message.timeout.ms"] == "0"
    assert told["socket.nagle.disable"] == "false"
    assert told["client.id"] == "ours"


@pytest.mark.parametrize(
    ("keys", "protocol"),
    [
        ({}, "PLAINTEXT"),
        ({"tls": {}}, "SSL"),
        ({"username": "u", "password": "p"}, "SASL_PLAINTEXT"),
        ({"username": "u", "password": "p", "tls": {}}, "SASL_SSL"),
    ],
)
def test_the_protocol_follows_from_tls_and_user(keys: dict[str, object], protocol: str) -> None:
    options = KafkaOptions.model_validate({"type": "kafka", "brokers": ("a:1",), **keys})
    assert options.for_client("events")["security.protocol"] == protocol


def test_a_truncate_has_the_tables_name_as_key(
    cluster: MockKafka, sink_to: Callable[..., KafkaSink], make_event: Make
) -> None:
    event = make_event(1).model_copy(update={"op": Op.TRUNCATE, "key": None, "after": None})
    sink_to(cluster).deliver([event])
    (message,) = messages(cluster)
    assert message.key() == b'"public.orders"'


@pytest.mark.parametrize("timeout", ["100ms", "3h", "1000d"])
def test_librdkafka_is_content_with_any_timeout(timeout: str) -> None:
    options = KafkaOptions.model_validate({"type": "kafka", "brokers": ("a:1",), "timeout": timeout})
    confluent_kafka.Producer(options.for_client("events"))


def test_options_cannot_be_made_with_a_wrong_broker() -> None:
    with pytest.raises(ValidationError):
        KafkaOptions(type="kafka", brokers=("kafka1",))
