"""Whatever a table can hold or go through, and whatever somebody may change of what is installed."""

import re
from pathlib import Path

from alembic import op

revision = "0004"
down_revision = "0003"

_SQL = Path(__file__).parents[1] / "sql"
_REPLACED = (
    ("0003_choice.up.sql", "function cdc.capture()"),
    ("0001_foundation.up.sql", "function cdc.payload("),
    ("0003_choice.up.sql", "function cdc.hide("),
    ("0003_choice.up.sql", "function cdc.capture_plan("),
    ("0003_choice.up.sql", "function cdc.enable_capture("),
    ("0001_foundation.up.sql", "function cdc.set_trigger("),
    ("0003_choice.up.sql", "view cdc.captured as"),
)
"""What this revision has a newer body for, and where the one before stands."""
_VERBS = (
    "cdc.capture_plan(regclass, text[], text, text[], boolean, text, text, text, text[], json, json, boolean)",
    "cdc.enable_capture(regclass, text[], text, text[], boolean, text, text, text, text[], json, json, boolean)",
    "cdc.set_trigger(regclass, name, text, text, boolean, text)",
)


def upgrade() -> None:
    _run(_read("0004_everything.up.sql"))


def downgrade() -> None:
    _run(_read("0004_everything.down.sql"))
    for script, what in _REPLACED:
        end = r"^\$\$;$" if what.startswith("function") else r";$"
        found = re.search(
            rf"^create (?:or replace )?({re.escape(what)}.*?{end})", _read(script), re.MULTILINE | re.DOTALL
        )
        if found is not None:  # the files are frozen: it is there
            _run(f"create or replace {found[1]}")
    _run(f"revoke all on function {', '.join(_VERBS)} from public")
    _run(f"grant execute on function {_VERBS[0]} to cdc_reader")


def _read(script: str) -> str:
    return (_SQL / script).read_text(encoding="utf-8")


def _run(script: str) -> None:
    # psycopg2 would take a % for a parameter.
    op.get_bind().exec_driver_sql(script.replace("%", "%%"))
