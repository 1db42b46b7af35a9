"""From a YAML file to strict, frozen models, or to every reason why not.

`find` says which file, `load` reads it. Four steps; each adds to one list of findings, which is raised as a
whole:

1. **Read.** UTF-8, at most 256 KiB, one YAML 1.2 document. The tree is built here from parser events, because
   only there can duplicate keys, anchors, aliases and tags be told from what they would become, and every key
   keeps its line. What leaves no tree to speak of (syntax, nesting, a second document) ends the work here.
2. **Expand** ``${NAME}`` and ``${NAME:-default}`` in text values, never in keys, once, after parsing: what a
   variable holds is always text and can add neither keys nor structure.
3. **Validate** with pydantic. A sink is read by the model its ``type`` names in the registry the caller hands
   in; one whose type is unknown still has its shared fields checked.
4. **Cross-check** what no single model sees: databases named by sinks, one table written in two ways.

Findings come in the order of the file and read ``FILE: path.to.key: what is wrong (what would be right)``.
They never contain a value: any value may be a secret, or have come from ``${SECRET}``. Two exceptions: keys,
unless they look like a connection string, and the name of a ``dsn_file``. A place that already has a finding
of step 1 or 2 gets no second one from step 3.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, TypeAlias, Union, get_args, get_origin
from urllib.parse import unquote

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.reader import ReaderError

from cdc.errors import ConfigError
from cdc.options import (
    ALL_CAPTURE_OPS,
    NAME_BYTES,
    CaptureOp,
    Distinct,
    Duration,
    SinkOptions,
    StrictModel,
    TablePattern,
    is_glob,
    matches,
    not_supported_yet,
    split,
)

LOCAL_CONFIG: Final = Path("config.yaml")
SYSTEM_CONFIG: Final = Path("/etc/cdc/config.yaml")

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 32

SINK_TYPES: Final = ("stdout", "file", "webhook", "kafka", "redis", "nats", "rabbitmq", "postgres", "python")
"""Every sink type the contract names, whether this version has it or not."""

# A DSN file holds one line; anything larger is another file.
_MAX_DSN_BYTES: Final = 64 * 1024


# -- connection strings --

_KEYWORD: Final = re.compile(
    r"\s*([A-Za-z_]+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'(?=\s|\Z)|((?!')(?:[^\s\\]|\\.)*))", re.DOTALL
)
_URL_HOST: Final = re.compile(r"([\w.%-]*|\[[\w:.%]+\])(?::([0-9]*))?", re.ASCII)
_BAD_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")

# The parts of a connection string that are no secret, in the order they are shown.
_PUBLIC_PARTS: Final = ("service", "host", "hostaddr", "port", "dbname")

_ENCODE: Final = "percent-encode what is special in the user name and password: @ is %40, / is %2F, ? is %3F"


def _dsn_parts(dsn: str) -> dict[str, str]:
    """The keywords of a connection string, read as libpq reads it; of a URL only the `_PUBLIC_PARTS`.

    Stricter than libpq wherever a slip in the password would turn a piece of it into a host or database name,
    because those names are logged.

    Raises:
        ValueError: neither a libpq URL, nor key=value, nor ``embedded:DIR``; the message holds nothing of it.
    """
    if "\x00" in dsn:
        raise ValueError("contains a NUL character (remove it)")
    if dsn.startswith("embedded:"):
        directory = dsn.removeprefix("embedded:")
        if not directory.strip():
            raise ValueError("embedded: without a directory (write embedded:./data)")
        return {"embedded": directory}
    scheme, found, rest = dsn.partition("://")
    parts = _url_parts(rest) if found and scheme in ("postgresql", "postgres") else _keyword_parts(dsn)
    if "@" in parts.get("host", "")[1:]:
        raise ValueError("a host that contains @ (write user and password as keywords of their own)")
    # `host= password=x` makes password=x the host, and a dbname may be a connection string of its own.
    for name in _PUBLIC_PARTS:
        if re.search(r"=|://", parts.get(name, "")):
            raise ValueError(f"a {name} that contains = or :// (write '' for an empty value)")
    return parts


def _url_parts(rest: str) -> dict[str, str]:
    if re.search(r"\s", rest) or _BAD_PERCENT.search(rest):
        raise ValueError(f"not a valid URL ({_ENCODE}, % is %25)")
    # libpq looks for the user before anything else: up to the first @, unless a / comes first.
    user = re.match(r"[^@/]*@", rest)
    if user:
        rest = rest[user.end() :]
    location, _, query = rest.partition("?")
    hosts, _, dbname = location.partition("/")
    found = [_URL_HOST.fullmatch(host) for host in hosts.split(",")]
    if (user and "?" in user[0]) or "@" in location or not all(found):
        raise ValueError(f"not a valid URL ({_ENCODE})")
    ports = [host[2] or "" for host in found if host]
    parts = {
        "host": ",".join(host[1].strip("[]") for host in found if host),
        "port": ",".join(ports) if any(ports) else "",
        "dbname": dbname,
    }
    for parameter in filter(None, query.split("&")):
        name, found_equals, value = parameter.partition("=")
        if not found_equals or "=" in value:
            raise ValueError("not a valid URL (write its parameters as ?name=value&name=value)")
        if unquote(name) in _PUBLIC_PARTS:
            parts[unquote(name)] = value
    return {name: unquote(value) for name, value in parts.items() if value}


def _keyword_parts(dsn: str) -> dict[str, str]:
    parts: dict[str, str] = {}
    dsn = dsn.strip()
    at = 0
    while at < len(dsn):
        found = _KEYWORD.match(dsn, at)
        if found is None:
            parts = {}
            break
        at = found.end()
        parts[found[1]] = re.sub(r"\\(.)", r"\1", found[2] if found[2] is not None else found[3], flags=re.DOTALL)
    if not parts:
        raise ValueError(
            "not a connection string (write postgresql://user@host/dbname, host=… dbname=…, or embedded:DIR)"
        )
    return parts


def _checked_dsn(dsn: SecretStr) -> SecretStr:
    _dsn_parts(dsn.get_secret_value())
    return dsn


Dsn = Annotated[SecretStr, AfterValidator(_checked_dsn)]
"""A libpq URL, a libpq key=value string, or ``embedded:DIR``; never shown."""


@dataclass(frozen=True)
class DsnFile:
    """A file that holds a connection string, and the one it held when the configuration was read."""

    path: str
    dsn: SecretStr


def _read_dsn_file(value: object) -> object:
    """Read the file a ``dsn_file`` names; a relative name counts from the working directory."""
    if not isinstance(value, str):
        return value
    path = Path(value)
    try:
        mode = path.stat().st_mode
        # stat() first: opening a FIFO would wait for a writer that may never come.
        if not stat.S_ISREG(mode):
            raise ValueError(f"{_printable(value)} is not a regular file (write the name of a file)")
        if mode & stat.S_IROTH:
            raise ValueError(f"{_printable(value)} can be read by everybody (chmod o-r {_printable(value)})")
        with path.open("rb") as file:
            content = file.read(_MAX_DSN_BYTES + 1)
    except OSError as error:
        if re.search(r"=|:", value):
            # Somebody may have put the connection string itself here, and it must not be shown.
            message = "no such file, and it looks like a connection string (write that as dsn)"
        else:
            reason = error.strerror or "unknown reason"
            message = f"cannot read {_printable(value)}: {reason} (name a file this user may read)"
        raise ValueError(message) from None
    name = _printable(value)
    if len(content) > _MAX_DSN_BYTES:
        raise ValueError(f"{name} is too large (it should hold one connection string and nothing else)")
    try:
        dsn = content.decode().strip()
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8 text (it should hold one connection string)") from None
    if not dsn:
        raise ValueError(f"{name} is empty (it should hold one connection string)")
    try:
        _dsn_parts(dsn)
    except ValueError as error:
        raise ValueError(f"content of {name}: {error}") from None
    return DsnFile(value, SecretStr(dsn))


# -- the models --


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,62}", value):
        raise ValueError("not a usable name (a letter, then letters, digits, _ or -, at most 63 in all)")
    return value


Name = Annotated[str, AfterValidator(_name)]
"""What a database or a sink is called: in metrics labels, in event ids, on the command line."""


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
    model: str | None = None

    _exclude = not_supported_yet("exclude", except_for=((),))
    _mask = not_supported_yet("mask", except_for=({},))
    _when = not_supported_yet("when", except_for=({},))
    _delivery = not_supported_yet("delivery", except_for=("durable",))
    _model = not_supported_yet("model")


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
    """

    dsn: Dsn | None = None
    dsn_file: Annotated[DsnFile, BeforeValidator(_read_dsn_file)] | None = Field(default=None, validate_default=True)
    migrate_dsn: Dsn | None = None
    tables: dict[TablePattern, Annotated[TableConfig, BeforeValidator(_all_defaults)]] = Field(min_length=1)
    notify: Literal["adaptive", "always", "off"] = "adaptive"
    notify_payload: Literal["diff", "wake"] = "diff"
    channel: str = "cdc"
    retention: Duration = 86_400.0

    @field_validator("dsn_file")
    @classmethod
    def _either_dsn_or_file(cls, value: DsnFile | None, info: ValidationInfo) -> DsnFile | None:
        if "dsn" in info.data:  # otherwise it is there, and wrong, and has a finding of its own
            if value is None and info.data["dsn"] is None:
                raise ValueError("no connection string (write dsn or dsn_file)")
            if value is not None and info.data["dsn"] is not None:
                raise ValueError("given beside dsn (keep one of the two)")
        return value

    @field_validator("channel")
    @classmethod
    def _channel_fits(cls, value: str) -> str:
        if not 1 <= len(value.encode()) <= NAME_BYTES:
            raise ValueError(f"not a channel name (1 to {NAME_BYTES} bytes)")
        return value

    @property
    def resolved_dsn(self) -> SecretStr:
        """The connection string of the daemon, written as ``dsn`` or read from ``dsn_file``."""
        dsn = self.dsn_file.dsn if self.dsn_file else self.dsn
        if dsn is None:  # only model_construct() gets here
            raise ValueError("a database without a connection string")
        return dsn

    @property
    def resolved_migrate_dsn(self) -> SecretStr:
        """The connection string for migrate and uninstall."""
        return self.migrate_dsn or self.resolved_dsn

    def describe(self) -> str:
        """Where the database is, fit for logs: ``host=db1 port=5433 dbname=shop`` or ``embedded:DIR``.

        Users, passwords and every other parameter are left out.
        """
        parts = _dsn_parts(self.resolved_dsn.get_secret_value())
        if "embedded" in parts:
            return _printable(f"embedded:{parts['embedded']}")
        shown = (f"{name}={_printable(parts[name])}" for name in _PUBLIC_PARTS if parts.get(name))
        return " ".join(shown) or "libpq's default server"

    def options_for(self, schema: str, table: str) -> TableConfig | None:
        """How a table is captured, or None when no pattern covers it.

        The name of the table itself beats a glob; among globs the first of the file wins.
        """
        covering = [pattern for pattern in self.tables if matches(pattern, schema, table)]
        if not covering:
            return None
        return self.tables[next((pattern for pattern in covering if not is_glob(pattern)), covering[0])]


