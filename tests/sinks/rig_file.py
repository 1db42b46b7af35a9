"""Files, as a destination under test."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import ClassVar

from harness import read_lines
from rig import NotApplicable, Received, Rig

from cdc.event import Event


class FileRig(Rig):
    """One file in the rig's directory, closed and compressed again and again."""

    kind: ClassVar[str] = "file"

    def configuration(self) -> dict[str, object]:
        rotate = {"size": "16KiB", "compress": "gzip"}
        return {"type": "file", "path": str(self.directory / "out.jsonl"), "rotate": rotate}

    def received(self) -> list[Received]:
        while True:
            before = self._closed()
            # Somebody may be writing: what has no line break yet is not there yet.
            texts = [_read(path) for path in [*before.values(), self.directory / "out.jsonl"]]
            if list(before) == list(self._closed()) and None not in texts[:-1]:
                lines = [line for text in texts for line in (text or "").split("\n")[:-1]]
                return [Received(Event.from_json(line).id, line) for line in lines]

    def _closed(self) -> dict[str, Path]:
        """Closed files by the name they were closed under, in its order; of two the compressed one."""
        return {path.name.removesuffix(".gz"): path for path in sorted(self.directory.glob("out-*Z.json*[lz]"))}

    def close(self) -> None:
        read_lines(self.directory / "out.jsonl")  # whole lines to the end

    def forbidden(self) -> dict[str, object]:
        raise NotApplicable("no credentials; test_file.py has the rights of directories")

    def limit(self) -> int:
        raise NotApplicable("no limit below the disk's; test_file.py has full disks and size limits")

    def refuse(self, key: int | None) -> None:
        raise NotApplicable("a file takes all of its lines or none; test_file.py has one that fails beside others")


def _read(path: Path) -> str | None:
    """The text of a file; None where it has just got another name."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode(errors="replace")
