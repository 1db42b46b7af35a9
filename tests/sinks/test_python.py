"""Sinks of the user's own: the documentation's examples run, and what is wrong with one is said at the start."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pytest
from harness import SINK, Project
from psycopg2.extensions import connection
from ruamel.yaml import YAML
from sql import fetch

from cdc import config as configuration
from cdc import sinks
from cdc.encoding import Encoder
from cdc.errors import ConfigError
from cdc.event import Event
from cdc.options import SinkOptions
from cdc.sinks import create, option_models
from cdc.sinks.base import Page, Sink
from cdc.sinks.python import PythonSink

DOCUMENT = (Path(__file__).parents[2] / "docs" / "sinks" / "python.md").read_text()


def blocks(language: str) -> list[str]:
    """The document's code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, flags=re.DOTALL)


# -- the documentation ------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A directory with the modules of the document, and its package as pip would leave it."""
    directory = tmp_path / "shelf"
    directory.mkdir()
    for block in blocks("python"):
        named = re.match(r'"""(\w+\.py)"""', block)
        assert named is not None
        (directory / named[1]).write_text(block)
    (block,) = blocks("toml")
    project = tomllib.loads(block)["project"]
    info = directory / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("".join(lines))
    return directory


@pytest.fixture
def run(tmp_path: Path, shelf: Path, installed: str, connect: Callable[..., connection]) -> Callable[[str], Path]:
    """``run(yaml)`` delivers three changes to the one sink of a document's block; returns the working directory."""

    def deliver(block: str) -> Path:
        conn = connect(installed)
        fetch(conn, "create table item (id integer primary key, v numeric); select cdc.enable_capture('item')")
        (sink,) = YAML(typ="safe").load(block)["sinks"].values()
        # The paths of the documentation are short ones.
        for options in (sink, sink.get("options", {})):
            options.update({key: str(tmp_path / options[key]) for key in ("path", "file") if key in options})
        project = Project(tmp_path, installed, {"public.item": {}}, "unused", environment={"PYTHONPATH": str(shelf)})
        project.content["sinks"] = {SINK: {"start": "earliest", **sink}}
        project.write()
        fetch(conn, "insert into item values (1, 1.50); update item set v = 2; delete from item")
        project.cdc("run", "--until-idle")
        return tmp_path

    return deliver


def test_the_function_of_the_documentation_delivers(run: Callable[[str], Path]) -> None:
    directory = run(blocks("yaml")[0])
    assert (directory / "changes.txt").read_text().splitlines() == [
        'insert item {"id":1}',
        'update item {"id":1}',
        'delete item {"id":1}',
    ]


@pytest.mark.parametrize("block", [1, 2], ids=["by call", "by a type of its own"])
def test_the_class_of_the_documentation_delivers(run: Callable[[str], Path], block: int) -> None:
    directory = run(blocks("yaml")[block])
    database = sqlite3.connect(directory / "archive.db")
    events = [Event.from_json(body) for (body,) in database.execute("select body from event order by rowid")]
    database.close()
    assert [event.op for event in events] == ["insert", "update", "delete"]
    assert events[0].after is not None
    assert '"v":1.50' in events[0].after.raw


def test_what_is_wrong_with_a_sink_of_ones_own_is_a_configuration_error(tmp_path: Path) -> None:
    project = Project(tmp_path, "host=127.0.0.1 port=1", {"public.item": {}}, "unused")
    project.content["sinks"] = {"hook": {"type": "python", "call": "no_such_module:deliver"}}
    project.write()
    said = project.cdc("run", codes=(78,)).stderr
    assert "sinks.hook.call: no module no_such_module (install its package beside cdc, or name its directory" in said


def test_the_directory_of_the_configuration_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted.py").write_text("def deliver(batch): ...")
    monkeypatch.chdir(tmp_path)
    project = Project(tmp_path, "host=127.0.0.1 port=1", {"public.item": {}}, "unused")
    project.content["sinks"] = {"hook": {"type": "python", "call": "planted:deliver"}}
    project.write()
    assert "sinks.hook.call: no module planted (" in project.cdc("check", codes=(78,)).stderr


# -- what can be called -----------------------------------------------------------------------------------------------


class OwnOptions(SinkOptions):
    """Of `Own`."""

    limit: int
    color: Literal["red", "green"] = "red"