class LogConfig(StrictModel):
    """What is logged and in which shape."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class _UnknownSink(SinkOptions):
    """Stands in for a sink whose type is missing or names no model: its shared fields are checked."""

    model_config = ConfigDict(extra="ignore")

    @field_validator("type")
    @classmethod
    def _refuse(cls, value: str, info: ValidationInfo) -> str:
        known = _registry(info)
        if value in SINK_TYPES:
            raise ValueError(f"not supported yet (this version has {_listed(known)})")
        raise ValueError(f"unknown sink type ({_known(value, known, SINK_TYPES)})")


def _registry(info: ValidationInfo) -> Mapping[str, type[SinkOptions]]:
    context = info.context if isinstance(info.context, dict) else {}
    registry: Mapping[str, type[SinkOptions]] = context.get("sink_types", {})
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
    """

    databases: dict[Name, DatabaseConfig] = Field(min_length=1)
    sinks: dict[Name, Annotated[SerializeAsAny[SinkOptions], BeforeValidator(_sink)]] = Field(min_length=1)
    http: object = None
    log: LogConfig = LogConfig()

    _http = not_supported_yet("http")


# -- the file --


def find(explicit: Path | None, environ: Mapping[str, str]) -> Path:
    """Which configuration file to read: ``-c``, ``$CDC_CONFIG``, ``./config.yaml``, ``/etc/cdc/config.yaml``.

    A file that was asked for by name is returned whether it exists or not; `load` says what is wrong with it.

    Args:
        explicit: what the user gave as ``-c``.
        environ: the process environment; an empty ``CDC_CONFIG`` counts as unset.

    Raises:
        ConfigError: nothing was asked for and neither default exists.
    """
    if explicit is not None:
        return explicit
    if environ.get("CDC_CONFIG"):
        return Path(environ["CDC_CONFIG"])
    for candidate in (LOCAL_CONFIG, SYSTEM_CONFIG):
        try:
            candidate.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            # It is there, or may be, behind a directory we may not enter. Going on to the next file would run
            # the daemon with a configuration nobody meant; load() reports the reason.
            return candidate
        return candidate
    raise ConfigError(
        [
            f"{LOCAL_CONFIG}: no configuration file; looked for -c FILE, $CDC_CONFIG, ./{LOCAL_CONFIG} and "
            f"{SYSTEM_CONFIG} (copy config.example.yaml to ./{LOCAL_CONFIG} and set its dsn)"
        ]
    )


