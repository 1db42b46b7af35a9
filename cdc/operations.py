"""``op.enable_capture`` and ``op.disable_capture`` for anybody's Alembic migrations, and autogenerate that writes them.

Alembic imports this module whenever it is imported itself (entry point ``alembic.plugins``), in the middle of its own
import and in programs that may never capture anything. So the rest of `cdc` is imported where it is needed, not here: a
mistake at import would break Alembic for everybody in the environment.

**Operations** hold a table and those of its options that are not the default, checked by the models of the YAML. When
run they call the function of their name in schema cdc, which `cdc migrate` has installed before; in offline mode
(``--sql``) the same call is written out.

**Autogenerate** (plugin ``cdc``) compares the database with the YAML file that env.py names, after Alembic has compared
everything else.

* A table of the YAML that is not captured, or not like that, is enabled at the end, when the tables and columns that
  the migration makes are there. A captured table that the YAML does not have, or that the migration drops, is disabled
  at the beginning. A downgrade goes through all of it backwards. What ``include_name`` leaves out is left alone.
* Whether triggers stand as they should, ``cdc.capture_plan`` says, as for `cdc migrate`. How a table was captured
  before, which the downgrade needs, stands in its triggers and in ``cdc.captured_table``; conditions come back in
  PostgreSQL's own words.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from alembic.runtime.plugins import Plugin

    from cdc.config import DatabaseConfig, TableConfig

# What Alembic wants of a plugin stands above all imports from Alembic: when somebody imports this module first, it is
# the first of them that brings Alembic here, for a module of which there is no more yet.


def setup(plugin: Plugin) -> None:
    """Give the comparison to Alembic, to be made where env.py asks for this plugin."""
    from alembic.util import DispatchPriority

    def compare(context: AutogenContext, upgrade_ops: UpgradeOps) -> PriorityDispatchResult:
        return _compare(context, upgrade_ops)

    plugin.add_autogenerate_comparator(
        compare, "autogenerate", "cdc", qualifier="postgresql", priority=DispatchPriority.LAST
    )


class _Plugin(ModuleType):
    """This module. Alembic before 1.20.1 goes through what the entry point names, as if it were several."""

    def __iter__(self) -> Iterator[ModuleType]:
        yield self


sys.modules[__name__].__class__ = _Plugin

from alembic.autogenerate.render import renderers
from alembic.operations import MigrateOperation, Operations
from alembic.operations.ops import CreateTableOp, DropTableOp, ModifyTableOps, UpgradeOps
from alembic.util import CommandError, PriorityDispatchResult

Options = Mapping[str, object]
"""Options by the names of `EnableCapture.enable_capture`; what is not there is the default."""

# -- the operations ---------------------------------------------------------------------------------------------


@Operations.register_operation("enable_capture")
class EnableCapture(MigrateOperation):
    """Make the triggers of one table exactly these.

    Attributes:
        table: as in the YAML, without wildcards.
        options: those that are not the default.
        previous: how it was captured before; None: it was not.
    """

    def __init__(self, table: str, options: Options, *, previous: Options | None = None) -> None:
        """Raises ValueError for what `cdc check` would refuse in the YAML."""
        self.table = table
        self.options = _minimal(table, options)
        self.previous = None if previous is None else _minimal(table, previous)

    @classmethod
    def enable_capture(
        cls,
        operations: Operations,
        table: str,
        *,
        ops: Sequence[str] = ("insert", "update", "delete", "truncate"),
        image: str = "diff",
        key: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        mask: Mapping[str, str] | None = None,
        when: Mapping[str, str] | None = None,
        always: bool = False,
        delivery: str = "durable",
        notify: str = "adaptive",
        notify_payload: str = "diff",
        channel: str = "cdc",
        lenient: bool = False,
    ) -> None:
        """Capture a table, or capture it differently: afterwards its triggers are what these options say.

        Args:
            table: ``schema.table``; odd names as in the YAML, ``public."my.table"``.
            ops, image, key, exclude, mask, when, always, delivery: as for a table in the YAML.
            notify, notify_payload, channel: as for a database in the YAML.
            lenient: ``exclude`` and ``mask`` may name columns that the table does not have, and hide them should they
                come; what the YAML says of a pattern is meant so.

        Raises:
            ValueError: an option that `cdc check` would refuse in the YAML.
            CommandError: schema cdc is not installed, or the table cannot be captured like that.
        """
        options: dict[str, object] = {
            "ops": ops,
            "image": image,
            "key": key,
            "exclude": exclude,
            "mask": mask,
            "when": when,
            "always": always,
            "delivery": delivery,
            "notify": notify,
            "notify_payload": notify_payload,
            "channel": channel,
            "lenient": lenient,
        }
        operations.invoke(cls(table, {name: value for name, value in options.items() if value is not None}))

    def reverse(self) -> EnableCapture | DisableCapture:
        if self.previous is None:
            return DisableCapture(self.table, self.options)
        return EnableCapture(self.table, self.previous, previous=self.options)

    def to_diff_tuple(self) -> tuple[str, str, Options]:
        return ("enable_capture", self.table, self.options)


@Operations.register_operation("disable_capture")
class DisableCapture(MigrateOperation):
    """Remove our triggers from one table.

    Attributes:
        table: as in the YAML, without wildcards.
        options: how it was captured; None: not known.
    """

    def __init__(self, table: str, options: Options | None = None) -> None:
        """Raises ValueError for what `cdc check` would refuse in the YAML."""
        self.table = table
        self.options = _minimal(table, options or {})
        self._reversible = options is not None

    @classmethod
    def disable_capture(cls, operations: Operations, table: str) -> None:
        """Capture a table no longer. What was recorded is delivered all the same.

        Args:
            table: as for ``enable_capture``.

        Raises:
            ValueError: not the name of a table.
            CommandError: schema cdc is not installed, or there is no such table.
        """
        operations.invoke(cls(table))

    def reverse(self) -> EnableCapture:
        if not self._reversible:
            raise ValueError(f"disable_capture({self.table!r}) does not know how the table was captured")
        return EnableCapture(self.table, self.options)

    def to_diff_tuple(self) -> tuple[str, str]:
        return ("disable_capture", self.table)


_DEFAULTS: dict[str, object] = {
    name: parameter.default
    for name, parameter in inspect.signature(EnableCapture.enable_capture).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}
_OF_THE_DATABASE = ("notify", "notify_payload", "channel")
"""Options that the YAML gives to a database, not to a table."""


def _minimal(table: str, options: Options) -> dict[str, object]:
    """Options checked as the YAML is checked, as plain lists and mappings, without those that are the default."""
    from pydantic import SecretStr, ValidationError

    from cdc.config import DatabaseConfig
    from cdc.options import ALL_CAPTURE_OPS, is_glob

    try:
        if is_glob(table):
            raise ValueError('several tables (name one; a * or ? in a name wants quotes: public."really?")')
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        lenient = given.pop("lenient", False)
        of_the_database = {name: given.pop(name) for name in _OF_THE_DATABASE if name in given}
        database = DatabaseConfig.model_validate(
            {"dsn": SecretStr("dbname=none"), "tables": {table: given}, **of_the_database}
        )
    except ValidationError as error:
        raise ValueError(f"{table}: {'; '.join(map(_finding, error.errors()))}") from None
    except ValueError as error:
        raise ValueError(f"{table}: {error}") from None
    checked = {
        **database.tables[table].model_dump(),
        **{name: getattr(database, name) for name in _OF_THE_DATABASE},
        "ops": [op for op in ALL_CAPTURE_OPS if op in database.tables[table].ops],
        "lenient": lenient,
    }
    if checked["delivery"] == "ephemeral":
        checked["notify"] = None  # such a table rings, whatever this says
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in checked.items()}
    # What is empty is a default, too.
    return {
        name: plain[name]
        for name, default in _DEFAULTS.items()
        if plain[name] and plain[name] != (list(default) if isinstance(default, tuple) else default)
    }


def _finding(detail: Any) -> str:
    """One of pydantic's errors, without the way that leads to the table."""
    place = ".".join(str(part) for part in detail["loc"][2 if detail["loc"][:1] == ("tables",) else 0 :])
    what = str(detail.get("ctx", {}).get("error", detail["msg"]))
    return f"{place}: {what}" if place else what


