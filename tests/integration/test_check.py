"""cdc check against a real server: one finding a line, with its cure, and the exit codes of the contract."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2
import pytest
from click.testing import CliRunner, Result
from psycopg2 import sql
from psycopg2.extensions import connection, make_dsn

from cdc import inventory, listener
from cdc.cli import main
from cdc.embedded import start
from cdc.errors import DatabaseUnreachable
from cdc.sql import QUERIES

if TYPE_CHECKING:
    from conftest import Server

UNREACHABLE = "host=127.0.0.1 port=1 dbname=shop user=cdc password=hunter2"
ORDERS = {"public.orders": {}}
TABLES = """
    create table orders (id bigint primary key, status text);
    create table customers (id bigint primary key, name text);
"""


@dataclass
class Shop:
    """A database with tables, and the command line on a configuration that names it ``shop``."""

    dsn: str
    cursor: Any
    path: Path
    daemon_dsn: str
    config: dict[str, Any]

    def run(self, *arguments: str) -> Result:
        self.path.write_text(json.dumps(self.config))
        self.path.chmod(0o600)  # it holds passwords
        return CliRunner().invoke(main, ["-c", str(self.path), *arguments])

    def configure(self, tables: dict[str, Any], **options: Any) -> None:
        database = {"dsn": self.daemon_dsn, "migrate_dsn": self.dsn, "tables": tables, **options}
        self.config = {"databases": {"shop": database}, "sinks": {"audit": {"type": "file", "path": "/dev/null"}}}

    def migrate(self) -> None:
        result = self.run("migrate")
        assert result.exit_code == 0, result.output

    def check(self, expected_exit: int = 0) -> list[str]:
        result = self.run("check")
        assert result.exit_code == expected_exit, result.output
        return result.stdout.splitlines()


@pytest.fixture
def shop(database: str, connect: Callable[..., connection], tmp_path: Path) -> Shop:
    """Not migrated yet; daemon and migration are one role."""
    cursor = connect(database).cursor()
    cursor.execute(TABLES)
    shop = Shop(database, cursor, tmp_path / "config.yaml", database, {})
    shop.configure(ORDERS)
    return shop


@pytest.fixture
def role(server: Server) -> Iterator[str]:
    """A login role of this test."""
    name = f"cdc_test_{uuid.uuid4().hex[:12]}"
    with psycopg2.connect(server.admin_dsn) as conn, conn.cursor() as cursor:
        cursor.execute(sql.SQL("create role {} login password 'secret'").format(sql.Identifier(name)))
    conn.close()
    yield name
    with psycopg2.connect(server.admin_dsn) as conn, conn.cursor() as cursor:
        cursor.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))
    conn.close()


def test_a_healthy_database_is_one_ok_line(shop: Shop, server: Server) -> None:
    shop.migrate()
    [line] = shop.check()
    assert line.startswith("ok      shop: PostgreSQL ")
    assert line.endswith(f", revision {inventory.head()}, 1 table captured, 1 sink")
    assert f" {server.version // 10000}." in line


def test_json_is_a_list_with_the_documented_keys(shop: Shop) -> None:
    shop.configure({"public.orders": {}, "billing.*": {}})
    shop.migrate()
    ok, warning = json.loads(shop.run("check", "--json").stdout)
    assert set(ok) == set(warning) == {"database", "level", "subject", "message", "cure"}
    assert (ok["database"], ok["level"], ok["subject"], ok["cure"]) == ("shop", "ok", None, None)
    assert warning == {
        "database": "shop",
        "level": "warning",
        "subject": "tables.billing.*",
        "message": "matches no table",
        "cure": "correct it, or create the tables first",
    }


def test_a_database_that_was_never_migrated_is_told_to(shop: Shop) -> None:
    assert shop.check(1) == ["error   shop: cdc is not installed (run cdc migrate)"]


def test_another_revision_is_an_error(shop: Shop) -> None:
    shop.migrate()
    shop.cursor.execute("update cdc.alembic_version set version_num = '0000'")
    [line] = shop.check(1)
    assert line == f"error   shop: schema cdc is at revision 0000, not {inventory.head()} (run cdc migrate)"


def test_a_trigger_that_was_dropped_is_missing(shop: Shop) -> None:
    shop.migrate()
    shop.cursor.execute('drop trigger "00_cdc_capture" on orders; drop trigger "00_cdc_truncate" on orders')
    assert shop.check(1) == ["error   shop: public.orders: trigger is missing (run cdc migrate)"]


def test_one_of_two_triggers_dropped_is_a_difference(shop: Shop) -> None:
    shop.migrate()
    shop.cursor.execute('drop trigger "00_cdc_truncate" on orders')
    assert shop.check(1) == ["error   shop: public.orders: trigger differs from the configuration (run cdc migrate)"]


def test_a_disabled_trigger_is_called_disabled(shop: Shop) -> None:
    shop.migrate()
    shop.cursor.execute('alter table orders disable trigger "00_cdc_capture"')
    [line] = shop.check(1)
    assert line == "error   shop: public.orders: trigger is disabled: changes are not captured (run cdc migrate)"


def test_a_changed_option_is_a_difference(shop: Shop) -> None:
    shop.migrate()
    shop.configure({"public.orders": {"image": "full"}})
    assert shop.check(1) == ["error   shop: public.orders: trigger differs from the configuration (run cdc migrate)"]


def test_a_captured_table_the_configuration_does_not_name_is_unmanaged(shop: Shop) -> None:
    shop.migrate()
    shop.cursor.execute("select cdc.enable_capture('customers')")
    [line] = shop.check(1)
    assert line.startswith("error   shop: public.customers: is captured, and the configuration does not name it (")


def test_one_wrong_table_does_not_hide_the_drift_of_the_others(shop: Shop) -> None:
    shop.cursor.execute("create view recent as select * from orders")
    shop.configure({"public.orders": {}, "public.customers": {}})
    shop.migrate()
    changed = {"public.orders": {"ops": ["insert"]}, "public.customers": {}}
    shop.configure({**changed, "public.gone": {}, "public.recent": {}})
    shop.cursor.execute("create table extra (id int primary key); select cdc.enable_capture('extra')")
    lines = shop.check(1)
    assert lines[0] == "error   shop: tables: public.gone: no such table (correct `tables`, or create it first)"
    assert lines[1].startswith("error   shop: tables: public.recent cannot be captured: it is a view (")
    assert lines[2] == "error   shop: public.orders: trigger differs from the configuration (run cdc migrate)"
    assert lines[3].startswith("error   shop: public.extra: is captured")
    assert len(lines) == 4


def test_a_glob_that_matches_no_table_is_a_warning(shop: Shop) -> None:
    shop.configure({"public.orders": {}, "billing.*": {}})
    shop.migrate()
    ok, line = shop.check()
    assert ok.startswith("ok ")
    assert line == "warning shop: tables.billing.*: matches no table (correct it, or create the tables first)"


def test_a_table_without_a_key_is_a_note_until_the_key_is_named(shop: Shop) -> None:
    shop.cursor.execute("create table journal (line int, text text)")
    shop.configure({"public.journal": {}})
    shop.migrate()
    _, note = shop.check()
    assert note.startswith("note    shop: public.journal: has no primary key: ")
    shop.configure({"public.journal": {"key": ["line"]}})
    shop.migrate()
    assert len(shop.check()) == 1


def test_a_deferrable_primary_key_is_a_note(shop: Shop) -> None:
    shop.cursor.execute("create table loose (id int primary key deferrable); create table elsewhere (like loose)")
    shop.cursor.execute("alter table elsewhere add primary key (id) deferrable")
    shop.configure({"public.loose": {}})
    shop.migrate()
    _, note = shop.check()
    assert note.startswith("note    shop: public.loose: has a deferrable primary key: ")


def test_a_database_that_feeds_no_sink_is_a_warning(shop: Shop) -> None:
    other = {**shop.config["databases"]["shop"]}
    shop.config["databases"]["other"] = other
    shop.config["sinks"]["audit"]["databases"] = ["other"]
    shop.migrate()
    result = shop.run("check", "-d", "shop")
    assert "warning shop: sinks: no sink is fed from this database (add it to a sink's `databases`)" in result.stdout
    assert "other" not in result.stdout


def test_a_replica_role_by_default_is_a_warning(shop: Shop, role: str) -> None:
    shop.migrate()
    shop.cursor.execute(f"alter role {role} set session_replication_role = replica")
    _, line = shop.check()
    assert line.startswith(f"warning shop: session_replication_role: is replica for role {role}: ")


def test_a_server_encoding_other_than_utf8_is_a_warning_with_the_reason(
    shop: Shop, server: Server, connect: Callable[..., connection]
) -> None:
    name = f"test_{uuid.uuid4().hex[:12]}"
    admin = connect(server.admin_dsn).cursor()
    admin.execute(f"create database {name} template template0 encoding 'SQL_ASCII' locale 'C'")
    try:
        dsn = make_dsn(server.admin_dsn, dbname=name)
        connect(dsn).cursor().execute(TABLES)
        shop.dsn = shop.daemon_dsn = dsn
        shop.configure(ORDERS)
        shop.migrate()
        _, line = shop.check()
        assert line.startswith("warning shop: server_encoding: is SQL_ASCII: ")
    finally:
        server.drop_database(name)


def test_a_bell_that_does_not_ring_back_is_an_error(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PgBouncer in transaction mode does."""
    shop.migrate()
    monkeypatch.setitem(QUERIES, "ring_self", "select %(channel)s, %(nonce)s")
    monkeypatch.setattr(listener, "SELF_TEST_DEADLINE", 0.1)
    [line] = shop.check(1)
    assert line.startswith("error   shop: channel cdc: notifications do not arrive on this connection; PgBouncer")
    shop.configure(ORDERS, notify="off")
    shop.migrate()
    assert len(shop.check()) == 1


