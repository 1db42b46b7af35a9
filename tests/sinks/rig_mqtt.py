"""Mosquitto, as a destination under test, with a subscriber whose session outlives the broker.

It keeps in memory what it has acknowledged and not handed on yet, and writes it down when it is told to end; so it is
told, and not killed.
"""

from __future__ import annotations

import signal
import subprocess
import threading
from pathlib import Path
from typing import Any, ClassVar

import paho.mqtt.client as mqtt
from harness import until
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from rig import Received, Rig
from service import Service, free_port, program

PASSWORD = "right+horse/battery"
_LIMIT = 2**17
_RIGHTS = "user cdc\ntopic readwrite cdc/#\nuser rig\ntopic readwrite #\n"


class MqttRig(Rig):
    """A broker with users and their rights."""

    kind: ClassVar[str] = "mqtt"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._port = free_port()
        for user, only in (("cdc", ["-c"]), ("rig", [])):
            command = [program("mosquitto_passwd"), *only, "-b", str(directory / "users"), user, PASSWORD]
            subprocess.run(command, check=True, capture_output=True)
        (directory / "rights").write_text(_RIGHTS)
        config = directory / "mosquitto.conf"
        config.write_text(
            f"listener {self._port} 127.0.0.1\nuser root\nallow_anonymous false\npassword_file {directory}/users\n"
            f"acl_file {directory}/rights\npersistence true\npersistence_location {directory}/\n"
            f"max_packet_size {_LIMIT}\nmax_inflight_messages 0\nmax_queued_messages 0\n"
        )
        self._log = directory / "log"
        self._server = Service([program("mosquitto"), "-c", config], self._port, self._log)
        self._topic = "cdc/{table}"
        self._received: list[Received] = []
        self._subscribed = threading.Event()
        self._fences = 0
        self._up_to = 0
        self._answers = True
        self._subscriber = self._subscribe()

    def configuration(self) -> dict[str, object]:
        return {
            "type": "mqtt",
            "host": "127.0.0.1",
            "port": self._port,
            "username": "cdc",
            "password": PASSWORD,
            "topic": self._topic,
            "timeout": "1s",
        }

    def received(self) -> list[Received]:
        if self._answers:
            # What the broker has taken before this it has handed on before this.
            self._fences += 1
            self._subscriber.publish("fence", str(self._fences), qos=1)
            until(lambda: self._up_to >= self._fences, "the subscriber has everything")
        return list(self._received)

    def close(self) -> None:
        self._subscriber.disconnect()
        self._server.kill()
        self._subscriber.loop_stop()

    def stop(self) -> None:
        self._subscribed.clear()
        self._answers = False
        self._server.terminate()

    def start(self) -> None:
        self._server.start()
        assert self._subscribed.wait(30)
        self._answers = True

    def stall(self) -> None:
        self._answers = False
        self._server.freeze()

    def resume(self) -> None:
        self._server.thaw()
        self._answers = True

    def forbidden(self) -> dict[str, object]:
        return {**self.configuration(), "password": "wrong+horse/battery"}

    def limit(self) -> int:
        return _LIMIT

    def refuse(self, key: int | None) -> None:
        self._topic = "cdc/{table}" if key is None else "cdc/{table}/{key.id}"
        denied = "" if key is None else f"topic deny cdc/item/{key}\n"
        (self.directory / "rights").write_text(_RIGHTS.replace("user rig", f"{denied}user rig"))
        times = self._reloaded()
        self._server.signal(signal.SIGHUP)
        until(lambda: self._reloaded() > times, "the broker reads the rights again")

    def _reloaded(self) -> int:
        return self._log.read_text().count("Reloading config")

    def _subscribe(self) -> mqtt.Client:
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="rig", protocol=mqtt.MQTTv5)
        client.username_pw_set("rig", PASSWORD)
        client.reconnect_delay_set(1, 1)

        def on_connect(_: mqtt.Client, __: object, flags: Any, *___: object) -> None:
            if flags.session_present:
                self._subscribed.set()
            else:
                client.subscribe([("cdc/#", 1), ("fence", 1)])

        def on_message(_: mqtt.Client, __: object, message: Any) -> None:
            if message.topic == "fence":
                self._up_to = int(message.payload)
                return
            (id_,) = (value for name, value in message.properties.UserProperty if name == "id")
            self._received.append(Received(id_, message.payload.decode()))

        client.on_connect = on_connect
        client.on_subscribe = lambda *_: self._subscribed.set()
        client.on_message = on_message
        session = Properties(PacketTypes.CONNECT)
        session.SessionExpiryInterval = 3600
        client.connect("127.0.0.1", self._port, clean_start=False, properties=session)
        client.loop_start()
        assert self._subscribed.wait(30)
        return client
