"""The command line. One file per command group; this one knows the global options and what an error's exit code is.

A command's file is imported when it is called: Alembic, which few need, takes longer than all the rest together.

Exit codes are the contract's: 0 ok, 1 failure, 2 usage, 69 a database or sink cannot be reached, 78 configuration.
stdout is data, stderr is talk. A user sees causes and cures, never a traceback.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import click

from cdc import config as configuration
from cdc.cli.app import App
from cdc.cli.logs import places, set_up_logging
from cdc.cli.terminal import EXIT_CONFIG, EXIT_FAILURE, EXIT_UNREACHABLE
from cdc.errors import CdcError, ConfigError, DatabaseUnreachable

_COMMANDS = (
    "backfill", "check", "completion", "dead-letters", "demo", "migrate", "models", "rebase", "run", "sinks", "status",
    "systemd", "tail", "uninstall",
)  # fmt: skip
"""Each is what the file of its name has under its name, with _ for -."""


class _Commands(click.Group):
    """Imports commands as they are asked for, and turns this package's errors into one clear line each and the right
    exit code."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(import_module(f"cdc.cli.{name}"), name)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except CdcError as error:
            for line in str(error).splitlines():
                click.echo(f"error: {line}", err=True)
            code = EXIT_FAILURE
            if isinstance(error, ConfigError):
                code = EXIT_CONFIG
            elif isinstance(error, DatabaseUnreachable):
                code = EXIT_UNREACHABLE
            sys.exit(code)
        except BrokenPipeError:
            # The reader of our output has gone: end quietly, and keep Python from complaining at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_FAILURE)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:  # noqa: BLE001  the last one to see it
            # Where, not what: the text of an exception nobody expected may quote a row or a connection string.
            where = places(error.__traceback__)
            click.echo(f"error: unexpected {type(error).__name__} at {where} (please report it)", err=True)
            sys.exit(EXIT_FAILURE)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-c",
    "--config",
    "path",
    type=click.Path(path_type=Path),
    help="The YAML file. Default: $CDC_CONFIG, ./config.yaml, /etc/cdc/config.yaml.",
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Overrides log.level.")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Overrides log.format.")
@click.version_option(version("table-cdc"), prog_name="cdc")
@click.pass_context
def main(context: click.Context, path: Path | None, log_level: str | None, log_format: str | None) -> None:
    """Change data capture for PostgreSQL tables."""
    set_up_logging(log_level or "info", log_format or "text")
    context.obj = App(lambda: configuration.find(path, os.environ), os.environ, log_level, log_format)