def test_two_phase_commit_beside_a_ringing_bell_is_a_note_and_a_standby_an_error(shop: Shop) -> None:
    directory = Path(tempfile.mkdtemp(prefix="cdc-tests-"))
    settings = {"fsync": "off", "max_prepared_transactions": "1"}
    try:
        with start(directory, settings=settings) as server:
            with closing(psycopg2.connect(server.dsn())) as conn, conn, conn.cursor() as cursor:
                cursor.execute(TABLES)
            shop.dsn = shop.daemon_dsn = server.dsn()
            shop.configure(ORDERS)
            shop.migrate()
            _, note = shop.check()
            assert note.startswith("note    shop: max_prepared_transactions: is above 0: PREPARE TRANSACTION fails")
            shop.configure(ORDERS, notify="off")
            shop.migrate()
            assert len(shop.check()) == 1
        signal = directory / "data" / "standby.signal"
        signal.touch()
        owner = signal.parent.stat()
        os.chown(signal, owner.st_uid, owner.st_gid)
        with start(directory, settings=settings):
            [line] = shop.check(1)
            assert line.startswith("error   shop: the server is a standby (let dsn name the primary")
    finally:
        shutil.rmtree(directory)


def test_a_server_that_cannot_be_reached_exits_69_and_keeps_the_password(shop: Shop) -> None:
    shop.daemon_dsn = shop.dsn = UNREACHABLE
    shop.configure(ORDERS)
    [line] = shop.check(69)
    assert line.startswith("error   shop: cannot connect: ")
    assert line.endswith(
        "Connection refused (start the server at host=127.0.0.1 port=1 dbname=shop, or correct databases.shop.dsn)"
    )
    assert "hunter2" not in shop.run("check").output


