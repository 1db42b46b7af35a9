"""cdc status against a real server: one line per sink that says what is the matter, and the JSON shape."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2
import pytest
from click.testing import CliRunner, Result
from psycopg2 import sql
from psycopg2.extensions import connection, make_dsn

from cdc import inventory, outbox
from cdc.cli import main
from cdc.cli.terminal import age, byte_size
from cdc.connection import Connection
from cdc.embedded import start
from cdc.outbox import Outbox, Owner

if TYPE_CHECKING:
    from conftest import Server

UNREACHABLE = "host=127.0.0.1 port=1 dbname=shop user=cdc password=hunter2"
TABLES = "create table orders (id bigint primary key, status text)"
SINK_KEYS = {
    "state", "pending", "pending_capped", "lag_seconds", "delivered_at", "last_error", "last_error_at", "dead_letters",
    "owner", "dropped", "parked", "paused", "state_since", "backfills",
}  # fmt: skip
DATABASE_KEYS = {
    "state", "error", "revision", "armed", "outbox_bytes", "oldest_transaction", "drift", "problems", "sinks",
    "outbox_held_by", "notify_queue_usage",
}  # fmt: skip


@dataclass
class Shop:
    """A database with a table, and the command line on a configuration that names it ``shop``."""

    dsn: str
    cursor: Any
    path: Path
    config: dict[str, Any]

    def run(self, *arguments: str) -> Result:
        self.path.write_text(json.dumps(self.config))
        return CliRunner().invoke(main, ["-c", str(self.path), *arguments])

    def migrate(self) -> None:
        result = self.run("migrate")
        assert result.exit_code == 0, result.output

    def json(self, expected_exit: int = 0) -> dict[str, Any]:
        result = self.run("status", "--json")
        assert result.exit_code == expected_exit, result.output
        databases: dict[str, Any] = json.loads(result.stdout)["databases"]
        assert all(set(database) == DATABASE_KEYS for database in databases.values())
        assert all(set(sink) == SINK_KEYS for database in databases.values() for sink in database["sinks"].values())
        return databases

    def audit(self) -> dict[str, Any]:
        sink: dict[str, Any] = self.json()["shop"]["sinks"]["audit"]
        return sink

    def text(self, expected_exit: int = 0) -> str:
        result = self.run("status")
        assert result.exit_code == expected_exit, result.output
        return result.stdout

    def row(self) -> list[str]:
        """The line of sink audit, cell by cell."""
        [line] = [line for line in self.text().splitlines() if line.startswith("shop ")]
        return [cell.strip() for cell in line.split("  ") if cell.strip()]


@pytest.fixture
def bare(database: str, connect: Callable[..., connection], tmp_path: Path) -> Shop:
    """Not migrated yet."""
    cursor = connect(database).cursor()
    cursor.execute(TABLES)
    config = {
        "databases": {"shop": {"dsn": database, "tables": {"public.orders": {}}}},
        "sinks": {"audit": {"type": "file", "path": str(tmp_path / "out.jsonl")}},
    }
    return Shop(database, cursor, tmp_path / "config.yaml", config)


@pytest.fixture
def shop(bare: Shop) -> Shop:
    bare.migrate()
    return bare


@pytest.fixture
def served(shop: Shop) -> Iterator[Outbox]:
    """Sink audit, claimed by this test as a daemon would."""
    with Connection(shop.dsn, purpose="test") as session:
        book = Outbox(session, database="shop", sink="audit", owner=Owner("db1:4711", 4711))
        assert book.claim(start="now")
        yield book


def test_a_served_idle_sink_is_running_with_nothing_pending_and_no_lag(shop: Shop, served: Outbox) -> None:
    served.set_state("running")
    assert shop.row() == ["shop", "audit", "running", "0", "0 s", "never", "0", "db1:4711"]
    sink = shop.audit()
    assert datetime.fromisoformat(sink.pop("state_since")).tzinfo is not None
    assert sink == {
        "state": "running",
        "pending": 0,
        "pending_capped": False,
        "lag_seconds": 0.0,
        "delivered_at": None,
        "last_error": None,
        "last_error_at": None,
        "dead_letters": 0,
        "dropped": 0,
        "parked": 0,
        "paused": False,
        "backfills": [],
        "owner": "db1:4711",
    }


def test_the_first_line_says_whether_all_is_well(shop: Shop, served: Outbox) -> None:
    def verdict() -> str:
        return shop.text().splitlines()[0]

    served.set_state("running")
    assert verdict() == "all is delivered, up to date"
    served.set_state("retrying", "the disk is full")
    assert verdict() == "1 of 1 sink does not deliver: shop/audit"
    served.set_state("running")
    shop.cursor.execute('drop trigger "00_cdc_capture" on orders')
    assert verdict() == "look at the triggers of shop"


def test_a_healthy_database_is_summed_up_in_one_line(shop: Shop, served: Outbox) -> None:
    served.set_state("running")
    lines = shop.text().splitlines()
    assert lines[-1].startswith(f"shop: revision {inventory.head()}, not armed, outbox ")
    assert lines[-1].endswith("KiB, no drift")
    state = shop.json()["shop"]
    assert (state["state"], state["error"], state["drift"], state["problems"]) == ("ok", None, 0, [])
    assert state["revision"] == inventory.head()
    assert isinstance(state["outbox_bytes"], int)


def test_the_bell_is_armed_while_a_listener_holds_its_lock(shop: Shop) -> None:
    assert shop.json()["shop"]["armed"] is False
    shop.cursor.execute("select pg_advisory_lock(6513763, 1)")
    assert shop.json()["shop"]["armed"] is True
    assert f"revision {inventory.head()}, armed, " in shop.text()


def test_a_writer_that_stays_silent_does_not_look_armed(shop: Shop) -> None:
    shop.cursor.execute("select pg_advisory_lock_shared(6513763, 1)")
    assert shop.json()["shop"]["armed"] is False


def test_pending_events_without_a_daemon_are_counted_and_age(shop: Shop) -> None:
    shop.cursor.execute("insert into orders select n, 'new' from generate_series(1, 3) n")
    shop.cursor.execute("update cdc.event set captured_at = clock_timestamp() - interval '4 minutes' where seq = "
                        "(select min(seq) from cdc.event)")  # fmt: skip
    sink = shop.audit()
    assert (sink["state"], sink["pending"], sink["delivered_at"]) == ("down", 3, None)
    assert 240 <= sink["lag_seconds"] < 260
    assert shop.row() == ["shop", "audit", "down", "3", "4 min", "never", "0", "-"]
    assert "shop: audit: down: no daemon serves it (start cdc run)" in shop.text()


def test_lag_is_zero_again_once_everything_is_delivered(shop: Shop, served: Outbox) -> None:
    served.set_state("running")
    shop.cursor.execute("insert into orders values (1, 'new'), (2, 'new')")
    batch = served.next_batch(None, events=10, bytes_=1000)
    assert batch is not None
    assert shop.audit()["pending"] == 2
    served.acknowledge(batch.last_seq)
    sink = shop.audit()
    assert (sink["pending"], sink["lag_seconds"]) == (0, 0.0)
    assert datetime.fromisoformat(sink["delivered_at"]).tzinfo is not None
    assert "s ago" in " ".join(shop.row())


def test_a_half_delivered_window_counts_only_the_rest(shop: Shop, served: Outbox) -> None:
    shop.cursor.execute("insert into orders select n, 'new' from generate_series(1, 5) n")
    batch = served.next_batch(None, events=2, bytes_=10**6)
    assert batch is not None
    served.acknowledge(batch.last_seq)
    assert shop.audit()["pending"] == 3


def test_changes_of_a_transaction_that_goes_on_are_not_pending(shop: Shop, connect: Callable[..., connection]) -> None:
    writer = connect(shop.dsn, autocommit=False)
    writer.cursor().execute("insert into orders values (1, 'new')")
    assert shop.audit()["pending"] == 0
    writer.commit()
    assert shop.audit()["pending"] == 1


def test_more_pending_than_can_be_counted_in_time_has_a_plus(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "PENDING_CAP", 2)
    shop.cursor.execute("insert into orders select n, 'new' from generate_series(1, 3) n")
    sink = shop.audit()
    assert (sink["pending"], sink["pending_capped"]) == (2, True)
    assert shop.row()[3] == "2+"


def test_the_lag_of_a_backlog_too_large_to_count_is_that_of_its_oldest_event(shop: Shop) -> None:
    """Where the oldest event lies in the last of the outbox's children and all of the first is newer."""
    shop.cursor.execute("select setval('cdc.event_seq', 2::bigint << 24); insert into orders values (0, 'new')")
    shop.cursor.execute("update cdc.event set captured_at = clock_timestamp() - interval '2 hours'")
    shop.cursor.execute("select setval('cdc.event_seq', 3::bigint << 24)")
    shop.cursor.execute("insert into orders select n, 'new' from generate_series(1, 100001) n")
    assert shop.row()[3:5] == ["100000+", "2 h"]