def load(path: Path, sink_types: Mapping[str, type[SinkOptions]], environ: Mapping[str, str]) -> Config:
    """Read a configuration file, and the files its ``dsn_file`` keys name.

    Args:
        path: the YAML file.
        sink_types: sink type → its model; the sinks this program has.
        environ: where ``${NAME}`` is looked up.

    Raises:
        ConfigError: every finding at once, in the order of the file; no value of the file is in it.
    """
    tree = _Tree()
    config = None
    try:
        data = _expand(_read(path, tree), (), environ, tree)
    except _ReadError as reason:
        tree.findings.append(_Finding(reason.place, f"{reason.where}{reason}"))
    else:
        config = _validate(data, sink_types, tree)
    if config is None or tree.findings:
        # Outside any except block: a chained ValidationError would carry the values it complains about.
        findings = sorted(tree.findings, key=lambda finding: finding.place)
        raise ConfigError([f"{path}: {text}" for text in dict.fromkeys(finding.text for finding in findings)])
    return config


_Path: TypeAlias = tuple[str | int, ...]
_Place: TypeAlias = tuple[int, int]

# Stands where a value is missing because its place already has a finding. Text, so that it counts as given.
_BROKEN: Final = ""


@dataclass(frozen=True)
class _Finding:
    """``path.to.key: what is wrong (what would be right)``, and the line and column that sort it."""

    place: _Place
    text: str