class Own(Sink[OwnOptions]):
    """A sink with options."""

    Options = OwnOptions
    keeps_position = True
    calls: list[object] = []  # noqa: RUF012  # what was called, of all objects

    def begin(self, page: Page) -> None:
        self.calls.append(page)

    def deliver(self, batch: Any) -> None:
        self.calls.append((self.name, self.options.limit, batch))


class WithoutDeliver(Sink[OwnOptions]):
    """Abstract."""

    Options = OwnOptions


class WithoutOptions(Sink[OwnOptions]):
    """Has no model."""

    def deliver(self, batch: Any) -> None: ...


class NoSink:
    """Some class."""


taken: list[tuple[Any, dict[str, Any]]] = []
constant = 7


def take(batch: Any, *, path: str, deep: Any = None) -> None:
    """A function with options."""
    taken.append((batch, {"path": path, "deep": deep}))


def take_no_options(batch: Any) -> None:
    """A function without."""


async def take_later(batch: Any) -> None:
    """A coroutine."""


def load(tmp_path: Path, **sink: object) -> SinkOptions:
    content = {
        "databases": {"shop": {"dsn": "dbname=x", "tables": {"public.item": {}}}},
        "sinks": {"hook": {"type": "python", **sink}},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(content))
    return configuration.load(path, option_models(), {}).sinks["hook"]


HERE = Path(__file__).stem
FINDINGS: Mapping[str, tuple[Mapping[str, object], str]] = MappingProxyType(
    {
        "no colon": ({"call": "shop.hooks"}, "call: not a module and a name in it (write shop.hooks:deliver)"),
        "no module path": ({"call": "../hooks.py:deliver"}, "call: not a module and a name in it"),
        "a secret": ({"call": "postgresql://u:hunter2@db/x"}, "call: not a module and a name in it"),
        "no module": ({"call": "nowhere.at_all:f"}, "call: no module nowhere (install its package beside cdc, or name"),
        "no name": ({"call": f"{HERE}:nothing"}, f"call: {HERE} has no nothing (write the name of a function"),
        "no function": ({"call": f"{HERE}:constant"}, "call: constant cannot be called (write the name of a function"),
        "no sink": ({"call": f"{HERE}:NoSink"}, "call: NoSink is a class and no subclass of cdc.sinks.base.Sink"),
        "abstract": ({"call": f"{HERE}:WithoutDeliver"}, "call: WithoutDeliver has no deliver() (write one)"),
        "no model": ({"call": f"{HERE}:WithoutOptions"}, "call: WithoutOptions has no model of its options"),
        "coroutine": ({"call": f"{HERE}:take_later"}, "call: take_later is a coroutine or a generator (write a plain"),
        "raises": (
            {"call": "failing_module:f"},
            "call: failing_module cannot be imported: ZeroDivisionError: division",
        ),
        "imports": ({"call": "lacking_module:f"}, "call: lacking_module imports a_package_nobody_has, which is not"),
        "argument missing": (
            {"call": f"{HERE}:take"},
            "sinks.hook: they do not fit the function: missing a required argument: 'path' (a function takes",
        ),
        "argument unknown": (
            {"call": f"{HERE}:take_no_options", "options": {"x": 1}},
            "options: they do not fit the function: got an unexpected keyword argument 'x'",
        ),
        "options a list": ({"call": f"{HERE}:take", "options": [1]}, "options: not keys and values (write options:"),
        "option missing": ({"call": f"{HERE}:Own"}, "limit: missing (this key is required)"),
        "option wrong": (
            {"call": f"{HERE}:Own", "options": {"limit": "x", "color": "blue"}},
            "options.color: not a known word (write red or green)",
        ),
        "option unknown": (
            {"call": f"{HERE}:Own", "options": {"limit": 1, "colour": "red"}},
            "options.colour: unknown key (see the documentation of this sink)",
        ),
        "option of every sink": (
            {"call": f"{HERE}:Own", "options": {"limit": 1, "batch": {"events": 5}}},
            "options: batch is of every sink (write it beside call)",
        ),
        "key unknown": ({"call": f"{HERE}:take_no_options", "zzz": "x"}, "zzz: unknown key (known: type, databases"),
    }
)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules that cannot be imported."""
    directory = tmp_path / "modules"
    directory.mkdir()
    (directory / "failing_module.py").write_text("1 / 0")
    (directory / "lacking_module.py").write_text("import a_package_nobody_has")
    monkeypatch.syspath_prepend(directory)
    yield
    for name in ("failing_module", "lacking_module"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("what", FINDINGS)
def test_what_cannot_be_called_is_found_by_its_path_and_with_its_cure(tmp_path: Path, what: str) -> None:
    sink, said = FINDINGS[what]
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, **sink)
    assert any(said in finding for finding in raised.value.findings), raised.value.findings
    assert "hunter2" not in str(raised.value)


def test_a_function_gets_the_batch_and_its_options(tmp_path: Path, make_event: Callable[..., Event]) -> None:
    options = load(tmp_path, call=f"{HERE}:take", options={"path": "p", "deep": {"a": [1, {"b": None}]}})
    sink = create("hook", options, Encoder())
    batch = [make_event(1)]
    sink.open()
    sink.deliver(batch)
    sink.close()
    assert taken.pop() == (batch, {"path": "p", "deep": {"a": (1, {"b": None})}})
    assert not sink.keeps_position
    assert "deep" not in repr(options), "they may hold secrets"


def test_a_class_gets_what_every_sink_has_and_its_own(tmp_path: Path) -> None:
    options = load(tmp_path, call=f"{HERE}:Own", options={"limit": 3}, ops=["insert"], batch={"events": 7})
    sink = create("hook", options, Encoder())
    assert isinstance(sink, Own)
    assert sink.keeps_position
    assert (sink.options.limit, sink.options.ops, sink.options.batch.events) == (3, ("insert",), 7)
    assert (sink.name, sink.options.type) == ("hook", "python")


def test_an_exception_of_the_function_is_the_pipelines_business(
    tmp_path: Path, make_event: Callable[..., Event]
) -> None:
    sink = create("hook", load(tmp_path, call=f"{HERE}:take", options={"path": "p"}), Encoder())
    assert isinstance(sink, PythonSink)
    sink._function = lambda batch, path: 1 / 0
    with pytest.raises(ZeroDivisionError):
        sink.deliver([make_event(1)])


# -- entry points -----------------------------------------------------------------------------------------------------


def offer(directory: Path, package: str, points: str) -> None:
    """Leave a package behind as pip does."""
    info = directory / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[cdc.sinks]\n{points}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of packages."""
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(directory)
    return directory


