"""An HTTP server, as a destination under test."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from receiver import OK, Answer, Receiver, Request
from rig import Received, Rig

from cdc.event import Event

LIMIT = 64 * 1024


class WebhookRig(Rig):
    """The receiver of tests/support, which knows one token."""

    kind: ClassVar[str] = "webhook"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._refused: int | None = None
        self._receiver = Receiver()
        self._receiver.answer = self._answer

    def configuration(self) -> dict[str, object]:
        return self._configuration("the-right-token")

    def received(self) -> list[Received]:
        return [Received(request.id, request.body.decode()) for request in list(self._receiver.taken)]

    def close(self) -> None:
        self._receiver.stop()

    def stop(self) -> None:
        self._receiver.stop()

    def start(self) -> None:
        self._receiver.start()

    def stall(self) -> None:
        self._receiver.stall()

    def resume(self) -> None:
        self._receiver.resume()

    def forbidden(self) -> dict[str, object]:
        return self._configuration("another-token")

    def limit(self) -> int:
        return LIMIT

    def refuse(self, key: int | None) -> None:
        self._refused = key

    def _configuration(self, token: str) -> dict[str, object]:
        return {
            "type": "webhook",
            "url": f"{self._receiver.url}/in/{{table}}",
            "allow_private": True,
            "headers": {"Authorization": f"Bearer {token}"},
            "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "timeout": "2s",
            "connect_timeout": "2s",
            "max_body": LIMIT,
        }

    def _answer(self, request: Request) -> Answer:
        if request.headers["authorization"] != "Bearer the-right-token":
            return Answer(401)
        event = Event.from_json(request.body.decode())
        if self._refused is not None and event.key is not None and event.key["id"] == self._refused:
            return Answer(503)
        return OK
