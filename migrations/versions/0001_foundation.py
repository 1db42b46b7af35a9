"""The outbox, the capture trigger, the reader's round trip and the two verbs."""

from pathlib import Path

from alembic import op

revision = "0001"
down_revision = None

_SQL = Path(__file__).parents[1] / "sql"


def upgrade() -> None:
    _run("0001_foundation.up.sql")


def downgrade() -> None:
    _run("0001_foundation.down.sql")


def _run(script: str) -> None:
    # psycopg2 would take a % for a parameter.
    op.get_bind().exec_driver_sql((_SQL / script).read_text(encoding="utf-8").replace("%", "%%"))
