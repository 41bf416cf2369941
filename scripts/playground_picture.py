"""Pictures of the playground for the README: `quire serve` with the built-in model, in a real Chromium.

    python scripts/playground_picture.py        writes docs/images/playground-light.webp and -dark.webp

Needs Debian's chromium (scripts/install-chromium), selenium and Pillow.
"""

from __future__ import annotations

import asyncio
import io
import shutil
import sys
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from quire.cli.demo.server import ServerProcess, scratch_folder

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
WIDTH, HEIGHT, SCALE = 940, 610, 2
QUESTIONS = ("show me an example of zip", "what is prefix caching?")


def browser() -> webdriver.Chrome:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        raise SystemExit("chromium is missing: scripts/install-chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "hide-scrollbars",
    ):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(executable_path=chromedriver)
    return webdriver.Chrome(options=options, service=service)


def take(driver: webdriver.Chrome, url: str, scheme: str) -> Image.Image:
    """Ask the questions, point at the least likely token, and take the picture."""
    size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": SCALE, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.get(url)

    def find(selector: str) -> WebElement:
        return driver.find_element("css selector", selector)

    wait = WebDriverWait(driver, 30, poll_frequency=0.02)
    wait.until(lambda _: find("#status").get_attribute("data-state") == "ready")
    if not find("#settings").is_displayed():
        find("#toggle").click()
    find("[data-field=temperature]").send_keys("0")
    find("#toggle").click()
    for _ in range(2):  # the first conversation warms up the server
        find("#clear").click()
        for question in QUESTIONS:
            find("#prompt").send_keys(question, "\ue007")
            wait.until(lambda _: find("#send").is_displayed())
    tokens = driver.find_elements("css selector", ".assistant .body .t")
    unlikely = max(tokens, key=lambda token: token.get_attribute("class") or "")  # "t p0" to "t p4"
    ActionChains(driver).move_to_element(find("#prompt")).pause(0.3).move_to_element(
        unlikely
    ).perform()
    time.sleep(0.5)  # a repainted answer hides the tooltip
    if not find("#tip").is_displayed():
        raise SystemExit("the tooltip is not shown")
    return Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")


def main() -> int:
    IMAGES.mkdir(exist_ok=True)
    driver = browser()
    with scratch_folder() as folder:
        server = ServerProcess.start({"seed": 0}, Path(folder))
        try:
            asyncio.run(server.wait_ready())
            for scheme in ("light", "dark"):
                picture = take(driver, server.url + "/", scheme)
                picture.save(IMAGES / f"playground-{scheme}.webp", quality=80, method=6)
        finally:
            driver.quit()
            server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
