"""What is wrong with a file, and where: the one list every step adds to, and the paths it is told by."""

from __future__ import annotations

from operator import itemgetter
from typing import Final, TypeAlias

from cdc.dsn import printable

KeyPath: TypeAlias = tuple[str | int, ...]
"""From the top of the file to a value: ``("sinks", "audit", "tables", 0)``."""

Place: TypeAlias = tuple[int, int]
"""Line and column, both from 0."""

BROKEN: Final = ""
"""Stands where a value is missing because its place already has a finding. Text, so that it counts as given."""


class Findings:
    """All findings about one file, and what the steps tell each other about its paths.

    Attributes:
        places: every path of the file → where its key or list entry begins.
        settled: paths that have a finding which explains whatever validation finds wrong there.
        expanded: paths whose text contained a variable.
    """

    def __init__(self) -> None:
        self.places: dict[KeyPath, Place] = {(): (0, 0)}
        self.settled: set[KeyPath] = set()
        self.expanded: set[KeyPath] = set()
        self._found: list[tuple[Place, str]] = []

    def add(self, path: KeyPath, message: str, *, place: Place | None = None) -> None:
        """Note ``what is wrong (what would be right)``.

        Args:
            path: of the value; an empty one means the file as a whole and is not written in front.
            message: the finding; it must contain no value.
            place: what sorts it, when that is not the place of the path.
        """
        where = f"{shown(path)}: " if path else ""
        self._found.append((place or self.places[path], f"{where}{message}"))

    def settle(self, path: KeyPath, message: str) -> None:
        """Note a finding after which validation has nothing to add about this path."""
        self.add(path, message)
        self.settled.add(path)

    def in_order(self) -> list[str]:
        """``path.to.key: what is wrong (what would be right)``, in the order of the file, each once."""
        return list(dict.fromkeys(text for _, text in sorted(self._found, key=itemgetter(0))))


def at(data: object, path: KeyPath) -> object:
    """What stands at a path of a tree of dicts and tuples, or None."""
    for part in path:
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, tuple) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return None
    return data


def shown(path: KeyPath) -> str:
    """A path as the user knows it: ``sinks.audit.tables[0]``; keys stand as they are."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{printable(part)}" for part in path)
    return text.removeprefix(".")
