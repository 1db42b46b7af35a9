"""Crash points: nothing until armed, then the death of a kill -9 at the right place and the right time."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdc import crashpoints

PACKAGE = Path(crashpoints.__file__).parent


@pytest.fixture(autouse=True)
def killed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What os.kill was asked for, instead of done."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(crashpoints, "_trap", None)
    return asked


def test_nothing_happens_unless_armed(killed: list[tuple[int, int]]) -> None:
    for point in crashpoints.POINTS:
        crashpoints.reached(point)
        assert not crashpoints.armed(point)
    assert killed == []


@pytest.mark.parametrize("point", crashpoints.POINTS)
def test_the_armed_point_kills_and_no_other_does(killed: list[tuple[int, int]], point: str) -> None:
    crashpoints.arm(point)
    for other in crashpoints.POINTS:
        assert crashpoints.armed(other) == (other == point)
        if other != point:
            crashpoints.reached(other)
    assert killed == []
    crashpoints.reached(point)
    assert killed == [(os.getpid(), signal.SIGKILL)]


def test_the_n_th_time_kills(killed: list[tuple[int, int]]) -> None:
    crashpoints.arm("after-read:3")
    crashpoints.reached("after-read")
    crashpoints.reached("after-read")
    assert killed == []
    crashpoints.reached("after-read")
    assert len(killed) == 1


@pytest.mark.parametrize("spec", ["", "after-reed", "after_read", ":1", "after-read ", "AFTER-READ"])
def test_an_unknown_point_is_refused_and_the_known_ones_are_named(spec: str) -> None:
    with pytest.raises(ValueError, match=r"known: before-listen, after-listen, .*, draining"):
        crashpoints.arm(spec)
    assert not any(map(crashpoints.armed, crashpoints.POINTS))


@pytest.mark.parametrize("count", ["", "0", "-1", "1.5", "x", "1:1", " 1", "²"])
def test_a_count_that_is_none_is_refused(count: str) -> None:
    with pytest.raises(ValueError, match="POINT:N"):
        crashpoints.arm(f"after-read:{count}")


def uses() -> Iterator[tuple[str, str]]:
    """Where the package names a point: (file:line, point)."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and (node.func.value.id, node.func.attr) in {("crashpoints", "reached"), ("crashpoints", "armed")}
                and isinstance(node.args[0], ast.Constant)
            ):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node.args[0].value


def test_the_package_reaches_only_points_that_exist() -> None:
    found = list(uses())
    assert found
    assert [use for use in found if use[1] not in crashpoints.POINTS] == []


# Eight threads, a thousand times each; the process must not see its 8,000th time, and must not die before it.
COUNTING = """
import sys, threading
from cdc import crashpoints
crashpoints.arm("before-deliver:" + sys.argv[1])
def work():
    for _ in range(1000):
        crashpoints.reached("before-deliver")
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("alive")
"""


@pytest.mark.parametrize(("count", "code", "output"), [(8000, -signal.SIGKILL, ""), (8001, 0, "alive\n")])
def test_threads_count_together_and_death_is_a_kill_9(count: int, code: int, output: str) -> None:
    command = [sys.executable, "-c", COUNTING, str(count)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (code, output)
