"""NATS JetStream, as a destination under test: one subject; one for each key while a key is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar, TypeVar

import nats
from nats.aio.client import Client
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from rig import Received, Rig
from service import Service, free_port, program

PASSWORD = "right+horse/battery"
_LIMIT = 2**18
_KEYS = range(1, 200)
ResultT = TypeVar("ResultT")


class NatsRig(Rig):
    """A server with a stream on disk and one user."""

    kind: ClassVar[str] = "nats"
    deduplicates: ClassVar[bool] = True

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._port = free_port()
        config = directory / "nats.conf"
        config.write_text(
            json.dumps(
                {
                    "host": "127.0.0.1",
                    "port": self._port,
                    "max_payload": _LIMIT,
                    "jetstream": {"store_dir": str(directory / "store")},
                    "authorization": {"user": "cdc", "password": PASSWORD},
                }
            )
        )
        self._server = Service([program("nats-server"), "-c", config], self._port, directory / "log")
        self._received: list[Received] = []
        self._last = 0
        self._subject = "cdc.{table}"
        self._call(lambda client: client.jetstream().add_stream(name="cdc", subjects=["cdc.>"]))

    def configuration(self) -> dict[str, object]:
        return {
            "type": "nats",
            "servers": [f"nats://127.0.0.1:{self._port}"],
            "username": "cdc",
            "password": PASSWORD,
            "subject": self._subject,
            "timeout": "1s",
        }

    def received(self) -> list[Received]:
        self._call(self._read)
        return list(self._received)

    def close(self) -> None:
        self._server.kill()

    def stop(self) -> None:
        self._server.kill()

    def start(self) -> None:
        self._server.start()

    def stall(self) -> None:
        self._server.freeze()

    def resume(self) -> None:
        self._server.thaw()

    def forbidden(self) -> dict[str, object]:
        return {**self.configuration(), "password": "wrong+horse/battery"}

    def limit(self) -> int:
        return _LIMIT

    def refuse(self, key: int | None) -> None:
        subjects = ["cdc.>"] if key is None else [f"cdc.item.{other}" for other in _KEYS if other != key]
        self._subject = "cdc.{table}" if key is None else "cdc.{table}.{key.id}"
        self._call(lambda client: client.jetstream().update_stream(name="cdc", subjects=subjects))

    def _call(self, what: Callable[[Client], Awaitable[ResultT]]) -> ResultT:
        """Do something over a connection of its own."""

        async def call() -> ResultT:
            client = await nats.connect(f"nats://127.0.0.1:{self._port}", user="cdc", password=PASSWORD)
            try:
                return await what(client)
            finally:
                await client.close()

        return asyncio.run(call())

    async def _read(self, client: Client) -> None:
        """What has come since the last time."""
        stream = client.jetstream()
        newest = (await stream.stream_info("cdc")).state.last_seq
        if newest <= self._last:
            return
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=self._last + 1, ack_policy=AckPolicy.NONE
        )
        consumer = await stream.pull_subscribe("cdc.>", stream="cdc", config=config)
        while self._last < newest:
            for message in await consumer.fetch(500, timeout=5):
                assert message.headers is not None
                self._received.append(Received(message.headers["Nats-Msg-Id"], message.data.decode()))
                self._last = message.metadata.sequence.stream