def test_a_type_that_a_package_offers_is_known_by_its_name_and_imported_when_used(site: Path, tmp_path: Path) -> None:
    offer(site, "cdc_own", f"own = {HERE}:Own\nbroken = no_such_module:Sink")
    models = option_models()
    assert {"own", "broken", "file"} <= set(models)
    assert len(models) == len(set(models))
    options = load(tmp_path, type="own", limit=3)
    assert isinstance(create("hook", options, Encoder()), Own)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ("odd = no_such_module:Sink", "cdc_odd offers it, and cannot be used: No module named 'no_such_module'"),
        (f"odd = {HERE}:NoSink", f"cdc_odd offers it, and cannot be used: {HERE}:NoSink is a class and no subclass"),
        (f"odd = {HERE}:take", "cdc_odd offers it, and has a function there (name it by type: python and call)"),
        (f"other = {HERE}:Own", "unknown sink type ("),
    ],
)
def test_an_offer_that_cannot_be_used_names_its_package(site: Path, tmp_path: Path, points: str, said: str) -> None:
    offer(site, "cdc_odd", points)
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, type="odd")
    assert said in str(raised.value)


def test_two_packages_with_one_type_are_refused(site: Path, tmp_path: Path) -> None:
    offer(site, "cdc_one", f"own = {HERE}:Own")
    offer(site, "cdc_two", f"own = {HERE}:Own")
    with pytest.raises(ConfigError, match=r"cdc_one and cdc_two offer a sink of this type \(uninstall all but one\)"):
        load(tmp_path, type="own", limit=1)


def test_a_type_of_ours_cannot_be_replaced(site: Path) -> None:
    offer(site, "cdc_evil", f"file = {HERE}:Own")
    assert sinks.sink_class("file") is sinks.SINKS["file"]
    assert list(option_models()).count("file") == 1
    assert os.environ.get("PYTHONPATH") is None or str(site) not in os.environ["PYTHONPATH"]