def test_an_unreachable_database_beside_a_broken_one_exits_1(shop: Shop) -> None:
    shop.config["databases"]["far"] = {"dsn": UNREACHABLE, "tables": ORDERS}
    lines = shop.check(1)
    assert [line.split(": ")[0] for line in lines] == ["error   shop", "error   far"]


def test_an_unreachable_database_beside_a_healthy_one_exits_69_and_shows_both(shop: Shop) -> None:
    shop.migrate()
    shop.config["databases"]["far"] = {"dsn": UNREACHABLE, "tables": ORDERS}
    lines = shop.check(69)
    assert [line.split(": ")[0] for line in lines] == ["ok      shop", "error   far"]


def test_a_migrate_dsn_that_cannot_be_reached_is_named(shop: Shop) -> None:
    shop.migrate()
    shop.dsn = UNREACHABLE
    shop.configure(ORDERS)
    [line] = shop.check(69)
    assert line.startswith("error   shop: migrate_dsn: cannot connect: ")
    assert line.endswith("or correct databases.shop.migrate_dsn)")


def test_a_migrate_dsn_to_another_database_is_an_error(shop: Shop, server: Server) -> None:
    shop.migrate()
    shop.dsn = server.admin_dsn
    shop.configure(ORDERS)
    assert shop.check(1) == ["error   shop: migrate_dsn: is another database than dsn (let both name the same one)"]


