"""The console in a real browser: what it shows, that it obeys nobody's rows, and how it looks.

``CDC_SCREENSHOTS=DIR`` keeps the pictures.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import chromium
import pytest
from harness import Project, read_lines, until
from pages import TOKEN
from psycopg2 import sql
from psycopg2.extensions import connection
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from service import free_port
from sql import fetch

Connect = Callable[..., connection]

HOSTILE = (
    "<script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    '"><svg onload=window.pwned=1>',
    "javascript:window.pwned=1",
    "</pre></script><script>window.pwned=1</script>",
    "${window.pwned=1}{{window.pwned=1}}",
    "\u202egnp.exe\u0007",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    found = chromium.start(tmp_path_factory.mktemp("chromium"))
    yield found
    found.quit()


@pytest.fixture
def project(tmp_path: Path, database: str, connect: Connect) -> Iterator[Project]:
    fetch(connect(database), "create table orders (id int primary key, status text, amount numeric)")
    made = Project(
        tmp_path, database, {"public.*": {}}, "{table}.jsonl",
        sinks={"warehouse": {"type": "file", "path": f"{tmp_path}/warehouse/{{table}}.jsonl", "retry": {"max": "1s"}}},
    )  # fmt: skip
    made.content["http"] = {
        "listen": f"127.0.0.1:{free_port()}", "token": TOKEN, "show_values": True, "stalled_after": "2s",
    }  # fmt: skip
    made.write()
    made.cdc("migrate")
    yield made
    shutil.rmtree(tmp_path / "warehouse", ignore_errors=True)
    made.remove_output()


def open_console(
    browser: Chrome, project: Project, *, token: bool = True, width: int = 1280, dark: bool = False
) -> None:
    chromium.look_like(browser, width=width, dark=dark)
    browser.get(f"http://{project.content['http']['listen']}/")
    browser.execute_script("sessionStorage.clear()")
    if token:
        browser.execute_script("sessionStorage.setItem('cdc-token', arguments[0])", TOKEN)
    chromium.complaints(browser)
    browser.refresh()
    until(lambda: "Connecting" not in text(browser, "#verdict"), "the console is there")


def text(browser: Chrome, selector: str) -> str:
    return " ".join(
        str(browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)).split()
    )


def click(browser: Chrome, selector: str) -> None:
    browser.find_element(By.CSS_SELECTOR, selector).click()


def keep(browser: Chrome, tmp_path: Path, name: str, *, width: int = 1280) -> None:
    """A picture of it, for people."""
    path = tmp_path / f"{name}.png"
    chromium.whole_page(browser, path, width=width)
    assert path.stat().st_size > 10_000
    if target := os.environ.get("CDC_SCREENSHOTS"):
        Path(target).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def fits(browser: Chrome) -> bool:
    """Whether nothing sticks out at the side."""
    return bool(browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth"))


def test_at_a_glance_it_says_that_all_is_well(
    browser: Chrome, project: Project, connect: Connect, tmp_path: Path
) -> None:
    writer = connect(project.dsn)
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 2)
        fetch(writer, "insert into orders select i, 'new', i / 3.0 from generate_series(1, 1234) i")
        open_console(browser, project)
        until(lambda: "All is delivered" in text(browser, "#verdict"), "it says so")
        until(lambda: "2468 events" in text(browser, "#totals"), "it has counted")
        until(lambda: "no drift" in text(browser, "#databases"), "the database has been looked at")
        assert "mirror" in text(browser, "#databases")
        until(
            lambda: browser.find_elements(By.CSS_SELECTOR, "#plot-rate svg polyline, #plot-rate svg circle"),
            "a plot",
            40,
        )
        keep(browser, tmp_path, "well")
        assert chromium.complaints(browser) == []


def test_a_sink_that_fails_is_named_with_its_reason(
    browser: Chrome, project: Project, connect: Connect, tmp_path: Path
) -> None:
    (tmp_path / "warehouse").write_text("in the way")
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 2)
        fetch(connect(project.dsn), "insert into orders select i, 'new', i from generate_series(1, 50) i")
        open_console(browser, project)
        until(lambda: "1 of 2 sinks does not deliver" in text(browser, "#verdict"), "it says so")
        assert "shop / warehouse is stalled" in text(browser, "#troubles")
        assert "move away what stands in the place of its directory" in text(browser, "#troubles")
        keep(browser, tmp_path, "failing-phone", width=390)
        (tmp_path / "warehouse").unlink()
        until(lambda: "All is delivered" in text(browser, "#verdict"), "and when it works again")
    until(lambda: "The daemon does not answer" in text(browser, "#verdict"), "and when the daemon has gone")


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (820, False), (1280, True)])
def test_it_fits_on_a_phone_and_in_the_dark(
    browser: Chrome, project: Project, connect: Connect, tmp_path: Path, width: int, dark: bool
) -> None:
    writer = connect(project.dsn)
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 2)
        open_console(browser, project, width=width, dark=dark)
        click(browser, "#tail-toggle")

        def seen() -> bool:
            fetch(
                writer,
                "insert into orders select coalesce(max(id), 0) + 1, repeat('a long status ', 20), 1 from orders",
            )
            return bool(browser.find_elements(By.CSS_SELECTOR, "#tail li"))

        until(seen, "the tail shows it", pause=0.3)
        assert fits(browser)
        background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (int(background.removeprefix("rgb(").partition(",")[0]) < 60) == dark
        keep(browser, tmp_path, f"{width}-{'dark' if dark else 'light'}", width=width)
        assert chromium.complaints(browser) == []


def test_rows_and_names_that_are_hostile_are_text_and_nothing_else(
    browser: Chrome, project: Project, connect: Connect, tmp_path: Path
) -> None:
    writer = connect(project.dsn)
    with writer.cursor() as cursor:
        for evil in HOSTILE:
            table = sql.Identifier(evil.encode()[:63].decode(errors="ignore"))
            cursor.execute(
                sql.SQL("create table {} (id text primary key, {} text)").format(table, sql.Identifier(evil[:40]))
            )
    project.cdc("migrate")
    # Drift with a hostile name in it, too.
    with writer.cursor() as cursor:
        cursor.execute(sql.SQL('drop trigger "00_cdc_capture" on {}').format(sql.Identifier(HOSTILE[1])))
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 2)
        open_console(browser, project)
        click(browser, "#tail-toggle")
        until(lambda: "Waiting for changes" in text(browser, "#tail-note"), "the tail begins")

        def write() -> bool:
            with writer.cursor() as cursor:
                for evil in HOSTILE:
                    table = sql.Identifier(evil.encode()[:63].decode(errors="ignore"))
                    cursor.execute(
                        sql.SQL("insert into {} values (%s, %s) on conflict (id) do update set {} = %s").format(
                            table, sql.Identifier(evil[:40])
                        ),
                        (evil, evil, evil + "!"),
                    )
                    cursor.execute(sql.SQL("delete from {}").format(table))
            return len(browser.find_elements(By.CSS_SELECTOR, "#tail li")) >= 20

        until(write, "they are shown", pause=0.3)
        until(lambda: "trigger drift" in text(browser, "#troubles"), "the drift is shown")
        shown = text(browser, "#tail")
        for evil in (HOSTILE[0], *HOSTILE[2:6]):  # of table 1 the trigger is gone
            assert " ".join(evil.split()) in shown
        assert HOSTILE[1] in text(browser, "#troubles")
        browser.find_element(By.ID, "tail-filter").send_keys("<script>")
        until(lambda: "javascript:" not in text(browser, "#tail"), "the filter filters")
        assert browser.execute_script("return window.pwned") is None
        assert browser.execute_script("return document.scripts.length") == 1
        assert (
            browser.execute_script(
                "return document.querySelectorAll('main img, main svg[onload], iframe, main a').length"
            )
            == 0
        )
        assert chromium.complaints(browser) == []


def test_the_token_is_asked_for_checked_and_kept_in_the_tab_only(browser: Chrome, project: Project) -> None:
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 2)
        open_console(browser, project, token=False)
        click(browser, "#tail-toggle")
        until(lambda: browser.execute_script("return document.getElementById('token-dialog').open"), "it asks")
        field = browser.find_element(By.ID, "token-input")
        field.send_keys("not the right one at all")
        click(browser, "#token-ok")
        until(lambda: "needs the token" in text(browser, "#token-error"), "it says no")
        assert text(browser, "#tail-note") == "Starting…"
        field.clear()
        field.send_keys(TOKEN)
        click(browser, "#token-ok")
        until(lambda: "Waiting for changes" in text(browser, "#tail-note"), "the tail begins")
        assert browser.execute_script("return sessionStorage.getItem('cdc-token')") == TOKEN
        assert browser.execute_script("return localStorage.length + document.cookie.length") == 0


def test_values_stay_hidden_and_the_page_says_why(browser: Chrome, project: Project, connect: Connect) -> None:
    project.content["http"]["show_values"] = False
    project.write()
    writer = connect(project.dsn)
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 2)
        open_console(browser, project, token=False)
        click(browser, "#tail-toggle")

        def seen() -> bool:
            fetch(writer, "insert into orders select coalesce(max(id), 0) + 1, '4929-1234', 1 from orders")
            fetch(writer, "update orders set status = '4929-5678'")
            return "status" in text(browser, "#tail")

        until(seen, "the tail shows which column", pause=0.3)
        assert "4929" not in browser.page_source
        assert "Row values are hidden" in text(browser, "#tail-note")


LONG = "a_table_whose_name_repeated_is_longer_than_a_file_name_may_be"


def test_dead_letters_are_shown_with_their_reason_replayed_and_discarded(
    browser: Chrome, project: Project, connect: Connect, tmp_path: Path
) -> None:
    writer = connect(project.dsn)
    fetch(writer, f"create table {LONG} (id int primary key, note text)")
    project.cdc("migrate")
    letters = project.content["sinks"]["letters"] = {
        "type": "file", "path": f"{tmp_path}/" + "{table}" * 5, "tables": [f"public.{LONG}"],
    }  # fmt: skip
    project.write()
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 3)
        fetch(writer, f"insert into {LONG} select i, '<b>note</b>' from generate_series(1, 3) i")
        daemon.wait_until_it_says("An event became a dead letter.", 3)
        open_console(browser, project)
        until(lambda: len(browser.find_elements(By.CSS_SELECTOR, ".letter")) == 3, "they are shown")
        assert "3 dead letters" in text(browser, "#verdict")
        assert "File name too long" in text(browser, "#letters")
        assert "<b>note</b>" in text(browser, "#letters pre")
        keep(browser, tmp_path, "letters")
        # One is discarded.
        click(browser, ".letter button.danger")
        click(browser, "#ask-yes")
        until(lambda: len(browser.find_elements(By.CSS_SELECTOR, ".letter")) == 2, "one has gone")
        # The cause is mended, and the rest replayed.
        letters["path"] = f"{tmp_path}/letters.jsonl"
        project.write()
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_until_it_says("The configuration was reloaded.")
        until(lambda: daemon.said().count("sink=letters owner") == 2, "it begins anew")
        click(browser, "#letters-actions button")
        click(browser, "#ask-yes")
        until(lambda: len(read_lines(tmp_path / "letters.jsonl")) == 2, "they are delivered")
        until(lambda: "All is delivered" in text(browser, "#verdict"), "and gone")
        assert chromium.complaints(browser) == []
        assert daemon.said().count("Done from the console.") == 2
    (tmp_path / "letters.jsonl").unlink()


def test_a_sink_is_paused_and_resumed(browser: Chrome, project: Project, connect: Connect) -> None:
    writer = connect(project.dsn)
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 2)
        open_console(browser, project)
        until(lambda: bool(browser.find_elements(By.CSS_SELECTOR, ".sink .actions button")), "there is a button")
        click(browser, ".sink .actions button")
        click(browser, "#ask-yes")
        until(lambda: "1 sink paused" in text(browser, "#verdict"), "it is paused")
        daemon.wait_until_it_says("The sink is paused.")
        fetch(writer, "insert into orders values (1, 'new', 1)")
        until(lambda: "1pending" in text(browser, ".sink"), "its events wait")
        until(lambda: text(browser, ".sink .actions button") == "Resume", "it may be resumed")
        click(browser, ".sink .actions button")
        until(lambda: "All is delivered" in text(browser, "#verdict"), "it is resumed")
    assert len(read_lines(project.directory / "orders.jsonl")) == 1


def test_a_backfill_is_shown_paused_and_resumed(browser: Chrome, project: Project, connect: Connect) -> None:
    conn = connect(project.dsn)
    fetch(conn, "insert into orders select g, 'new', 1 from generate_series(1, 500) g")
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 2)
        project.cdc("backfill", "start", "mirror", "public.orders", "--chunk", "5", "--rate", "4")
        open_console(browser, project)
        until(lambda: "Backfill of public.orders" in text(browser, ".sink"), "it is shown")
        assert browser.find_elements(By.CSS_SELECTOR, ".sink progress")
        click(browser, ".sink .error button")
        until(lambda: "rows, paused" in text(browser, ".sink"), "it is paused")
        assert fetch(conn, "select state from cdc.backfill") == [("paused",)]
        click(browser, ".sink .error button")
        until(lambda: fetch(conn, "select state from cdc.backfill") == [("running",)], "it is resumed")
        assert chromium.complaints(browser) == []


def test_without_a_token_in_the_configuration_nothing_can_be_clicked(browser: Chrome, project: Project) -> None:
    del project.content["http"]["token"]
    project.write()
    with project.daemon() as daemon:
        daemon.wait_until_it_says("Serving.", 2)
        open_console(browser, project, token=False)
        until(lambda: "mirror" in text(browser, "#databases"), "the sinks are shown")
        assert not browser.find_elements(By.CSS_SELECTOR, ".actions button")
