"""A real systemd to test under, as process 1 of a namespace of its own, on a throwaway copy of this machine's files."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import until

BOOT = Path(__file__).with_name("boot.sh")
SYSTEMD = Path("/lib/systemd/systemd")
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}


class Guest:
    """What runs under that systemd. Its processes are also this machine's, under other numbers."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def run(self, command: str, *, fails: bool = False) -> str:
        """What a command of bash says in there, as root and from an environment of its own."""
        done = self._ask(["/bin/bash", "-euo", "pipefail", "-c", command])
        said = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, f"{command}: {done.returncode}\n{said[-3000:]}"
        return said

    def has_booted(self) -> bool:
        """Whether it has, even if a unit has failed."""
        return self._ask(["systemctl", "is-system-running"]).stdout.strip() in ("running", "degraded")

    def show(self, unit: str, what: str) -> str:
        """A property of a unit."""
        return self.run(f"systemctl show {unit} --property {what} --value").strip()

    def _ask(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nsenter", "--target", str(self.pid), "--all", "--root", "--wd", *command],
            env=ENVIRONMENT | {name: value for name, value in os.environ.items() if name.startswith("PIP_")},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )


@contextmanager
def booted(shared: Path) -> Iterator[Guest]:
    """Boot one; skips, or fails in CI, where that cannot be.

    Args:
        shared: a directory to be seen in there under the same path, read only; boot.log is written there.
    """
    if os.geteuid() != 0 or not SYSTEMD.exists():
        reason = "needs root and systemd (Debian: apt install systemd)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    said = shared / "boot.log"
    with said.open("w") as log:
        outer = subprocess.Popen(
            ["unshare", "-C", "-p", "-m", "-u", "-i", "-f", "--kill-child", "bash", str(BOOT), str(shared)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")

        def first() -> int | None:
            assert outer.poll() is None, said.read_text()
            found = children.read_text().split()
            if not found or Path(f"/proc/{found[0]}/comm").read_text().strip() != "systemd":
                return None
            return int(found[0])

        until(lambda: first() is not None, "systemd is process 1")
        guest = Guest(first() or 0)
        until(guest.has_booted, "it has booted", 60)
        yield guest
    finally:
        outer.send_signal(signal.SIGKILL)
        outer.wait()
