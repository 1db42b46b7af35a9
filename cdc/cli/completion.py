"""cdc completion: what a shell needs to complete commands and options. The scripts are click's."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_CDC_COMPLETE"
"""Click's name for it; by this the script asks the program."""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    bash: eval "$(cdc completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc; fish: cdc completion fish >
    ~/.config/fish/completions/cdc.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    click.echo(kind(context.find_root().command, {}, "cdc", VARIABLE).source())
