"""What migrations/env.py calls for ``alembic -x config=…``: the same migration, driven by Alembic."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click
from alembic import context
from sqlalchemy import Connection as SqlConnection
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from cdc.cli.app import App
from cdc.cli.migrate import migrate_all


def migrate_with_alembic(path: str, database: str | None, run: Callable[[SqlConnection], None]) -> None:
    """Carry Alembic's command out on the databases of a configuration file.

    Args:
        path: the YAML file.
        database: only this one; None: all.
        run: runs Alembic's command on a connection.
    """
    app = App(lambda: Path(path), os.environ, None, None)
    names = app.select((database,) if database else ())
    with app.places() as places:
        if context.get_head_revision() == context.get_revision_argument() or context.get_revision_argument() == "head":
            if migrate_all(app, places, names):
                raise click.exceptions.Exit(1)
            return
        for name in names:
            engine = create_engine(places[name].migrate_dsn, poolclass=NullPool)
            with engine.begin() as connection:
                run(connection)