@dataclass
class _Tree:
    """What is known about the file besides its values.

    Attributes:
        findings: all of them, unsorted.
        places: every path of the file → line and column, from 0, of its key or list entry.
        settled: paths that have a finding which explains whatever validation finds wrong there.
        expanded: paths whose text contained a variable.
    """

    findings: list[_Finding] = field(default_factory=list)
    places: dict[_Path, _Place] = field(default_factory=lambda: {(): (0, 0)})
    settled: set[_Path] = field(default_factory=set)
    expanded: set[_Path] = field(default_factory=set)

    def add(self, path: _Path, message: str, *, place: _Place | None = None) -> None:
        where = f"{_shown(path)}: " if path else ""
        self.findings.append(_Finding(place or self.places[path], f"{where}{message}"))

    def settle(self, path: _Path, message: str, *, place: _Place | None = None) -> None:
        self.add(path, message, place=place)
        self.settled.add(path)


class _ReadError(Exception):
    """There is no tree to validate; the text is the finding. With a place it says where in the file."""

    def __init__(self, message: str, place: _Place | None = None) -> None:
        super().__init__(message)
        self.place = place or (0, 0)
        self.where = f"line {place[0] + 1}, column {place[1] + 1}: " if place else ""


def _read(path: Path, tree: _Tree) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or "unknown reason"
        raise _ReadError(f"cannot be read: {reason} (name a file this user may read)") from None
    if len(content) > MAX_BYTES:
        raise _ReadError(f"larger than {MAX_BYTES // 1024} KiB (a configuration is far smaller; is it this file?)")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start)
        column = error.start - (content.rfind(b"\n", 0, error.start) + 1)
        raise _ReadError("not UTF-8 (save the file as UTF-8)", (line, column)) from None
    try:
        return _Reader(text, tree).document()
    except YAMLError as error:
        raise _not_yaml(error, text) from None
    except RecursionError:
        raise _too_deep() from None


