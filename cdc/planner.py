"""What `cdc migrate` would do to one database, told without doing it: as steps for people, or as a script for a DBA.

Only catalogues and tables of schema cdc are read, one short statement at a time; nothing is locked, and a table that
somebody has locked altogether is told of without its size. Whether the triggers of a table stand already is what
``cdc.capture_plan`` says. Where that is missing or of another revision, there is only the catalogue to go by: a table
without our triggers gets them, one that has some is compared once the schema is at head.

Nothing in a schema cdc is read before :func:`cdc.installer.may_use_schema` has said whose it is; the script asks that
again, for the role it is run by.

The script holds the statements of :mod:`cdc.installer`, written out: the revisions as Alembic renders them, the queries
with their parameters filled in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cdc import installer, inventory
from cdc.config import DatabaseConfig, TableConfig
from cdc.connection import Connection
from cdc.errors import InstallError
from cdc.installer import Holder
from cdc.inventory import Target
from cdc.sql import QUERIES

Wait = Literal["none", "moments", "until they end"]

_TRIGGERS = {f"00_cdc_{what}" for what in ("capture", "insert", "update", "delete", "truncate")}
_ADD = "SHARE ROW EXCLUSIVE"
_DROP = "ACCESS EXCLUSIVE"


@dataclass(frozen=True, slots=True)
class Size:
    """How large a table is, with its partitions.

    Attributes:
        bytes: on disk, indexes included; None while somebody has it locked.
        rows: as the planner estimates them; None: never analysed.
    """

    bytes: int | None
    rows: int | None
    partitions: int


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that would change.

    Attributes:
        subject, what: as in :class:`cdc.installer.Change`.
        lock: the strongest one it takes, on the table and its partitions or on tables of schema cdc; None: none.
        size: of the table, for triggers.
        in_the_way: transactions that this lock has to wait for, longest first.
    """

    subject: str
    what: str
    lock: str | None = None
    size: Size | None = None
    in_the_way: Sequence[Holder] = ()

    @property
    def wait(self) -> Wait:
        """What to expect: transactions that are younger than a lock is waited for usually end in time."""
        if not self.in_the_way:
            return "none"
        young = all(holder.age is not None and holder.age < installer.LOCK_TIMEOUT for holder in self.in_the_way)
        return "moments" if young else "until they end"


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the catalogue says of a table; see the query ``table_facts``."""

    quoted: str
    size: Size
    triggers: Sequence[str]
    primary_key: Sequence[str] | None
    columns: Sequence[str]


def plan(
    name: str,
    database: DatabaseConfig,
    *,
    dsn: str,
    reader_dsn: str,
    sinks: Mapping[str, str],
    schema_only: bool = False,
) -> list[Step]:
    """What :func:`cdc.installer.migrate` would change, in its order. Arguments as there.

    Raises:
        InstallError: it would refuse, for this reason.
        DatabaseError: see :class:`cdc.connection.Connection`.
    """
    role = installer.daemon_role(dsn, reader_dsn)
    with Connection(dsn, purpose="plan") as connection:
        look = _Look(connection, name, database, schema_only=schema_only)
        steps = [
            *look.functions(),
            *look.schema(),
            *(step for _, step in look.tables() if step.what != "unchanged"),
            *look.sinks(sinks),
        ]
        if connection.query(QUERIES["lacks_reader"], {"role": role}) == [(True,)]:
            steps.append(Step(f"role {role}", "granted cdc_reader"))
        return steps


def script(
    name: str,
    database: DatabaseConfig,
    *,
    dsn: str,
    reader_dsn: str,
    sinks: Mapping[str, str],
    schema_only: bool = False,
) -> str:
    """The statements :func:`cdc.installer.migrate` would run, for psql. Arguments and errors as :func:`plan`."""
    role = installer.role_of(reader_dsn)
    with Connection(dsn, purpose="plan") as connection:
        look = _Look(connection, name, database, schema_only=schema_only)
        return "\n\n".join(part.strip() for part in look.script(sinks, role)) + "\n"


class _Look:
    """A look at one database."""

    def __init__(self, connection: Connection, name: str, database: DatabaseConfig, *, schema_only: bool) -> None:
        self._connection = connection
        self._name = name
        self._database = database
        self._head = inventory.head()
        self._there = installer.may_use_schema(connection.query, reading=True)
        self._revision = inventory.installed_revision(connection) if self._there else None
        self._at_head = self._revision == self._head
        # Of a revision that is not known here this says so.
        self._upgrade = "" if self._at_head else installer.upgrade_script(self._revision)
        candidates = connection.query(QUERIES["candidate_tables"])
        self._plain = {oid for oid, _, _, plain in candidates if plain}
        targets = [] if schema_only else inventory.resolve(candidates, database)
        captured = [] if self._revision is None or schema_only else connection.query(QUERIES["captured"])
        relations = list({target.oid for target in targets} | {row[0] for row in captured})
        self._facts = {
            oid: _Facts(quoted, Size(size, rows, partitions), *catalogue)
            for oid, quoted, size, rows, partitions, *catalogue in connection.query(
                QUERIES["table_facts"], {"relations": relations}
            )
        }
        # Whatever was dropped since the last question is out of it.
        self._targets = [target for target in targets if target.oid in self._facts]
        wanted = {target.oid for target in targets}
        self._unwanted = [row for row in captured if row[0] in self._facts and row[0] not in wanted]

    def schema(self) -> Iterator[Step]:
        if not self._at_head:
            # The first revision makes its tables; those after it alter what the daemon and the writers use.
            lock = None if self._revision is None else _DROP
            yield Step("schema cdc", f"revision {self._revision or 'none'} → {self._head}", lock)
        called = [] if self._revision is None else self._connection.query(QUERIES["installation_name"])
        if called and called[0][0] != self._name:
            yield Step("name in events", f"{called[0][0] or 'none'} → {self._name}")

    def functions(self) -> Iterator[Step]:
        for name in inventory.replaced_functions(self._connection) if self._there else ():
            yield Step(f"function {name}", "put back")

    def tables(self) -> Iterator[tuple[str, Step]]:
        """The quoted name and the step of every table that is, or no longer is, to be captured."""
        for target in self._targets:
            facts = self._facts[target.oid]
            state = self._state(target, facts)
            step = Step(target.name, state)
            if state != "unchanged":
                dropped = set(facts.triggers) & _TRIGGERS - _triggers(target.options)
                step = self._trigger_step(target.oid, target.name, state, _DROP if dropped else _ADD)
            yield facts.quoted, step
        for oid, schema, name in self._unwanted:
            yield self._facts[oid].quoted, self._trigger_step(oid, f"{schema}.{name}", "removed", _DROP)

    def sinks(self, sinks: Mapping[str, str]) -> Iterator[Step]:
        known = set() if self._revision is None else {row[0] for row in self._connection.query(QUERIES["known_sinks"])}
        for sink, start in sinks.items():
            if sink not in known:
                yield Step(f"sink {sink}", f"starts {installer.STARTS[start]}")

    def _trigger_step(self, oid: int, name: str, what: str, lock: str) -> Step:
        in_the_way = installer.holders(self._connection, oid, exclusive=lock == _DROP)
        return Step(name, what, lock, self._facts[oid].size, in_the_way)

    def _state(self, target: Target, facts: _Facts) -> str:
        if self._at_head:
            state = inventory.capture_state(self._connection, target, self._database)
            return {"missing": "added", "outdated": "changed"}.get(state, "unchanged")
        self._check(target, facts)
        return f"compared at revision {self._head}, and changed if need be" if facts.triggers else "added"

    def _check(self, target: Target, facts: _Facts) -> None:
        """Refuse what ``cdc.capture_plan`` would, as far as the catalogue tells."""
        options = target.options
        if target.oid not in self._plain:
            raise InstallError(f"{target.name} cannot be captured: it is no ordinary table, or only a part of one")
        if options.key and facts.primary_key and list(options.key) != facts.primary_key:
            key = ", ".join(facts.primary_key)
            raise InstallError(f"{target.name} has the primary key ({key}); key is for tables without one")
        columns = list(options.key or ())
        if self._database.names(target.schema, target.table):
            columns += [*options.exclude, *options.mask]
        if missing := [column for column in columns if column not in facts.columns]:
            raise InstallError(f"{target.name} has no column {', '.join(missing)}")

    def script(self, sinks: Mapping[str, str], role: str | None) -> Iterator[str]:
        """The parts of the script; `role` is the daemon's."""
        before = self._revision or "none"
        yield _ENCODING
        yield _HEAD.format(name=_in_a_comment(self._name), before=before, head=self._head)
        yield "begin;\n" + self._sql(installer.BEGIN, {"lock_timeout": f"{installer.LOCK_TIMEOUT:g}s"})
        yield "-- whose schema cdc is, and at which revision\n" + self._sql(_GUARD, {"revision": self._revision})
        if any(self.functions()):
            yield "-- functions of schema cdc that somebody has replaced\nselect cdc.restore_definitions();"
        if not self._at_head:
            yield f"-- schema cdc: revision {before} → {self._head}\n{self._upgrade}"
        yield "-- the name in events\n" + self._sql(QUERIES["name_installation"], {"name": self._name})
        targets = {self._facts[target.oid].quoted: target for target in self._targets}
        # In the way of a root's trigger is that of a table which has become its partition.
        for quoted, step in sorted(self.tables(), key=lambda table: table[0] in targets):
            comment = f"-- {_in_a_comment(step.subject)}: {step.what}" + (f", {step.lock}" if step.lock else "")
            if quoted in targets:
                statement = installer.enable_statement(self._connection, targets[quoted], self._database, quoted)
            else:
                statement = self._sql("select cdc.disable_capture(%(table)s::regclass)", {"table": quoted})
            yield f"{comment}\n{statement}"
        for sink, start in sinks.items():
            yield f"-- sink {_in_a_comment(sink)}: where it starts, unless it has a position\n" + self._sql(
                QUERIES["register_sink"], {"sink": sink, "start": start}
            )
        if role is not None:
            yield f"-- the daemon's role\n{self._sql(_GRANT, {'role': role})}"
        yield "commit;"

    def _sql(self, query: str, parameters: Mapping[str, object]) -> str:
        return installer.written_out(self._connection, query, parameters)


