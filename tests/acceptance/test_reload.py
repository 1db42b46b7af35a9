"""SIGHUP: what has changed is restarted, what has not goes on, and what is wrong changes nothing."""

from __future__ import annotations

import re
import signal
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import Daemon, Project, read_lines, until
from pages import TOKEN, get, metrics
from psycopg2.extensions import connection
from service import free_port
from sql import fetch

from cdc.event import Event

if TYPE_CHECKING:
    from conftest import Server

Connect = Callable[..., connection]
BROKEN = Path(__file__).parents[1] / "unit" / "broken"


@pytest.fixture
def project(tmp_path: Path, database: str, connect: Connect) -> Iterator[Project]:
    """Sinks mirror and other, and a console."""
    fetch(connect(database), "create table orders (id int primary key, n int)")
    made = Project(
        tmp_path, database, {"public.*": {}}, "{table}.jsonl",
        sinks={"other": {"type": "file", "path": str(tmp_path / "other.jsonl")}},
    )  # fmt: skip
    made.content["http"] = {"listen": f"127.0.0.1:{free_port()}"}
    made.write()
    made.cdc("migrate")
    yield made
    made.remove_output()


def served(daemon: Daemon, sink: str) -> int:
    """How often the daemon has begun to serve a sink."""
    return len(re.findall(rf"Serving\..* sink={sink} ", daemon.said()))


def reload(daemon: Daemon, project: Project, says: str = "The configuration was reloaded.") -> None:
    project.write()
    times = daemon.said().count(says)
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_until_it_says(says, times + 1)