def _too_deep(place: _Place | None = None) -> _ReadError:
    return _ReadError(f"nested more than {MAX_DEPTH} levels deep (a configuration needs six)", place)


class _Reader:
    """Builds plain dicts, tuples and scalars from parser events, and notes places and structural findings."""

    def __init__(self, text: str, tree: _Tree) -> None:
        self._text = text
        self._tree = tree
        # One instance per file: a %YAML line changes the rules of the instance that reads it.
        self._yaml = YAML(typ="safe", pure=True)

    def document(self) -> dict[str, object]:
        """The only document of the file; raises `_ReadError` or `YAMLError` when there is none or another."""
        with closing(self._yaml.parse(self._text)) as events:
            next(events)  # the start of the stream
            start = next(events)
            if isinstance(start, StreamEndEvent):
                raise _ReadError("empty (begin with databases: and sinks:)")
            if isinstance(start, DocumentStartEvent) and (start.version or start.tags):
                raise _ReadError("a %YAML or %TAG line (remove it; the file is read as YAML 1.2)", (0, 0))
            first = next(events)
            data = self._value(first, (), events)
            next(events)  # the end of the document
            another = next(events)
            if not isinstance(another, StreamEndEvent):
                raise _ReadError("a second document (keep one; remove the --- line)", _place(another))
        if not isinstance(data, dict):
            raise _ReadError("not keys and values (begin with databases: and sinks:)", _place(first))
        return data

    def _value(self, event: Event, path: _Path, events: Iterator[Event]) -> object:
        if isinstance(event, AliasEvent):
            cure = "write the value out; a pattern that begins with * needs quotes"
            self._tree.settle(path, f"a YAML alias ({cure})")
            return _BROKEN
        if isinstance(event, NodeEvent) and event.anchor is not None:
            self._tree.add(path, "a YAML anchor (remove it; a value that begins with & needs quotes)")
        if isinstance(event, ScalarEvent | CollectionStartEvent) and event.tag is not None:
            self._tree.settle(path, "a YAML tag (remove it; a value that begins with ! needs quotes)")
        if isinstance(event, ScalarEvent):
            return self._scalar(event, path)
        if len(path) >= MAX_DEPTH:
            raise _too_deep(_place(event))
        read = self._list if isinstance(event, SequenceStartEvent) else self._mapping
        return read(path, events)

    def _list(self, path: _Path, events: Iterator[Event]) -> tuple[object, ...]:
        items: list[object] = []
        while not isinstance(event := next(events), SequenceEndEvent):
            here = (*path, len(items))
            self._tree.places.setdefault(here, _place(event))
            items.append(self._value(event, here, events))
        return tuple(items)

    def _mapping(self, path: _Path, events: Iterator[Event]) -> dict[str, object]:
        mapping: dict[str, object] = {}
        while not isinstance(event := next(events), MappingEndEvent):
            key = self._key(event, path, events)
            here = (*path, key)
            if key in mapping:
                first, again = self._tree.places[here][0] + 1, event.start_mark.line + 1
                self._tree.add(
                    here,
                    f"duplicate key on line {again}, first on line {first} (keep one)",
                    place=_place(event),
                )
                # Read for the structural findings inside it; validation sees the first.
                self._value(next(events), here, events)
                continue
            self._tree.places.setdefault(here, _place(event))
            is_text = isinstance(event, ScalarEvent) and self._tag(event) == "str"
            if not is_text and here not in self._tree.settled:
                self._tree.settle(here, "a key that is not text (write text, in quotes if it looks like a number)")
            mapping[key] = self._value(next(events), here, events)
        return mapping

    def _key(self, event: Event, path: _Path, events: Iterator[Event]) -> str:
        if isinstance(event, ScalarEvent) and event.anchor is None and event.tag is None:
            return self._text_of(event, path)
        # Anything else has its finding here, in the place where it stands.
        key = event.value if isinstance(event, ScalarEvent) else "?"
        self._tree.places.setdefault((*path, key), _place(event))
        self._value(event, (*path, key), events)
        return str(key)

    def _tag(self, event: ScalarEvent) -> str:
        """What a scalar is under YAML 1.2's rules: str, int, float, bool, null, timestamp and the like."""
        return str(self._yaml.resolver.resolve(ScalarNode, event.value, event.implicit)).rpartition(":")[2]

    def _scalar(self, event: ScalarEvent, path: _Path) -> object:
        text = self._text_of(event, path)
        if event.tag is not None:
            return text
        kind = self._tag(event)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind in ("int", "float"):
            return self._number(kind, text.replace("_", "").lower(), path)
        # Dates and the like: nothing in a configuration is one, and as text they get a finding that fits.
        return text

    def _number(self, kind: str, text: str, path: _Path) -> object:
        try:
            if kind == "int":
                # Base 0 reads 0x1f and 0o17 but refuses 010, which YAML 1.2 reads as ten.
                return int(text, 0 if re.search("[box]", text) else 10)
            return float(re.sub(r"\.(inf|nan)", r"\1", text))
        except ValueError:
            self._tree.settle(path, "a number that cannot be read (write fewer digits, or quote it as text)")
            return _BROKEN

    def _text_of(self, event: ScalarEvent, path: _Path) -> str:
        text = str(event.value)
        # Only escapes in double quotes get here; raw ones are refused by the reader.
        if re.search("[\x00\ud800-\udfff]", text):
            self._tree.settle(path, r"a NUL or half a character (remove the \0 or \ud800 escape)")
            return _BROKEN
        return text


