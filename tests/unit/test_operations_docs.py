"""docs/: every metric, alert and page is told of, and what is told of exists."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from cdc.config import Config, HttpConfig
from cdc.fleet import Fleet
from cdc.http.app import App
from cdc.http.exposition import described

DOCS = Path(__file__).parents[2] / "docs"
METRICS = described()
RULES: list[dict[str, Any]] = YAML(typ="safe", pure=True).load((DOCS / "alerts.yaml").read_text())["groups"][0]["rules"]


def named(expression: str) -> Iterator[str]:
    """The metrics of ours in an expression."""
    for name in re.findall(r"\bcdc_\w+", expression):
        yield re.sub(r"_(bucket|sum|count)$", "", name)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_described_as_the_scrape_describes_it(name: str) -> None:
    rows = [line for line in (DOCS / "metrics.md").read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1
    assert METRICS[name].rstrip(".") in rows[0]


def test_no_metric_is_described_that_does_not_exist() -> None:
    for page in ("metrics.md", "operations.md", "systemd.md", "security.md"):
        assert set(named((DOCS / page).read_text())) - {"cdc_reader", "cdc_capture"} <= set(METRICS), page


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_is_about_metrics_there_are_and_has_a_place_in_the_runbook(rule: dict[str, Any]) -> None:
    assert set(named(rule["expr"])) <= set(METRICS)
    assert f"\n### {rule['alert']}\n" in (DOCS / "operations.md").read_text()
    assert rule["labels"]["severity"] in ("warning", "critical")


def test_the_runbook_has_no_alert_that_does_not_exist() -> None:
    told = re.findall(r"^### (Cdc\w+)$", (DOCS / "operations.md").read_text(), re.MULTILINE)
    assert told == [rule["alert"] for rule in RULES]


def test_prometheus_accepts_the_rules() -> None:
    program = shutil.which("promtool")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("promtool is missing")
        pytest.skip("promtool is not installed")
    done = subprocess.run(
        [program, "check", "rules", DOCS / "alerts.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_asks_for_metrics_there_are() -> None:
    board = json.loads((DOCS / "grafana.json").read_text())
    asked = {name for panel in board["panels"] for target in panel["targets"] for name in named(target["expr"])}
    asked |= {name for one in board["templating"]["list"] for name in named(json.dumps(one))}
    assert len(asked) > 10
    assert asked <= set(METRICS)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_every_page_is_documented() -> None:
    app = App(Fleet(Config.model_construct(http=None), ""), HttpConfig())
    told = "\n".join(page.read_text() for page in DOCS.glob("*.md"))
    for _, path in app.routes():
        assert path in told, path


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", (DOCS / page).read_text()):
        assert target.startswith("https://") or (DOCS / target).exists(), target
