"""How Alembic reaches the target databases. Two ways in:

* in-process: `cdc migrate` passes its open connection as ``config.attributes["connection"]`` and owns the transaction;
* plain Alembic: ``alembic -x config=config.yaml [-x database=NAME] upgrade head`` does what `cdc migrate` does for
  every database of the file, triggers included, and ``downgrade`` takes the schema down again; or, without any file,
  ``alembic -x dsn=postgresql://… upgrade head`` for the schema alone.

Revisions are plain SQL and import nothing from `cdc`; only ``-x config`` needs the installed package, for its YAML.
The revision is kept in ``cdc.alembic_version``: the database may have an ``alembic_version`` of its own.
"""

from __future__ import annotations

from typing import Any

import psycopg2
from alembic import context
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

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
    if moves():
        connection.execute(text("create schema if not exists cdc"))
    context.configure(connection=connection, version_table_schema="cdc", transactional_ddl=False)
    event.listen(connection, "before_cursor_execute", in_ascii, retval=True)
    try:
        context.run_migrations()
    finally:
        event.remove(connection, "before_cursor_execute", in_ascii)
    if moves():
        connection.execute(text(KEEP_DEFINITIONS))


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
