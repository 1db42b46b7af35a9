from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from cdc.options import (
    BatchOptions,
    Duration,
    EventOp,
    Host,
    RetryOptions,
    SinkOptions,
    Size,
    StrictModel,
    TablePattern,
    is_glob,
    matches,
    split,
)


def message(kind: Any, value: object) -> str:
    """What the validator of an annotated type or a model says against a value."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(value)
    return str(caught.value.errors()[0]["msg"]).removeprefix("Value error, ")


# -- durations and sizes --


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("200ms", 0.2),
        ("20s", 20),
        ("5m", 300),
        ("24h", 86400),
        ("7d", 604800),
        ("1.5s", 1.5),
        ("0s", 0),
        ("5 m", 300),
    ],
)
def test_a_duration_is_a_number_with_a_unit_and_becomes_seconds(text: str, seconds: float) -> None:
    assert TypeAdapter(Duration).validate_python(text) == seconds


@pytest.mark.parametrize("bare", [5, 0, 0.5, "5", "0.5"])
def test_a_bare_number_is_no_duration_and_the_cure_is_a_unit(bare: object) -> None:
    assert message(Duration, bare) == "a number without a unit (write a unit, such as 20ms or 5m)"


@pytest.mark.parametrize(
    "wrong", ["", "s", "5 minutes", "-5s", "1h30m", "5M", "\u0665s", "5s\n", ".5s", True, None, ("5s",)]
)
def test_anything_else_is_no_duration(wrong: object) -> None:
    assert message(Duration, wrong).startswith("not a duration (")


def test_a_duration_no_clock_can_wait_for_is_refused() -> None:
    assert message(Duration, "999999999999d") == "too long (at most 36500d)"


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("512KiB", 512 * 1024),
        ("4MiB", 4 * 1024**2),
        ("1GiB", 1024**3),
        ("4kB", 4000),
        ("4MB", 4_000_000),
        ("1GB", 10**9),
        ("10B", 10),
        ("1.5KiB", 1536),
        ("4096", 4096),
        (4096, 4096),
    ],
)
def test_a_size_is_bytes_or_a_number_with_a_unit(written: object, size: int) -> None:
    assert TypeAdapter(Size).validate_python(written) == size


@pytest.mark.parametrize("wrong", ["", "4M", "4mib", "-1", "4 MiB extra", True, None, 1.5])
def test_anything_else_is_no_size(wrong: object) -> None:
    assert message(Size, wrong).startswith("not a size (")


def test_a_size_is_a_whole_number_of_bytes() -> None:
    assert message(Size, "1.5B") == "not a whole number of bytes (write a number such as 512KiB)"


@pytest.mark.parametrize("huge", [2**53 + 1, 2**63, 99999999999999999999, "8388609GiB", "999999999999999GiB"])
def test_a_size_no_counter_holds_is_refused(huge: object) -> None:
    assert message(Size, huge) == "too large (at most 8388608GiB)"


def test_the_largest_size_is_one() -> None:
    assert TypeAdapter(Size).validate_python("8388608GiB") == 2**53


# -- hosts --


@pytest.mark.parametrize(
    "host", ["localhost", "db1", "db-1.example.com", "mq_1", "127.0.0.1", "::1", "fe80::1%eth0", "bücher.example"]
)
def test_a_host_is_a_name_or_an_address(host: str) -> None:
    assert TypeAdapter(Host).validate_python(host) == host


@pytest.mark.parametrize(
    "wrong",
    [
        "redis://u:S3CRET@127.0.0.1:6399",
        "u:S3CRET@db1",
        "S3CRET@db1",
        "db1/S3CRET",
        "db1:S3CRET",
        "db1:6379",
        "[::1]:6379",
        "[::1]",
        "db1 password=S3CRET",
        " db1",
        "db1\n",
        "db1\x07",
        "db1\u200b",
        "",
    ],
)
def test_what_is_more_than_a_host_is_refused_with_its_cure_and_without_its_value(wrong: str) -> None:
    assert message(Host, wrong) == (
        "not the name or address of a host (write it alone: port, user and password have keys of their own)"
    )


# -- table patterns --


@pytest.mark.parametrize(
    ("pattern", "schema", "table"),
    [
        ("public.orders", "public", "orders"),
        ("public.*", "public", "orders"),
        ("*.*", "any", "thing"),
        ("*.orders", "billing", "orders"),
        ("public.order_?", "public", "order_1"),
        ("tenant_*.orders", "tenant_7", "orders"),
        ('public."weird.name"', "public", "weird.name"),
        ('public."a ""b"""', "public", 'a "b"'),
        ('public."a*"', "public", "a*"),
        ('"my schema".*', "my schema", "orders"),
        ("public.Größe", "public", "Größe"),
        ("public.*", "public", "line\nbreak"),
        ("public.my-table$1", "public", "my-table$1"),
    ],
)
def test_a_pattern_matches(pattern: str, schema: str, table: str) -> None:
    assert matches(pattern, schema, table)


@pytest.mark.parametrize(
    ("pattern", "schema", "table"),
    [
        ("public.orders", "public", "orders_old"),
        ("public.orders", "Public", "orders"),
        ("public.Orders", "public", "orders"),
        ("public.*", "billing", "orders"),
        ("public.order?", "public", "order"),
        ('public."a*"', "public", "ab"),
        ("public.orders", "public.orders", "orders"),
    ],
)
def test_a_pattern_does_not_match(pattern: str, schema: str, table: str) -> None:
    assert not matches(pattern, schema, table)


