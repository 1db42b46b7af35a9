"""Redis, as a destination under test: one stream; one for each key while a key is refused."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import redis
from rig import Received, Rig
from service import Service, free_port, program

PASSWORD = "right+horse/battery"
_LIMIT = 2**20


class RedisRig(Rig):
    """A server with append-only file and a password."""

    kind: ClassVar[str] = "redis"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._port = free_port()
        config = directory / "redis.conf"
        config.write_text(
            f"port {self._port}\nbind 127.0.0.1\nrequirepass {PASSWORD}\ndir {directory}\n"
            f'appendonly yes\nsave ""\nproto-max-bulk-len {_LIMIT}\n'
        )
        self._server = Service([program("redis-server"), config], self._port, directory / "log")
        self._client = redis.Redis(port=self._port, password=PASSWORD, decode_responses=True)
        self._refused: str | None = None
        self._stream = "cdc:{table}"

    def configuration(self) -> dict[str, object]:
        return {
            "type": "redis",
            "host": "127.0.0.1",
            "port": self._port,
            "password": PASSWORD,
            "stream": self._stream,
            "timeout": "1s",
        }

    def received(self) -> list[Received]:
        found = []
        for name in self._client.scan_iter("cdc:*", _type="stream"):
            found += [(entry, Received(fields["id"], fields["event"])) for entry, fields in self._client.xrange(name)]
        found.sort(key=lambda pair: [int(part) for part in pair[0].split("-")])
        return [received for _, received in found]

    def close(self) -> None:
        self._client.close()
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
        if self._refused is not None:
            self._client.delete(self._refused)
        self._refused = None if key is None else f"cdc:item:{key}"
        self._stream = "cdc:{table}" if key is None else "cdc:{table}:{key.id}"
        if self._refused is not None:
            self._client.set(self._refused, "no stream")
