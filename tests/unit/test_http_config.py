"""The block `http`: where to listen, and what has to be shown to change anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdc import config
from cdc.config import HttpConfig
from cdc.errors import ConfigError
from cdc.sinks import option_models

TOKEN = "correct-horse-battery"
REST = """
databases: {shop: {dsn: host=db1, tables: {public.orders: {}}}}
sinks: {out: {type: stdout}}
"""


def load(http: str, tmp_path: Path, **environ: str) -> HttpConfig | None:
    path = tmp_path / "c.yaml"
    path.write_text(f"{REST}http: {http}\n")
    return config.load(path, option_models(), environ).http


def finding(http: str, tmp_path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(http, tmp_path)
    (only,) = caught.value.findings
    return only.partition(": ")[2]


def test_left_out_or_empty_it_is_off(tmp_path: Path) -> None:
    assert load("null", tmp_path) is None


def test_by_default_it_listens_on_loopback_and_shows_no_values(tmp_path: Path) -> None:
    http = load("{}", tmp_path)
    assert http is not None
    assert (http.address, http.is_loopback, http.secret) == (("127.0.0.1", 8650), True, None)
    assert (http.show_values, http.stalled_after) == (False, 60.0)


def test_an_unset_token_is_none(tmp_path: Path) -> None:
    http = load('{token: "${CDC_TOKEN:-}"}', tmp_path)
    assert http is not None
    assert http.secret is None


@pytest.mark.parametrize(
    ("listen", "address", "loopback"),
    [
        ("localhost:80", ("localhost", 80), True),
        ("127.8.9.1:80", ("127.8.9.1", 80), True),
        ("[::1]:8650", ("::1", 8650), True),
        ("[::]:8650", ("::", 8650), False),
        ("0.0.0.0:0", ("0.0.0.0", 0), False),  # noqa: S104  what is told apart
        ("db1.example.com:1", ("db1.example.com", 1), False),
    ],
)
def test_an_address_is_this_machines_alone_or_not(
    listen: str, address: tuple[str, int], loopback: bool, tmp_path: Path
) -> None:
    http = load(f'{{listen: "{listen}", token: {TOKEN}}}', tmp_path)
    assert http is not None
    assert (http.address, http.is_loopback) == (address, loopback)


@pytest.mark.parametrize("listen", ["0.0.0.0:8650", "[::]:8650", "db1:8650", "10.0.0.1:1"])
def test_beyond_this_machine_it_wants_a_token(listen: str, tmp_path: Path) -> None:
    assert finding(f'{{listen: "{listen}"}}', tmp_path) == (
        "http: listens beyond this machine without a token (write token or token_file, or listen: 127.0.0.1:8650)"
    )


@pytest.mark.parametrize("listen", ["8650", ":8650", "127.0.0.1", "127.0.0.1:99999", "http://127.0.0.1:80", "::1:80"])
def test_what_is_no_address_is_refused(listen: str, tmp_path: Path) -> None:
    assert finding(f'{{listen: "{listen}"}}', tmp_path) == (
        "http.listen: not an address to listen on (write HOST:PORT, such as 127.0.0.1:8650)"
    )


@pytest.mark.parametrize("token", ["short", "with a space in it", "not-ascii-ä-and-long"])
def test_a_token_that_can_be_guessed_or_not_be_sent_is_refused_and_not_shown(token: str, tmp_path: Path) -> None:
    said = finding(f'{{token: "{token}"}}', tmp_path)
    assert said.startswith("http.token: not a usable token (")
    assert token not in said


def test_a_token_may_stand_in_a_file_that_not_everybody_reads(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    http = load(f"{{token_file: {file}}}", tmp_path)
    assert http is not None
    assert http.secret == TOKEN
    assert TOKEN not in repr(http)
    file.chmod(0o644)
    assert finding(f"{{token_file: {file}}}", tmp_path) == (
        f"http.token_file: {file} can be read by everybody (chmod o-r {file})"
    )
    file.chmod(0o600)
    assert finding(f"{{token_file: {file}, token: {TOKEN}}}", tmp_path) == "http: both token and token_file (keep one)"
