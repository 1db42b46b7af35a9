"""Events to deliver."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from cdc.event import Event, Image, Op


@pytest.fixture
def make_event() -> Callable[..., Event]:
    """``make_event(seq, table="orders", key=…)`` makes an insert."""

    def make(seq: int, *, table: str = "orders", key: int | None = None, text: str = "x") -> Event:
        return Event.model_validate(
            {
                "id": f"shop-{seq}-1",
                "op": Op.INSERT,
                "source": {
                    "database": "shop",
                    "schema": "public",
                    "table": table,
                    "seq": seq,
                    "txid": seq,
                    "ts": datetime(2026, 11, 22, tzinfo=UTC),
                },
                "key": Image(f'{{"id":{seq if key is None else key}}}'),
                "before": None,
                "after": Image(f'{{"id":{seq},"text":"{text}"}}'),
                "changed": None,
                "context": None,
            }
        )

    return make