# -- calling the database ---------------------------------------------------------------------------------------

_TYPES = {
    "relation": "regclass",
    "ops": "text[]",
    "image": "text",
    "key": "text[]",
    "always": "boolean",
    "notify": "text",
    "notify_payload": "text",
    "channel": "text",
    "exclude": "text[]",
    "mask": "json",
    "conditions": "json",
    "lenient": "boolean",
}
"""The parameters of ``cdc.enable_capture`` and ``cdc.capture_plan``."""

_OWNER = """
select pg_catalog.pg_get_userbyid(n.nspowner)::text, current_user::text
  from pg_catalog.pg_namespace n where n.nspname = 'cdc'
"""
_PARAMETERS = """
select p.proargnames::text[]
  from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
 where n.nspname = 'cdc' and p.proname = 'enable_capture'
"""


@Operations.implementation_for(EnableCapture)
def _enable(operations: Operations, operation: EnableCapture) -> None:
    _run(operations, "enable_capture", _arguments(operation.table, operation.options))


@Operations.implementation_for(DisableCapture)
def _disable(operations: Operations, operation: DisableCapture) -> None:
    _run(operations, "disable_capture", _arguments(operation.table, {}))


def _arguments(table: str, options: Options) -> dict[str, str | None]:
    """What these options are as parameters, each in the text form of its type."""
    from cdc.options import split

    arguments: dict[str, str | None] = {"relation": ".".join(map(_identifier, split(table)))}
    for name, value in options.items():
        if name != "delivery":
            parameter = "conditions" if name == "when" else name
            arguments[parameter] = _text(value, _TYPES[parameter])
        elif value == "ephemeral":
            arguments["notify"] = "ephemeral"
    return arguments


