"""The MQTT sink: what a subscriber sees, what a broker may refuse, and how the others get past it."""

from __future__ import annotations

import contextlib
import gc
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from authority import Authority
from harness import until
from paho.mqtt.enums import CallbackAPIVersion
from pydantic import ValidationError
from service import Service, free_port, needed

from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event
from cdc.sinks.mqtt import MqttOptions, MqttSink

Make = Callable[..., Event]
SECRET = "4929-1234-5678"


class Broker:
    """A Mosquitto of the test's own.

    Attributes:
        heard: what its subscriber has heard, in order.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        self.port = free_port()
        self.log = directory / "log"
        config = directory / "mosquitto.conf"
        config.write_text("\n".join([f"listener {self.port} 127.0.0.1", "user root", "allow_anonymous true", *options]))
        self.service = Service([needed("mosquitto"), "-c", config], self.port, self.log)
        self.heard: list[Any] = []
        self._subscriber: mqtt.Client | None = None

    def subscribe(self) -> None:
        """Hear everything from now on."""
        subscribed = threading.Event()
        client = self._subscriber = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        client.on_subscribe = lambda *_: subscribed.set()
        client.on_message = lambda _, __, message: self.heard.append(message)
        client.connect("127.0.0.1", self.port)
        client.loop_start()
        client.subscribe("#", qos=1)
        assert subscribed.wait(10)

    def hears(self, number: int) -> list[str]:
        """Wait until so many messages have come; returns the events' ids, in order."""
        until(lambda: len(self.heard) >= number, f"{number} messages are heard")
        return [dict(message.properties.UserProperty)["id"] for message in self.heard]

    def close(self) -> None:
        if self._subscriber is not None:
            self._subscriber.disconnect()
        self.service.kill()
        if self._subscriber is not None:
            self._subscriber.loop_stop()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    """``start(*options)``: a broker with these lines in its configuration."""
    made: list[Broker] = []

    def make(*options: str) -> Broker:
        made.append(Broker(tmp_path, *options))
        return made[-1]

    yield make
    for broker in made:
        broker.close()


@pytest.fixture
def broker(start: Callable[..., Broker]) -> Broker:
    """One with a subscriber."""
    made = start()
    made.subscribe()
    return made


@pytest.fixture
def connect() -> Iterator[Callable[..., MqttSink]]:
    """``connect(broker, **options)``: a sink, closed after the test."""
    made: list[MqttSink] = []

    def make(broker: Broker, **options: object) -> MqttSink:
        given = {"type": "mqtt", "host": "127.0.0.1", "port": broker.port, "timeout": "5s", **options}
        made.append(MqttSink("things", MqttOptions.model_validate(given)))
        return made[-1]

    yield make
    for sink in made:
        sink.close()


def transient(sink: MqttSink, batch: Sequence[Event]) -> str:
    """What the sink says of a batch it cannot deliver for now."""
    with pytest.raises(TransientFailure) as raised:
        sink.deliver(batch)
    assert SECRET not in str(raised.value)
    return str(raised.value)


def users(directory: Path, rights: str) -> list[str]:
    """Lines for a broker that knows user ``cdc``, and has a file of rights."""
    command = [needed("mosquitto_passwd"), "-c", "-b", str(directory / "users"), "cdc", SECRET]
    subprocess.run(command, check=True, capture_output=True)
    (directory / "rights").write_text(rights)
    return [f"password_file {directory}/users", f"acl_file {directory}/rights"]


# -- messages -----------------------------------------------------------------------------------------------------


def test_a_message_has_the_events_id_and_its_text(
    broker: Broker, connect: Callable[..., MqttSink], make_event: Make
) -> None:
    event = make_event(1)
    connect(broker).deliver([event])
    assert broker.hears(1) == [event.id]
    (message,) = broker.heard
    assert message.topic == "cdc/shop/public/orders"
    assert message.payload.decode() == event.to_json()
    assert message.properties.ContentType == "application/json"
    assert (message.qos, message.retain) == (1, False)


@pytest.mark.parametrize(
    ("table", "level"),
    [("a/b", "a%2Fb"), ("+", "%2B"), ("#", "%23"), ("50%", "50%25"), ("a\tb", "a%09b"), ("ü 🐘", "ü 🐘"), ("a$", "a$")],
)
def test_no_name_adds_a_level_to_a_topic(
    broker: Broker, connect: Callable[..., MqttSink], make_event: Make, table: str, level: str
) -> None:
    connect(broker).deliver([make_event(1, table=table)])
    broker.hears(1)
    assert broker.heard[0].topic == f"cdc/shop/public/{level}"


