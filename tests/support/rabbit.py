"""A RabbitMQ of a test's own: its node, its ports and its data are nobody else's."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pika
from service import Service, free_port

HOME = Path("/usr/lib/rabbitmq/bin")
"""Where the package keeps its programs; those in PATH want to be run by another user."""
PASSWORD = "a-word-nobody-may-see"


class Rabbit:
    """A running broker; user ``cdc`` may do everything.

    Attributes:
        port: for AMQP, on 127.0.0.1.
    """

    def __init__(self, directory: Path, settings: Mapping[str, object] | None = None) -> None:
        """Start it; everything it writes goes below `directory`.

        Args:
            directory: an empty one.
            settings: more lines of its configuration file.

        Raises:
            FileNotFoundError: the program is not on this machine.
        """
        if not (HOME / "rabbitmq-server").exists():
            raise FileNotFoundError("rabbitmq-server")
        self.port = free_port()
        self._node = f"cdc{uuid.uuid4().hex[:12]}@localhost"
        lines = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "default_user": "cdc",
            "default_pass": PASSWORD,
            "disk_free_limit.absolute": "1MB",
            "log.file": "false",
            "log.console": "true",
            **(settings or {}),
        }
        (directory / "rabbitmq.conf").write_text("".join(f"{name} = {value}\n" for name, value in lines.items()))
        (directory / "plugins").write_text("[].\n")
        self._environment = {
            "HOME": str(directory),
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(directory / "data"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none",  # schedulers that do not spin
            "RUNNING_UNDER_SYSTEMD": "1",  # so that the process started is the broker, and no script around it
        }
        variables = [f"{name}={value}" for name, value in self._environment.items()]
        self.service = Service(
            ["/usr/bin/env", *variables, HOME / "rabbitmq-server"], self.port, directory / "rabbitmq.log", patience=180
        )

    def url(self, password: str = PASSWORD, vhost: str = "%2F") -> str:
        return f"amqp://cdc:{password}@127.0.0.1:{self.port}/{vhost}"

    def connection(self) -> pika.BlockingConnection:
        """Another client."""
        return pika.BlockingConnection(pika.URLParameters(self.url()))

    def control(self, *arguments: str) -> str:
        """rabbitmqctl; it takes a second or two. Returns what it prints."""
        command = [HOME / "rabbitmqctl", "--quiet", "-n", self._node, *arguments]
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": self._environment["HOME"]}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=120, stdin=subprocess.DEVNULL
        ).stdout

    def close(self) -> None:
        """Kill it."""
        self.service.kill()

    def make_queue(self, name: str, **arguments: object) -> None:
        """A durable queue, by another client."""
        with closing(self.connection()) as connection:
            connection.channel().queue_declare(name, durable=True, arguments=arguments)