def _text(value: Any, kind: str) -> str:
    if kind == "text[]":
        return "{" + ",".join('"' + re.sub(r'(["\\])', r"\\\1", item) + '"' for item in value) + "}"
    return str(value) if kind == "text" else json.dumps(value)


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(value: str) -> str:
    quoted = "'" + value.replace("'", "''") + "'"
    # A plain literal with a backslash depends on standard_conforming_strings.
    return "E" + quoted.replace("\\", "\\\\") if "\\" in value else quoted


def _run(operations: Operations, function: str, arguments: Mapping[str, str | None]) -> None:
    context = operations.get_context()
    if context.as_sql:
        given = (
            f"{name} => {_literal(value)}::{_TYPES[name]}" for name, value in arguments.items() if value is not None
        )
        context.impl.static_output(f"select cdc.{function}({', '.join(given)}){context.impl.command_terminator}")
        return
    connection = operations.get_bind()
    for owner, role in connection.execute(text(_OWNER)):
        if owner != role:  # nothing of it is called: it may be anybody's
            cure = "migrations that capture tables run as the role that runs `cdc migrate`"
            raise CommandError(f"schema cdc belongs to {owner}, not to {role} ({cure})")
    _check_installed(connection)
    _call(connection, f"select cdc.{function}", arguments)


def _call(connection: Connection, select: str, arguments: Mapping[str, str | None]) -> Any:
    """The answer of a function; raises CommandError with what the server says."""
    given = ", ".join(f"{name} => cast(:{name} as {_TYPES[name]})" for name in arguments)
    try:
        return connection.execute(text(f"{select}({given})"), dict(arguments)).scalar()
    except DBAPIError as error:
        raise _refusal(error) from error


def _refusal(error: DBAPIError) -> CommandError:
    from cdc.connection import first_line

    message = first_line(error.orig or error)
    state = getattr(error.orig, "pgcode", None) or getattr(error.orig, "sqlstate", None)
    if state == "42501":
        message += " (migrations that capture tables run as the role that runs `cdc migrate`)"
    return CommandError(message)


def _check_installed(connection: Connection) -> None:
    """Raises CommandError unless schema cdc is there, with all the parameters we know of."""
    present = connection.execute(text(_PARAMETERS)).scalar()
    if present is None:
        raise CommandError("schema cdc is not installed in this database (run `cdc migrate` first)")
    if not set(_TYPES) <= set(present):
        raise CommandError("schema cdc is of an older revision than this cdc (run `cdc migrate` first)")


# -- autogenerate -----------------------------------------------------------------------------------------------

