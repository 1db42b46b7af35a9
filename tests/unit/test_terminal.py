"""Reports on a terminal, or into a pipe, that lacks letters."""

from __future__ import annotations

import io
import json
import sys

import pytest

from cdc.cli.several import each
from cdc.cli.terminal import console, print_json

pytestmark = pytest.mark.parametrize("encoding", ["ascii", "latin-1"])


def no_arrows(monkeypatch: pytest.MonkeyPatch, encoding: str) -> io.BytesIO:
    """Make standard output one that has no arrows; returns what it gets."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    return written


def test_what_a_report_cannot_show_is_a_question_mark(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    out = no_arrows(monkeypatch, encoding)
    console().print("a → b")
    assert out.getvalue() == b"a ? b\n"


def test_so_it_is_with_what_is_said_of_each_database(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    out = no_arrows(monkeypatch, encoding)
    assert each({"shop": None}, ["shop"], lambda name, place: ["a → b"]) == 0  # type: ignore[dict-item]  # no place
    assert out.getvalue() in (b"a ? b\n", "a → b\n".encode())  # where ASCII is asked for, click writes UTF-8


def test_json_is_utf_8_whatever_the_terminal_is(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    out = no_arrows(monkeypatch, encoding)
    print_json({"table": "größe →", "file": "\udcff"})
    assert json.loads(out.getvalue().decode()) == {"table": "größe →", "file": "?"}