def _triggers(options: TableConfig) -> set[str]:
    """The names of the triggers that ``cdc.enable_capture`` makes."""
    rows = {"00_cdc_capture" for op in options.ops if op != "truncate" and op not in options.when}
    return rows | {f"00_cdc_{op}" for op in options.ops if op == "truncate" or op in options.when}


def _in_a_comment(text: str) -> str:
    """A name as it may stand in a comment, which a line break would end."""
    return "".join(c if c.isprintable() else "?" for c in text)


_ENCODING = "set client_encoding = 'UTF8';"
"""First of all, for names that are not ASCII stand in what follows, comments included."""

_HEAD = """\
-- cdc: brings database {name} from revision {before} to {head} and its triggers in line with the configuration, as
-- `cdc migrate` would. To be run once by the role that is to own schema cdc:
--     psql -1 -v ON_ERROR_STOP=1 -f FILE
-- All of it or nothing, however it is run. If a lock cannot be had, nothing was changed: run it again later."""

_GUARD = """
do $guard$
declare
  present text;
  wanted constant text := %(revision)s;
  owner constant text := (select pg_catalog.pg_get_userbyid(n.nspowner) from pg_catalog.pg_namespace n
                           where n.nspname = 'cdc');
begin
  if owner is null then
    create schema cdc;
  elsif owner <> current_user then
    raise exception 'schema cdc belongs to %%, not to %% (if %% has installed cdc, run this as that role; if not, '
      'drop or rename the schema)', owner, current_user, owner;
  elsif pg_catalog.to_regclass('cdc.alembic_version') is not null then
    execute 'select version_num from cdc.alembic_version' into present;
  end if;
  if present is distinct from wanted then
    raise exception 'written for revision %% of schema cdc, and this database is at %%',
      coalesce(wanted, 'none'), coalesce(present, 'none');
  end if;
end
$guard$"""

# The name stands outside of the block, whose end it could spell.
_GRANT = """
select set_config('cdc.daemon', %(role)s, true);
do $grant$
declare
  daemon constant text := current_setting('cdc.daemon');
begin
  if daemon <> current_user and not pg_catalog.pg_has_role(daemon, 'cdc_reader', 'member') then
    execute pg_catalog.format('grant cdc_reader to %%I', daemon);
  end if;
end
$grant$"""