# Not among cdc.sql.QUERIES, which speak psycopg2's dialect: the connection is env.py's, with whatever driver it has.
_TRIGGERS = """
select pg_get_triggerdef(g.oid), format('%I.%I', n.nspname, c.relname), g.tgenabled = 'A'
  from pg_catalog.pg_trigger g
  join pg_catalog.pg_class c on c.oid = g.tgrelid
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where g.tgrelid = :relation and not g.tgisinternal and starts_with(g.tgname::text, '00_cdc_')
 order by g.tgname
"""
_CAPTURED_TABLE = """
select t.image,
       case when not exists (select from pg_catalog.pg_index i where i.indrelid = :relation and i.indisprimary)
            then t.key_columns end
  from cdc.captured_table t
 where t.id = :captured
"""
# By the name a column has now; without one it is to be hidden should it come.
_HIDDEN = """
select coalesce(a.attname, b.attname, h.key), h.value ->> 'how', coalesce(a.attname, b.attname) is null
  from cdc.captured_table t
 cross join lateral jsonb_each(t.hidden) h
  left join pg_catalog.pg_attribute a
    on a.attrelid = :relation and a.attname = h.key and a.attnum > 0 and not a.attisdropped
  left join pg_catalog.pg_attribute b
    on b.attrelid = :relation and b.attnum = (h.value ->> 'number')::smallint and not b.attisdropped
 where t.id = :captured
 order by 1
"""
_COLUMNS = """
select a.attname from pg_catalog.pg_attribute a
 where a.attrelid = :relation and a.attnum > 0 and not a.attisdropped
"""
_DEFINITION = (
    r"CREATE TRIGGER \"00_cdc_\w+\" AFTER (?P<ops>\w+(?: OR \w+)*) ON {table} FOR EACH (?:ROW|STATEMENT)"
    r"(?: WHEN \((?P<condition>.*)\))? EXECUTE FUNCTION cdc\.capture\("
    r"'(?P<captured>[0-9]+)', '(?P<notify>\w+)', '(?P<channel>(?:[^']|'')*)', '(?P<notify_payload>\w+)'"
    r"(?:, '(?:hidden|virtual)?')?(?:, '[0-9a-f]+')?\)"
)


def _compare(context: AutogenContext, upgrade_ops: UpgradeOps) -> PriorityDispatchResult:
    """Add what makes the captures of a database equal to the YAML.

    Raises:
        CommandError: the file is wrong or not named, schema cdc is not installed, a table cannot be captured.
    """
    from cdc.errors import InstallError
    from cdc.inventory import resolve
    from cdc.sql import QUERIES

    connection = context.connection
    if connection is None:
        raise CommandError("plugin cdc: there is no connection to compare with")
    database = _configured(context.opts)
    _check_installed(connection)
    default_schema = connection.dialect.default_schema_name

    def place(operation: CreateTableOp | DropTableOp | ModifyTableOps) -> tuple[str, str]:
        return (str(operation.schema or default_schema), str(operation.table_name))

    def is_ours(schema: str, table: str) -> bool:
        name = None if schema == default_schema else schema
        return context.run_name_filters(name, "schema", {}) and context.run_name_filters(
            table, "table", {"schema_name": name}
        )

    made = {place(o): {c.name for c in o.to_table().columns} for o in upgrade_ops.ops if isinstance(o, CreateTableOp)}
    dropped = {place(o) for o in upgrade_ops.ops if isinstance(o, DropTableOp)}
    altered = {place(o) for o in upgrade_ops.ops if isinstance(o, ModifyTableOps)}

    there = [tuple(row) for row in connection.exec_driver_sql(QUERIES["candidate_tables"])]
    try:
        targets = resolve([*there, *((0, schema, table, True) for schema, table in made)], database)
    except InstallError as error:
        raise CommandError(str(error)) from None
    targets = [target for target in targets if (target.schema, target.table) not in dropped]

    enable = []
    for target in targets:
        at = (target.schema, target.table)
        if not is_ours(*at):
            continue
        columns = (
            made[at] if at in made else set(connection.execute(text(_COLUMNS), {"relation": target.oid}).scalars())
        )
        wanted = EnableCapture(_written(*at), _options(target.options, database, at, columns))
        if at not in made:
            if _stands(connection, wanted, unsure=at in altered):
                continue
            wanted.previous = _present(connection, target.oid, wanted.table, lenient=at in altered)
        enable.append(wanted)

    named = {(target.schema, target.table) for target in targets}
    disable = [
        DisableCapture(_written(schema, table), _present(connection, relation, _written(schema, table)))
        for relation, schema, table in connection.exec_driver_sql(QUERIES["captured"])
        if (schema, table) not in named and is_ours(schema, table)
    ]
    # With include_schemas and without include_name, Alembic would drop what it does not know: our own tables.
    others = [operation for operation in upgrade_ops.ops if getattr(operation, "schema", None) != "cdc"]
    upgrade_ops.ops[:] = [*disable, *others, *enable]
    return PriorityDispatchResult.CONTINUE


