"""Secrets and row values: put in everywhere, looked for in everything that is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from harness import Project, until
from pages import TOKEN, get
from psycopg2.extensions import connection, make_dsn
from service import free_port
from sql import fetch

from cdc.cli import main

Connect = Callable[..., connection]

PASSWORD = "hunter2-canary"
ROW = "4929-canary-row"
VARIABLE = "variable-canary"
SECRETS = (PASSWORD, ROW, VARIABLE, TOKEN)
PAGES = (
    "/",
    "/metrics",
    "/readyz",
    "/healthz",
    "/api/status",
    "/api/overview",
    "/api/history",
    "/api/tail",
    "/nowhere",
)


def clean(text: str, where: str) -> None:
    for secret in SECRETS:
        assert secret not in text, f"{secret!r} in {where}: …{text[max(0, text.index(secret) - 200) :][:400]}"


@pytest.fixture
def project(tmp_path: Path, database: str, connect: Connect) -> Iterator[Project]:
    fetch(connect(database), "create table orders (id text primary key, note text)")
    # The server trusts everybody; what matters is that a password is there to be shown.
    made = Project(
        tmp_path, make_dsn(database, password=PASSWORD), {"public.*": {}}, "{table}.jsonl",
        sink={"retry": {"max": "300ms"}}, environment={"CDC_TOKEN_CANARY": TOKEN, "SECRET_CANARY": VARIABLE},
    )  # fmt: skip
    made.content["http"] = {
        "listen": f"127.0.0.1:{free_port()}", "token": "${CDC_TOKEN_CANARY}", "stalled_after": "1s",
    }  # fmt: skip
    made.write()
    made.cdc("migrate")
    yield made
    made.remove_output()


def port_of(project: Project) -> int:
    return int(str(project.content["http"]["listen"]).rpartition(":")[2])


def everything_it_says(project: Project, log: Path) -> None:
    for path in PAGES:
        page = get(port_of(project), path)
        clean(page.text, path)
        clean(str(page.headers), f"headers of {path}")
    for command in (["status"], ["status", "--json"], ["check"], ["check", "--json"], ["migrate", "--plan"]):
        done = project.cdc(*command, codes=(0, 1, 69))
        clean(done.stdout + done.stderr, " ".join(command))
    clean(log.read_text(), "the log")


@pytest.mark.parametrize("journal", [False, True])
def test_a_sink_that_fails_says_nothing_of_the_rows(
    project: Project, connect: Connect, journal: bool, tmp_path: Path
) -> None:
    (project.directory / "orders.jsonl").mkdir()
    environment = {}
    if journal:
        log = project.directory / "daemon-1.log"
        log.touch()
        environment["JOURNAL_STREAM"] = f"{log.stat().st_dev}:{log.stat().st_ino}"
    with project.daemon(environment=environment) as daemon:
        fetch(connect(project.dsn), "insert into orders values (%s, %s)", (ROW, ROW))
        daemon.wait_until_it_says("The sink fails; retrying.")
        until(lambda: get(port_of(project), "/readyz").status == 503, "it is seen")
        assert daemon.said().startswith("<") == journal
        everything_it_says(project, daemon.log)
        command_line = Path(f"/proc/{daemon.process.pid}/cmdline").read_text()
        clean(command_line, "the command line, which ps shows")
    (project.directory / "orders.jsonl").rmdir()


def test_a_bug_that_quotes_a_row_is_told_by_its_place(project: Project, connect: Connect, tmp_path: Path) -> None:
    program = tmp_path / "buggy.py"
    program.write_text(
        "import threading\n"
        "from cdc.cli import main\n"
        "from cdc.sinks.file import FileSink\n"
        "from cdc.keeper import Keeper\n"
        "from cdc.listener import Listener\n"
        "def deliver(self, batch):\n"
        "    raise ValueError(f'cannot take {batch[0].after.raw}')\n"
        "FileSink.deliver = deliver\n"
        "def measure(self, connection):\n"
        "    rows = connection.query('select note from public.orders')\n"
        "    if rows:\n"
        "        raise KeyError(rows)\n"
        "Keeper._measure = measure\n"
        "def listen(self):\n"
        f"    raise KeyError({ROW!r})\n"
        "Listener.run = listen\n"
        "main()\n"
    )
    with project.daemon(program=[sys.executable, program]) as daemon:
        fetch(connect(project.dsn), "insert into orders values (%s, %s)", (ROW, ROW))
        daemon.wait_until_it_says("The sink raised what it should not; retrying.")
        daemon.wait_until_it_says("The keeper failed as it should not; starting again.")
        daemon.wait_until_it_says("A thread has ended as it should not.")
        assert "exception=ValueError" in daemon.said()
        assert "buggy.py:7" in daemon.said()
        everything_it_says(project, daemon.log)


def test_a_command_that_fails_as_it_should_not_shows_no_traceback(project: Project, tmp_path: Path) -> None:
    program = tmp_path / "buggy.py"
    program.write_text(
        "from cdc import diagnosis\n"
        "from cdc.cli import main\n"
        "def check(config, names, dsns):\n"
        "    raise RuntimeError(str(dsns))\n"
        "diagnosis.check = check\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, program, "-c", project.config, "check"],
        capture_output=True, text=True, check=False, env=os.environ | project.environment,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: unexpected RuntimeError at " in done.stderr
    assert "buggy.py:4" in done.stderr
    assert "Traceback" not in done.stderr
    clean(done.stdout + done.stderr, "cdc check")


DSNS = (
    f"postgresql://cdc:{PASSWORD}@127.0.0.1:1/shop",
    f"postgresql://cdc:{PASSWORD}@does-not-exist.invalid/shop",
    f"host=127.0.0.1 port=1 password={PASSWORD} user=cdc",
    f"host=127.0.0.1 password='{PASSWORD}",
    f"postgresql://cdc:{PASSWORD}:x@[::1/shop",
    f"password={PASSWORD} nonsense=1 host=127.0.0.1",
    f"postgresql://cdc:p@{PASSWORD}@db1/shop",
    f"{PASSWORD}",
    f"postgresql:/cdc:{PASSWORD}@db1/shop",
    "${SECRET_CANARY}",
    "postgresql://cdc:${SECRET_CANARY}@127.0.0.1:1/shop?nonsense=1",
)


@pytest.mark.parametrize("number", range(len(DSNS)))
@pytest.mark.parametrize("through_file", [False, True])
def test_a_connection_string_is_shown_by_no_error(project: Project, number: int, through_file: bool) -> None:
    dsn = DSNS[number]
    block: dict[str, object] = {"dsn": dsn, "tables": {"public.*": {}}}
    if through_file:
        file = project.directory / "shop.dsn"
        file.write_text(dsn.replace("${SECRET_CANARY}", VARIABLE))
        file.chmod(0o600)
        block = {"dsn_file": str(file), "tables": {"public.*": {}}}
    project.content["databases"] = {"shop": block}
    project.write()
    for command in ("check", "status", "migrate"):
        environ = os.environ | project.environment
        done = CliRunner(env=environ).invoke(main, ["-c", str(project.config), command])
        assert done.exit_code != 0 or command == "status"
        clean(done.output, f"cdc {command}, {number}")
    if number == 0:
        clean(project.cdc("run", codes=(1, 69)).stderr, f"cdc run, {number}")


def test_the_token_and_values_stay_out_of_what_is_refused(project: Project) -> None:
    project.content["http"]["token"] = f"{TOKEN} with blanks {PASSWORD}"
    project.content["log"] = {"level": VARIABLE}
    project.content["sinks"]["mirror"]["type"] = PASSWORD
    project.write()
    done = project.cdc("check", codes=(78,))
    clean(done.stdout + done.stderr, "cdc check")
    assert done.stderr.count("error: ") == 3


def test_a_reload_that_is_refused_names_no_secret(project: Project) -> None:
    with project.daemon() as daemon:
        project.content["databases"]["shop"]["dsn"] = f"mysql://cdc:{PASSWORD}@db1/shop"
        project.content["http"]["token"] = "${UNSET_CANARY}"
        project.write()
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_until_it_says("The configuration was not reloaded", 2)
        assert json.loads(get(port_of(project), "/api/overview").text)["reload"]["error"]
        clean(daemon.said(), "the log")
        for path in PAGES:
            clean(get(port_of(project), path).text, path)
