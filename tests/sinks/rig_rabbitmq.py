"""RabbitMQ, as a destination under test: a broker of its own, an exchange of kind topic and a quorum queue."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import ClassVar

import pika
from rabbit import Rabbit
from rig import Received, Rig

EXCHANGE = "changes"
QUEUE = "item"
LIMIT = 300_000
KEYS = range(1, 4)
"""Of the events that are sent while one of them is refused."""


class RabbitmqRig(Rig):
    """Routes by the row's key, so that one key can be refused: nothing is bound to it."""

    kind: ClassVar[str] = "rabbitmq"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._rabbit = Rabbit(directory, {"max_message_size": LIMIT})
        self._received: list[Received] = []
        self._connection: pika.BlockingConnection | None = None
        with contextlib.closing(self._rabbit.connection()) as connection:
            channel = connection.channel()
            channel.exchange_declare(EXCHANGE, "topic", durable=True)
            channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
            channel.queue_bind(QUEUE, EXCHANGE, "#")

    def configuration(self) -> dict[str, object]:
        return {
            "type": "rabbitmq",
            "url": self._rabbit.url(),
            "exchange": EXCHANGE,
            "routing_key": "{table}.{key.id}",
            "timeout": "3s",
        }

    def received(self) -> list[Received]:
        if self._connection is None:
            self._connection = self._rabbit.connection()
        channel = self._connection.channel()
        while (answer := channel.basic_get(QUEUE))[0] is not None:
            method, properties, body = answer
            self._received.append(Received(properties.message_id, body.decode()))
            channel.basic_ack(method.delivery_tag)
        channel.close()
        return list(self._received)

    def close(self) -> None:
        self._disconnect()
        self._rabbit.close()

    def stop(self) -> None:
        self._disconnect()
        self._rabbit.service.kill()

    def start(self) -> None:
        self._rabbit.service.start()

    def stall(self) -> None:
        self._disconnect()
        self._rabbit.service.freeze()

    def resume(self) -> None:
        self._rabbit.service.thaw()

    def forbidden(self) -> dict[str, object]:
        return {**self.configuration(), "url": self._rabbit.url(password="not-the-password")}

    def limit(self) -> int:
        return LIMIT

    def refuse(self, key: int | None) -> None:
        with contextlib.closing(self._rabbit.connection()) as connection:
            channel = connection.channel()
            if key is None:
                channel.queue_bind(QUEUE, EXCHANGE, "#")
            else:
                for other in KEYS:
                    if other != key:
                        channel.queue_bind(QUEUE, EXCHANGE, f"item.{other}")
                channel.queue_unbind(QUEUE, EXCHANGE, "#")

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and connection.is_open:
            connection.close()
