from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from psycopg2.extensions import parse_dsn
from pydantic import SecretStr
from ruamel.yaml import YAML

from cdc import config
from cdc.config import Config, DatabaseConfig, LogConfig, TableConfig
from cdc.errors import ConfigError
from cdc.options import BatchOptions, RetryOptions, SinkOptions, StrictModel
from cdc.sinks import option_models
from cdc.sinks.file import FileOptions
from cdc.sinks.stdout import StdoutOptions

EXAMPLE = Path(__file__).parents[2] / "config.example.yaml"


SINKS: dict[str, type[SinkOptions]] = {"stdout": StdoutOptions, "file": FileOptions}
"""A program that lacks some of the sinks there are."""

SMALLEST = """
databases:
  shop:
    dsn: postgresql://cdc@db1/shop
    tables: {public.orders: {}}
sinks:
  out: {type: stdout}
"""


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "SYSTEM_CONFIG", tmp_path / "etc" / "config.yaml")


Models = Mapping[str, type[SinkOptions]]


def load(text: str | bytes, environ: Mapping[str, str] | None = None, sinks: Models | None = None) -> Config:
    content = text if isinstance(text, bytes) else textwrap.dedent(text).encode()
    Path("c.yaml").write_bytes(content)
    return config.load(Path("c.yaml"), sinks or SINKS, environ or {})


def findings(text: str | bytes, environ: Mapping[str, str] | None = None, sinks: Models | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, environ, sinks)
    # A chained ValidationError would carry the values into the traceback.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    return list(caught.value.findings)


def with_database(lines: str) -> str:
    """The smallest configuration with these lines as the body of its database."""
    body = textwrap.indent(textwrap.dedent(lines), "    ")
    return f"databases:\n  shop:\n{body}\nsinks:\n  out: {{type: stdout}}\n"


def with_table(body: str) -> str:
    return with_database(f"dsn: host=db1\ntables:\n  public.orders: {body}")


def with_sink(body: str) -> str:
    return SMALLEST.replace("{type: stdout}", body)


def database(**values: Any) -> DatabaseConfig:
    return DatabaseConfig.model_validate({"tables": {"public.orders": {}}, **values})


# -- what is right --


def test_the_smallest_configuration_has_all_defaults() -> None:
    loaded = load(SMALLEST)
    shop = loaded.databases["shop"]
    assert shop.tables == {"public.orders": TableConfig()}
    assert (shop.notify, shop.notify_payload, shop.channel, shop.retention) == (
        "adaptive",
        "diff",
        "cdc",
        86400.0,
    )
    assert (shop.dsn_file, shop.migrate_dsn) == (None, None)
    assert loaded.sinks == {"out": StdoutOptions(type="stdout")}
    assert loaded.log == LogConfig(level="info", format="text")


def test_a_table_captures_all_four_ops_as_diffs_by_default() -> None:
    assert TableConfig().model_dump() == {
        "ops": ("insert", "update", "delete", "truncate"),
        "image": "diff",
        "exclude": (),
        "mask": {},
        "when": {},
        "key": None,
        "delivery": "durable",
        "always": False,
        "model": None,
    }


@pytest.mark.parametrize("nothing", ["public.customers: {}", "public.customers:", "public.customers: null"])
def test_a_table_with_nothing_behind_it_has_all_defaults(nothing: str) -> None:
    loaded = load(with_database(f"dsn: host=db1\ntables:\n  {nothing}"))
    assert loaded.databases["shop"].tables == {"public.customers": TableConfig()}


def test_every_supported_table_key_arrives() -> None:
    loaded = load(with_table("{ops: [insert], image: full, key: [order_no, line], always: true}"))
    assert loaded.databases["shop"].tables["public.orders"] == TableConfig(
        ops=("insert",), image="full", key=("order_no", "line"), always=True
    )


def test_a_sink_is_read_by_the_model_its_type_names() -> None:
    loaded = load(with_sink("{type: file, path: ./x, batch: {bytes: 1MiB}, retry: {max: 1h}, databases: [shop]}"))
    assert loaded.sinks["out"] == FileOptions(
        type="file",
        path="./x",
        databases=("shop",),
        batch=BatchOptions.model_validate({"bytes": "1MiB"}),
        retry=RetryOptions.model_validate({"max": "1h"}),
    )


@pytest.mark.parametrize("name", ["shop", "Shop_2", "shop-eu", "a" + "b" * 62])
def test_names_are_letters_digits_underscores_and_dashes(name: str) -> None:
    assert list(load(SMALLEST.replace("shop:", f"{name}:")).databases) == [name]


def test_values_follow_yaml_1_2_where_yaml_1_1_had_surprises() -> None:
    loaded = load(with_database("dsn: host=db1\nchannel: no\ntables: {public.on: {key: [off, 22:22]}}"))
    assert loaded.databases["shop"].channel == "no"
    assert loaded.databases["shop"].tables["public.on"].key == ("off", "22:22")
    assert load(with_sink("{type: stdout, batch: {events: 010}}")).sinks["out"].batch.events == 10
    assert load(with_sink("{type: stdout, batch: {events: 0x10}}")).sinks["out"].batch.events == 16


def test_the_model_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(SMALLEST).log.level = "debug"


# -- which table has which options --


