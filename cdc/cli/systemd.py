"""cdc systemd: the unit files, and putting them where systemd looks."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import click

from cdc.dsn import read_secret
from cdc.errors import CdcError

UNITS = Path("etc/systemd/system")
CONFIGURATION = Path("etc/cdc")
CREDENTIALS = CONFIGURATION / "credentials"
PLACEHOLDER = "ExecStart=/usr/bin/cdc "


@click.group()
def systemd() -> None:
    """Run the daemon under systemd: docs/systemd.md walks through it."""


@systemd.command("print")
@click.option("--template", is_flag=True, help="cdc@.service, for several daemons: cdc@NAME reads /etc/cdc/NAME.yaml.")
def print_unit(template: bool) -> None:
    """Print the unit file, with the path of this cdc in it."""
    click.echo(unit(template), nl=False)


@systemd.command()
@click.option("--template", is_flag=True, help="cdc@.service, for several daemons: cdc@NAME reads /etc/cdc/NAME.yaml.")
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/"),
    help="Below this directory instead of /; nothing is run, as for a package or an image.",
)
def install(template: bool, root: Path) -> None:
    """Write the unit file and a drop-in that loads every file of /etc/cdc/credentials as a credential.

    Makes the user cdc and /etc/cdc where they are missing, lets systemd read its files again, and starts nothing. Run
    it again after an update, or after a credential has come or gone.
    """
    name = "cdc@.service" if template else "cdc.service"
    is_here = root == Path("/")
    try:
        if is_here:
            _make_user()
        _make_directory(root / CONFIGURATION, 0o755)
        credentials = root / CREDENTIALS
        _make_directory(credentials, 0o700)
        names = sorted(path.name for path in credentials.iterdir() if path.is_file())
        for credential in names:
            read_secret(str(credentials / credential), "secret", "dsn")
        _write(root / UNITS / name, unit(template))
        _write(root / UNITS / f"{name}.d" / "credentials.conf", drop_in(names))
    except OSError as error:
        raise CdcError(f"cannot write {error.filename}: {error.strerror} (run it as root)") from None
    except ValueError as error:
        raise CdcError(str(error)) from None
    if is_here and Path("/run/systemd/system").is_dir():
        subprocess.run(["/usr/bin/systemctl", "daemon-reload"], check=False)
    service = "cdc@NAME" if template else "cdc"
    file = "NAME.yaml" if template else "config.yaml"
    click.echo(
        f"next: write /etc/cdc/{file}, cdc -c /etc/cdc/{file} migrate, systemctl enable --now {service}", err=True
    )


def unit(template: bool) -> str:
    """A unit file, with the path of the program that runs now."""
    text = (resources.files("cdc") / ("cdc@.service" if template else "cdc.service")).read_text(encoding="utf-8")
    program = shutil.which(sys.argv[0]) or shutil.which("cdc") or "/usr/bin/cdc"
    # Quoted as systemd reads it: a percent sign and a blank mean something there.
    path = str(Path(program).absolute()).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return text.replace(PLACEHOLDER, f'ExecStart="{path}" ' if " " in path else f"ExecStart={path} ")


def drop_in(names: list[str]) -> str:
    """What loads these files of /etc/cdc/credentials as credentials of the same names."""
    lines = [f"LoadCredential={name}:/{CREDENTIALS}/{name}" for name in names]
    return "\n".join(["# Written by `cdc systemd install`.", "[Service]", *lines, ""])


def _write(path: Path, text: str) -> None:
    _make_directory(path.parent, 0o755)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o644)
    click.echo(f"written: {path}")


def _make_directory(path: Path, mode: int) -> None:
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)


def _make_user() -> None:
    try:
        pwd.getpwnam("cdc")
    except KeyError:
        pass
    else:
        return
    if os.geteuid() != 0:
        raise CdcError("there is no user cdc (run it as root, or: useradd --system cdc)")
    command = ["--system", "--user-group", "--home-dir", "/var/lib/cdc", "--shell", "/usr/sbin/nologin", "cdc"]
    done = subprocess.run(["/usr/sbin/useradd", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CdcError(f"the user cdc could not be made: {done.stderr.strip()}")
    click.echo("made: user cdc")
