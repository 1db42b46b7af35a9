"""How fast the webhook sink delivers to a server on the same machine: the sink alone, without a database.

    .venv/bin/python benchmarks/webhook.py [--events N] [--concurrency C] [--format F]

The receiver is a process of its own that reads requests and answers 200, as fast as asyncio can; it shares the
machine's cores with the sink. A figure is the median of three runs.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing.connection import Connection
from typing import Any, get_args

from cdc.errors import PartialFailure
from cdc.event import Event, Image, Op
from cdc.formats import encoder
from cdc.options import Format
from cdc.sinks.webhook import WebhookOptions, WebhookSink

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # noqa: S105  # anybody's: the specification's example
BATCH = 500
KEYS = 1000


class Receiver(asyncio.Protocol):
    """Reads requests with a Content-Length and answers 200."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._came = bytearray()

    def data_received(self, data: bytes) -> None:
        self._came += data
        while (end := self._came.find(b"\r\n\r\n")) >= 0:
            length = int(self._came[:end].lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
            if len(self._came) < end + 4 + length:
                return
            del self._came[: end + 4 + length]
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def receive(port: Connection) -> None:
    """Serve for ever; tells the port it has."""

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Receiver, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


def events(number: int) -> list[Event]:
    """Updates of KEYS rows, about 340 bytes each in the native format."""
    return [
        Event.model_validate(
            {
                "id": f"shop-{seq}-20261122080102123456",
                "op": Op.UPDATE,
                "source": {
                    "database": "shop",
                    "schema": "public",
                    "table": "orders",
                    "seq": seq,
                    "txid": seq,
                    "ts": datetime(2026, 11, 22, 8, 1, 2, 123456, tzinfo=UTC),
                },
                "key": Image(f'{{"id":{seq % KEYS}}}'),
                "before": Image('{"status":"new","total":12.50}'),
                "after": Image(f'{{"status":"paid","total":{seq}.25}}'),
                "changed": ("status", "total"),
                "context": None,
            }
        )
        for seq in range(1, number + 1)
    ]


def measure(sink: WebhookSink, load: Sequence[Event]) -> tuple[float, float]:
    """Events per second, and microseconds of this process's CPU time for each."""
    began, used = time.perf_counter(), time.process_time()
    for start in range(0, len(load), BATCH):
        try:
            sink.deliver(load[start : start + BATCH])
        except PartialFailure as error:
            sys.exit(f"not all was delivered: {next(iter(error.failures.values()))}")
    return len(load) / (time.perf_counter() - began), (time.process_time() - used) / len(load) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--events", type=int, default=10_000, help="in a run of single requests; batched ten times it")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--format", choices=get_args(Format), default="native")
    options = parser.parse_args()
    cpu = platform.processor() or platform.machine()
    print(f"machine: {os.cpu_count()} cores, {cpu}; load {os.getloadavg()[0]:.1f} at the start")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("httpcore", "h11", "standardwebhooks"))
    print(f"versions: Python {platform.python_version()}, {versions}")
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=receive, args=(theirs,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}/events/{{table}}"
    load = events(options.events * 10)
    size = len(encoder(options.format, "http").encode(load[0]))
    print(f"events: updates of {KEYS} keys, {size} bytes as {options.format}, signed, batches of {BATCH}")
    modes = ["single"] if options.format == "cloudevents-binary" else ["single", "batch"]
    for mode in modes:
        settings = WebhookOptions(
            type="webhook", url=url, allow_private=True, secret=SECRET, mode=mode, concurrency=options.concurrency,
            format=options.format,
        )  # fmt: skip
        sink = WebhookSink("benchmark", settings, encoder(options.format, "http"))
        sink.open()
        measure(sink, load[:1000])
        some = load if mode == "batch" else load[: options.events]
        runs = [measure(sink, some) for _ in range(3)]
        sink.close()
        rate, cost = (statistics.median(values) for values in zip(*runs, strict=True))
        what = f"single, {options.concurrency} at a time" if mode == "single" else f"{BATCH} in a request"
        print(f"{what}: {rate:,.0f} events/s, {cost:.0f} µs of CPU each")
    server.terminate()
    server.join()


if __name__ == "__main__":
    sys.exit(main())