def test_an_exact_name_beats_a_glob_and_among_globs_the_first_of_the_file_wins() -> None:
    tables = """\
        dsn: host=db1
        tables:
          "public.o*": {image: full}
          "public.*": {ops: [insert]}
          public.orders: {ops: [delete]}
          public."o*": {ops: [truncate]}
    """
    shop = load(with_database(tables)).databases["shop"]
    assert shop.options_for("public", "orders") == TableConfig(ops=("delete",))
    assert shop.options_for("public", "offers") == TableConfig(image="full")
    assert shop.options_for("public", "customers") == TableConfig(ops=("insert",))
    assert shop.options_for("public", "o*") == TableConfig(ops=("truncate",))
    assert shop.options_for("billing", "orders") is None


# -- connection strings --


def test_migrations_use_the_same_dsn_unless_they_have_their_own() -> None:
    assert database(dsn="host=a").resolved_migrate_dsn.get_secret_value() == "host=a"
    both = database(dsn="host=a", migrate_dsn="host=b")
    assert both.resolved_dsn.get_secret_value() == "host=a"
    assert both.resolved_migrate_dsn.get_secret_value() == "host=b"


def test_a_dsn_file_is_read_when_the_configuration_is() -> None:
    secret = Path("shop.dsn")
    secret.write_text("\n  postgresql://cdc:CANARY@db1/shop \n")
    secret.chmod(0o600)
    shop = load(with_database("dsn_file: shop.dsn\ntables: {public.orders: }")).databases["shop"]
    secret.unlink()
    assert shop.resolved_dsn == SecretStr("postgresql://cdc:CANARY@db1/shop")
    assert shop.resolved_migrate_dsn == shop.resolved_dsn
    assert shop.describe() == "host=db1 dbname=shop"
    assert "CANARY" not in repr(shop)


@pytest.mark.parametrize(
    ("content", "mode", "complaint"),
    [
        (b" \n", 0o600, "x.dsn is empty (it should hold one connection string)"),
        (b"\xff", 0o600, "x.dsn is not UTF-8 text (it should hold one connection string)"),
        (b"x" * 70_000, 0o600, "x.dsn is too large (it should hold one connection string and nothing else)"),
        (b"host=a", 0o604, "x.dsn can be read by everybody (chmod o-r x.dsn)"),
        (
            b"CANARY",
            0o600,
            "content of x.dsn: not a connection string "
            "(write postgresql://user@host/dbname, host=… dbname=…, or embedded:DIR)",
        ),
    ],
)
def test_a_dsn_file_that_is_no_secret_or_no_dsn_is_refused(content: bytes, mode: int, complaint: str) -> None:
    Path("x.dsn").write_bytes(content)
    Path("x.dsn").chmod(mode)
    text = with_database("dsn_file: x.dsn\ntables: {public.orders: }")
    assert findings(text) == [f"c.yaml: databases.shop.dsn_file: {complaint}"]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("gone.dsn", "cannot read gone.dsn: No such file or directory (name a file this user may read)"),
        (".", ". is not a regular file (write the name of a file)"),
        (
            "postgresql://cdc:CANARY@db1/shop",
            "no such file, and it looks like a connection string (write that as dsn)",
        ),
        (
            "host=db1 password=CANARY",
            "no such file, and it looks like a connection string (write that as dsn)",
        ),
    ],
)
def test_a_dsn_file_that_cannot_be_read_is_named_unless_it_is_a_dsn(name: str, complaint: str) -> None:
    text = with_database(f"dsn_file: {name}\ntables: {{public.orders: }}")
    assert findings(text) == [f"c.yaml: databases.shop.dsn_file: {complaint}"]


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgresql://cdc:CANARY@db1:5433/shop?sslpassword=CANARY", "host=db1 port=5433 dbname=shop"),
        ("postgres://cdc@h1:1,h2/shop", "host=h1,h2 port=1, dbname=shop"),
        ("postgresql://cdc:CAN%40RY@[::1]:5/shop", "host=::1 port=5 dbname=shop"),
        ("postgresql://cdc:CANARY#@%2Fvar%2Frun/my%20shop", "host=/var/run dbname=my shop"),
        ("postgresql:///shop?host=/run&password=CANARY", "host=/run dbname=shop"),
        ("postgresql://db1/shop?password=CAN@ARY", "host=db1 dbname=shop"),
        ("postgresql://", "libpq's default server"),
        ("host=db1 password=CANARY dbname=shop", "host=db1 dbname=shop"),
        (r"password = 'CAN \' ARY' host= db1", "host=db1"),
        ("host=db1 password=CAN=ARY port=5433", "host=db1 port=5433"),
        ("service=shop passfile=CANARY", "service=shop"),
    ],
)
def test_a_description_has_no_secret_and_says_what_libpq_understands(dsn: str, shown: str) -> None:
    assert database(dsn=dsn).describe() == shown
    understood = parse_dsn(dsn)
    public = {key: understood[key] for key in ("service", "host", "port", "dbname") if key in understood}
    assert (" ".join(f"{key}={value}" for key, value in public.items()) or "libpq's default server") == shown


def test_an_embedded_server_is_described_by_its_directory() -> None:
    assert database(dsn="embedded:./data").describe() == "embedded:./data"


