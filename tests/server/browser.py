"""A real Chromium, and what a person does with a page of ours and sees of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

SECONDS = 20.0


class BrowserPage:
    """A page that fails its test if the console says anything, a refused policy included, or if anything but
    the server under test was asked for anything."""

    def __init__(self, driver) -> None:
        self.driver = driver
        self.url = ""
        self.may_complain_of = "^$"
        """What the console may say: Chromium reports every answer of 400 and above there."""

    def __call__(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def js(self, script: str, *arguments: object):
        return self.driver.execute_script(script, *arguments)

    def until(self, condition: Callable[[], object]) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, SECONDS, poll_frequency=0.02).until(lambda _: condition())

    @contextmanager
    def emulating(
        self, *, width: int | None = None, height: int = 800, **media: str
    ) -> Iterator[None]:
        """media: features such as prefers_color_scheme."""
        command = self.driver.execute_cdp_cmd
        features = [{"name": name.replace("_", "-"), "value": v} for name, v in media.items()]
        command("Emulation.setEmulatedMedia", {"features": features})
        if width is not None:
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
            command("Emulation.setDeviceMetricsOverride", metrics)
        try:
            yield
        finally:
            command("Emulation.clearDeviceMetricsOverride", {})
            command("Emulation.setEmulatedMedia", {"features": []})

    def begin(self) -> None:
        """Forget what went before."""
        self.driver.get("about:blank")
        self.complaints(), self.requested()

    def check(self) -> None:
        complaints = self.complaints()
        assert not complaints, complaints
        strangers = [u for u in self.requested() if not u.startswith((self.url, "data:", "about:"))]
        assert not strangers, strangers

    def complaints(self) -> list[str]:
        return [
            entry["message"] for entry in self.driver.get_log("browser")
            if not re.search(self.may_complain_of, entry["message"])
        ]  # fmt: skip

    def requested(self) -> list[str]:
        """Every URL that Chromium has asked for since the last time."""
        events = (json.loads(e["message"])["message"] for e in self.driver.get_log("performance"))
        return [
            e["params"]["request"]["url"]
            for e in events
            if e["method"] == "Network.requestWillBeSent"
        ]


def chromium():
    """A driver of Debian's chromium. Skips the test without it."""
    binary, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or chromedriver is None:
        pytest.skip("needs Debian's chromium and chromium-driver (scripts/install-chromium)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "disable-gpu",
        "window-size=1280,860",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=chromedriver)
    )