def test_no_table_gets_at_the_brokers_own_topics(
    broker: Broker, connect: Callable[..., MqttSink], make_event: Make
) -> None:
    connect(broker, topic="{table}/x").deliver([make_event(1, table="$SYS")])
    broker.hears(1)
    assert broker.heard[0].topic == "%24SYS/x"


def test_the_last_message_of_a_topic_is_kept_if_one_wants_it(
    start: Callable[..., Broker], connect: Callable[..., MqttSink], make_event: Make
) -> None:
    broker = start()
    connect(broker, retain=True, topic="cdc/{key.id}").deliver([make_event(seq, key=seq % 2) for seq in range(1, 6)])
    broker.subscribe()
    assert sorted(broker.hears(2)) == ["shop-4-1", "shop-5-1"]


def test_each_key_is_in_order_with_as_many_in_flight_as_the_broker_allows(
    start: Callable[..., Broker], connect: Callable[..., MqttSink], make_event: Make
) -> None:
    broker = start("max_inflight_messages 5")
    broker.subscribe()
    sink = connect(broker)
    batch = [make_event(seq, key=seq % 17) for seq in range(1, 301)]
    sink.deliver(batch)
    assert sink._connection is not None
    assert sink._connection.at_once == 5
    seqs = [int(id_.split("-")[1]) for id_ in broker.hears(300)]
    assert sorted(seqs) == list(range(1, 301))
    for key in range(17):
        own = [seq for seq in seqs if seq % 17 == key]
        assert own == sorted(own)


# -- what a broker may refuse -------------------------------------------------------------------------------------


def test_a_message_nobody_is_subscribed_to_waits_if_it_is_to(
    start: Callable[..., Broker], connect: Callable[..., MqttSink], make_event: Make
) -> None:
    broker = start()
    connect(broker).deliver([make_event(1)])  # gone
    sink = connect(broker, require_subscriber=True)
    assert transient(sink, [make_event(2)]) == f"nobody at mqtt at 127.0.0.1:{broker.port} is subscribed to the topic"
    broker.subscribe()
    sink.deliver([make_event(2)])
    assert broker.hears(1) == ["shop-2-1"]


@pytest.mark.parametrize("closes", [False, True], ids=["answers", "closes the connection"])
def test_a_topic_that_is_refused_does_not_keep_the_others(
    start: Callable[..., Broker], connect: Callable[..., MqttSink], make_event: Make, tmp_path: Path, closes: bool
) -> None:
    known = users(tmp_path, "topic read #\nuser cdc\ntopic write cdc/#\ntopic deny cdc/2\n")
    # Without a limit on its queues Mosquitto 2.0.11 refuses a message and closes the connection over it.
    broker = start(*known, "max_queued_messages 0" if closes else "")
    broker.subscribe()
    sink = connect(broker, username="cdc", password=SECRET, topic="cdc/{key.id}")
    batch = [make_event(seq, key=seq % 5) for seq in range(1, 31)]
    refused = [event for event in batch if event.key == {"id": 2}]
    waiting = batch

    def only_they_wait() -> bool:
        nonlocal waiting
        with contextlib.suppress(TransientFailure):  # an answer may get lost in a connection that is closed
            with pytest.raises(PartialFailure) as raised:
                sink.deliver(waiting)
            waiting = [waiting[index] for index in sorted(raised.value.failures)]
        return waiting == refused

    until(only_they_wait, "only they wait")
    said = transient(sink, waiting)
    assert said.endswith("Not authorized (check username, password, and the rights to the topics)")
    assert len(set(broker.hears(24))) == 24
    (tmp_path / "rights").write_text("topic readwrite #\nuser cdc\ntopic write cdc/#\n")
    broker.service.signal(signal.SIGHUP)
    until(lambda: "Reloading config" in broker.log.read_text(), "the broker reads the rights again")
    sink.deliver(waiting)
    until(lambda: len(set(broker.hears(24))) == 30, "the rest is heard")
    assert [id_ for id_ in broker.hears(30) if id_ in {event.id for event in refused}] == [e.id for e in refused]


def test_a_packet_above_the_brokers_limit_is_refused_before_anything_is_sent(
    start: Callable[..., Broker], connect: Callable[..., MqttSink], make_event: Make
) -> None:
    broker = start("max_packet_size 2000")
    broker.subscribe()
    sink = connect(broker)
    with pytest.raises(PermanentFailure, match="the broker takes 2000 at most"):
        sink.deliver([make_event(1), make_event(2, text=SECRET * 200)])
    assert broker.heard == []
    size = 2000 - len(make_event(3, text="").to_json()) - 150
    sink.deliver([make_event(3, text="x" * size)])
    assert broker.hears(1) == ["shop-3-1"]