@pytest.mark.parametrize(
    "dsn",
    [
        "CANARY",
        "mysql://cdc:CANARY@db1/shop",
        "postgresql+psycopg2://cdc:CANARY@db1/shop",
        "postgresql://cdc:CAN/ARY@db1/shop",
        "postgresql://cdc:CAN@ARY@db1/shop",
        "postgresql://cdc:CAN?ARY@db1/shop",
        "postgresql://db1?password=CAN@ARY",
        "postgresql://cdc:CANARY%@db1/shop",
        "postgresql://cdc:CANARY@db1:x/shop",
        "postgresql://cdc:CAN ARY@db1/shop",
        "postgresql://cdc@db1/shop?CANARY",
        "host=db1 password=CANARY CANARY",
        "host=db1 password='CANARY",
        "host= password=CANARY",
        "host=cdc:CANARY@db1",
        "dbname='postgresql://cdc:CANARY@db1/shop'",
        "'embedded:'",
        '"embedded:a\\0CANARY"',
        "",
        "''",
    ],
)
def test_what_is_no_dsn_is_refused_without_being_shown(dsn: str) -> None:
    only = findings(with_database(f"dsn: {dsn}\ntables: {{public.orders: }}"))
    assert len(only) == 1
    assert re.fullmatch(r"c\.yaml: databases\.shop(\.dsn)?: [^()]+ \(.+\)", only[0])
    assert "CAN" not in only[0]
    assert "ARY" not in only[0]


def test_a_database_has_a_dsn_or_a_dsn_file_and_not_both() -> None:
    Path("x.dsn").write_text("host=a")
    Path("x.dsn").chmod(0o600)
    assert findings(with_database("tables: {public.orders: }")) == [
        "c.yaml: databases.shop: no connection string (write dsn or dsn_file)"
    ]
    assert findings(with_database("dsn: host=a\ndsn_file: x.dsn\ntables: {public.orders: }")) == [
        "c.yaml: databases.shop.dsn_file: given beside dsn (keep one of the two)"
    ]


# -- variables --


@pytest.mark.parametrize(
    ("written", "environ", "channel"),
    [
        ("${NAME}", {"NAME": "bell"}, "bell"),
        ("a_${NAME}_b", {"NAME": "bell"}, "a_bell_b"),
        ("${A}${B}", {"A": "x", "B": "y"}, "xy"),
        ("${NAME:-cdc}", {}, "cdc"),
        ("${NAME:-cdc}", {"NAME": ""}, "cdc"),
        ("${NAME:-cdc}", {"NAME": "bell"}, "bell"),
        ('"a${NAME:-}"', {}, "a"),
        ("a${NAME}", {"NAME": ""}, "a"),
        ("$${NAME}", {"NAME": "bell"}, "${NAME}"),
        ("${NAME}", {"NAME": "${OTHER}", "OTHER": "x"}, "${OTHER}"),
        ("${NAME}", {"NAME": "a: [b]"}, "a: [b]"),
        ("$NAME$$", {"NAME": "bell"}, "$NAME$$"),
    ],
)
def test_variables_are_replaced_in_values_once(written: str, environ: dict[str, str], channel: str) -> None:
    text = with_database(f"dsn: host=db1\nchannel: {written}\ntables: {{public.orders: }}")
    assert load(text, environ).databases["shop"].channel == channel


def test_variables_are_replaced_in_lists_and_never_in_keys() -> None:
    text = with_table('{key: ["${COLUMN}"], "${COLUMN}": 1}')
    assert findings(text, {"COLUMN": "image"}) == [
        "c.yaml: databases.shop.tables.public.orders.${COLUMN}: unknown key "
        "(known: ops, image, exclude, mask, when, key, delivery, always, model)"
    ]
    loaded = load(with_table('{key: ["${COLUMN}"]}'), {"COLUMN": "order_no"})
    assert loaded.databases["shop"].tables["public.orders"].key == ("order_no",)


def test_variables_need_no_quotes_between_braces_and_brackets() -> None:
    text = with_table("{key: [${A}, b${B:-x}, ${C:-}y], image: ${IMAGE:-full}, nonsense: 1}")
    assert findings(text, {"A": "a"}) == [
        "c.yaml: databases.shop.tables.public.orders.nonsense: unknown key "
        "(known: ops, image, exclude, mask, when, key, delivery, always, model)"
    ]
    loaded = load(with_table("{key: [${A}, b${B:-x}, ${C:-}y], image: ${IMAGE:-full}}"), {"A": "a, b}"})
    assert loaded.databases["shop"].tables["public.orders"].key == ("a, b}", "bx", "y")
    assert loaded.databases["shop"].tables["public.orders"].image == "full"


def test_letters_of_private_use_in_a_value_mean_themselves() -> None:
    odd = "b\ue000\ue001"
    loaded = load(with_table(f'{{key: [{odd}, "${{A}}"]}}'), {"A": "a"})
    assert loaded.databases["shop"].tables["public.orders"].key == (odd, "a")


@pytest.mark.parametrize("wrong", ["${", "${NAME", "${}", "${1}", "${NA-ME}", "${NAME-x}", "${A:-${B}}", "x${ y}"])
def test_a_malformed_variable_is_an_error_that_does_not_show_the_value(wrong: str) -> None:
    text = with_database(f"dsn: host=db1\nchannel: 'CANARY{wrong}'\ntables: {{public.orders: }}")
    assert findings(text)[0] == (
        "c.yaml: databases.shop.channel: malformed ${ (write ${NAME} or ${NAME:-default}; $${ for a plain ${)"
    )


