"""One transaction that changes very many rows: delivered whole, in flat memory, and with a handful of rings."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Project, report, until
from psycopg2.extensions import connection

from cdc.event import Event, Op

MOST_MEMORY = 200 * 1024 * 1024
MOST_RINGS = 40
SAMPLE = 9973
"""Every so many lines one is parsed to the last digit."""

_LINE = re.compile(
    r'\{"version":1,"id":"shop-(\d+)-\d{20}","op":"update",.*"seq":(\d+),.*"key":\{"id":(\d+)\},'
    r'"before":\{"n":(\d+),"label":"(row [0-9a-z]{16})"\},"after":\{"n":(\d+),"label":"(new [0-9a-z]{16})"\}.*\}'
)


@pytest.mark.parametrize("rows", [200_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_one_huge_transaction_is_delivered_whole_in_flat_memory_with_few_rings(
    rows: int, tmp_path: Path, database: str, connect: Callable[..., connection]
) -> None:
    made = Project(tmp_path, database, {"public.bulk": {}}, "{table}.jsonl")
    file = made.directory / "bulk.jsonl"
    writer, ears = connect(made.dsn, autocommit=False), connect(made.dsn)
    with writer.cursor() as cursor:
        cursor.execute("create table bulk (id bigint primary key, n int not null, label text not null)")
        cursor.execute(
            "insert into bulk select i, i %% 1000, 'row ' || left(md5(i::text), 16) from generate_series(1, %s) i",
            (rows,),
        )
        writer.commit()
    made.cdc("migrate")

    with ears.cursor() as cursor:
        cursor.execute("listen cdc")
    with made.daemon() as daemon:
        until(lambda: made.armed(ears), "the bell is armed")
        before = daemon.peak_rss()
        began = time.monotonic()
        with writer.cursor() as cursor:
            cursor.execute("update bulk set n = n + 1000, label = 'new ' || left(md5(label), 16)")
            assert cursor.rowcount == rows
            updated = time.monotonic() - began
        writer.commit()
        wrote = time.monotonic() - began
        count = _LineCount(file)
        delivered = until(lambda: count.so_far() >= rows, "all of it is delivered", seconds=240, pause=0.05)
        rests = until(lambda: made.armed(ears), "the bell is armed again")
        memory = daemon.peak_rss()
        assert daemon.drain() == 0

    ears.poll()
    rings = [note.payload for note in ears.notifies if not note.payload.startswith("cdc self-test")]
    report(
        f"{rows} rows; writer {wrote:.1f} s (COMMIT {wrote - updated:.2f} s), {wrote / rows * 1e6:.1f} µs a row; "
        f"all delivered {delivered:.1f} s after COMMIT, {rows / delivered:.0f} events/s, "
        f"{file.stat().st_size >> 20} MiB; "
        f"peak RSS {memory / 2**20:.0f} MiB ({before / 2**20:.0f} before); {len(rings)} rings; "
        f"armed again {rests:.2f} s later"
    )
    assert 1 <= len(rings) <= MOST_RINGS
    assert memory < MOST_MEMORY
    _check_every_row(file, rows)
    made.remove_output()
    assert "error" not in daemon.said().lower()


class _LineCount:
    """Counts the lines of a growing file, each byte once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._lines = 0

    def so_far(self) -> int:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._position)
                while chunk := file.read(1 << 20):
                    self._position += len(chunk)
                    self._lines += chunk.count(b"\n")
        return self._lines


def _check_every_row(path: Path, rows: int) -> None:
    """Every row once, by ascending seq, with the values before and after that the one update made of it."""
    seen = bytearray(rows + 1)
    last = 0
    number = 0
    for number, line in enumerate(_lines(path), 1):
        found = _LINE.fullmatch(line)
        assert found, f"line {number}: {line}"
        in_id, seq, key, n, _, new_n, _ = found.groups()
        assert in_id == seq, f"line {number}: {line}"
        assert int(seq) > last, f"line {number}, out of order: {line}"
        last = int(seq)
        assert not seen[int(key)], f"line {number}, the second one of key {key}: {line}"
        seen[int(key)] = 1
        assert (int(n), int(new_n)) == (int(key) % 1000, int(key) % 1000 + 1000), f"line {number}: {line}"
        if number % SAMPLE == 1:
            event = Event.from_json(line)
            assert event.op is Op.UPDATE
            assert event.changed == ("n", "label")
            assert event.to_json() == line
    assert number == rows
    assert sum(seen) == rows


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n")