def _place(event: Event) -> _Place:
    return event.start_mark.line, event.start_mark.column


# What the parser says → what that means to somebody who edits the file. Its own words quote the file now and
# then, so what is not listed is not shown.
_SYNTAX: Final = (
    (r"character '\\t'", "a tab (indent with spaces)"),
    (r"cannot start any token", "a character that cannot begin a value (put the value in quotes)"),
    (r"mapping values are not allowed", "a second colon (put the value in quotes, or check the indentation)"),
    (r"could not find expected ':'", "a line without a colon (write key: value)"),
    (r"unexpected end of stream", "a quote that is never closed (close it)"),
    (r"expected <block end>", "wrong indentation (keys of one block begin in the same column)"),
    (r"expected ',' or", "a { } or [ ] that is not closed or lacks a comma (close it)"),
    (r"sequence entries are not allowed", "a list entry in the wrong place (put it on a line of its own)"),
    (r"escape", "an unknown escape in double quotes (use single quotes)"),
    (r"tag|'!'|URI", "a YAML tag (remove it; a value that begins with ! needs quotes)"),
    (r"expected '<document start>'", "text after the end of the document (check the indentation)"),
)


def _not_yaml(error: YAMLError, text: str) -> _ReadError:
    if isinstance(error, ReaderError):
        before = text[: error.position]
        place = before.count("\n"), len(before) - (before.rfind("\n") + 1)
        return _ReadError("a control character (remove it)", place)
    mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
    if not isinstance(error, MarkedYAMLError) or mark is None:
        return _ReadError("not valid YAML (check it with a YAML linter)")
    place = mark.line, mark.column
    if text[max(0, mark.index - 1) : mark.index + 1] == "${":
        return _ReadError('${…} without quotes inside { } or [ ] (write "${…}")', place)
    if re.search("alias|anchor", str(error.context)):
        return _ReadError("a YAML alias or anchor (a value that begins with * or & needs quotes)", place)
    for pattern, meaning in _SYNTAX:
        if re.search(pattern, str(error.problem)):
            return _ReadError(meaning, place)
    return _ReadError("not valid YAML (check quotes and indentation here)", place)


