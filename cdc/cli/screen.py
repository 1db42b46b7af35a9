"""One event as one line for people: time, op, table, key, and what became of the columns."""

from __future__ import annotations

import json

from rich.text import Text

from cdc.event import Event, Image, Op, split_object

_OP_STYLES = {Op.INSERT: "green", Op.UPDATE: "yellow", Op.DELETE: "red", Op.TRUNCATE: "bold red", Op.READ: "cyan"}
_OP_WIDTH = 6
_TABLE_WIDTH = 11
_KEY_WIDTH = 7


def line(event: Event) -> Text:
    """The event as a styled line, in local time; printed without a terminal it is plain text."""
    source = event.source
    table = source.table if source.schema_name == "public" else f"{source.schema_name}.{source.table}"
    text = Text().append(f"{source.ts.astimezone():%H:%M:%S.%f}"[:-3], "dim")
    text.append("  ").append(f"{event.op.value:<{_OP_WIDTH}}", _OP_STYLES[event.op])
    text.append(f"  {_clean(table):<{_TABLE_WIDTH}}")
    key = _columns(event.key)
    text.append(f"  {'/'.join(map(_shown, key.values())):<{_KEY_WIDTH}}", "cyan")
    if event.truncated:
        text.append("  too large: only the key is known", "dim")
    elif event.op is Op.UPDATE:
        _append_difference(text, event)
    elif event.op in (Op.INSERT, Op.READ):
        for name, value in _columns(event.after).items():
            if name not in key and value != "null":
                text.append(f"  {_clean(name)} ", "dim").append(_shown(value))
    text.rstrip()
    return text


def _append_difference(text: Text, event: Event) -> None:
    before, after = _columns(event.before), _columns(event.after)
    for name in event.changed or ():
        text.append(f"  {_clean(name)} ", "dim")
        if name in before:
            text.append(_shown(before[name]), "red").append(" → ", "dim")
        text.append(_shown(after.get(name, "null")), "green")


def _columns(image: Image | None) -> dict[str, str]:
    """Column → its value as JSON text: every digit as PostgreSQL wrote it."""
    return {} if image is None else split_object(image.raw)


def _shown(raw: str) -> str:
    """A JSON value without the quotes a person does not need, and without anything a terminal would obey."""
    if not raw.startswith('"'):
        return _clean(raw)
    value = str(json.loads(raw))
    needs_quotes = not value.isprintable() or value != value.strip() or value in ("", "null")
    return _clean(raw if needs_quotes else value)


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else " " if c in "\t\r\n" else "�" for c in text)