def test_dead_letters_are_counted_for_their_sink_and_those_others_wait_behind(shop: Shop, served: Outbox) -> None:
    letter = "insert into cdc.dead_letter (sink, event_id, event, reason, parked) values ('audit', %s, '{}', 'no', %s)"
    shop.cursor.execute(letter, ("a", False))
    sink = shop.audit()
    assert (sink["dead_letters"], sink["parked"]) == (1, 0)
    assert shop.row()[6] == "1"
    shop.cursor.execute(letter, ("b", True))
    sink = shop.audit()
    assert (sink["dead_letters"], sink["parked"]) == (2, 1)
    assert "shop: audit: later events of their keys wait behind 1 dead letters (cdc dead-letters list audit)" in (
        shop.text()
    )


def test_a_sink_that_does_not_return_is_shown_with_how_long(shop: Shop, served: Outbox) -> None:
    assert served.epoch is not None
    with Connection(shop.dsn, purpose="test") as session:
        outbox.note_stall(session, "audit", epoch=served.epoch, seconds=75)
    assert shop.row()[2] == "stalled"
    assert "shop: audit: stalled: it has not returned from a delivery for 1 min" in shop.text()
    assert shop.audit()["state"] == "stalled"


def test_a_paused_sink_is_paused_whether_a_daemon_serves_it_or_not(shop: Shop, served: Outbox) -> None:
    served.set_state("running")
    shop.cursor.execute("update cdc.sink set paused = true")
    sink = shop.audit()
    assert (sink["state"], sink["paused"]) == ("running", True)  # its daemon has not noticed yet
    served.set_state("paused")
    assert shop.audit()["state"] == "paused"
    assert "shop: audit: paused: nothing is delivered until cdc sinks resume audit" in shop.text()
    shop.cursor.execute("update cdc.sink set epoch = epoch + 1")  # nobody's
    assert shop.audit()["state"] == "paused"
    assert "until cdc sinks resume audit; no daemon serves it" in shop.text()