# -- variables --

_VARIABLE: Final = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}|\$\{")


def _expand(value: object, path: _Path, environ: Mapping[str, str], tree: _Tree) -> object:
    """The same tree with ``${NAME}`` and ``${NAME:-default}`` replaced in its texts, and ``$${`` by ``${``.

    As in a shell, ``:-`` also stands in for a variable that is empty.
    """
    if isinstance(value, dict):
        return {key: _expand(item, (*path, key), environ, tree) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_expand(item, (*path, index), environ, tree) for index, item in enumerate(value))
    if not isinstance(value, str):
        return value

    def replace(found: re.Match[str]) -> str:
        name, default = found[1], found[2]
        if found[0] == "$${":
            return "${"
        if name is None:
            tree.settle(path, "malformed ${ (write ${NAME} or ${NAME:-default}; $${ for a plain ${)")
            return _BROKEN
        tree.expanded.add(path)
        if name in environ and (environ[name] or default is None):
            return environ[name]
        if default is not None:
            return default
        tree.settle(path, f"${{{name}}} is not set (set the environment variable, or write ${{{name}:-default}})")
        return _BROKEN

    text = _VARIABLE.sub(replace, value)
    if re.search("[\ud800-\udfff]", text):  # how os.environ passes on bytes that are not UTF-8
        tree.settle(path, "a variable that is not UTF-8 text (set it again, in UTF-8)")
        return _BROKEN
    return text


# -- from pydantic's errors to findings --


def _validate(data: object, sink_types: Mapping[str, type[SinkOptions]], tree: _Tree) -> Config | None:
    path: _Path
    for path, message in _cross_findings(data):
        tree.add(path, message)
    try:
        return Config.model_validate(data, context={"sink_types": sink_types})
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    for detail in details:
        # What is missing is not in the file; its finding sorts where its mapping begins.
        missing = detail["loc"][-1:] if detail["type"] == "missing" else ()
        path = ()
        for part in detail["loc"][: -1 if missing else None]:
            # What is not in the file ("[key]", a field left at its default, a branch of a union) is left out:
            # the finding belongs to the innermost place somebody wrote.
            if (*path, part) in tree.places:
                path = (*path, part)
        if path in tree.settled:
            continue
        message = _in_words(detail, path, data, sink_types)
        if path in tree.expanded and detail["type"] in _EXPECTED:
            message = message.removesuffix(")") + "; what ${NAME} gives is always text)"
        tree.add((*path, *missing), message, place=tree.places[path])
    return None


def _cross_findings(data: object) -> Iterator[tuple[_Path, str]]:
    """What no model sees alone; on the plain tree, so that a finding elsewhere hides none of these."""
    databases = _at(data, ("databases",))
    sinks = _at(data, ("sinks",))
    for name in databases if isinstance(databases, dict) else ():
        tables = _at(databases, (name, "tables"))
        seen: dict[tuple[str, str], str] = {}
        for pattern in tables if isinstance(tables, dict) else ():
            try:
                first = pattern if is_glob(pattern) else seen.setdefault(split(pattern), pattern)
            except ValueError:
                continue  # validation says so
            if first != pattern:
                yield (
                    ("databases", name, "tables", pattern),
                    f"the same table as {_printable(first)} (keep one)",
                )
    if not isinstance(databases, dict) or not isinstance(sinks, dict):
        return
    for name in sinks:
        wanted = _at(sinks, (name, "databases"))
        for index, database in enumerate(wanted if isinstance(wanted, tuple) else ()):
            if isinstance(database, str) and database and database not in databases:
                known = [_printable(key) for key in databases]
                yield ("sinks", name, "databases", index), f"no such database ({_known(database, known)})"


# pydantic's names for "wrong type" → what was expected.
_EXPECTED: Final = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "mapping_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "dataclass_type": "the name of a file",
    "dataclass_exact_type": "the name of a file",
    "tuple_type": "a list",
    "list_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "url_type": "a URL",
    "url_parsing": "a URL",
}

