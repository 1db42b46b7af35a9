"""What the file may say: one strict, frozen model for each of its blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Annotated, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cdc.config.words import known_words, listed
from cdc.dsn import Dsn, DsnFile, describe, either, read_dsn_file, read_secret, resolved
from cdc.options import (
    ALL_CAPTURE_OPS,
    NAME_BYTES,
    CaptureOp,
    Distinct,
    Duration,
    SinkOptions,
    Size,
    StrictModel,
    TablePattern,
    is_glob,
    matches,
)


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,62}", value):
        raise ValueError("not a usable name (a letter, then letters, digits, _ or -, at most 63 in all)")
    return value


Name = Annotated[str, AfterValidator(_name)]
"""What a database or a sink is called: in metrics labels, in event ids, on the command line."""


def _class_reference(value: str) -> str:
    parts = value.split(":")
    if len(parts) != 2 or not all(name.isidentifier() for part in parts for name in part.split(".")):
        raise ValueError("not a module and its class (write it as shop.models:Order)")
    return value


class TableConfig(StrictModel):
    """How one table, or every table a pattern covers, is captured.

    Attributes:
        ops: the operations captured.
        image: ``diff``, an update carries only the columns that changed; ``full``, whole rows on both sides.
        exclude: columns that are never captured.
        mask: column → how its value is hidden.
        when: operation → SQL condition.
        key: the columns that identify a row, for a table without a primary key.
        delivery: ``durable``, through the outbox; ``ephemeral``, by NOTIFY alone.
        always: capture replicated writes too (ENABLE ALWAYS).
        model: ``module:Class``, a pydantic model of the row.
    """

    ops: Annotated[tuple[CaptureOp, ...], Distinct] = ALL_CAPTURE_OPS
    image: Literal["diff", "full"] = "diff"
    exclude: tuple[str, ...] = ()
    mask: dict[str, Literal["hash", "redact"]] = Field(default_factory=dict)
    when: dict[CaptureOp, str] = Field(default_factory=dict)
    key: Annotated[tuple[str, ...], Distinct] | None = None
    delivery: Literal["durable", "ephemeral"] = "durable"
    always: bool = False
    model: Annotated[str, AfterValidator(_class_reference)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> TableConfig:
        if both := [column for column in self.exclude if column in self.mask]:
            raise ValueError(f"exclude and mask both name {listed(both)} (keep one)")
        if "truncate" in self.when:
            raise ValueError("a condition for truncate, which touches no single row (leave truncate out of ops)")
        if unused := [op for op in self.when if op not in self.ops]:
            raise ValueError(f"a condition for {listed(unused)}, which ops leaves out (keep one)")
        return self


def _all_defaults(value: object) -> object:
    """``public.customers:`` with nothing behind it says what ``public.customers: {}`` says."""
    return {} if value is None else value


class DatabaseConfig(StrictModel):
    """One source database.

    Attributes:
        dsn: connection string of the daemon; see `resolved_dsn` for the one to use.
        dsn_file: the file it was read from instead.
        migrate_dsn: connection string for migrate and uninstall; see `resolved_migrate_dsn`.
        tables: pattern → how the tables it covers are captured, in the order of the file.
        notify: when the triggers ring: while somebody listens, on every commit, never.
        notify_payload: what they say: the change, or only that there is one.
        channel: name of the NOTIFY channel.
        retention: seconds an event is kept after delivery.
        outbox_alarm: bytes of the outbox on disk above which the daemon and `cdc status` raise an alarm.
    """

    dsn: Dsn | None = None
    dsn_file: Annotated[DsnFile, BeforeValidator(read_dsn_file)] | None = Field(default=None, validate_default=True)
    migrate_dsn: Dsn | None = None
    tables: dict[TablePattern, Annotated[TableConfig, BeforeValidator(_all_defaults)]] = Field(min_length=1)
    notify: Literal["adaptive", "always", "off"] = "adaptive"
    notify_payload: Literal["diff", "wake"] = "diff"
    channel: str = "cdc"
    retention: Duration = 86_400.0
    outbox_alarm: Size = Field(default=10 * 2**30, ge=1)

    _either = field_validator("dsn_file")(either)

    @model_validator(mode="after")
    def _ephemeral_needs_notify(self) -> DatabaseConfig:
        if self.notify == "off" and self.has_ephemeral:
            raise ValueError("notify: off, and a table with delivery: ephemeral (its changes go by NOTIFY alone)")
        return self

    @property
    def has_ephemeral(self) -> bool:
        """Whether there are tables whose changes go by NOTIFY alone."""
        return any(table.delivery == "ephemeral" for table in self.tables.values())

    def is_ephemeral(self, schema: str, table: str) -> bool:
        """Whether the changes of a table go by NOTIFY alone."""
        options = self.options_for(schema, table)
        return options is not None and options.delivery == "ephemeral"

    @field_validator("channel")
    @classmethod
    def _channel_fits(cls, value: str) -> str:
        if not 1 <= len(value.encode()) <= NAME_BYTES:
            raise ValueError(f"not a channel name (1 to {NAME_BYTES} bytes)")
        return value

    @property
    def resolved_dsn(self) -> SecretStr:
        """The connection string of the daemon, written as ``dsn`` or read from ``dsn_file``."""
        return resolved(self.dsn, self.dsn_file)

    @property
    def resolved_migrate_dsn(self) -> SecretStr:
        """The connection string for migrate and uninstall."""
        return self.migrate_dsn or self.resolved_dsn

    def describe(self) -> str:
        """Where the database is, fit for logs: ``host=db1 port=5433 dbname=shop`` or ``embedded:DIR``.

        Users, passwords and every other parameter are left out.
        """
        return describe(self.resolved_dsn)

    def names(self, schema: str, table: str) -> bool:
        """Whether a table is written by its own name, not only covered by a glob."""
        return any(not is_glob(pattern) and matches(pattern, schema, table) for pattern in self.tables)

    def options_for(self, schema: str, table: str) -> TableConfig | None:
        """How a table is captured, or None when no pattern covers it.

        The name of the table itself beats a glob; among globs the first of the file wins.
        """
        covering = [pattern for pattern in self.tables if matches(pattern, schema, table)]
        if not covering:
            return None
        return self.tables[next((pattern for pattern in covering if not is_glob(pattern)), covering[0])]


_LISTEN: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_TOKEN_CHARACTERS: Final = 16


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _no_token(value: object) -> object:
    """``token: ${CDC_TOKEN:-}`` says that there is none as long as the variable is not set."""
    return None if value == "" else value


def _read_token(value: object) -> object:
    return read_secret(value, "token", "token") if isinstance(value, str) else value


class HttpConfig(StrictModel):
    """Metrics, health and console.

    Attributes:
        listen: ``HOST:PORT``; beyond loopback a token is needed.
        token: what has to be shown to change anything, such as to pause a sink, at least 16 ASCII characters without
            blanks; without one nothing can be changed.
        token_file: a file that holds it instead.
        show_values: whether the console shows row values, in the live tail and of dead letters.
        stalled_after: seconds a change may wait while nothing is acknowledged, before ``/readyz`` says 503.
    """

    listen: str = "127.0.0.1:8650"
    token: Annotated[SecretStr | None, BeforeValidator(_no_token)] = None
    token_file: Annotated[SecretStr | None, BeforeValidator(_read_token)] = None
    show_values: bool = False
    stalled_after: Duration = Field(default=60.0, ge=1)

    @field_validator("listen")
    @classmethod
    def _listen_fits(cls, value: str) -> str:
        found = _LISTEN.fullmatch(value)
        if found is None or int(found[2]) > 65535:
            raise ValueError("not an address to listen on (write HOST:PORT, such as 127.0.0.1:8650)")
        return value

    @field_validator("token", "token_file")
    @classmethod
    def _token_is_long(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and (len(value.get_secret_value()) < _TOKEN_CHARACTERS or not _is_plain(value)):
            raise ValueError(
                f"not a usable token (at least {_TOKEN_CHARACTERS} ASCII characters without spaces; "
                "openssl rand -hex 32 makes one)"
            )
        return value

    @model_validator(mode="after")
    def _is_guarded(self) -> HttpConfig:
        if self.token is not None and self.token_file is not None:
            raise ValueError("both token and token_file (keep one)")
        if self.secret is None and not self.is_loopback:
            raise ValueError(
                "listens beyond this machine without a token (write token or token_file, or listen: 127.0.0.1:8650)"
            )
        return self

    @property
    def secret(self) -> str | None:
        """The token, wherever it was written."""
        token = self.token or self.token_file
        return token.get_secret_value() if token else None

    @property
    def address(self) -> tuple[str, int]:
        """Host, without brackets, and port."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return _is_loopback(self.address[0])


