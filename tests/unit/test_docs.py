"""The documentation says what the program does: commands, options, keys, sinks, and the lines people copy."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
import pytest

from cdc import config as configuration
from cdc.cli import main
from cdc.config import Config, DatabaseConfig, LogConfig, TableConfig
from cdc.event import Event
from cdc.options import BatchOptions, Format, RetryOptions, SinkOptions, TlsOptions
from cdc.sinks import SINKS, option_models

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = (ROOT / "config.example.yaml").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    """The README's first code block of a language that contains a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return next(found for found in blocks if containing in found)


CONTEXT = click.Context(main)
COMMANDS = main.list_commands(CONTEXT)


def options() -> Iterator[tuple[str, str]]:
    for name in COMMANDS:
        command = main.get_command(CONTEXT, name)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                yield name, parameter.opts[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_row_in_the_readme(command: str) -> None:
    assert re.search(rf"^\| `cdc {command}\b", README, flags=re.MULTILINE)


@pytest.mark.parametrize(("command", "option"), sorted(options()))
def test_every_option_is_in_its_commands_row(command: str, option: str) -> None:
    row = next(line for line in README.splitlines() if line.startswith(f"| `cdc {command}"))
    short = {"--database": "-d"}.get(option, option)
    assert short in row


@pytest.mark.parametrize(
    "parameter", [parameter.opts[-1] for parameter in main.params if isinstance(parameter, click.Option)]
)
def test_every_global_option_is_in_the_readme(parameter: str) -> None:
    assert {"--config": "-c FILE"}.get(parameter, parameter) in README or parameter == "--version"


@pytest.mark.parametrize(
    "key",
    sorted(
        {
            name
            for model in (Config, DatabaseConfig, TableConfig, LogConfig, BatchOptions, RetryOptions, TlsOptions)
            for name in model.model_fields
        }
        | {name for model in option_models().values() for name in model.model_fields}
    ),
)
def test_every_key_is_in_the_example_configuration(key: str) -> None:
    assert re.search(rf"\b{key}:", EXAMPLE)


@pytest.mark.parametrize("kind", sorted(SINKS))
def test_every_sink_has_a_file_a_place_in_the_example_and_one_in_the_readme(kind: str) -> None:
    assert (ROOT / "cdc" / "sinks" / f"{kind}.py").is_file()
    assert re.search(rf"^  (  |#   )type: {kind}\b", EXAMPLE, flags=re.MULTILINE)
    assert f"`{kind}`" in README
    index = (ROOT / "docs" / "sinks" / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| \[?`{kind}`", index, flags=re.MULTILINE)


@pytest.mark.parametrize("kind", [kind for kind, sink in sorted(SINKS.items()) if sink.clients])
def test_a_sink_with_a_client_library_has_an_extra_and_a_page_that_explains_its_keys(kind: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert extras[kind]
    assert any(re.search(rf"[\[,]{kind}[,\]]", requirement) for requirement in extras["all"])
    page = (ROOT / "docs" / "sinks" / f"{kind}.md").read_text(encoding="utf-8")
    assert f"table-cdc[{kind}]" in page
    own = set(SINKS[kind].Options.model_fields) - set(SinkOptions.model_fields)
    assert [key for key in sorted(own) if not re.search(rf"`{key}\b|\b{key}:", page)] == []


@pytest.mark.parametrize("name", re.findall(r"^  # (\w+):", EXAMPLE, flags=re.MULTILINE))
def test_a_sink_that_is_commented_out_shows_its_defaults(tmp_path: Path, name: str) -> None:
    lines = EXAMPLE.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"  # {name}:"))
    end = next(number for number in range(start + 1, len(lines)) if not lines[number].startswith("  #   "))
    lines[start:end] = [line.replace("# ", "", 1) for line in lines[start:end]]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(lines))
    sink = configuration.load(path, option_models(), {}).sinks[name]
    required = {key for key, field in type(sink).model_fields.items() if field.is_required() or key == "dsn"}
    assert sink == type(sink)(**{key: getattr(sink, key) for key in required})
    own = set(type(sink).model_fields) - set(SinkOptions.model_fields)
    assert own <= sink.model_fields_set, "every key of its own is shown"


def test_the_readmes_configuration_is_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(block("yaml", "databases:"))
    loaded = configuration.load(path, option_models(), {})
    assert set(loaded.databases) == {"shop"}


def test_the_readmes_event_is_one() -> None:
    line = block("json", "version").strip()
    assert Event.from_json(line).to_json() == line


def test_ci_finds_its_two_lines_in_the_readme() -> None:
    for what in ("cdc demo", "pytest"):
        assert re.search(rf"^python3 -m venv .*{what}", README, flags=re.MULTILINE)


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists()


@pytest.mark.parametrize("name", get_args(Format))
def test_every_format_has_a_section(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def test_nothing_tracked_names_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    suspicious = re.compile(r"/(?:work|root|home/\w+)/(?:main|\.pyenv|\.library)|pypi\.(?!org\b)\w+\.internal")
    for name in listed.stdout.splitlines():
        if name.endswith(".png"):
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not suspicious.search(text), name