def test_a_variable_that_is_not_utf_8_is_refused() -> None:
    text = with_database("dsn: host=db1\nchannel: ${NAME}\ntables: {public.orders: }")
    assert findings(text, {"NAME": "\udcff"}) == [
        "c.yaml: databases.shop.channel: a variable that is not UTF-8 text (set it again, in UTF-8)"
    ]


# -- what cannot be read as YAML --


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a:\n\tb: 1", "line 2, column 1: a tab (indent with spaces)"),
        ("a: b: c", "line 1, column 5: a second colon (put the value in quotes, or check the indentation)"),
        ("a: 'b", "line 1, column 6: a quote that is never closed (close it)"),
        ("a: {b: 1\nc: [2", "line 2, column 2: a { } or [ ] that is not closed or lacks a comma (close it)"),
        (
            "a:\n  - b\n c: 1",
            "line 3, column 2: wrong indentation (keys of one block begin in the same column)",
        ),
        ("a: @b", "line 1, column 4: a character that cannot begin a value (put the value in quotes)"),
        ("a: !b!CANARY", "line 1, column 4: a YAML tag (remove it; a value that begins with ! needs quotes)"),
        ("a: * b", "line 1, column 5: a YAML alias or anchor (a value that begins with * or & needs quotes)"),
        ('a: "\\q"', "line 1, column 6: an unknown escape in double quotes (use single quotes)"),
        ("a: 1\nb", "line 2, column 2: a line without a colon (write key: value)"),
        ("a: x\n\nb: \x07", "line 3, column 4: a control character (remove it)"),
        ("a: {b: ${C:-d, e}}", 'line 1, column 9: ${…} without quotes inside { } or [ ] (write "${…}")'),
        ("a: {b: ${C-}}", 'line 1, column 9: ${…} without quotes inside { } or [ ] (write "${…}")'),
        ("a: 1\n---\nb: 2", "line 2, column 1: a second document (keep one; remove the --- line)"),
        (
            "%YAML 1.1\n---\na: no",
            "line 1, column 1: a %YAML or %TAG line (remove it; the file is read as YAML 1.2)",
        ),
        ("- a\n- b", "line 1, column 1: not keys and values (begin with databases: and sinks:)"),
        ("just text", "line 1, column 1: not keys and values (begin with databases: and sinks:)"),
        ("", "empty (begin with databases: and sinks:)"),
        ("# nothing yet\n", "empty (begin with databases: and sinks:)"),
        (b"a: 1\nb: \xff", "line 2, column 4: not UTF-8 (save the file as UTF-8)"),
        ("a: 1\n".encode("utf-16"), "line 1, column 1: not UTF-8 (save the file as UTF-8)"),
        (
            "a: " + "[" * 3000,
            "line 1, column 35: nested more than 32 levels deep (a configuration needs six)",
        ),
        ("{a: " * 3000, "line 1, column 129: nested more than 32 levels deep (a configuration needs six)"),
        (
            "a: " + "x" * 256 * 1024,
            "larger than 256 KiB (a configuration is far smaller; is it this file?)",
        ),
    ],
)
def test_what_cannot_be_read_is_one_finding_with_line_and_column(text: str | bytes, complaint: str) -> None:
    assert findings(text) == [f"c.yaml: {complaint}"]


def test_no_sentence_of_the_yaml_parser_reaches_the_user() -> None:
    """Every prefix of a file, and the file with any one character replaced, is refused in our own words."""
    text = 'databases: {a: [1, "b\\n"]}\n? c\n: &d !!str e\nf: *d\ng: |+\n  h\ni: %j\n'
    broken = [text[:end] for end in range(len(text))]
    broken += [text[:at] + new + text[at + 1 :] for at in range(len(text)) for new in "{[\"'!&*:\t%-|"]
    for attempt in broken:
        for finding in findings(attempt):
            assert not re.search(r"while|but found|expected '|<", finding)
            assert finding.endswith(")")


