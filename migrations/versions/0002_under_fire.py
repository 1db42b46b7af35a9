"""Take-over of a sink, where the database is, changes that are never stored, finer retention."""

import re
from pathlib import Path

from alembic import op

revision = "0002"
down_revision = "0001"

_SQL = Path(__file__).parents[1] / "sql"
_REPLACED = ("cdc.capture()", "cdc.rotate(p_retention interval)")
"""Functions of revision 0001 that this one has a newer body for."""


def upgrade() -> None:
    _run(_read("0002_under_fire.up.sql"))


def downgrade() -> None:
    _run(_read("0002_under_fire.down.sql"))
    foundation = _read("0001_foundation.up.sql")
    for function in _REPLACED:
        body = re.search(rf"^create (function {re.escape(function)}.*?^\$\$;)$", foundation, re.MULTILINE | re.DOTALL)
        if body is not None:  # the file is frozen: it is there
            _run(f"create or replace {body[1]}")


def _read(script: str) -> str:
    return (_SQL / script).read_text(encoding="utf-8")


def _run(script: str) -> None:
    # psycopg2 would take a % for a parameter.
    op.get_bind().exec_driver_sql(script.replace("%", "%%"))
