"""Files, as a destination under test."""

from __future__ import annotations

from typing import ClassVar

from harness import read_lines
from rig import NotApplicable, Received, Rig

from cdc.event import Event


class FileRig(Rig):
    """One file in the rig's directory."""

    kind: ClassVar[str] = "file"

    def configuration(self) -> dict[str, object]:
        return {"type": "file", "path": str(self.directory / "out.jsonl")}

    def received(self) -> list[Received]:
        path = self.directory / "out.jsonl"
        # Somebody may be writing: what has no line break yet is not there yet.
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
        return [Received(Event.from_json(line).id, line) for line in text.split("\n")[:-1]]

    def close(self) -> None:
        read_lines(self.directory / "out.jsonl")  # whole lines to the end

    def forbidden(self) -> dict[str, object]:
        raise NotApplicable("no credentials; test_file.py has the rights of directories")

    def limit(self) -> int:
        raise NotApplicable("no limit below the disk's; test_file.py has full disks and size limits")

    def refuse(self, key: int | None) -> None:
        raise NotApplicable("a file takes all of its lines or none; test_file.py has one that fails beside others")
