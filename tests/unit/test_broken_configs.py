"""Two dozen configurations that are wrong, and what is said of each: in ``broken/said.txt``, to be read by people.

``python tests/unit/test_broken_configs.py`` writes that file anew; look at what has changed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cdc import config
from cdc.errors import ConfigError
from cdc.sinks import option_models

BROKEN = Path(__file__).parent / "broken"
FILES = sorted(BROKEN.glob("*.yaml"))
SINKS = {kind: option_models()[kind] for kind in ("file", "stdout")}  # so that a new sink changes no message


def said_of(path: Path) -> list[str]:
    """The findings, without the directory."""
    try:
        config.load(path, SINKS, {})
    except ConfigError as error:
        return [finding.replace(f"{BROKEN}/", "") for finding in error.findings]
    return []


def everything() -> str:
    return "\n".join("\n".join(said_of(path)) + "\n" for path in FILES)


def test_there_are_enough_of_them() -> None:
    assert len(FILES) >= 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_is_refused_with_a_place_and_a_cure_and_without_its_values(path: Path) -> None:
    findings = said_of(path)
    assert findings
    for finding in findings:
        assert finding.startswith(f"{path.name}: ")
        assert finding.endswith(")"), "without a cure"
        assert "canary" not in finding


def test_the_messages_are_those_somebody_has_read() -> None:
    print(everything())  # noqa: T201  pytest -s shows them
    assert everything() == (BROKEN / "said.txt").read_text()


if __name__ == "__main__":
    (BROKEN / "said.txt").write_text(everything())
    sys.stdout.write(everything())
