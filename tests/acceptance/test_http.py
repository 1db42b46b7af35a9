"""Metrics, health and the pages' guard, on a real daemon."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from harness import Project, until
from pages import TOKEN, get, metrics
from psycopg2.extensions import connection
from service import free_port
from sql import fetch

Connect = Callable[..., connection]
SINK = '{database="shop",sink="mirror"}'
DATABASE = '{database="shop"}'


@pytest.fixture
def project(tmp_path: Path, database: str, connect: Connect) -> Iterator[Project]:
    fetch(connect(database), "create table orders (id int primary key, note text)")
    made = Project(tmp_path, database, {"public.*": {}}, "{table}.jsonl", sink={"retry": {"max": "1s"}})
    made.content["http"] = {"listen": f"127.0.0.1:{free_port()}", "token": TOKEN, "stalled_after": "2s"}
    made.write()
    made.cdc("migrate")
    yield made
    made.remove_output()


def port_of(project: Project) -> int:
    return int(str(project.content["http"]["listen"]).rpartition(":")[2])


def test_what_is_delivered_is_counted_and_timed(project: Project, connect: Connect) -> None:
    port = port_of(project)
    writer = connect(project.dsn)
    with project.daemon():
        fetch(writer, "insert into orders select i, 'x' from generate_series(1, 1000) i")
        until(lambda: metrics(port)["cdc_events_delivered_total" + SINK] == 1000, "all are counted")
        until(lambda: metrics(port)["cdc_commit_to_ack_seconds_count" + SINK] == 1000, "and acknowledged")
        until(lambda: metrics(port).get("cdc_pending_events" + SINK) == 0, "nothing is pending")
        found = metrics(port)
        assert found["cdc_batch_events_sum" + SINK] == 1000
        assert found["cdc_events_filtered_total" + SINK] == 0
        assert found['cdc_sink_state{database="shop",sink="mirror",state="running"}'] == 1
        assert found["cdc_database_up" + DATABASE] == 1
        assert found["cdc_outbox_bytes" + DATABASE] > 0
        assert found["cdc_lag_seconds" + SINK] == 0
        assert found["cdc_dead_letters" + SINK] == 0
        assert 0 <= found["cdc_notify_queue_usage" + DATABASE] < 0.1
        assert found["cdc_trigger_drift" + DATABASE] == 0
        assert abs(found["cdc_clock_offset_seconds" + DATABASE]) < 1
        assert found['cdc_commit_to_ack_seconds_bucket{database="shop",le="60.0",sink="mirror"}'] == 1000
        assert found["cdc_config_last_reload_successful"] == 1
        assert found["process_resident_memory_bytes"] > 10_000_000
        until(lambda: metrics(port).get("cdc_armed" + DATABASE) == 1, "it sleeps")


def test_a_backfill_is_counted_and_can_be_paused(project: Project, connect: Connect) -> None:
    port = port_of(project)
    table = '{database="shop",sink="mirror",table="public.orders"}'
    conn = connect(project.dsn)
    fetch(conn, "insert into orders select i, 'x' from generate_series(1, 300) i; analyze orders")
    with project.daemon():
        project.cdc("backfill", "start", "mirror", "--chunk", "5", "--rate", "4")
        until(lambda: metrics(port).get("cdc_backfill_rows" + table, 0) > 5, "rows are counted")
        assert metrics(port)["cdc_backfill_running" + table] == 1
        assert 0 < metrics(port)["cdc_backfill_done_ratio" + table] < 1
        assert "backfill of public.orders: " in project.cdc("status").stdout
        [shown] = project.status()["databases"]["shop"]["sinks"]["mirror"]["backfills"]
        assert (shown["table"], shown["state"]) == ("public.orders", "running")
        project.cdc("backfill", "pause", "mirror")
        until(lambda: metrics(port)["cdc_backfill_running" + table] == 0, "it is paused")
        assert "paused until cdc backfill resume mirror" in project.cdc("status").stdout


def test_a_sink_that_fails_makes_the_daemon_unready_and_its_recovery_ready_again(
    project: Project, connect: Connect
) -> None:
    port = port_of(project)
    writer = connect(project.dsn)
    project.file.parent.mkdir(exist_ok=True)
    broken = project.directory / "orders.jsonl"
    broken.mkdir()  # a directory where the file should be
    with project.daemon():
        assert get(port, "/readyz").status == 200
        fetch(writer, "insert into orders values (1, 'x')")
        until(lambda: get(port, "/readyz").status == 503, "it is unready")
        page = get(port, "/readyz").json
        assert page["ready"] is False
        (reason,) = page["reasons"]
        assert (reason["database"], reason["sink"], reason["reason"]) == ("shop", "mirror", "stalled")
        assert "path must name a file; move that directory away" in reason["detail"]
        assert reason["seconds"] >= 2
        assert page["databases"]["shop"]["sinks"]["mirror"]["lag_seconds"] >= 2
        found = metrics(port)
        assert found["cdc_delivery_failures_total" + SINK] >= 1
        assert found["cdc_sink_stalled" + SINK] == 1
        assert get(port, "/healthz").status == 200
        broken.rmdir()
        until(lambda: get(port, "/readyz").status == 200, "it is ready again")
        assert metrics(port)["cdc_sink_stalled" + SINK] == 0


def test_an_open_transaction_is_named_and_does_not_make_it_unready(project: Project, connect: Connect) -> None:
    port = port_of(project)
    writer = connect(project.dsn, autocommit=False)
    fetch(writer, "set application_name = 'nightly report'")
    fetch(writer, "insert into orders values (1, 'x')")
    with project.daemon():

        def named() -> bool:
            metrics(port)  # asks for a fresh look
            found = get(port, "/readyz").json["databases"]["shop"]["oldest_transaction"]
            return found is not None and found["application"] == "nightly report"

        until(named, "it is named")
        page = get(port, "/readyz")
        assert page.status == 200
        assert page.json["databases"]["shop"]["oldest_transaction"]["pid"] == writer.info.backend_pid
    writer.rollback()


def test_status_is_what_the_command_prints(project: Project) -> None:
    with project.daemon():
        served, printed = get(port_of(project), "/api/status").json, project.status()
        for one in (served, printed):
            for name in ("armed", "outbox_bytes", "oldest_transaction"):
                one["databases"]["shop"].pop(name)
        assert served == printed


def test_a_sink_that_sleeps_is_not_behind_by_what_it_does_not_want(project: Project, connect: Connect) -> None:
    port = port_of(project)
    writer = connect(project.dsn)
    quiet = '{database="shop",sink="quiet"}'
    project.content["sinks"]["quiet"] = {
        "type": "file",
        "path": f"{project.directory}/quiet",
        "tables": ["public.never"],
    }
    project.write()
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 2)
        began = time.monotonic()
        while time.monotonic() - began < 6:  # three times stalled_after
            fetch(writer, "insert into orders select coalesce(max(id), 0) + 1, 'x' from orders")
            assert get(port, "/readyz").status == 200
            assert metrics(port).get("cdc_lag_seconds" + quiet, 0) < 2
            threading.Event().wait(0.3)
        until(lambda: metrics(port).get("cdc_pending_events" + quiet) == 0, "nothing is pending")
        assert metrics(port)["cdc_sink_stalled" + quiet] == 0


@pytest.mark.parametrize("offset", ["+600", "-600"])
def test_a_daemon_whose_clock_is_wrong_measures_by_the_servers(project: Project, connect: Connect, offset: str) -> None:
    library = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)
    if library is None:
        if os.environ.get("CI") == "true":
            pytest.fail("libfaketime is missing")
        pytest.skip("libfaketime is not installed")
    port = port_of(project)
    writer = connect(project.dsn)
    clock = {"LD_PRELOAD": str(library), "FAKETIME": f"{offset}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    with project.daemon(environment=clock):
        until(lambda: "cdc_clock_offset_seconds" + DATABASE in metrics(port), "the server's clock is known")
        for number in range(20):
            fetch(writer, "insert into orders values (%s, 'x')", (number,))
        until(lambda: metrics(port)["cdc_commit_to_ack_seconds_count" + SINK] == 20, "all are acknowledged")
        found = metrics(port)
        assert abs(found["cdc_clock_offset_seconds" + DATABASE] + int(offset)) < 5
        # On a busy machine a change may take a while; ten minutes it does not.
        assert 0 < found["cdc_commit_to_ack_seconds_sum" + SINK] < 20 * 20
        assert found['cdc_commit_to_ack_seconds_bucket{database="shop",le="0.001",sink="mirror"}'] < 20
        assert found["cdc_lag_seconds" + SINK] < 20


# -- the guard --


def test_another_host_name_is_refused_so_that_no_name_can_be_pointed_here(project: Project) -> None:
    port = port_of(project)
    with project.daemon():
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "10.0.0.1",
            "",
            "localhost.evil",
        ):
            for path in ("/", "/metrics", "/readyz", "/api/overview", "/api/tail"):
                assert get(port, path, headers={"Host": host}).status == 403, (host, path)
        for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert get(port, "/healthz", headers={"Host": host}).status == 200, host


def test_nothing_is_changed_without_the_token_in_its_header(project: Project) -> None:
    port = port_of(project)
    with project.daemon():
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert get(port, "/api/token", method="POST", headers=right, body={}).status == 200
        for wrong in ({}, {"Authorization": "Bearer " + TOKEN[:-1]}, {"Authorization": "Bearer "}, {"Cookie": TOKEN}):
            assert get(port, "/api/token", method="POST", headers=wrong, body={}).status == 401
        # What a page of another site can send without being asked for leave.
        form = {**right, "Content-Type": "application/x-www-form-urlencoded"}
        assert get(port, "/api/token", method="POST", headers=form, body="{}").status == 415
        assert get(port, "/api/token", headers=right).status == 405
        assert get(port, f"/api/token?token={TOKEN}", method="POST", body={}).status == 401
        huge = {**right, "Content-Length": "100000000"}
        assert get(port, "/api/token", method="POST", headers=huge, body="{}").status == 413


def test_every_answer_carries_the_headers_that_tie_a_browser_down(project: Project) -> None:
    port = port_of(project)
    with project.daemon():
        for path in ("/", "/console.js", "/metrics", "/readyz", "/api/overview", "/nowhere"):
            headers = get(port, path).headers
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "script-src 'self'" in policy
            assert "unsafe" not in policy
            assert (headers["X-Content-Type-Options"], headers["X-Frame-Options"]) == ("nosniff", "DENY")
            assert headers["Cache-Control"] == "no-store"
            assert "Server" not in headers
        for path in ("/../config.yaml", "/static/../app.py", "/console.js/..", "/%2e%2e/config.yaml", "//etc/passwd"):
            assert get(port, path).status == 404, path


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing_inline(project: Project) -> None:
    port = port_of(project)
    with project.daemon():
        page = get(port, "/").text
        for link in re.findall(r'(?:src|href)="([^"]+)"', page):
            assert not link.startswith(("http", "//", "/")), link
            assert get(port, f"/{link}").status in (200, 503)
        assert not re.search(r"<script(?![^>]*src=)", page)
        assert not re.search(r"\son\w+=|\sstyle=|<style", page)
        scripts = get(port, "/console.js").text + get(port, "/plots.js").text
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", scripts)


def test_row_values_are_hidden_unless_allowed_and_then_want_the_token(project: Project, connect: Connect) -> None:
    port = port_of(project)
    writer = connect(project.dsn)
    secret = "4929-1234-5678"
    right = {"Authorization": f"Bearer {TOKEN}"}

    def seen(headers: dict[str, str]) -> str:
        after = get(port, "/api/tail", headers=headers).json["last"]
        text = ""

        def came() -> bool:
            nonlocal text
            fetch(
                writer, "insert into orders values (%s, %s) on conflict (id) do update set note = null", (id_, secret)
            )
            fetch(writer, "update orders set note = %s where id = %s", (secret, id_))
            page = get(port, f"/api/tail?after={after}", headers=headers)
            text = page.text
            return any(event["op"] == "update" for event in page.json["events"])

        until(came, "the tail sees an update", pause=0.2)
        return text

    id_ = 1
    with project.daemon():
        hidden = seen({})
        assert secret not in hidden
        assert '"changed": ["note"]' in hidden
    id_ = 2
    project.content["http"]["show_values"] = True
    project.write()
    with project.daemon():
        assert get(port, "/api/tail").status == 401
        assert secret in seen(right)
        for path in ("/api/overview", "/readyz", "/metrics", "/api/status", "/api/history"):
            assert secret not in get(port, path).text


def test_the_tail_leaves_when_nobody_watches(project: Project, connect: Connect) -> None:
    look = connect(project.dsn)
    sessions = "select count(*) from pg_stat_activity where application_name = 'cdc console'"
    with project.daemon():
        get(port_of(project), "/api/tail")
        until(lambda: fetch(look, sessions)[0][0] == 1, "a reader is there")
        until(lambda: fetch(look, sessions)[0][0] == 0, "it has left", seconds=40)


# -- what must not hold delivery up --


def test_a_port_that_is_taken_is_said_and_changes_are_delivered(project: Project, connect: Connect) -> None:
    port = port_of(project)
    with socket.create_server(("127.0.0.1", port)), project.daemon() as daemon:
        daemon.wait_until_it_says("No console and no metrics: the address cannot be had.")
        fetch(connect(project.dsn), "insert into orders values (1, 'x')")
        until(lambda: project.directory.joinpath("orders.jsonl").exists(), "it is delivered")
        assert daemon.drain() == 0


def test_clients_that_dribble_hold_up_neither_a_scrape_nor_the_end(project: Project) -> None:
    port = port_of(project)
    with project.daemon() as daemon:
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
        for number, one in enumerate(slow):
            one.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n" if number % 2 else b"G")
        answered: list[int] = []
        threads = [threading.Thread(target=lambda: answered.append(get(port, "/metrics").status)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert answered == [200] * 4
        assert daemon.drain() == 0
        for one in slow:
            one.close()


def test_an_unreachable_database_makes_it_unready_and_keeps_no_page_waiting(project: Project) -> None:
    port = port_of(project)
    project.content["databases"]["gone"] = {
        "dsn": "host=127.0.0.1 port=1 dbname=x user=cdc password=hunter2-canary",
        "tables": {"public.x": {}},
    }
    project.write()
    with project.daemon():
        until(lambda: get(port, "/readyz").status == 503, "it is unready")
        (reason,) = get(port, "/readyz").json["reasons"]
        assert (reason["database"], reason["sink"], reason["reason"]) == ("gone", None, "lost")
        assert "Connection refused" in reason["detail"]
        assert metrics(port)['cdc_database_up{database="gone"}'] == 0
        assert metrics(port)["cdc_database_up" + DATABASE] == 1
        for path in ("/", "/readyz", "/metrics", "/api/status", "/api/overview", "/api/tail", "/api/history"):
            assert "hunter2" not in get(port, path).text


def test_overview_and_history_are_json_without_surprises(project: Project, connect: Connect) -> None:
    port = port_of(project)
    with project.daemon():
        fetch(connect(project.dsn), "insert into orders values (1, 'x')")
        until(lambda: get(port, "/api/history").json["sinks"][0]["at"] != [], "a sample is there")
        (sink,) = get(port, "/api/history").json["sinks"]
        lengths = {len(sink[name]) for name in ("at", "rate", "p50", "p99", "pending", "lag")}
        assert len(lengths) == 1
        overview = get(port, "/api/overview").json
        assert overview["ready"] is True
        assert TOKEN not in json.dumps(overview)
        assert project.dsn not in json.dumps(overview)


def test_what_is_asked_for_wrongly_is_refused_in_words(project: Project) -> None:
    port = port_of(project)
    right = {"Authorization": f"Bearer {TOKEN}"}
    with project.daemon():
        for body in (
            {},
            [],
            "x",
            {"database": "shop"},
            {"database": "nowhere", "sink": "mirror"},
            {"database": 1, "sink": []},
        ):
            for path in ("/api/sinks/pause", "/api/dead-letters/replay", "/api/dead-letters/discard"):
                page = get(port, path, method="POST", headers=right, body=json.dumps(body).encode())
                assert page.status == 400, (path, body)
        everywhere = {"database": "shop", "sink": "mirror"}
        assert get(port, "/api/dead-letters/discard", method="POST", headers=right, body=everywhere).status == 400
        odd = {**everywhere, "ids": ["1; drop table x"]}
        assert get(port, "/api/dead-letters/replay", method="POST", headers=right, body=odd).status == 400
        for number in ("x", "-1", "1" * 5000, "\u00b2"):
            assert get(port, f"/api/tail?after={quote(number)}").status == 400, number[:9]
        assert get(port, "/api/tail?after=9223372036854775807").status == 200
        page = get(port, "/api/dead-letters/replay", method="POST", headers=right, body={**everywhere, "ids": [999]})
        assert page.json == {"done": "0 to be delivered again; what fails once more stays."}


def test_every_key_of_what_is_answered_is_documented(project: Project, connect: Connect) -> None:
    told = set(re.findall(r"`(\w+)`", (Path(__file__).parents[2] / "docs" / "json.md").read_text()))
    names = {"shop", "mirror"}  # of the configuration

    def keys(value: object) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {key for inner in value.values() for key in keys(inner)}
        return {key for inner in value for key in keys(inner)} if isinstance(value, list) else set()

    port = port_of(project)
    with project.daemon():
        after = get(port, "/api/tail").json["last"]

        def seen() -> bool:
            fetch(connect(project.dsn), "insert into orders select coalesce(max(id), 0) + 1, 'x' from orders")
            return bool(get(port, f"/api/tail?after={after}").json["events"])

        until(seen, "the tail sees a change", pause=0.2)
        pages = (
            "/readyz",
            "/api/status",
            "/api/overview",
            "/api/history",
            f"/api/tail?after={after}",
            "/api/dead-letters",
        )
        for page in pages:
            assert keys(get(port, page).json) - names <= told, page
    assert keys(json.loads(project.cdc("check", "--json").stdout)) <= told
    assert keys(json.loads(project.cdc("migrate", "--plan", "--json").stdout)) <= told
