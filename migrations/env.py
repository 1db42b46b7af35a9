"""How Alembic reaches the target databases. Two ways in:

* in-process: `cdc migrate` passes its open connection as ``config.attributes["connection"]`` and owns the transaction;
* plain Alembic: ``alembic -x config=config.yaml [-x database=NAME] upgrade head`` does what `cdc migrate` does for every
  database of the file, triggers included, and ``downgrade`` takes the schema down again; or, without any file,
  ``alembic -x dsn=postgresql://… upgrade head`` for the schema alone.

Revisions are plain SQL and import nothing from `cdc`; only the second way needs the installed package, to read its YAML.
The revision is kept in ``cdc.alembic_version``: the database may have an ``alembic_version`` of its own.
"""

from __future__ import annotations

import psycopg2
from alembic import context
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool


def run(connection: Connection) -> None:
    """Migrate one database inside the caller's transaction."""
    connection.execute(text("create schema if not exists cdc"))
    context.configure(connection=connection, version_table_schema="cdc", transactional_ddl=False)
    context.run_migrations()


def run_dsn(dsn: str) -> None:
    """Migrate one database in a transaction of its own."""
    engine = create_engine("postgresql+psycopg2://", creator=lambda: psycopg2.connect(dsn), poolclass=NullPool)
    with engine.begin() as connection:
        run(connection)


def main() -> None:
    arguments = context.get_x_argument(as_dictionary=True)
    if (connection := context.config.attributes.get("connection")) is not None:
        run(connection)
    elif "dsn" in arguments:
        run_dsn(arguments["dsn"])
    elif "config" in arguments:
        from cdc.cli.alembic import migrate_with_alembic

        # `alembic current` and its like move nothing, and so must not touch a trigger either.
        moves = "destination_rev" in context._proxy.context_opts
        migrate_with_alembic(arguments["config"], arguments.get("database"), run, triggers=moves)
    else:
        raise SystemExit("alembic: say which databases: -x config=config.yaml, or -x dsn=postgresql://…")


main()