def test_a_quoted_star_is_a_name_and_no_glob() -> None:
    assert is_glob("public.*")
    assert is_glob('"a".b?')
    assert not is_glob('public."*"')
    assert not is_glob("public.orders")


def test_split_gives_schema_and_table_without_quotes() -> None:
    assert split("public.orders") == ("public", "orders")
    assert split('"a.b"."c ""d"""') == ("a.b", 'c "d"')


@given(st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=15))
def test_every_name_can_be_written_in_quotes_and_then_means_itself(name: str) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    pattern = f"{quoted}.{quoted}"
    assert split(pattern) == (name, name)
    assert not is_glob(pattern)
    assert matches(pattern, name, name)
    assert not matches(pattern, name, name + "x")


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("orders", "a table without a schema (write public.orders)"),
        ('"a.b"', "a table without a schema (write public.orders)"),
        ("", "a table without a schema (write public.orders)"),
        ("a.b.c", 'more than one dot (write schema.table; quote a dot in a name: public."weird.name")'),
        ("public.", "not a table pattern"),
        (".orders", "not a table pattern"),
        ("public.my table", "not a table pattern"),
        ("public.[ab]", "not a table pattern"),
        ('public.""', "not a table pattern"),
        ('public."open', "not a table pattern"),
        ("public.orders\n", "not a table pattern"),
        ("public." + "ä" * 32, "a name longer than 63 bytes (write it as PostgreSQL cut it)"),
    ],
)
def test_what_is_no_pattern_is_refused_with_its_cure(wrong: str, complaint: str) -> None:
    assert message(TablePattern, wrong).startswith(complaint)


def test_asking_with_what_is_no_pattern_raises() -> None:
    with pytest.raises(ValueError, match="without a schema"):
        matches("orders", "public", "orders")


# -- models --


def test_a_model_is_strict_frozen_closed_and_silent_about_its_input() -> None:
    class Door(StrictModel):
        width: int = 1

    with pytest.raises(ValidationError) as caught:
        Door.model_validate({"width": "CANARY", "height": "CANARY"})
    assert {error["type"] for error in caught.value.errors()} == {"int_type", "extra_forbidden"}
    assert "CANARY" not in str(caught.value)
    with pytest.raises(ValidationError, match="frozen"):
        Door().width = 2


def test_a_batch_has_500_events_4_mib_and_lingers_20_ms_by_default() -> None:
    assert BatchOptions().model_dump() == {"events": 500, "bytes": 4 * 1024 * 1024, "linger": 0.02}


@pytest.mark.parametrize("wrong", [{"events": 0}, {"events": 100_001}, {"bytes": 0}, {"linger": "0s"}, {"events": "5"}])
def test_a_batch_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        BatchOptions.model_validate(wrong)


def test_retries_wait_200_ms_to_5_minutes_by_default() -> None:
    assert RetryOptions().model_dump() == {"initial": 0.2, "max": 300.0}


@pytest.mark.parametrize("wrong", [{"initial": "0s"}, {"initial": "6m"}, {"initial": "2s", "max": "1s"}])
def test_retries_that_never_wait_or_shrink_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RetryOptions.model_validate(wrong)


def test_a_sink_wants_everything_by_default() -> None:
    sink = SinkOptions(type="stdout")
    assert sink.wants("shop", "public", "orders", "read")
    assert sink.model_dump(exclude={"batch", "retry"}) == {
        "type": "stdout",
        "databases": None,
        "tables": ("*.*",),
        "ops": ("insert", "update", "delete", "truncate", "read"),
        "filter": None,
        "format": "native",
        "start": "now",
        "on_permanent_failure": "dead_letter",
    }


@pytest.mark.parametrize(
    ("database", "schema", "table", "op", "wanted"),
    [
        ("shop", "public", "orders", "insert", True),
        ("shop", "billing", "invoices", "update", True),
        ("crm", "public", "orders", "insert", False),
        ("shop", "public", "customers", "insert", False),
        ("shop", "public", "orders", "delete", False),
    ],
)
def test_a_sink_wants_what_its_databases_tables_and_ops_say(
    database: str, schema: str, table: str, op: EventOp, wanted: bool
) -> None:
    sink = SinkOptions(
        type="stdout", databases=("shop",), tables=("public.orders", "billing.*"), ops=("insert", "update")
    )
    assert sink.wants(database, schema, table, op) is wanted


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("filter", "op", "not a condition: its value is of type string (write one that is true or false)"),
        ("format", "cloudevents-binary", "a format for sinks with headers, which this one is not (write cloudevents)"),
        ("ops", (), "an empty list (write at least one entry, or leave the key out)"),
        ("ops", ("insert", "insert"), "lists the same entry twice (keep one)"),
        ("tables", (), "an empty list (write at least one entry, or leave the key out)"),
        ("databases", (), "an empty list (write at least one entry, or leave the key out)"),
    ],
)
def test_a_sink_refuses_what_it_cannot_do(key: str, value: object, complaint: str) -> None:
    assert message(SinkOptions, {"type": "stdout", key: value}) == complaint
