"""What migrations/env.py calls for ``alembic -x config=…``: `cdc migrate`, with Alembic's own command in the middle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection as SqlConnection

from cdc.cli.app import App
from cdc.cli.migrate import migrate_all
from cdc.errors import CdcError


def migrate_with_alembic(
    path: str, database: str | None, run: Callable[[SqlConnection], None], *, triggers: bool
) -> None:
    """Carry Alembic's command out on the databases of a configuration file; at head, make the triggers equal to it.

    Args:
        path: the YAML file.
        database: only this one; None: all.
        run: runs Alembic's command on a connection.
        triggers: whether the command moves the schema, so that the triggers are to follow.

    Raises:
        SystemExit: a database was left as it was, or the file is wrong; the reasons are on stderr.
    """
    try:
        app = App(lambda: Path(path), os.environ, None, None)
        names = app.select((database,) if database else ())
        with app.places(names) as places:
            failed = migrate_all(app, places, names, upgrade=run, triggers=triggers)
    except CdcError as error:
        raise SystemExit("\n".join(f"error: {line}" for line in str(error).splitlines())) from None
    if failed:
        raise SystemExit(1)