def test_a_role_without_cdc_reader_is_told_what_to_grant(shop: Shop, role: str) -> None:
    shop.migrate()
    shop.daemon_dsn = make_dsn(shop.dsn, user=role, password="secret")
    shop.configure(ORDERS)
    [line] = shop.check(1)
    assert line == f"error   shop: role {role}: may not use schema cdc (grant cdc_reader to {role}, or run cdc migrate)"


def test_each_missing_privilege_is_a_line(shop: Shop, role: str) -> None:
    shop.daemon_dsn = make_dsn(shop.dsn, user=role, password="secret")
    shop.configure(ORDERS)
    shop.migrate()
    shop.cursor.execute("grant select on cdc.alembic_version to cdc_reader")
    shop.cursor.execute("revoke truncate on cdc.event_1 from cdc_reader; revoke update on cdc.sink from cdc_reader")
    assert shop.check(1) == [
        f"error   shop: role {role}: lacks truncate on table cdc.event_1 "
        f"(run cdc migrate, or: grant truncate on table cdc.event_1 to {role})",
        f"error   shop: role {role}: lacks update on table cdc.sink "
        f"(run cdc migrate, or: grant update on table cdc.sink to {role})",
    ]


def test_a_role_that_cannot_see_other_sessions_is_a_note_and_status_says_so(
    shop: Shop, role: str, connect: Callable[..., connection]
) -> None:
    shop.daemon_dsn = make_dsn(shop.dsn, user=role, password="secret")
    shop.configure(ORDERS)
    shop.migrate()
    shop.cursor.execute("grant select on cdc.alembic_version to cdc_reader")
    _, note = shop.check()
    assert note.startswith(f"note    shop: role {role}: cannot see how long transactions of other roles have been open")
    writer = connect(shop.dsn, autocommit=False)
    writer.cursor().execute("insert into orders values (1, 'new')")
    assert f"pid {writer.info.backend_pid} (database " in shop.run("status").stdout
    assert "age not visible to this role" in shop.run("status").stdout
    shop.cursor.execute(f"grant pg_read_all_stats to {role}")
    assert len(shop.check()) == 1


def test_a_daemon_role_made_by_migrate_alone_is_healthy(shop: Shop, role: str) -> None:
    shop.daemon_dsn = make_dsn(shop.dsn, user=role, password="secret")
    shop.configure(ORDERS)
    shop.migrate()
    ok, note = shop.check()
    assert ok.startswith("ok ")
    assert note.startswith(f"note    shop: role {role}: cannot see how long transactions")


def test_check_changes_nothing_and_takes_no_lock_a_writer_would_notice(shop: Shop) -> None:
    shop.migrate()
    shop.cursor.execute("begin; lock table orders in access exclusive mode")
    assert len(shop.check()) == 1
    shop.cursor.execute("rollback")


def test_an_unknown_database_is_a_configuration_error(shop: Shop) -> None:
    result = shop.run("check", "-d", "nowhere")
    assert result.exit_code == 78
    assert "no database nowhere in the configuration" in result.stderr


def test_nothing_goes_to_a_pipe_but_text(shop: Shop) -> None:
    shop.migrate()
    assert "\x1b" not in shop.run("check").stdout