@pytest.mark.parametrize(("path", "reason"), [("gone.yaml", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named_with_the_reason(path: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(Path(path), SINKS, {})
    assert caught.value.findings == (f"{path}: cannot be read: {reason} (name a file this user may read)",)


def test_a_byte_order_mark_is_no_error() -> None:
    assert load(b"\xef\xbb\xbf" + SMALLEST.strip().encode()) == load(SMALLEST)


# -- what is wrong in a file that can be read --

BROKEN: dict[str, tuple[str, list[str]]] = {
    "nothing that is required is there": (
        "log: {}",
        ["databases: missing (this key is required)", "sinks: missing (this key is required)"],
    ),
    "no database and no sink": (
        "databases: {}\nsinks: {}",
        ["databases: too few entries (at least 1)", "sinks: too few entries (at least 1)"],
    ),
    "a database without tables": (
        with_database("dsn: host=db1\ntables: {}"),
        ["databases.shop.tables: too few entries (at least 1)"],
    ),
    "a database that leaves its tables out": (
        with_database("dsn: host=db1"),
        ["databases.shop.tables: missing (this key is required)"],
    ),
    "a key nobody knows, with one that comes near": (
        with_table("{imge: full}"),
        ["databases.shop.tables.public.orders.imge: unknown key (did you mean image?)"],
    ),
    "a key nobody knows, and nothing near": (
        SMALLEST + "zzz: 1\n",
        ["zzz: unknown key (known: databases, sinks, http, log, stop_timeout)"],
    ),
    "an unknown key of one sink type": (
        with_sink("{type: file, paht: x}"),
        [
            "sinks.out.path: missing (this key is required)",
            "sinks.out.paht: unknown key (did you mean path?)",
        ],
    ),
    "an unknown key deep in a sink": (
        with_sink("{type: stdout, batch: {event: 5}}"),
        ["sinks.out.batch.event: unknown key (did you mean events?)"],
    ),
    "a word that is not in the list": (
        with_table("{image: ful, ops: [insert, upsert]}"),
        [
            "databases.shop.tables.public.orders.image: not a known word (write diff or full; did you mean full?)",
            "databases.shop.tables.public.orders.ops[1]: not a known word "
            "(write insert, update, delete or truncate; did you mean insert?)",
        ],
    ),
    "values of the wrong type": (
        with_database("dsn: [a]\ntables: {public.orders: 5}\nchannel: 5\nnotify: true\nretention: {}"),
        [
            "databases.shop.dsn: found a list (expected text)",
            "databases.shop.tables.public.orders: found a number (expected keys and values)",
            "databases.shop.channel: found a number (expected text)",
            "databases.shop.notify: found true or false (expected adaptive, always or off)",
            "databases.shop.retention: not a duration (write a number and one of ms, s, m, h, d, such as 20ms)",
        ],
    ),
    "more values of the wrong type": (
        with_table("{always: yes, ops: insert, key: {a: b}}") + "log:\nhttp:\n",
        [
            "databases.shop.tables.public.orders.always: found text (expected true or false)",
            "databases.shop.tables.public.orders.ops: found text (expected a list)",
            "databases.shop.tables.public.orders.key: found keys and values (expected a list)",
            "log: found nothing (expected keys and values)",
        ],
    ),
    "numbers out of range": (
        with_sink("{type: stdout, batch: {events: 0, bytes: 0, linger: 0s}}"),
        [
            "sinks.out.batch.events: too small (at least 1)",
            "sinks.out.batch.bytes: too small (at least 1)",
            "sinks.out.batch.linger: too small (more than 0.0)",
        ],
    ),
    "a number that is too large": (
        with_sink("{type: stdout, batch: {events: 100001}}"),
        ["sinks.out.batch.events: too large (at most 100000)"],
    ),
    "a number nobody can read": (
        with_sink(f"{{type: stdout, batch: {{events: {'9' * 5000}}}}}"),
        ["sinks.out.batch.events: a number that cannot be read (write fewer digits, or quote it as text)"],
    ),
    "a duration without a unit": (
        with_sink("{type: stdout, retry: {initial: 5, max: '5'}}"),
        [
            "sinks.out.retry.initial: a number without a unit (write a unit, such as 20ms or 5m)",
            "sinks.out.retry.max: a number without a unit (write a unit, such as 20ms or 5m)",
        ],
    ),
    "a first pause longer than the longest": (
        with_sink("{type: stdout, retry: {initial: 10m}}"),
        ["sinks.out.retry: initial is longer than max (write a max of at least initial)"],
    ),
    "a channel too long, in bytes": (
        with_database(f"dsn: host=db1\ntables: {{public.orders: }}\nchannel: {'ä' * 32}"),
        ["databases.shop.channel: not a channel name (1 to 63 bytes)"],
    ),
    "a channel without a name": (
        with_database("dsn: host=db1\ntables: {public.orders: }\nchannel: ''"),
        ["databases.shop.channel: not a channel name (1 to 63 bytes)"],
    ),
    "a table without a schema, as key and in a list": (
        with_database("dsn: host=db1\ntables: {orders: }").replace(
            "{type: stdout}", "{type: stdout, tables: [a.b, c]}"
        ),
        [
            "databases.shop.tables.orders: a table without a schema (write public.orders)",
            "sinks.out.tables[1]: a table without a schema (write public.orders)",
        ],
    ),
    "one table written in two ways": (
        with_database("dsn: host=db1\ntables: {public.orders: , '\"public\".orders': }"),
        ['databases.shop.tables."public".orders: the same table as public.orders (keep one)'],
    ),
    "lists that are empty or repeat themselves": (
        with_table("{ops: [], key: [a, a]}").replace("{type: stdout}", "{type: stdout, ops: [read, read]}"),
        [
            "databases.shop.tables.public.orders.ops: an empty list (write at least one entry, or leave the key out)",
            "databases.shop.tables.public.orders.key: lists the same entry twice (keep one)",
            "sinks.out.ops: lists the same entry twice (keep one)",
        ],
    ),
    "names that are none": (
        SMALLEST.replace("shop:", "9shop:").replace("out:", "o t:"),
        [
            f"{path}: not a usable name (a letter, then letters, digits, _ or -, at most 63 in all)"
            for path in ("databases.9shop", "sinks.o t")
        ],
    ),
    "a sink for databases there are not": (
        with_sink("{type: stdout, databases: [shop, shpo, crm]}"),
        [
            "sinks.out.databases[1]: no such database (known: shop; did you mean shop?)",
            "sinks.out.databases[2]: no such database (known: shop)",
        ],
    ),
    "a sink type nobody knows": (
        with_sink("{type: fil, ops: [x]}"),
        [
            "sinks.out.type: unknown sink type (known: stdout, file; did you mean file?)",
            "sinks.out.ops[0]: not a known word (write insert, update, delete, truncate or read)",
        ],
    ),
    "a misspelt sink type": (
        with_sink("{type: fiel}"),
        ["sinks.out.type: unknown sink type (known: stdout, file; did you mean file?)"],
    ),
    "a sink without a type, or that is none": (
        SMALLEST.replace("out: {type: stdout}", "{a: {path: x}, b: [], c: , d: {type: 5}}"),
        [
            "sinks.a.type: missing (this key is required)",
            "sinks.b: found a list (expected keys and values)",
            "sinks.c: found nothing (expected keys and values)",
            "sinks.d.type: found a number (expected text)",
        ],
    ),
    "duplicate keys, every one": (
        SMALLEST + "log: {level: info,\n level: debug}\nsinks:\n  out: 5\nlog: 7\n",
        [
            "log.level: duplicate key on line 9, first on line 8 (keep one)",
            "sinks: duplicate key on line 10, first on line 6 (keep one)",
            "log: duplicate key on line 12, first on line 8 (keep one)",
        ],
    ),
    "anchors, aliases and merges": (
        with_database("dsn: &dsn host=db1\nmigrate_dsn: *dsn\ntables: *t").replace("stdout}", "stdout, <<: *o}"),
        [
            "databases.shop.dsn: a YAML anchor (remove it; a value that begins with & needs quotes)",
            "databases.shop.migrate_dsn: a YAML alias (write the value out; a pattern that begins with * needs quotes)",
            "databases.shop.tables: a YAML alias (write the value out; a pattern that begins with * needs quotes)",
            "sinks.out.<<: a key that is not text (write text, in quotes if it looks like a number)",
            "sinks.out.<<: a YAML alias (write the value out; a pattern that begins with * needs quotes)",
        ],
    ),
    "a pattern that begins with a star and lacks quotes": (
        with_sink("{type: stdout, tables: [*.orders]}"),
        ["sinks.out.tables[0]: a YAML alias (write the value out; a pattern that begins with * needs quotes)"],
    ),
    "tags": (
        with_database("dsn: !secret host=db1\ntables: !!map {public.orders: }"),
        [
            f"databases.shop.{key}: a YAML tag (remove it; a value that begins with ! needs quotes)"
            for key in ("dsn", "tables")
        ],
    ),
    "keys that are not text": (
        SMALLEST + "1: a\ntrue: b\nnull: c\n? [d]\n: e\n",
        [
            f"{key}: a key that is not text (write text, in quotes if it looks like a number)"
            for key in ("1", "true", "null", "?")
        ],
    ),
    "a character no text can have": (
        with_database('dsn: host=db1\ntables: {public.orders: }\nchannel: "a\\0b"'),
        [r"databases.shop.channel: a NUL or half a character (remove the \0 or \ud800 escape)"],
    ),
    "variables that are not set": (
        with_database("dsn: postgresql://${DB_USER}:${DB_PASSWORD}@db1/shop\ntables: {public.orders: }"),
        [
            f"databases.shop.dsn: ${{{name}}} is not set (set the environment variable, or write ${{{name}:-default}})"
            for name in ("DB_USER", "DB_PASSWORD")
        ],
    ),
    "a variable where a number is expected": (
        with_sink("{type: stdout, batch: {events: '${EVENTS:-500}'}}"),
        ["sinks.out.batch.events: found text (expected a whole number; what ${NAME} gives is always text)"],
    ),
    "a connection string in the place of a name": (
        SMALLEST.replace("shop:", "postgresql://cdc:CANARY@db1/shop:"),
        ["databases.***: not a usable name (a letter, then letters, digits, _ or -, at most 63 in all)"],
    ),
    "a key of several lines": (
        SMALLEST + '"a\\nb": 1\n',
        [r"a\nb: unknown key (known: databases, sinks, http, log, stop_timeout)"],
    ),
}


@pytest.mark.parametrize(("text", "expected"), BROKEN.values(), ids=BROKEN)
def test_a_broken_configuration_is_told_exactly(text: str, expected: list[str]) -> None:
    assert findings(text) == [f"c.yaml: {finding}" for finding in expected]


def test_all_kinds_of_findings_come_at_once_and_in_the_order_of_the_file() -> None:
    text = """\
        log: {level: loud}
        databases:
          shop:
            dsn: ${SHOP_DSN}
            dsn: host=other
            tabels: {}
            tables:
              orders: {imge: full, model: shop.models}
            migrate_dsn: *dsn
        sinks:
          out: {type: stdout, databases: [shoop], batch: {events: 0}}
          in: {type: kafka}
        http: {listen: here}
    """
    paths = [finding.split(": ")[1] for finding in findings(text)]
    assert paths == [
        "log.level",
        "databases.shop.dsn",
        "databases.shop.dsn",
        "databases.shop.tabels",
        "databases.shop.tables.orders",
        "databases.shop.tables.orders.imge",
        "databases.shop.tables.orders.model",
        "databases.shop.migrate_dsn",
        "sinks.out.databases[0]",
        "sinks.out.batch.events",
        "sinks.in.type",
        "http.listen",
    ]


def test_the_words_of_pydantic_never_reach_the_user() -> None:
    class OddOptions(SinkOptions):
        type: Literal["odd"]
        either: int | tuple[int, ...] = 0
        code: float = 0.0
        size: frozenset[int] = frozenset()

    Path("c.yaml").write_text(with_sink("{type: odd, either: [x], code: x, size: {a: b}}"))
    with pytest.raises(ConfigError) as caught:
        config.load(Path("c.yaml"), {"odd": OddOptions}, {})
    assert caught.value.findings == (
        "c.yaml: sinks.out.either: found a list (expected a whole number)",
        "c.yaml: sinks.out.either[0]: found text (expected a whole number)",
        "c.yaml: sinks.out.code: found text (expected a number)",
        "c.yaml: sinks.out.size: found keys and values (expected a list)",
    )


def test_unknown_keys_of_a_sink_s_own_nested_model_find_their_neighbour() -> None:
    class TlsOptions(StrictModel):
        certificate: str | None = None

    class SecureOptions(SinkOptions):
        type: Literal["secure"]
        tls: TlsOptions | None = None

    Path("c.yaml").write_text(with_sink("{type: secure, tls: {certifcate: x}}"))
    with pytest.raises(ConfigError, match=r"sinks\.out\.tls\.certifcate: unknown key \(did you mean certificate\?\)"):
        config.load(Path("c.yaml"), {"secure": SecureOptions}, {})


# -- secrets --

CANARY = "CANARY-7e1f"


@pytest.mark.parametrize(
    "text",
    [
        SMALLEST.replace("postgresql://cdc@db1/shop", secret)
        for secret in (CANARY, f"[{CANARY}]", f"{{a: {CANARY}}}", f"!{CANARY} x", f"&{CANARY}")
    ]
    + [
        with_database(f"dsn: host=db1\ntables: {{public.orders: }}\n{key}: {CANARY}")
        for key in ("migrate_dsn", "notify", "notify_payload", "retention", "tables")
    ]
    + [
        with_table(f"{{{key}: {CANARY}}}")
        for key in ("ops", "image", "exclude", "mask", "when", "key", "delivery", "always", "model")
    ]
    + [
        with_sink(f"{{type: stdout, {key}: {value}}}")
        for key in ("databases", "tables", "ops", "filter", "format", "start", "batch", "retry")
        for value in (CANARY, f"[{CANARY}]", f"{{events: {CANARY}, bytes: {CANARY}, initial: {CANARY}}}")
    ]
    + [with_sink(f"{{type: {CANARY}}}"), with_sink(CANARY), SMALLEST + f"http: {CANARY}\nlog: {CANARY}"]
    + [SMALLEST + f"log: {{level: {CANARY}, format: [{CANARY}]}}", SMALLEST + f"password: {CANARY}", CANARY]
    + [
        SMALLEST + f"log: '{CANARY}",
        SMALLEST + f"log: \t{CANARY}: {CANARY}: {{",
        SMALLEST + f"log: ${{X{CANARY}",
    ],
)
def test_no_value_is_ever_in_a_finding(text: str) -> None:
    assert CANARY in text
    assert not [finding for finding in findings(text) if CANARY in finding]
    # The same value, come from the environment.
    hidden = text.replace(CANARY, "${CANARY}") if "!" not in text and "&" not in text else text
    assert not [finding for finding in findings(hidden, {"CANARY": CANARY}) if CANARY in finding]


def test_no_secret_is_in_the_repr_of_a_configuration() -> None:
    Path("x.dsn").write_text(f"host=db1 password={CANARY}")
    Path("x.dsn").chmod(0o600)
    text = """\
        databases:
          a:
            dsn: postgresql://u:${SECRET}@db1/a
            migrate_dsn: host=db1 password=${SECRET}
            tables: {a.b: }
          b: {dsn_file: x.dsn, tables: {a.b: }}
        sinks:
          out: {type: stdout}
    """
    loaded = load(text, {"SECRET": CANARY})
    assert loaded.databases["a"].resolved_dsn.get_secret_value() == f"postgresql://u:{CANARY}@db1/a"
    assert loaded.databases["b"].resolved_dsn.get_secret_value() == f"host=db1 password={CANARY}"
    shown = [
        repr(loaded),
        str(loaded),
        str(loaded.model_dump()),
        *(d.describe() for d in loaded.databases.values()),
    ]
    assert not [text for text in shown if CANARY in text]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("{exclude: [a, b], mask: {b: hash}}", "exclude and mask both name b (keep one)"),
        ("{ops: [insert], when: {update: 'true'}}", "a condition for update, which ops leaves out (keep one)"),
        ("{when: {truncate: 'true'}}", "a condition for truncate, which touches no single row"),
    ],
)
def test_what_is_said_of_a_table_has_to_fit_together(options: str, sentence: str) -> None:
    (only,) = findings(with_table(options))
    assert sentence in only
    assert "databases.shop.tables.public.orders" in only


# -- filters --


@pytest.mark.parametrize(
    ("expression", "finding"),
    [
        ("op ==", "not CEL at line 1, column 6 (see docs/delivery.md, Filters)"),
        ("${PASSWORD}", "not CEL at line 1, column 4 (see docs/delivery.md, Filters)"),
    ],
)
def test_a_filter_is_compiled_when_the_file_is_read_and_not_quoted(expression: str, finding: str) -> None:
    text = with_sink(f"{{type: stdout, filter: '{expression}'}}")
    assert findings(text, environ={"PASSWORD": "op hunter2"}) == [f"c.yaml: sinks.out.filter: {finding}"]


# -- the contract --


@pytest.mark.parametrize("nothing", ["{exclude: [], mask: {}, when: {}, delivery: durable, model: null}"])
def test_what_says_nothing_may_be_written(nothing: str) -> None:
    assert load(with_table(nothing)).databases["shop"].tables["public.orders"] == TableConfig()


# The block of the contract, to the letter.
CONTRACT = """\
databases:
  shop:
    dsn: postgresql://cdc@db1/shop        # libpq URL or key=value; or embedded:DIR (a private PostgreSQL kept in DIR)
    dsn_file: /run/credentials/shop.dsn   # instead of dsn
    migrate_dsn: postgresql://owner@db1/shop   # only for migrate/uninstall; default: dsn
    tables:
      public.orders:                      # schema.table; globs allowed: "billing.*"
        ops: [insert, update, delete, truncate]      # default: all four
        image: diff                       # diff (default) | full
        exclude: [internal_note]
        mask: {email: hash, card_number: redact}
        when: {update: "NEW.status IS DISTINCT FROM OLD.status"}    # SQL, per op
        key: [order_no]                   # only where there is no primary key
        delivery: durable                 # durable (default) | ephemeral
        always: false                     # ENABLE ALWAYS: capture replicated writes too
        model: shop.models:Order          # optional pydantic model for the row
      public.customers: {}
    notify: adaptive                      # adaptive (default) | always | off
    notify_payload: diff                  # diff (default) | wake
    channel: cdc
    retention: 24h                        # kept after delivery, for rewind
sinks:
  audit:
    type: file                            # stdout file webhook kafka redis nats rabbitmq postgres python
    path: ./out/{table}.jsonl             # {database} {schema} {table} {op}
    databases: [shop]                     # default: all
    tables: ["public.*"]                  # default: all
    ops: [insert, update, delete]         # default: all
    filter: "op == 'update' && after.amount > 100.0"    # CEL over the event
    format: native                        # native | debezium | cloudevents | flat
    start: now                            # now (default) | earliest | backfill
    batch: {events: 500, bytes: 4MiB, linger: 20ms}
    retry: {initial: 200ms, max: 5m}
    on_permanent_failure: dead_letter     # dead_letter | park_key | stop
http: {listen: "127.0.0.1:8650", token: ${CDC_TOKEN:-}}   # metrics, health, console; omit to switch off
log: {level: info, format: text}
"""


def test_every_key_of_the_contract_is_accepted() -> None:
    Path("shop.dsn").write_text("host=db1")
    Path("shop.dsn").chmod(0o600)
    for without in ("dsn", "dsn_file"):
        text = re.sub(rf"^ +{without}: .*\n", "", CONTRACT, flags=re.MULTILINE)
        assert load(text.replace("/run/credentials/shop.dsn", "shop.dsn")).sinks["audit"].batch.events == 500


def contract_keys() -> set[str]:
    """Every key of the contract's block that is a word of the format, and no name of the user's."""
    words: set[str] = set()

    def collect(node: object, inside: str = "") -> None:
        if isinstance(node, dict):
            words.update(node if inside not in {"databases", "sinks", "tables", "mask", "when"} else ())
            for key, value in node.items():
                collect(value, key)

    collect(YAML(typ="safe", pure=True).load(CONTRACT.replace("${CDC_TOKEN:-}", "x")))
    return words


# -- the example --


def test_the_example_loads_and_shows_the_defaults() -> None:
    loaded = config.load(EXAMPLE, option_models(), {})
    shop = loaded.databases["shop"]
    smallest = load(SMALLEST)
    assert [table.model_dump() for table in shop.tables.values()] == [TableConfig().model_dump()]
    without = {"dsn", "tables"}
    assert shop.model_dump(exclude=without) == smallest.databases["shop"].model_dump(exclude=without)
    assert loaded.log == LogConfig()
    audit = loaded.sinks["audit"]
    assert audit.databases == tuple(loaded.databases)
    assert audit.model_copy(update={"databases": None}) == FileOptions(type="file", path="./out/{table}.jsonl")
    assert loaded.sinks["console"] == StdoutOptions(type="stdout")


def test_the_example_names_every_key_of_the_contract() -> None:
    text = EXAMPLE.read_text()
    assert not [key for key in contract_keys() if not re.search(rf"\b{key}:", text)]


def test_the_example_shows_every_supported_key_of_every_model() -> None:
    text = EXAMPLE.read_text()
    models = (Config, DatabaseConfig, TableConfig, LogConfig, SinkOptions, BatchOptions, RetryOptions)
    assert not [key for model in models for key in model.model_fields if not re.search(rf"\b{key}:", text)]


# -- which file --


def test_a_file_given_by_name_beats_the_environment_which_beats_the_defaults() -> None:
    Path("config.yaml").touch()
    config.SYSTEM_CONFIG.parent.mkdir()
    config.SYSTEM_CONFIG.touch()
    environ = {"CDC_CONFIG": "from_environment.yaml"}
    assert config.find(Path("given.yaml"), environ) == Path("given.yaml")
    assert config.find(None, environ) == Path("from_environment.yaml")
    assert config.find(None, {"CDC_CONFIG": ""}) == Path("config.yaml")
    Path("config.yaml").unlink()
    assert config.find(None, {}) == config.SYSTEM_CONFIG


def test_without_any_file_the_error_says_where_it_looked_and_how_to_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "SYSTEM_CONFIG", Path("/nowhere/config.yaml"))
    with pytest.raises(ConfigError) as caught:
        config.find(None, {})
    assert caught.value.findings == (
        "config.yaml: no configuration file; looked for -c FILE, $CDC_CONFIG, ./config.yaml and "
        "/nowhere/config.yaml (copy config.example.yaml to ./config.yaml and set its dsn)",
    )