def test_a_stopped_sink_stays_stopped_when_its_daemon_has_gone_and_says_why(shop: Shop) -> None:
    with Connection(shop.dsn, purpose="test") as session:
        book = Outbox(session, database="shop", sink="audit", owner=Owner("db1:4711", 4711))
        assert book.claim(start="now")
        book.set_state("stopped", "HTTP 410 Gone")
    sink = shop.audit()
    assert (sink["state"], sink["last_error"], sink["owner"]) == ("stopped", "HTTP 410 Gone", "db1:4711")
    [line] = [line for line in shop.text().splitlines() if line.startswith("shop: audit: ")]
    assert line.startswith("shop: audit: stopped: it takes nothing more (mend the cause, then restart cdc run); last ")
    assert line.endswith(" s ago: HTTP 410 Gone")


def test_a_retrying_sink_shows_its_last_error(shop: Shop, served: Outbox) -> None:
    served.set_state("retrying", "connection refused")
    assert shop.row()[2] == "retrying"
    [line] = [line for line in shop.text().splitlines() if line.startswith("shop: audit: ")]
    assert line.startswith("shop: audit: retrying; last error ")
    assert line.endswith(": connection refused")


def test_the_error_of_a_sink_that_runs_again_is_shown_only_while_recent(shop: Shop, served: Outbox) -> None:
    served.set_state("retrying", "connection refused")
    served.set_state("running")
    assert "shop: audit: last error " in shop.text()
    shop.cursor.execute("update cdc.sink set last_error_at = clock_timestamp() - interval '1 hour'")
    assert "connection refused" not in shop.text()
    assert shop.audit()["last_error"] == "connection refused"


def test_a_killed_daemon_leaves_its_sink_down_not_running(shop: Shop) -> None:
    with Connection(shop.dsn, purpose="test") as session:
        book = Outbox(session, database="shop", sink="audit", owner=Owner("db1:4711", 4711))
        assert book.claim(start="now")
        book.set_state("running")
        assert shop.audit()["state"] == "running"
    deadline = time.monotonic() + 10  # the server notices the closed socket a moment later
    while shop.audit()["state"] == "running":
        assert time.monotonic() < deadline, "the sink is still shown as running"
    assert shop.audit()["state"] == "down"


