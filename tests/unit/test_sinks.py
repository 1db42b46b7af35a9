"""The registry: a sink costs nobody anything who does not use it, and a missing client library is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner

from cdc import sinks
from cdc.cli import main
from cdc.errors import SinkDisabled
from cdc.options import SinkOptions
from cdc.sinks import option_models
from cdc.sinks.base import Sink, require


class _Options(SinkOptions):
    type: Literal["letter"]


class _Letter(Sink[_Options]):
    Options = _Options
    clients = ("a_library_nobody_has.parcels", "json")

    def deliver(self, batch: object) -> None:
        raise NotImplementedError


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration with a sink whose client library is missing."""
    monkeypatch.setitem(sinks.SINKS, "letter", _Letter)
    content = {
        "databases": {"shop": {"dsn": "host=127.0.0.1 port=1", "tables": {"public.item": {}}}},
        "sinks": {"audit": {"type": "stdout"}, "post": {"type": "letter"}},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_missing_client_library_is_a_configuration_error(config: Path, command: str) -> None:
    done = CliRunner().invoke(main, ["-c", str(config), command])
    assert done.exit_code == 78
    assert (
        f"{config}: sinks.post.type: its client library is not installed: a_library_nobody_has.parcels "
        "(pip install 'table-cdc[letter]')" in done.stderr
    )
    assert "audit" not in done.stderr


def test_commands_that_deliver_nothing_need_no_client_library(config: Path) -> None:
    done = CliRunner().invoke(main, ["-c", str(config), "status"])
    assert done.exit_code == 69  # the database is not there


def test_a_library_is_imported_when_it_is_used_and_not_before() -> None:
    library = require("colorsys", extra="letter")
    sys.modules.pop("colorsys", None)
    assert "colorsys" not in sys.modules
    assert library.rgb_to_hsv(0, 0, 0) == (0.0, 0.0, 0)
    assert "colorsys" in sys.modules


def test_using_a_library_that_is_missing_stops_the_sink_and_names_the_extra() -> None:
    library = require("a_library_nobody_has", extra="letter")
    with pytest.raises(
        SinkDisabled, match=r"a_library_nobody_has cannot be imported \(pip install 'table-cdc\[letter\]'"
    ):
        library.send()


def test_reading_a_configuration_imports_no_client_library() -> None:
    program = (
        "import sys; from cdc.sinks import SINKS, option_models; option_models(); "
        "print([c for sink in SINKS.values() for c in sink.clients if c.partition('.')[0] in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "kind", sorted(kind for kind, options in option_models().items() if "host" in options.model_fields)
)
def test_a_url_in_the_place_of_a_host_is_refused_and_its_password_not_shown(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    needed = {"exchange": "changes"} if kind == "rabbitmq" else {}
    content = {
        "databases": {"shop": {"dsn": "host=127.0.0.1 port=1", "tables": {"public.item": {}}}},
        "sinks": {"events": {"type": kind, "host": f"{kind}://u:S3CRET@127.0.0.1:6399", **needed}},
    }
    path.write_text(json.dumps(content))
    done = CliRunner().invoke(main, ["-c", str(path), "check"])
    assert done.exit_code == 78
    assert done.stderr == (
        f"error: {path}: sinks.events.host: not the name or address of a host "
        "(write it alone: port, user and password have keys of their own)\n"
    )
