"""Dead letters that hold back their keys and come back in order; sinks that are paused."""

from pathlib import Path

from alembic import op

revision = "0005"
down_revision = "0004"

_SQL = Path(__file__).parents[1] / "sql"


def upgrade() -> None:
    _run("0005_delivery.up.sql")


def downgrade() -> None:
    _run("0005_delivery.down.sql")


def _run(script: str) -> None:
    # psycopg2 would take a % for a parameter.
    op.get_bind().exec_driver_sql((_SQL / script).read_text(encoding="utf-8").replace("%", "%%"))
