"""How Alembic reaches the target databases. Two ways in:

* in-process: `cdc migrate` passes its open connection as ``config.attributes["connection"]`` and owns the transaction;
* plain Alembic: ``alembic -x config=config.yaml [-x database=NAME] upgrade head`` does what `cdc migrate` does for
  every database of the file, triggers included, and ``downgrade`` takes the schema down again; or, without any file,
  ``alembic -x dsn=postgresql://… upgrade head`` for the schema alone.

Revisions are plain SQL and import nothing from `cdc`; only ``-x config`` needs the installed package, for its YAML.
The revision is kept in ``cdc.alembic_version``: the database may have an ``alembic_version`` of its own.

Neither that table nor anything else in schema cdc is looked at before it is certain that the schema belongs to the role
that migrates: in somebody else's, functions and views would be waiting to be run with the rights of that role.
"""

from __future__ import annotations

from typing import Any

import psycopg2
from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

SCHEMA = """
select pg_catalog.pg_get_userbyid(n.nspowner)::text, current_user::text,
       exists (select from pg_catalog.pg_class c
                where c.relnamespace = n.oid and c.relname = 'alembic_version' and c.relkind = 'r'
                  and c.relowner = n.nspowner),
       exists (select from pg_catalog.pg_class c where c.relnamespace = n.oid)
       or exists (select from pg_catalog.pg_proc p where p.pronamespace = n.oid)
       or exists (select from pg_catalog.pg_type t where t.typnamespace = n.oid)
  from pg_catalog.pg_namespace n
 where n.nspname = 'cdc'
"""
"""Whose schema cdc is, who we are, whether it has our version table, whether it holds anything."""

KEEP_DEFINITIONS = """
do $keep$
begin
  if to_regprocedure('cdc.keep_definitions()') is not null then
    perform cdc.keep_definitions();
  end if;
end
$keep$
"""
"""What the revisions have made of the functions is what they should be, whichever revision it was."""


def run(connection: Connection) -> None:
    """Carry Alembic's command out on one database, inside the caller's transaction."""
    # Names of PostgreSQL's stand for PostgreSQL's, whatever somebody has put into schema public.
    connection.exec_driver_sql("set local search_path = pg_catalog, pg_temp")
    enter_schema(connection)
    context.configure(connection=connection, version_table_schema="cdc", transactional_ddl=False)
    event.listen(connection, "before_cursor_execute", in_ascii, retval=True)
    try:
        context.run_migrations()
    finally:
        event.remove(connection, "before_cursor_execute", in_ascii)
    if moves():
        connection.execute(text(KEEP_DEFINITIONS))


def enter_schema(connection: Connection) -> None:
    """Make schema cdc where there is none, and refuse one that is another's.

    Raises:
        CommandError: it belongs to another role, or to an application.
    """
    found = connection.exec_driver_sql(SCHEMA).first()
    if found is None:
        if moves():
            connection.exec_driver_sql("create schema cdc")
        return
    owner, role, has_version, holds_something = found
    if owner != role:
        raise CommandError(
            f"schema cdc belongs to {owner}, not to {role} (if {owner} has installed cdc, run this as that role; if "
            "not, drop or rename the schema)"
        )
    if holds_something and not has_version:
        raise CommandError(
            f"schema cdc is not of cdc: it holds something, and no table alembic_version of {owner} (rename or drop "
            "the schema)"
        )


def in_ascii(connection: Connection, cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
    """A revision without the characters that its comments hold and the encoding of the database may not."""
    return statement.encode("ascii", "replace").decode(), parameters


def run_dsn(dsn: str) -> None:
    """The same in a transaction of its own."""
    engine = create_engine("postgresql+psycopg2://", creator=lambda: psycopg2.connect(dsn), poolclass=NullPool)
    try:
        with engine.begin() as connection:
            run(connection)
    except DBAPIError as error:
        raise SystemExit(f"error: {str(error.orig).splitlines()[0]}") from None
    except CommandError as error:
        raise SystemExit(f"error: {error}") from None


def moves() -> bool:
    """Whether the command changes the revision; `alembic current` and its like do not, and so must touch nothing."""
    return "destination_rev" in context._proxy.context_opts


def main() -> None:
    arguments = context.get_x_argument(as_dictionary=True)
    if context.is_offline_mode():
        raise SystemExit("alembic: no --sql here: the revisions are plain scripts already, read migrations/sql")
    if (connection := context.config.attributes.get("connection")) is not None:
        run(connection)
    elif "dsn" in arguments:
        run_dsn(arguments["dsn"])
    elif "config" in arguments:
        from cdc.cli.alembic import migrate_with_alembic

        migrate_with_alembic(arguments["config"], arguments.get("database"), run, triggers=moves())
    else:
        raise SystemExit("alembic: say which databases: -x config=config.yaml, or -x dsn=postgresql://…")


main()
