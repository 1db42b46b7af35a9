"""The trigger and the reader do the same in fewer steps."""

import re
from pathlib import Path

from alembic import op

revision = "0008"
down_revision = "0007"

_SQL = Path(__file__).parents[1] / "sql"
_REPLACED = (
    ("0004_everything.up.sql", "function cdc.capture("),
    ("0006_position.up.sql", "function cdc.next_batch("),
)
"""What this revision has a newer body for, and where the one before stands."""


def upgrade() -> None:
    _run(_read("0008_speed.up.sql"))


def downgrade() -> None:
    _run(_read("0008_speed.down.sql"))
    for script, what in _REPLACED:
        found = re.search(
            rf"^create (?:or replace )?({re.escape(what)}.*?^\$\$;$)", _read(script), re.MULTILINE | re.DOTALL
        )
        if found is not None:  # the files are frozen: it is there
            _run(f"create or replace {found[1]}")
    _run("revoke all on function cdc.next_batch(text, bigint, bigint, integer, bigint) from public")
    _run("grant execute on function cdc.next_batch(text, bigint, bigint, integer, bigint) to cdc_reader")


def _read(script: str) -> str:
    return (_SQL / script).read_text(encoding="utf-8")


def _run(script: str) -> None:
    # psycopg2 would take a % for a parameter.
    op.get_bind().exec_driver_sql(script.replace("%", "%%"))
