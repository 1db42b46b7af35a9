"""cdc models: pydantic models, or a JSON Schema, for the people who consume the events."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import click

from cdc import models as catalogue_models
from cdc.cli.app import App, pass_app
from cdc.cli.several import table_patterns
from cdc.cli.terminal import print_data
from cdc.connection import Connection
from cdc.daemon import check_revision
from cdc.errors import CdcError


@click.command()
@click.argument("tables", nargs=-1, metavar="[TABLE]...", callback=table_patterns)
@click.option("-d", "--database", "name", metavar="DB", help="Which one; needed where there are several.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["pydantic", "jsonschema"]),
    help="A Python module (default) or a JSON Schema.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format jsonschema.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="A file in place of stdout.")
@pass_app
def models(
    app: App, *, tables: tuple[str, ...], name: str | None, format_: str | None, as_json: bool, output: Path | None
) -> None:
    """Write models of the events of the captured tables, or of TABLE... alone, such as public.orders or "billing.*".

    What is written describes the tables as they are captured now, in one database. The same tables give the same text.
    """
    if as_json and format_ == "pydantic":
        raise click.UsageError("--json is --format jsonschema")
    [selected, *others] = app.select((name,) if name else ())
    if others:
        raise click.UsageError("models are of one database: name it with -d")
    with (
        app.places([selected]) as places,
        Connection(places[selected].dsn, purpose="models", read_write=False) as connection,
    ):
        check_revision(connection)
        catalogue = catalogue_models.read(connection, tables)
    text = catalogue_models.write(catalogue, database=selected, version=version("table-cdc"))
    if as_json or format_ == "jsonschema":
        text = catalogue_models.json_schema(text)
    if output is None:
        print_data(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CdcError(f"{output} cannot be written: {error.strerror}") from None
    click.echo(
        f"{output}: models of {len(catalogue.tables)} table{'' if len(catalogue.tables) == 1 else 's'}", err=True
    )
