"""Counters in a file that a consumer's process writes and the benchmark reads, without either waiting for the other."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

_LAYOUT = struct.Struct("qqqqqd")


class Tally(NamedTuple):
    """What a consumer has parsed so far.

    Attributes:
        ready: 1 once it listens.
        insert, update: events of either kind.
        other: events of any other kind; there should be none.
        keys: the sum of their keys.
        at: the monotonic clock when it last counted.
    """

    ready: int = 0
    insert: int = 0
    update: int = 0
    other: int = 0
    keys: int = 0
    at: float = 0.0


class Board:
    """The file."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if create:
            path.write_bytes(bytes(_LAYOUT.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)

    def read(self) -> Tally:
        return Tally(*_LAYOUT.unpack_from(self._map))

    def write(self, tally: Tally) -> None:
        _LAYOUT.pack_into(self._map, 0, *tally)