def test_a_payload_above_the_brokers_limit_is_a_permanent_failure(
    start: Callable[..., Broker], connect: Callable[..., MqttSink], make_event: Make
) -> None:
    broker = start("message_size_limit 2000")
    broker.subscribe()
    sink = connect(broker)
    large = make_event(2, text=SECRET * 200)
    for batch in ([make_event(1), large, make_event(3)], [large]):  # this one does not say which; the pipeline halves
        with pytest.raises(PermanentFailure) as raised:
            sink.deliver(batch)
        assert SECRET not in str(raised.value)
    sink.deliver([make_event(4)])
    until(lambda: broker.hears(1)[-1] == "shop-4-1", "the next one is heard")
    assert large.id not in broker.hears(1)


# -- the connection -----------------------------------------------------------------------------------------------


def test_wrong_credentials_are_told_from_an_absent_broker(
    start: Callable[..., Broker], connect: Callable[..., MqttSink], make_event: Make, tmp_path: Path
) -> None:
    broker = start(*users(tmp_path, "topic readwrite #\nuser cdc\ntopic readwrite #\n"))
    wrong = connect(broker, username="cdc", password=f"{SECRET}9")
    assert "Not authorized (check username, password" in transient(wrong, [make_event(1)])
    connect(broker, username="cdc", password=SECRET).deliver([make_event(1)])
    broker.service.kill()
    said = transient(wrong, [make_event(1)])
    assert said == f"mqtt at 127.0.0.1:{broker.port} cannot be reached: Connection refused"


def test_a_broker_that_was_restarted_meanwhile_is_no_failure(
    start: Callable[..., Broker], connect: Callable[..., MqttSink], make_event: Make
) -> None:
    broker = start()
    sink = connect(broker)
    sink.deliver([make_event(1)])
    broker.service.kill()
    broker.service.start()
    connection = sink._connection
    assert connection is not None
    until(connection.is_lost, "it is noticed")
    broker.subscribe()
    sink.deliver([make_event(2)])
    assert broker.hears(1) == ["shop-2-1"]


def test_closing_leaves_no_thread_behind_even_when_the_broker_stalls(
    broker: Broker, connect: Callable[..., MqttSink], make_event: Make
) -> None:
    before = set(threading.enumerate())
    sink = connect(broker, timeout="1s")
    sink.deliver([make_event(1)])
    broker.service.freeze()
    said = transient(sink, [make_event(seq, text="x" * 10_000) for seq in range(2, 500)])
    assert said.endswith("did not answer within 1 s")
    sink.close()
    assert set(threading.enumerate()) <= before
    broker.service.thaw()


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_tls_with_certificates_on_both_sides(
    start: Callable[..., Broker], connect: Callable[..., MqttSink], make_event: Make, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    broker = start(
        f"cafile {authority.ca}",
        f"certfile {authority.server}",
        f"keyfile {authority.server_key}",
        "require_certificate true",
    )
    ours = {"certificate": str(authority.client), "key": str(authority.client_key)}
    connect(broker, tls={"ca": str(authority.ca), **ours}).deliver([make_event(1)])
    connect(broker, tls={"verify": False, **ours}).deliver([make_event(2)])
    assert "certificate verify failed" in transient(connect(broker, tls=ours), [make_event(3)]).lower()
    missing = transient(connect(broker, tls={"ca": "/nowhere/ca.pem"}), [make_event(3)])
    assert missing == "tls.ca cannot be used: No such file or directory"
    assert "mqtt at" in transient(connect(broker, timeout="1s"), [make_event(3)])
    gc.collect()  # the client leaves a socket whose handshake has failed to it: hence the filter


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"topic": "cdc/+"}, "not a topic"),
        ({"topic": "$SYS/x"}, "not a topic"),
        ({"topic": ""}, "not a topic"),
        ({"topic": "{nothing}"}, "a placeholder that does not exist"),
        ({"password": SECRET}, "password without username"),
        ({"client_id": "a b"}, "should match"),
    ],
)
def test_what_does_not_fit_together_is_refused_without_its_value(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as raised:
        MqttOptions.model_validate({"type": "mqtt", **options})
    assert said in str(raised.value)
    assert SECRET not in str(raised.value)
