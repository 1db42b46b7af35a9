"""Standard output, which is no destination to speak of."""

from __future__ import annotations

from typing import ClassVar

from rig import NotApplicable, Received, Rig

_REASON = "for looking at: what is behind a pipe keeps nothing; test_stdout.py has its failures"


class StdoutRig(Rig):
    """Says that it cannot be tested like the others."""

    kind: ClassVar[str] = "stdout"

    def configuration(self) -> dict[str, object]:
        raise NotApplicable(_REASON)

    def received(self) -> list[Received]:
        return []

    def close(self) -> None:
        return

    def forbidden(self) -> dict[str, object]:
        return self.configuration()

    def limit(self) -> int:
        raise NotApplicable(_REASON)

    def refuse(self, key: int | None) -> None:
        raise NotApplicable(_REASON)
