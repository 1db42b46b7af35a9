"""docs/walkthrough.md, run as it stands: from an empty directory and a fresh environment to a replayed dead letter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from service import free_port

ROOT = Path(__file__).parents[2]
INSTALL = "'table-cdc[http,filter]'"


def script(port: int) -> str:
    """All blocks as one script, with this checkout in place of the published package and a port that is free."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "walkthrough.md").read_text(), re.DOTALL | re.MULTILINE)
    text = "\n".join(blocks)
    assert text.count(INSTALL) == 1
    text = text.replace(INSTALL, f"--quiet '{ROOT}[http,filter]'").replace("127.0.0.1:8650", f"127.0.0.1:{port}")
    # `-m`: jobs have numbers, as in a terminal.
    return f"set -euxm -o pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{text}\n"


def test_the_walk_through_works_from_nothing(database: str, tmp_path: Path) -> None:
    if missing := [program for program in ("psql", "curl", "openssl") if shutil.which(program) is None]:
        if os.environ.get("CI") == "true":
            pytest.fail(f"not installed: {missing}")
        pytest.skip(f"not installed: {missing}")
    (tmp_path / "work").mkdir()
    with (tmp_path / "said").open("w") as said:
        done = subprocess.run(
            ["/bin/bash", "-c", script(free_port())],
            cwd=tmp_path / "work",
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "DATABASE": database}
            | {name: value for name, value in os.environ.items() if name.startswith("PIP_")},
            stdout=said,
            stderr=subprocess.STDOUT,
            timeout=280,
            check=False,
        )
    output = (tmp_path / "said").read_text()
    log = tmp_path / "work" / "cdc.log"
    assert done.returncode == 0, output[-3000:] + (log.read_text()[-2000:] if log.exists() else "")
    assert "1 of 2 sinks does not deliver: shop/audit" in output
    assert re.search(r"^shop: schema cdc: removed$", output, re.MULTILINE), output[-500:]
    shutil.rmtree(tmp_path / "work")