def test_a_sink_added_to_the_configuration_is_new_until_it_has_a_position(shop: Shop) -> None:
    shop.config["sinks"]["late"] = {"type": "stdout"}
    late = shop.json()["shop"]["sinks"]["late"]
    assert (late["state"], late["pending"], late["lag_seconds"]) == ("new", None, None)
    assert "shop: late: new: it has no position yet" in shop.text()


def test_the_first_line_does_not_say_that_all_is_well_while_a_sink_is_new(shop: Shop, served: Outbox) -> None:
    served.set_state("running")
    shop.config["sinks"]["late"] = {"type": "stdout"}
    assert shop.text().splitlines()[0] == "1 of 2 sinks has no position yet (run cdc migrate): shop/late"
    shop.config["sinks"]["later"] = {"type": "stdout"}
    assert shop.text().splitlines()[0] == "2 of 3 sinks have no position yet (run cdc migrate): shop/late, shop/later"


def test_a_sink_the_configuration_no_longer_has_is_unknown_and_pins_the_outbox(shop: Shop) -> None:
    shop.config["sinks"] = {"other": {"type": "stdout"}}
    assert shop.json()["shop"]["sinks"]["audit"]["state"] == "unknown"
    assert "shop: audit: unknown: the configuration no longer has it, and its position keeps the outbox" in shop.text()


def test_drift_is_counted(shop: Shop) -> None:
    shop.cursor.execute('alter table orders disable trigger "00_cdc_capture"')
    assert shop.json()["shop"]["drift"] == 1
    assert "drift in 1 (run cdc check)" in shop.text()


def test_a_configured_table_that_is_gone_is_a_problem_and_the_rest_is_shown(shop: Shop) -> None:
    shop.config["databases"]["shop"]["tables"]["public.gone"] = {}
    state = shop.json()["shop"]
    assert state["problems"] == ["public.gone: no such table (correct `tables`, or create it first)"]
    assert (state["drift"], state["sinks"]["audit"]["state"]) == (0, "down")
    assert "shop: public.gone: no such table" in shop.text()