# pydantic's names for "out of range" → what to say, filled in from the error's own context.
_RANGES: Final = {
    "greater_than": "too small (more than {gt})",
    "greater_than_equal": "too small (at least {ge})",
    "less_than": "too large (less than {lt})",
    "less_than_equal": "too large (at most {le})",
    "too_short": "too few entries (at least {min_length})",
    "too_long": "too many entries (at most {max_length})",
    "string_too_short": "too short (at least {min_length} characters)",
    "string_too_long": "too long (at most {max_length} characters)",
    "string_pattern_mismatch": "not of the right form (it should match {pattern})",
    "url_scheme": "a URL of the wrong kind (it should begin with {expected_schemes})",
}


def _in_words(detail: ErrorDetails, path: _Path, data: object, sink_types: Mapping[str, type[SinkOptions]]) -> str:
    """One pydantic error as ``what is wrong (what would be right)``, without its value and without jargon."""
    kind, context, value = detail["type"], detail.get("ctx", {}), _at(data, path)
    message = ""
    if kind == "missing":
        message = "missing (this key is required)"
    elif kind == "extra_forbidden":
        keys = _keys_beside(path, data, sink_types)
        message = f"unknown key ({_nearest(str(path[-1]), keys) or _known('', keys)})"
    elif kind == "literal_error":
        words = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        word = path[-1] if detail["loc"][-1] == "[key]" else value
        choice = _listed(words, "or")
        if isinstance(word, str):
            message = f"not a known word ({_cure(f'write {choice}', _nearest(word, words))})"
        else:
            message = f"found {_kind(word)} (expected {choice})"
    elif kind in ("value_error", "assertion_error"):
        message = " ".join(str(context.get("error", "")).split())
    elif kind in _EXPECTED:
        message = f"found {_kind(value)} (expected {_EXPECTED[kind]})"
    elif kind in _RANGES:
        message = _RANGES[kind].format_map(context)
    return message or "not accepted (see the documentation of this key)"


def _at(data: object, path: _Path) -> object:
    """What stands at a path of the plain tree, or None."""
    for part in path:
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, tuple) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return None
    return data


def _keys_beside(path: _Path, data: object, sink_types: Mapping[str, type[SinkOptions]]) -> list[str]:
    """The keys a model knows, at the place where it was given one it does not know."""
    kind: Any = Config
    for index, part in enumerate(path[:-1]):
        if index == 1 and path[0] == "sinks":
            kind = sink_types.get(str(_at(data, (*path[:2], "type"))), SinkOptions)
            continue
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            known = kind.model_fields.get(str(part))
            kind = known.annotation if known else None
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        while get_origin(kind) in (Annotated, Union, UnionType):
            kind = next(branch for branch in get_args(kind) if branch is not NoneType)
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


# -- words --


def _kind(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case tuple():
            return "a list"
        case _:
            return "keys and values"


def _listed(words: Iterable[str], last: str = "and") -> str:
    *others, final = list(words) or ["nothing"]
    return f"{', '.join(others)} {last} {final}" if others else final


def _nearest(word: str, known: Iterable[str]) -> str:
    """The word that was probably meant, as a question; empty when none comes near."""
    near = get_close_matches(word.lower(), list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


def _known(word: str, known: Iterable[str], also: tuple[str, ...] = ()) -> str:
    """The cure for a word nobody knows: the words there are, and the one that was probably meant."""
    words = list(known)
    return _cure(f"known: {', '.join(words)}", _nearest(word, [*words, *also]))


def _cure(*parts: str) -> str:
    return "; ".join(filter(None, parts))


def _shown(path: _Path) -> str:
    """A path as the user knows it: ``sinks.audit.tables[0]``; keys stand as they are."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{_printable(part)}"
    return text.removeprefix(".")


def _printable(text: str) -> str:
    """A key or a file name on one line; a connection string in the wrong place is not shown at all."""
    if re.search(r"://[^/]*@|pass(word|file)?\s*=", text):
        return "***"
    if not text:
        return '""'
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= 120 else f"{shown[:119]}…"
