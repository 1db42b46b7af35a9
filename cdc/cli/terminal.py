"""How reports look: colours only where somebody watches, plain aligned text in a pipe."""

from __future__ import annotations

import json
import sys
from io import TextIOWrapper
from typing import TextIO

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

EXIT_FAILURE = 1
EXIT_UNREACHABLE = 69
EXIT_CONFIG = 78

_WIDE = 10_000


def lenient_stdout() -> TextIO:
    """Standard output as it is now, with ? for a letter that it cannot show: that is no reason to end."""
    stream = sys.stdout
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="replace")
    return stream


def print_json(value: object) -> None:
    """Print something as JSON in several lines."""
    print_data(json.dumps(value, ensure_ascii=False, indent=2))


def print_data(text: str, *, nl: bool = True) -> None:
    """Print a line, or several, for machines: in UTF-8, whatever the terminal's encoding is; `nl`: and a line break."""
    click.echo(text.encode(errors="replace"), nl=nl)


def console() -> Console:
    """Standard output as it is now; colours as NO_COLOR allows, and no line broken in a pipe."""
    stream = lenient_stdout()
    return Console(file=stream, highlight=False, soft_wrap=True, width=None if stream.isatty() else _WIDE)


def plain(text: str, style: str = "") -> Text:
    """Text from a database or a sink, as it is: no markup, no control characters."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text), style)


def print_table(table: Table, out: Console) -> None:
    """Print a table; in a pipe without the rubbish that Rich fills the last column up with."""
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as capture:
        out.print(table)
    for text in capture.get().splitlines():
        out.print(plain(text.rstrip()))


def age(seconds: float) -> str:
    """A duration in one unit, rounded down: ``0 s``, ``3 min``, ``5 h``, ``12 d``."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= (2 * size if unit != "min" else size):
            return f"{int(seconds // size)} {unit}"
    return f"{int(max(seconds, 0))} s"


def byte_size(number: int) -> str:
    """``0 B``, ``8.0 KiB``, ``1.2 GiB``."""
    size = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