def test_an_open_writing_transaction_is_named_with_pid_application_and_age(
    shop: Shop, connect: Callable[..., connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = connect(make_dsn(shop.dsn, application_name="month end"), autocommit=False)
    writer.cursor().execute("insert into orders values (1, 'new')")
    oldest = shop.json()["shop"]["oldest_transaction"]
    assert oldest["pid"] == writer.info.backend_pid
    assert (oldest["application"], oldest["state"], oldest["prepared"]) == ("month end", "idle in transaction", None)
    assert oldest["age_seconds"] >= 0
    assert "oldest open transaction" not in shop.text()  # not for long enough to be worth a line
    # By its full name: on the package the click command has taken the module's place.
    monkeypatch.setattr(import_module("cdc.cli.status"), "LONG_OPEN", 0.0)
    assert f"shop: oldest open transaction: pid {oldest['pid']} (database " in shop.text()
    writer.rollback()
    assert shop.json()["shop"]["oldest_transaction"] is None


def test_a_transaction_in_another_database_of_the_cluster_holds_back_too(
    shop: Shop, server: Server, connect: Callable[..., connection]
) -> None:
    writer = connect(server.admin_dsn, autocommit=False)
    writer.cursor().execute("select pg_current_xact_id()")
    oldest = shop.json()["shop"]["oldest_transaction"]
    assert (oldest["pid"], oldest["database"]) == (writer.info.backend_pid, writer.info.dbname)


def test_a_prepared_transaction_holds_back_too(tmp_path: Path) -> None:
    directory = Path(tempfile.mkdtemp(prefix="cdc-tests-"))
    try:
        with start(directory, settings={"fsync": "off", "max_prepared_transactions": "1"}) as server:
            conn = psycopg2.connect(server.dsn())
            conn.autocommit = True
            cursor = conn.cursor()
            cursor.execute(TABLES)
            config = {
                "databases": {"shop": {"dsn": server.dsn(), "tables": {"public.orders": {}}}},
                "sinks": {"audit": {"type": "stdout"}},
            }
            shop = Shop(server.dsn(), cursor, tmp_path / "config.yaml", config)
            shop.migrate()
            cursor.execute("begin")
            cursor.execute("insert into orders values (1, 'new')")
            cursor.execute("prepare transaction 'month end'")
            oldest = shop.json()["shop"]["oldest_transaction"]
            assert (oldest["pid"], oldest["prepared"], oldest["state"]) == (None, "month end", "prepared")
            conn.close()
    finally:
        shutil.rmtree(directory)


def test_a_database_that_was_never_migrated_is_not_installed(bare: Shop) -> None:
    state = bare.json()["shop"]
    assert (state["state"], state["sinks"], state["armed"]) == ("not installed", {}, None)
    assert bare.text() == (
        "1 of 1 database cannot be served: shop\n\n"
        "shop: not installed: cdc is not installed in this database (run cdc migrate)\n"
    )


def test_another_revision_is_said_and_nothing_is_read(shop: Shop) -> None:
    shop.cursor.execute("update cdc.alembic_version set version_num = '0000'")
    state = shop.json()["shop"]
    assert (state["state"], state["revision"]) == ("wrong revision", "0000")
    assert "(run cdc migrate)" in shop.text()


def test_an_unreachable_database_exits_69_and_the_others_are_shown(shop: Shop) -> None:
    shop.config["databases"]["far"] = {"dsn": UNREACHABLE, "tables": {"public.orders": {}}}
    databases = shop.json(69)
    assert (databases["shop"]["state"], databases["far"]["state"]) == ("ok", "unreachable")
    text = shop.text(69)
    assert "far: unreachable: cannot connect: Connection refused (start the server at host=127.0.0.1 port=1" in text
    assert "shop  " in text
    assert "hunter2" not in text + json.dumps(databases)


def test_a_role_without_privileges_is_an_error_with_its_cure(shop: Shop, server: Server) -> None:
    role = f"cdc_test_{uuid.uuid4().hex[:12]}"
    with psycopg2.connect(server.admin_dsn) as conn, conn.cursor() as cursor:
        cursor.execute(sql.SQL("create role {} login password 'secret'").format(sql.Identifier(role)))
    conn.close()
    shop.config["databases"]["shop"]["dsn"] = make_dsn(shop.dsn, user=role, password="secret")
    state = shop.json()["shop"]
    assert state["state"] == "error"
    assert state["error"] == "permission denied for schema cdc (grant cdc_reader to this role, as `cdc migrate` does)"
    shop.cursor.execute(sql.SQL("drop role {}").format(sql.Identifier(role)))


def test_only_the_named_database_is_looked_at(shop: Shop) -> None:
    shop.config["databases"]["far"] = {"dsn": UNREACHABLE, "tables": {"public.orders": {}}}
    result = shop.run("status", "-d", "shop", "--json")
    assert result.exit_code == 0
    assert set(json.loads(result.stdout)["databases"]) == {"shop"}


def test_in_a_pipe_columns_are_aligned_without_boxes_colours_or_trailing_blanks(shop: Shop) -> None:
    shop.config["sinks"]["a-sink-with-a-long-name"] = {"type": "stdout"}
    shop.migrate()
    lines = shop.text().splitlines()
    header, rows = lines[2], lines[3:5]
    assert all(row.index("down") == header.index("state") for row in rows)
    assert all(line == line.rstrip() for line in lines)
    assert shop.text().isascii()
    assert "\x1b" not in shop.text()


def test_an_error_text_cannot_write_to_the_terminal(shop: Shop, served: Outbox) -> None:
    served.set_state("retrying", "[red]bad\x1b[2J\nworse")
    assert "last error 0 s ago: [red]bad\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}worse" in shop.text()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (0.9, "0 s"), (59.9, "59 s"), (60, "1 min"), (180, "3 min"), (7199, "119 min"), (7200, "2 h"),
     (172_800, "2 d")],
)  # fmt: skip
def test_ages_are_rounded_down_to_one_unit(seconds: float, shown: str) -> None:
    assert age(seconds) == shown


@pytest.mark.parametrize(("number", "shown"), [(0, "0 B"), (1023, "1023 B"), (8192, "8.0 KiB"), (3 * 2**40, "3.0 TiB")])
def test_sizes_have_a_binary_unit(number: int, shown: str) -> None:
    assert byte_size(number) == shown
