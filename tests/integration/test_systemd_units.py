"""The unit files: written where systemd looks, as tight as promised, and only with keys it knows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cdc.cli import main
from cdc.cli.systemd import drop_in, unit

MOST_EXPOSED = 1.5
TEMPLATES = pytest.mark.parametrize("template", [False, True], ids=["cdc.service", "cdc@.service"])


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["systemd", *arguments])


def analyze(*arguments: str) -> str:
    program = shutil.which("systemd-analyze")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("systemd-analyze is missing")
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@TEMPLATES
def test_what_is_left_exposed_is_little(template: bool, tmp_path: Path) -> None:
    path = tmp_path / ("cdc@.service" if template else "cdc.service")
    path.write_text(unit(template))
    said = analyze("security", "--offline=true", "--no-pager", str(path))
    found = re.search(r"Overall exposure level for .*: ([0-9.]+)", said)
    assert found, said
    print(f"\n{path.name}: exposure {found[1]}")  # noqa: T201  pytest -s shows it
    assert float(found[1]) <= MOST_EXPOSED


@TEMPLATES
def test_systemd_understands_every_line(template: bool, tmp_path: Path) -> None:
    program = tmp_path / "cdc"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    path = tmp_path / ("cdc@.service" if template else "cdc.service")
    path.write_text(re.sub(r"ExecStart=\S+", f"ExecStart={program}", unit(template)))
    said = analyze("verify", "--man=no", str(path).replace("@.", "@shop."))
    complaints = [line for line in said.splitlines() if "cdc" in line and "Unit sysinit.target not found" not in line]
    # On a machine without systemd as init it also looks for units that are not there.
    assert not [line for line in complaints if re.search(r"Unknown|Failed to parse|not executable|ignoring", line)], (
        said
    )


@TEMPLATES
def test_it_does_what_the_contract_says(template: bool) -> None:
    text = unit(template)
    for line in ("Type=notify", "RestartPreventExitStatus=78", "ExecReload=/bin/kill -HUP $MAINPID"):
        assert line in text.splitlines()
    assert re.search(r"^WatchdogSec=", text, re.MULTILINE)
    config = "/etc/cdc/%i.yaml" if template else "/etc/cdc/config.yaml"
    assert re.search(rf"^ExecStart=\S+ --config {config} run$", text, re.MULTILINE)


def test_install_writes_units_and_a_credential_for_each_secret(tmp_path: Path) -> None:
    secrets = tmp_path / "etc/cdc/credentials"
    secrets.mkdir(parents=True)
    for name in ("shop.dsn", "token"):
        (secrets / name).write_text("host=db1 password=canary")
        (secrets / name).chmod(0o600)
    result = run("install", "--root", str(tmp_path))
    assert result.exit_code == 0, result.output
    units = tmp_path / "etc/systemd/system"
    assert (units / "cdc.service").read_text() == unit(False)
    assert (units / "cdc.service.d/credentials.conf").read_text().splitlines()[1:] == [
        "[Service]",
        "LoadCredential=shop.dsn:/etc/cdc/credentials/shop.dsn",
        "LoadCredential=token:/etc/cdc/credentials/token",
    ]
    assert "canary" not in result.output
    (secrets / "token").unlink()
    assert run("install", "--root", str(tmp_path)).exit_code == 0
    assert "token" not in (units / "cdc.service.d/credentials.conf").read_text()
    assert run("install", "--template", "--root", str(tmp_path)).exit_code == 0
    assert (units / "cdc@.service").read_text() == unit(True)


def test_install_refuses_a_secret_that_everybody_can_read(tmp_path: Path) -> None:
    secrets = tmp_path / "etc/cdc/credentials"
    secrets.mkdir(parents=True)
    (secrets / "shop.dsn").write_text("host=db1")
    (secrets / "shop.dsn").chmod(0o644)
    result = run("install", "--root", str(tmp_path))
    assert result.exit_code == 1
    assert "can be read by everybody (chmod o-r" in result.stderr
    assert not (tmp_path / "etc/systemd/system/cdc.service").exists()


def test_install_makes_a_directory_for_secrets_that_only_root_reads(tmp_path: Path) -> None:
    assert run("install", "--root", str(tmp_path)).exit_code == 0
    assert (tmp_path / "etc/cdc/credentials").stat().st_mode & 0o777 == 0o700


def test_print_prints_the_unit_and_nothing_else() -> None:
    assert run("print").stdout == unit(False)
    assert run("print", "--template").stdout == unit(True)


def test_without_secrets_the_drop_in_says_nothing() -> None:
    assert drop_in([]).splitlines() == ["# Written by `cdc systemd install`.", "[Service]"]