def _is_plain(secret: SecretStr) -> bool:
    return re.fullmatch(r"[!-~]+", secret.get_secret_value()) is not None


class LogConfig(StrictModel):
    """What is logged and in which shape.

    Attributes:
        level: the least that is said.
        format: lines for people, or a JSON object on each.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class _UnknownSink(SinkOptions):
    """Stands in for a sink whose type is missing or names no model: its shared fields are checked."""

    model_config = ConfigDict(extra="ignore")

    @field_validator("type")
    @classmethod
    def _refuse(cls, value: str, info: ValidationInfo) -> str:
        known = _registry(info)
        raise ValueError(f"unknown sink type ({known_words(value, known)})")


def _registry(info: ValidationInfo) -> Mapping[str, type[SinkOptions]]:
    """The sinks this program has, as `Config.model_validate` was handed them: ``context={"sink_types": …}``."""
    registry: Mapping[str, type[SinkOptions]] = (info.context or {}).get("sink_types", {})
    return registry


def _sink(value: object, info: ValidationInfo) -> SinkOptions:
    if isinstance(value, SinkOptions):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    model = _registry(info).get(kind) if isinstance(kind, str) else None
    return (model or _UnknownSink).model_validate(value, context=info.context)


class Config(StrictModel):
    """The whole file.

    Attributes:
        databases: name → source database; at least one.
        sinks: name → options of the model its type names, a subclass of `SinkOptions`; at least one.
        http: metrics, health and console.
        log: what is logged and in which shape.
        stop_timeout: seconds for which a sink that does not return is waited for when the daemon is told to stop.
    """

    databases: dict[Name, DatabaseConfig] = Field(min_length=1)
    sinks: dict[Name, Annotated[SerializeAsAny[SinkOptions], BeforeValidator(_sink)]] = Field(min_length=1)
    http: HttpConfig | None = None
    log: LogConfig = LogConfig()
    stop_timeout: Duration = Field(default=20.0, gt=0)
