"""A headless Chromium, as Debian packages it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--force-device-scale-factor=1",
)  # fmt: skip


def start(profile: Path) -> webdriver.Chrome:
    """A browser with a profile of its own; skips where there is none, and fails in CI."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium and chromium-driver are missing")
        pytest.skip("chromium and chromium-driver are not installed")
    options = Options()
    options.binary_location = program
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


def look_like(browser: webdriver.Chrome, *, width: int, height: int = 900, dark: bool = False) -> None:
    """Be a screen of this size, a phone below 500 pixels, at day or at night."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def whole_page(browser: webdriver.Chrome, path: Path, *, width: int) -> None:
    """A picture of all of the page."""
    height = int(browser.execute_script("return document.documentElement.scrollHeight"))
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.save_screenshot(str(path))


def complaints(browser: webdriver.Chrome) -> list[str]:
    """What the browser has complained of since the last call: errors of scripts, and breaches of the policy."""
    found: list[dict[str, Any]] = browser.get_log("browser")
    return [str(entry["message"]) for entry in found if entry["level"] in ("SEVERE", "WARNING")]
