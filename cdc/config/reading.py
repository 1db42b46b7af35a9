"""Step one, read: from the bytes of a file to a plain tree in which every path has a place.

UTF-8, at most 256 KiB, one YAML 1.2 document. The tree is built here from parser events, because only there
can duplicate keys, anchors, aliases and tags be told from what they would become, and every key keeps its
line. Those are findings, and reading goes on; what leaves no tree to speak of (syntax, nesting, a second
document) raises `Unreadable`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.reader import ReaderError

from cdc.config.findings import BROKEN, Findings, KeyPath, Place

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 32

# Between { } and [ ] YAML would take the brace of an unquoted ${…} for one of its own. Letters of private use stand in
# for both braces until the scalars are made; as many, so that every place is as it was.
_REFERENCE: Final = re.compile(r"""\$\{([A-Za-z_]\w*(?::-[^\s,\[\]{}"'#]*)?)\}""")
_SHIELD: Final = "\ue000", "\ue001"
_BRACES: Final = {ord(_SHIELD[0]): "{", ord(_SHIELD[1]): "}"}

# What the parser says → what that means to somebody who edits the file. Its own words quote the file now and
# then, so what is not listed is not shown.
_SYNTAX: Final = (
    (r"character '\\t'", "a tab (indent with spaces)"),
    (r"cannot start any token", "a character that cannot begin a value (put the value in quotes)"),
    (r"mapping values are not allowed", "a second colon (put the value in quotes, or check the indentation)"),
    (r"could not find expected ':'", "a line without a colon (write key: value)"),
    (r"unexpected end of stream", "a quote that is never closed (close it)"),
    (r"expected <block end>", "wrong indentation (keys of one block begin in the same column)"),
    (r"expected ',' or", "a { } or [ ] that is not closed or lacks a comma (close it)"),
    (r"sequence entries are not allowed", "a list entry in the wrong place (put it on a line of its own)"),
    (r"escape", "an unknown escape in double quotes (use single quotes)"),
    (r"tag|'!'|URI", "a YAML tag (remove it; a value that begins with ! needs quotes)"),
    (r"expected '<document start>'", "text after the end of the document (check the indentation)"),
)


class Unreadable(Exception):
    """There is no tree to validate; the text is the finding. With a place it says where in the file."""

    def __init__(self, message: str, place: Place | None = None) -> None:
        where = f"line {place[0] + 1}, column {place[1] + 1}: " if place else ""
        super().__init__(f"{where}{message}")
        self.place = place


def read(path: Path, findings: Findings) -> dict[str, object]:
    """The tree of dicts, tuples and scalars a file holds; places and findings go to `findings`.

    Raises:
        Unreadable: there is no tree to speak of.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or "unknown reason"
        raise Unreadable(f"cannot be read: {reason} (name a file this user may read)") from None
    if len(content) > MAX_BYTES:
        raise Unreadable(f"larger than {MAX_BYTES // 1024} KiB (a configuration is far smaller; is it this file?)")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start)
        column = error.start - (content.rfind(b"\n", 0, error.start) + 1)
        raise Unreadable("not UTF-8 (save the file as UTF-8)", (line, column)) from None
    try:
        return _Reader(text, findings).document()
    except YAMLError as error:
        raise _not_yaml(error, text) from None
    except RecursionError:
        raise _too_deep() from None


class _Reader:
    """Builds plain dicts, tuples and scalars from parser events, and notes places and structural findings."""

    def __init__(self, text: str, findings: Findings) -> None:
        self._braces: dict[int, str] = {}
        if not any(letter in text for letter in _SHIELD):  # else they mean themselves
            text = _REFERENCE.sub(rf"${_SHIELD[0]}\1{_SHIELD[1]}", text)
            self._braces = _BRACES
        self._text = text
        self._findings = findings
        # One instance per file: a %YAML line changes the rules of the instance that reads it.
        self._yaml = YAML(typ="safe", pure=True)

    def document(self) -> dict[str, object]:
        """The only document of the file; raises `Unreadable` or `YAMLError` when there is none or another."""
        with closing(self._yaml.parse(self._text)) as events:
            next(events)  # the start of the stream
            start = next(events)
            if isinstance(start, StreamEndEvent):
                raise Unreadable("empty (begin with databases: and sinks:)")
            if isinstance(start, DocumentStartEvent) and (start.version or start.tags):
                raise Unreadable("a %YAML or %TAG line (remove it; the file is read as YAML 1.2)", (0, 0))
            first = next(events)
            data = self._value(first, (), events)
            next(events)  # the end of the document
            another = next(events)
            if not isinstance(another, StreamEndEvent):
                raise Unreadable("a second document (keep one; remove the --- line)", _place(another))
        if not isinstance(data, dict):
            raise Unreadable("not keys and values (begin with databases: and sinks:)", _place(first))
        return data

    def _value(self, event: Event, path: KeyPath, events: Iterator[Event]) -> object:
        if isinstance(event, AliasEvent):
            self._findings.settle(path, "a YAML alias (write the value out; a pattern that begins with * needs quotes)")
            return BROKEN
        if isinstance(event, ScalarEvent | CollectionStartEvent):
            if event.anchor is not None:
                self._findings.add(path, "a YAML anchor (remove it; a value that begins with & needs quotes)")
            if event.tag is not None:
                self._findings.settle(path, "a YAML tag (remove it; a value that begins with ! needs quotes)")
        if isinstance(event, ScalarEvent):
            return self._scalar(event, path)
        if len(path) >= MAX_DEPTH:
            raise _too_deep(_place(event))
        read = self._list if isinstance(event, SequenceStartEvent) else self._mapping
        return read(path, events)

    def _list(self, path: KeyPath, events: Iterator[Event]) -> tuple[object, ...]:
        items: list[object] = []
        while not isinstance(event := next(events), SequenceEndEvent):
            here = (*path, len(items))
            self._findings.places.setdefault(here, _place(event))
            items.append(self._value(event, here, events))
        return tuple(items)

    def _mapping(self, path: KeyPath, events: Iterator[Event]) -> dict[str, object]:
        mapping: dict[str, object] = {}
        while not isinstance(event := next(events), MappingEndEvent):
            key = self._key(event, path, events)
            here = (*path, key)
            if key in mapping:
                place = _place(event)
                again, first = place[0] + 1, self._findings.places[here][0] + 1
                message = f"duplicate key on line {again}, first on line {first} (keep one)"
                self._findings.add(here, message, place=place)
                # Read for the structural findings inside it; validation sees the first.
                self._value(next(events), here, events)
                continue
            self._findings.places.setdefault(here, _place(event))
            is_text = isinstance(event, ScalarEvent) and self._tag(event) == "str"
            if not is_text and here not in self._findings.settled:
                self._findings.settle(here, "a key that is not text (write text, in quotes if it looks like a number)")
            mapping[key] = self._value(next(events), here, events)
        return mapping

    def _key(self, event: Event, path: KeyPath, events: Iterator[Event]) -> str:
        if isinstance(event, ScalarEvent) and event.anchor is None and event.tag is None:
            return self._text_of(event, path)
        # Anything else has its finding here, in the place where it stands.
        key = event.value if isinstance(event, ScalarEvent) else "?"
        self._findings.places.setdefault((*path, key), _place(event))
        self._value(event, (*path, key), events)
        return str(key)

    def _tag(self, event: ScalarEvent) -> str:
        """What a scalar is under YAML 1.2's rules: str, int, float, bool, null, timestamp and the like."""
        return str(self._yaml.resolver.resolve(ScalarNode, event.value, event.implicit)).rpartition(":")[2]

    def _scalar(self, event: ScalarEvent, path: KeyPath) -> object:
        text = self._text_of(event, path)
        if event.tag is not None:
            return text
        kind = self._tag(event)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind in ("int", "float"):
            return self._number(kind, text.replace("_", "").lower(), path)
        # Dates and the like: nothing in a configuration is one, and as text they get a finding that fits.
        return text

    def _number(self, kind: str, text: str, path: KeyPath) -> object:
        try:
            if kind == "int":
                # Base 0 reads 0x1f and 0o17 but refuses 010, which YAML 1.2 reads as ten.
                return int(text, 0 if re.search("[box]", text) else 10)
            return float(re.sub(r"\.(inf|nan)", r"\1", text))
        except ValueError:
            self._findings.settle(path, "a number that cannot be read (write fewer digits, or quote it as text)")
            return BROKEN

    def _text_of(self, event: ScalarEvent, path: KeyPath) -> str:
        text = str(event.value).translate(self._braces)
        # Only escapes in double quotes get here; raw ones are refused by the reader.
        if re.search("[\x00\ud800-\udfff]", text):
            self._findings.settle(path, r"a NUL or half a character (remove the \0 or \ud800 escape)")
            return BROKEN
        return text


def _not_yaml(error: YAMLError, text: str) -> Unreadable:
    if isinstance(error, ReaderError):
        before = text[: error.position]
        place = before.count("\n"), len(before) - (before.rfind("\n") + 1)
        return Unreadable("a control character (remove it)", place)
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return Unreadable("not valid YAML (check it with a YAML linter)")
    mark = error.problem_mark
    place = mark.line, mark.column
    if text[max(0, mark.index - 1) : mark.index + 1] == "${":
        return Unreadable('${…} without quotes inside { } or [ ] (write "${…}")', place)
    if re.search("alias|anchor", str(error.context)):
        return Unreadable("a YAML alias or anchor (a value that begins with * or & needs quotes)", place)
    for pattern, meaning in _SYNTAX:
        if re.search(pattern, str(error.problem)):
            return Unreadable(meaning, place)
    return Unreadable("not valid YAML (check quotes and indentation here)", place)


def _too_deep(place: Place | None = None) -> Unreadable:
    return Unreadable(f"nested more than {MAX_DEPTH} levels deep (a configuration needs six)", place)


def _place(event: Event) -> Place:
    return event.start_mark.line, event.start_mark.column
