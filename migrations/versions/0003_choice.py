"""Hidden columns, conditions, and casts of users run by nobody."""

import re
from pathlib import Path

from alembic import op

revision = "0003"
down_revision = "0002"

_SQL = Path(__file__).parents[1] / "sql"
_REPLACED = (
    ("0002_under_fire.up.sql", "function cdc.capture()"),
    ("0001_foundation.up.sql", "function cdc.capture_plan("),
    ("0001_foundation.up.sql", "function cdc.enable_capture("),
    ("0001_foundation.up.sql", "function cdc.disable_capture("),
    ("0001_foundation.up.sql", "view cdc.captured as"),
)
"""What this revision has a newer body for, and where the one before stands."""
_RIGHTS = """
revoke all on function cdc.capture_plan(regclass, text[], text, text[], boolean, text, text, text) from public;
revoke all on function cdc.enable_capture(regclass, text[], text, text[], boolean, text, text, text) from public;
grant execute on function cdc.capture_plan(regclass, text[], text, text[], boolean, text, text, text) to cdc_reader;
"""


def upgrade() -> None:
    _run(_read("0003_choice.up.sql"))


def downgrade() -> None:
    _run(_read("0003_choice.down.sql"))
    for script, what in _REPLACED:
        end = r"^\$\$;$" if what.startswith("function") else r";$"
        found = re.search(
            rf"^create (?:or replace )?({re.escape(what)}.*?{end})", _read(script), re.MULTILINE | re.DOTALL
        )
        if found is not None:  # the files are frozen: it is there
            _run(f"create or replace {found[1]}")
    _run(_RIGHTS)


def _read(script: str) -> str:
    return (_SQL / script).read_text(encoding="utf-8")


def _run(script: str) -> None:
    # psycopg2 would take a % for a parameter.
    op.get_bind().exec_driver_sql(script.replace("%", "%%"))