def lines(path: Path) -> int:
    """Whole ones; the last may be on its way."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_only_the_pipeline_whose_configuration_changed_restarts(project: Project, connect: Connect) -> None:
    writer = connect(project.dsn)
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 2)
        fetch(writer, "insert into orders values (1, 1)")
        until(lambda: lines(project.directory / "other.jsonl") == 1, "both have it")
        project.content["sinks"]["other"]["batch"] = {"events": 7}
        reload(daemon, project)
        until(lambda: served(daemon, "other") == 2, "the changed one begins anew")
        fetch(writer, "insert into orders values (2, 1)")
        until(lambda: lines(project.directory / "other.jsonl") == 2, "and delivers")
        assert served(daemon, "mirror") == 1
        assert "changed=shop/other" in daemon.said()
        reload(daemon, project)
        assert "changed=nothing" in daemon.said()
        assert (served(daemon, "mirror"), served(daemon, "other")) == (1, 2)


def test_a_daemon_all_of_whose_sinks_have_stopped_is_there_to_be_seen_until_one_is_mended(
    project: Project, connect: Connect
) -> None:
    del project.content["sinks"]["other"]
    mirror = project.content["sinks"]["mirror"]
    good, mirror["path"] = mirror["path"], str(project.directory / ("x" * 300 + "{table}"))
    mirror["on_permanent_failure"] = "stop"
    project.write()
    writer = connect(project.dsn)
    port = int(str(project.content["http"]["listen"]).rpartition(":")[2])
    with project.daemon() as daemon:
        fetch(writer, "insert into orders values (1, 1)")
        daemon.wait_until_it_says("The sink is stopped.")
        time.sleep(2.0)  # two looks of the main thread
        assert daemon.process.poll() is None
        assert daemon.said().count("The sink is stopped.") == 1
        assert get(port, "/readyz").status == 503
        assert metrics(port)['cdc_sink_state{database="shop",sink="mirror",state="stopped"}'] == 1
        mirror["path"] = good
        reload(daemon, project)
        until(lambda: lines(project.directory / "orders.jsonl") == 1, "it delivers")
        assert daemon.drain() == 0


def test_a_model_that_is_named_by_a_reload_counts_from_then_on(project: Project, connect: Connect) -> None:
    model = "from pydantic import BaseModel, Field\n\n\nclass Order(BaseModel):\n    n: int = Field(gt=0)\n"
    (project.directory / "reloaded_models.py").write_text(model)
    writer = connect(project.dsn)
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 2)
        fetch(writer, "insert into orders values (1, -1)")
        until(lambda: lines(project.directory / "other.jsonl") == 1, "what no model refuses is delivered")
        project.content["databases"]["shop"]["tables"]["public.*"] = {"model": "reloaded_models:Order"}
        reload(daemon, project)
        until(lambda: served(daemon, "other") == 2, "every pipeline of the database begins anew")
        fetch(writer, "insert into orders values (2, -2)")
        fetch(writer, "insert into orders values (3, 3)")
        files = [project.directory / name for name in ("other.jsonl", "orders.jsonl")]
        until(lambda: [lines(file) for file in files] == [2, 2], "what fits is delivered")
        letters = fetch(writer, "select sink, event -> 'key' ->> 'id' from cdc.dead_letter order by 1")
        assert letters == [("mirror", "2"), ("other", "2")]
        project.content["databases"]["shop"]["tables"]["public.*"] = {"model": "reloaded_models:Nobody"}
        reload(daemon, project, "The configuration was not reloaded; the old one stays.")


def test_sinks_come_and_go(project: Project, connect: Connect) -> None:
    writer = connect(project.dsn)
    third = project.directory / "third.jsonl"
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 2)
        other = project.content["sinks"].pop("other")
        project.content["sinks"]["third"] = {"type": "file", "path": str(third)}
        reload(daemon, project)
        until(lambda: served(daemon, "third") == 1, "the new one is served")
        fetch(writer, "insert into orders values (1, 1)")
        until(lambda: third.exists() and lines(third) == 1, "and delivers")
        assert project.status()["databases"]["shop"]["sinks"]["other"]["state"] == "unknown"
        assert not (project.directory / "other.jsonl").exists()
        project.content["sinks"]["other"] = other
        reload(daemon, project)
        # It has kept its position.
        until(
            lambda: (project.directory / "other.jsonl").exists() and lines(project.directory / "other.jsonl") == 1,
            "it goes on",
        )
        assert daemon.drain() == 0


def test_databases_come_and_go_and_one_that_is_not_migrated_is_served_once_it_is(
    project: Project, connect: Connect, server: Server
) -> None:
    name = f"test_{uuid.uuid4().hex[:12]}"
    dsn = server.create_database(name)
    writer = connect(dsn)
    fetch(writer, "create table invoices (id int primary key)")
    invoices = project.directory / "invoices.jsonl"
    try:
        with project.daemon() as daemon:
            project.content["databases"]["billing"] = {"dsn": dsn, "tables": {"public.*": {}}}
            reload(daemon, project)
            assert "A database cannot be served yet; trying on." in daemon.said()
            project.cdc("migrate", "-d", "billing")
            until(lambda: "database=billing sink=mirror" in daemon.said().partition("reloaded")[2], "it is served", 60)
            until(lambda: len(re.findall(r"Serving\..*database=billing", daemon.said())) == 2, "by both", 60)
            fetch(writer, "insert into invoices values (1)")
            until(lambda: invoices.exists() and lines(invoices) == 1, "and delivered")
            del project.content["databases"]["billing"]
            reload(daemon, project)
            sessions = (
                f"select count(*) from pg_stat_activity where datname = '{name}' and application_name like 'cdc %'"
            )
            look = connect(project.dsn)
            until(lambda: fetch(look, sessions)[0][0] == 0, "nobody of ours is left there")
            assert served(daemon, "mirror") == 2
            assert daemon.drain() == 0
    finally:
        writer.close()
        server.drop_database(name)


def test_a_wrong_configuration_changes_nothing_and_is_told_everywhere(project: Project, connect: Connect) -> None:
    port = int(str(project.content["http"]["listen"]).rpartition(":")[2])
    writer = connect(project.dsn)
    refused = "The configuration was not reloaded; the old one stays."
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 2)
        files = sorted(BROKEN.glob("*.yaml"))
        assert len(files) >= 20
        for number, path in enumerate(files):
            said = daemon.said().count(refused)
            project.config.write_text(path.read_text())
            daemon.process.send_signal(signal.SIGHUP)
            daemon.wait_until_it_says(refused, said + 1)
            assert metrics(port)["cdc_config_last_reload_successful"] == 0
            error = get(port, "/api/overview").json["reload"]["error"]
            assert error.startswith(str(project.config))
            fetch(writer, "insert into orders values (%s, 1)", (number,))
        until(lambda: lines(project.directory / "other.jsonl") == len(files), "all is delivered meanwhile")
        assert "canary" not in daemon.said()
        assert (served(daemon, "mirror"), served(daemon, "other")) == (1, 1)
        reload(daemon, project)
        assert metrics(port)["cdc_config_last_reload_successful"] == 1
        assert get(port, "/api/overview").json["reload"]["error"] is None


def test_reloads_in_mid_batch_lose_and_repeat_nothing(project: Project, connect: Connect) -> None:
    writer = connect(project.dsn)
    places = [project.directory / "a.jsonl", project.directory / "b.jsonl"]
    project.content["sinks"]["other"] |= {"path": str(places[0]), "batch": {"events": 50}}
    project.write()
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 2)
        for number in range(1, 16):
            fetch(writer, "insert into orders select i + %s, 1 from generate_series(1, 400) i", (number * 1000,))
            fetch(
                writer, "update orders set n = n + 1 where id between %s and %s", (number * 1000, number * 1000 + 400)
            )
            project.content["sinks"]["other"]["path"] = str(places[number % 2])
            reload(daemon, project)
        until(lambda: sum(map(lines, places)) >= 15 * 800, "all is delivered")
        assert daemon.drain() == 0
    assert served(daemon, "mirror") == 1
    events = [Event.from_json(line) for path in places for line in read_lines(path)]
    assert max(Counter(event.id for event in events).values()) == 1
    assert len(events) == 15 * 800
    for path in places:  # what was delivered under one configuration is in order
        seen: dict[int, int] = {}
        for event in (Event.from_json(line) for line in read_lines(path)):
            assert event.key is not None
            assert seen.get(event.key["id"], 0) < event.source.seq
            seen[event.key["id"]] = event.source.seq


def test_the_level_of_the_log_the_shape_and_the_console_change_too(project: Project) -> None:
    old = int(str(project.content["http"]["listen"]).rpartition(":")[2])
    new = free_port()
    with project.daemon() as daemon:
        assert get(old, "/healthz").status == 200
        project.content["log"] = {"format": "json"}
        project.content["http"] = {"listen": f"127.0.0.1:{new}", "token": TOKEN}
        reload(daemon, project, '"message": "The configuration was reloaded."')
        until(lambda: get(new, "/healthz").status == 200, "it has moved")
        with pytest.raises(ConnectionRefusedError):
            get(old, "/healthz")
        assert served(daemon, "mirror") == 1
        project.content["log"] = {"level": "error"}
        project.write()
        daemon.process.send_signal(signal.SIGHUP)
        del project.content["http"]
        project.write()
        daemon.process.send_signal(signal.SIGHUP)

        def is_gone() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", new)) != 0

        until(is_gone, "the console is off")
        assert daemon.drain() == 0
        assert "Draining" not in daemon.said()


def test_systemd_hears_of_the_start_the_reload_and_the_end(project: Project, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(20)
        heard: list[str] = []

        def hear(word: str) -> None:
            while not heard or word not in heard[-1]:
                heard.append(listening.recv(4096).decode())

        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "3000000"}
        with project.daemon(environment=environment) as daemon:
            hear("READY=1")
            began = time.monotonic()
            for _ in range(4):
                heard.append("")
                hear("WATCHDOG=1")
            assert time.monotonic() - began < 8
            reload(daemon, project)
            hear("RELOADING=1\nMONOTONIC_USEC=")
            hear("READY=1")
            assert daemon.drain() == 0
            hear("STOPPING=1")


def test_the_watchdog_goes_hungry_when_a_pipeline_hangs(project: Project, tmp_path: Path, connect: Connect) -> None:
    """A sink that never returns, in a daemon whose patience with a delivery is one second."""
    program = tmp_path / "impatient.py"
    program.write_text(
        "import sys, threading\n"
        "from cdc import metrics\n"
        "from cdc.cli import main\n"
        "from cdc.sinks.file import FileSink\n"
        "metrics.DELIVERY_PATIENCE = 1.0\n"
        "FileSink.deliver = lambda self, batch: threading.Event().wait()\n"
        "main()\n"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "3000000"}
        with project.daemon(program=[sys.executable, program], environment=environment) as daemon:
            fetch(connect(project.dsn), "insert into orders values (1, 1)")
            daemon.wait_until_it_says("A pipeline's thread hangs; the watchdog is not fed.")
            listening.setblocking(False)
            while True:  # what was said before
                try:
                    listening.recv(4096)
                except BlockingIOError:
                    break
            listening.settimeout(3)
            heard: list[str] = []

            def listen_on() -> None:
                while True:
                    heard.append(listening.recv(4096).decode())

            with pytest.raises(TimeoutError):
                listen_on()
            assert not [text for text in heard if "WATCHDOG" in text]
            port = int(str(project.content["http"]["listen"]).rpartition(":")[2])
            reasons = get(port, "/readyz").json["reasons"]
            assert {reason["reason"] for reason in reasons} == {"hanging"}