def test_a_server_lost_on_the_way_is_unreachable(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.migrate()

    def cut(*_: object) -> None:
        raise DatabaseUnreachable("connection lost: the server closed it")

    monkeypatch.setattr(inventory, "find_drift", cut)
    [line] = shop.check(69)
    assert line.startswith("error   shop: connection lost: ")


def test_a_password_in_a_file_that_everybody_reads_is_warned_of(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDC_TEST_DSN", psycopg2.extensions.make_dsn(database, password="canary-hunter2"))
    path = tmp_path / "config.yaml"
    rest = "tables: {'public.*': {}}}}, sinks: {out: {type: stdout}}}"
    for dsn, mode, warned in (
        (os.environ["CDC_TEST_DSN"], 0o644, True),
        (os.environ["CDC_TEST_DSN"], 0o640, False),
        ("${CDC_TEST_DSN}", 0o644, False),
        (database, 0o644, False),
    ):
        path.write_text(f"{{databases: {{shop: {{dsn: {json.dumps(dsn)}, {rest}")
        path.chmod(mode)
        output = CliRunner().invoke(main, ["-c", str(path), "check"]).output
        assert (f"holds a password, and {path} can be read by everybody (chmod o-r {path})" in output) == warned
        assert "canary" not in output


def test_every_secret_in_a_file_that_everybody_reads_is_warned_of(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.migrate()
    (tmp_path / "token").write_text("canary-canary-canary")
    (tmp_path / "token").chmod(0o600)
    monkeypatch.setenv("CDC_TEST_SECRET", "canary-hunter2-hunter2")
    with_password = psycopg2.extensions.make_dsn(shop.dsn, password="canary")
    shop.config["http"] = {"listen": "127.0.0.1:0", "token": "canary-canary-canary"}
    shop.config["sinks"] = {
        "queue": {"type": "redis", "password": "canary="},
        "bus": {"type": "rabbitmq", "url": "amqp://cdc:canary@mq1/", "exchange": "x"},
        "mqtt": {"type": "mqtt", "username": "cdc", "password": "canary"},
        "copy": {"type": "postgres", "dsn": with_password},
        "hook": {
            "type": "webhook",
            "url": "https://example.com/hook",
            "headers": {"Authorization": "Bearer canary"},
            "secret": "whsec_" + b"canary".hex() * 4,
        },
        "half": {"type": "rabbitmq", "url": "amqp://cdc:canary@${CDC_TEST_SECRET}/", "exchange": "x"},
        "given": {"type": "redis", "password": "${CDC_TEST_SECRET}"},
        "given_url": {"type": "rabbitmq", "url": "amqp://cdc:${CDC_TEST_SECRET}@mq1/", "exchange": "x"},
        "given_dsn": {"type": "postgres", "dsn": f"{shop.dsn} password=${{CDC_TEST_SECRET}}"},
        "guest": {"type": "rabbitmq", "exchange": "x"},
    }

    def warned(mode: int) -> list[str]:
        shop.path.write_text(json.dumps(shop.config))
        shop.path.chmod(mode)
        result = CliRunner().invoke(main, ["-c", str(shop.path), "check", "--json"])
        assert "canary" not in result.output
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        return [one["subject"] for one in found if one["cure"] == f"chmod o-r {shop.path}" and one["database"] is None]

    assert warned(0o640) == []
    assert warned(0o644) == [
        "sinks.queue.password",
        "sinks.bus.url",
        "sinks.mqtt.password",
        "sinks.copy.dsn",
        "sinks.hook.headers.Authorization",
        "sinks.hook.secret",
        "sinks.half.url",
        "http.token",
    ]
    line = f"warning {shop.path}: http.token: is a secret, and everybody can read the file (chmod o-r {shop.path})"
    assert line in CliRunner().invoke(main, ["-c", str(shop.path), "check"]).stdout.splitlines()
    shop.config["http"] = {"listen": "127.0.0.1:0", "token_file": str(tmp_path / "token")}
    assert "http.token_file" not in warned(0o644)
