"""Mended: others' code, hiding, publications, giving space back, moments, rewinding, rebase, blanks in json."""

import re
from pathlib import Path

from alembic import op

revision = "0009"
down_revision = "0008"

_SQL = Path(__file__).parents[1] / "sql"
_REPLACED = (
    ("0003_choice.up.sql", "function cdc.image("),
    ("0003_choice.up.sql", "function cdc.key_image("),
    ("0003_choice.up.sql", "function cdc.hash("),
    ("0004_everything.up.sql", "function cdc.hide("),
    ("0006_position.up.sql", "function cdc.rebase("),
    ("0007_backfill.up.sql", "function cdc.rotate("),
    ("0007_backfill.up.sql", "function cdc.passes("),
    ("0007_backfill.up.sql", "function cdc.backfill_batch("),
    ("0007_backfill.up.sql", "function cdc.note_moment("),
    ("0007_backfill.up.sql", "function cdc.diff("),
    ("0007_backfill.up.sql", "function cdc.rewind("),
)
"""What this revision has a newer body for, and where the one before stands."""


def upgrade() -> None:
    _run(_read("0009_mended.up.sql"))


def downgrade() -> None:
    _run(_read("0009_mended.down.sql"))
    for script, what in _REPLACED:
        found = re.search(
            rf"^create (?:or replace )?({re.escape(what)}.*?^\$\$;$)", _read(script), re.MULTILINE | re.DOTALL
        )
        if found is not None:  # the files are frozen: it is there
            _run(f"create or replace {found[1]}")


def _read(script: str) -> str:
    return (_SQL / script).read_text(encoding="utf-8")


def _run(script: str) -> None:
    # psycopg2 would take a % for a parameter.
    op.get_bind().exec_driver_sql(script.replace("%", "%%"))