def _configured(opts: Mapping[str, Any]) -> DatabaseConfig:
    """The database of the YAML file that env.py has named; raises CommandError."""
    from cdc import config
    from cdc.errors import ConfigError
    from cdc.sinks import option_models

    if not opts.get("cdc_config"):
        raise CommandError(
            'plugin cdc: which file? (context.configure(…, cdc_config="config.yaml", cdc_database="shop"))'
        )
    try:
        databases = config.load(Path(opts["cdc_config"]), option_models(), os.environ).databases
    except ConfigError as error:
        raise CommandError(str(error)) from None
    name = opts.get("cdc_database") or (next(iter(databases)) if len(databases) == 1 else None)
    if name not in databases:
        raise CommandError(f"plugin cdc: which database? (cdc_database is one of {', '.join(databases)})")
    return databases[name]


def _written(schema: str, table: str) -> str:
    """The name of one table as the YAML has it."""
    return ".".join(part if re.fullmatch(r"[\w$-]+", part) else _identifier(part) for part in (schema, table))


def _options(
    options: TableConfig, database: DatabaseConfig, table: tuple[str, str], columns: Collection[str]
) -> dict[str, object]:
    """The options of one table, with those of its database."""
    return {
        **options.model_dump(),
        **{name: getattr(database, name) for name in _OF_THE_DATABASE},
        "lenient": not database.names(*table) and not {*options.exclude, *options.mask} <= set(columns),
    }


def _stands(connection: Connection, wanted: EnableCapture, *, unsure: bool) -> bool:
    """Whether a table is captured like that already.

    Args:
        unsure: the migration alters the table, which may be what the options wait for; then an error means no.
    """
    arguments = {
        **dict.fromkeys(_TYPES),
        **_arguments(wanted.table, {name: value for name, value in _DEFAULTS.items() if value is not None}),
        "mask": "{}",
        "conditions": "{}",
        **_arguments(wanted.table, wanted.options),
    }
    savepoint = connection.begin_nested() if unsure else nullcontext()
    try:
        with savepoint:
            return bool(_call(connection, "select state from cdc.capture_plan", arguments) == "installed")
    except CommandError:
        if unsure:
            return False
        raise


def _present(connection: Connection, relation: int, table: str, *, lenient: bool = False) -> dict[str, object] | None:
    """How a table is captured; None when it is not.

    Args:
        lenient: when this is restored, columns may be missing that are hidden now.
    """
    # What is not in pg_catalog must be written with its schema: conditions are read again with that path alone.
    path = connection.execute(text("select current_setting('search_path')")).scalar()
    connection.execute(text("select set_config('search_path', 'pg_catalog', false)"))
    triggers = connection.execute(text(_TRIGGERS), {"relation": relation}).all()
    connection.execute(text("select set_config('search_path', :path, false)"), {"path": path})

    options: dict[str, Any] = {}
    captured = None
    when = {}
    for definition, name, always in triggers:
        found = re.fullmatch(_DEFINITION.format(table=re.escape(name)), definition, re.DOTALL)
        if found is None:  # altered by hand
            continue
        captured = int(found["captured"])
        ops = found["ops"].lower().split(" or ")
        if found["condition"]:
            when[ops[0]] = found["condition"]
        options["ops"] = [*options.get("ops", ()), *ops]
        options["always"] = always
        options["notify_payload"] = found["notify_payload"]
        options["channel"] = found["channel"].replace("''", "'")
        bell = "delivery" if found["notify"] == "ephemeral" else "notify"
        options[bell] = found["notify"]
    if captured is None:
        return None
    of_table = {"relation": relation, "captured": captured}
    options["when"] = when
    options["image"], options["key"] = connection.execute(text(_CAPTURED_TABLE), of_table).one()
    hidden = connection.execute(text(_HIDDEN), of_table).all()
    options["exclude"] = [column for column, how, _ in hidden if how == "exclude"]
    options["mask"] = {column: how for column, how, _ in hidden if how != "exclude"}
    options["lenient"] = bool(hidden) and (lenient or any(missing for *_, missing in hidden))
    return _minimal(table, options)


@renderers.dispatch_for(EnableCapture)
def _render_enable(context: AutogenContext, operation: EnableCapture) -> str:
    options = "".join(f", {name}={value!r}" for name, value in operation.options.items())
    return f"{_prefix(context)}enable_capture({operation.table!r}{options})"


@renderers.dispatch_for(DisableCapture)
def _render_disable(context: AutogenContext, operation: DisableCapture) -> str:
    return f"{_prefix(context)}disable_capture({operation.table!r})"


def _prefix(context: AutogenContext) -> str:
    return context.opts["alembic_module_prefix"] or ""
