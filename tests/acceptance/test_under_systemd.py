"""docs/systemd.md, done as it says under a real systemd: install, configure, start, reload, break, mend, stop.

The machine's python is in /usr/bin there, as Debian has it; this checkout stands in for the published package, and a
server of the test's own for db1.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from cluster import Cluster
from guest import Guest, booted
from harness import until
from sql import fetch

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "systemd.md"
FILE = "/var/lib/cdc/orders.jsonl"


def blocks(section: str, language: str = "sh") -> str:
    """The code of a section of the document."""
    text = re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)
    (found,) = (part for part in text if part.startswith(f"{section}\n"))
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", found, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of this checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", directory, ROOT], check=True
    )
    (found,) = directory.glob("*.whl")
    return found


@pytest.fixture
def guest(wheel: Path) -> Iterator[Guest]:
    """A systemd with the package installed as the document says."""
    if not Path("/usr/bin/python3").exists():
        pytest.skip("no python in /usr/bin")
    with booted(wheel.parent) as guest:
        install = blocks("Install")
        assert install.count("'table-cdc[http]'") == 1
        guest.run(install.replace("apt install python3-venv\n", "").replace("table-cdc[http]", f"{wheel}[http]"))
        yield guest


@pytest.fixture
def dsn() -> Iterator[str]:
    """Database shop, to be reached by TCP."""
    with Cluster({"fsync": "off"}) as cluster:
        cluster.create_database("shop")
        yield f"postgresql://postgres@127.0.0.1:{cluster.port}/shop"


def lines(guest: Guest) -> int:
    return int(guest.run(f"if [ -f {FILE} ]; then wc --lines < {FILE}; else echo 0; fi"))


def said(guest: Guest) -> str:
    return guest.run("journalctl --unit cdc --output cat --no-pager")


@pytest.mark.slow
def test_the_document_works_under_a_real_systemd(guest: Guest, dsn: str) -> None:
    with psycopg2.connect(dsn) as conn:
        fetch(conn, "create table orders (id int primary key, n int)")
    conn.autocommit = True
    configure = blocks("Configure")
    assert configure.count("postgresql://cdc:PASSWORD@db1/shop") == 1
    assert configure.startswith("install -d")
    secrets, _, rest = configure.partition("\ncdc check\n")
    guest.run(secrets.replace("postgresql://cdc:PASSWORD@db1/shop", dsn))
    guest.run(f"cat > /etc/cdc/config.yaml <<'YAML'\n{blocks('Configure', 'yaml')}YAML\n")
    guest.run(f"cdc check || true\n{rest}")
    assert guest.show("cdc", "ActiveState") == "active"
    until(lambda: guest.show("cdc", "StatusText") == "1 databases; sinks: 1 running", "it says what it does", 60)

    # It delivers, as a user without rights, with a secret that only root reads.
    fetch(conn, "insert into orders values (1, 1)")
    until(lambda: lines(guest) == 1, "the change is in the file")
    assert guest.run(f"stat --format '%U %a' {FILE}").strip() == "cdc 640"
    assert guest.run("stat --format '%U %a' /etc/cdc/credentials").strip() == "root 700"
    token = guest.run("cat /etc/cdc/credentials/token").strip()
    assert '"ready": true' in guest.run("curl --silent 127.0.0.1:8650/readyz")
    guest.run(blocks("Look").replace("systemctl status cdc ", "systemctl status --no-pager cdc "))

    # A reload takes in what has changed, and refuses what is wrong.
    guest.run("sed -i 's/type: file, /type: file, ops: [insert], /' /etc/cdc/config.yaml")
    guest.run(blocks("Change something"))
    until(lambda: "The configuration was reloaded." in said(guest), "it is reloaded")
    fetch(conn, "update orders set n = 2; insert into orders values (2, 2)")
    until(lambda: lines(guest) == 2, "only the insert comes")
    guest.run(
        "cp /etc/cdc/config.yaml /root/good.yaml; echo 'nonsense: 1' >> /etc/cdc/config.yaml; systemctl reload cdc"
    )
    until(lambda: "the last reload was refused" in guest.show("cdc", "StatusText"), "and says that it was not")
    assert guest.show("cdc", "ActiveState") == "active"

    # Started anew with that configuration it gives up, with the reason; with a good one it goes on where it was.
    guest.run("systemctl restart cdc", fails=True)
    assert guest.show("cdc", "ExecMainStatus") == "78"
    assert guest.show("cdc", "NRestarts") == "0"
    assert "nonsense" in said(guest)
    fetch(conn, "insert into orders values (3, 3)")
    guest.run("cp /root/good.yaml /etc/cdc/config.yaml; systemctl start cdc")
    until(lambda: lines(guest) == 3, "what came meanwhile is delivered")

    # Killed, it is started again; so is one that hangs, by the watchdog.
    guest.run("systemctl kill --kill-whom main --signal KILL cdc")
    until(lambda: guest.show("cdc", "NRestarts") == "1", "started again when it was killed", 60)
    watchdog = "/etc/systemd/system/cdc.service.d/watchdog.conf"
    guest.run(f"printf '[Service]\\nWatchdogSec=2s\\n' > {watchdog}; systemctl daemon-reload; systemctl restart cdc")
    guest.run("systemctl kill --kill-whom main --signal STOP cdc")
    until(lambda: guest.show("cdc", "NRestarts") == "1", "started again when it hung", 60)
    until(lambda: guest.show("cdc", "ActiveState") == "active", "it is up again", 60)
    fetch(conn, "insert into orders values (4, 4)")
    until(lambda: lines(guest) == 4, "and delivers")

    # Told to stop it drains, and ends well. Every line of the journal had its priority, and none a secret.
    guest.run("systemctl stop cdc")
    assert guest.show("cdc", "Result") == "success"
    entries = [json.loads(line) for line in guest.run("journalctl --unit cdc --output json --no-pager").splitlines()]
    ours = [entry for entry in entries if entry.get("SYSLOG_IDENTIFIER") == "cdc"]
    assert {"3", "6"} <= {entry["PRIORITY"] for entry in ours}
    assert token not in json.dumps(entries)
    conn.close()
