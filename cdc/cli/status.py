import click
@click.command()
def status() -> None:
    pass
