"""A page in a browser without a window: what tests click on, and read."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRIVER = shutil.which("chromedriver")
PATIENCE = 600.0  # seconds


class Browser:
    """A browser on one page of the demo."""

    def __init__(self, driver: Any, address: str):
        self.driver = driver
        driver.get(address)
        self.wait(lambda: self.all("#examples button.gallery-item") and self.all("#run"))
        self.wait(lambda: not self.all("[data-testid=status-tracker].translucent"))

    def all(self, selector: str) -> list[Any]:
        """All elements of a CSS selector."""
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        """The first element of a CSS selector."""
        return self.driver.find_element("css selector", selector)

    def wait(self, until: Callable[[], Any]) -> Any:
        """What a function gives once it gives something."""
        ends = time.monotonic() + PATIENCE
        while time.monotonic() < ends:
            try:
                if found := until():
                    return found
            except Exception as error:  # elements come and go
                if type(error).__name__ not in ("StaleElementReferenceException", "NoSuchElementException"):
                    raise
            time.sleep(0.1)
        raise AssertionError(f"nothing came in {PATIENCE:g} s; the page says {self.status!r}.")

    @property
    def status(self) -> str:
        """The line above the columns."""
        return self.one("#status .status").text

    def choose_example(self, number: int) -> None:
        """Click on an example, and wait until it is there."""
        before = self.one("#true-class textarea, #true-class input").get_attribute("value")
        self.all("#examples button.gallery-item")[number].click()
        field = "#true-class textarea, #true-class input"
        self.wait(lambda: self.all("#picture img") and (self.one(field).get_attribute("value") or before == ""))

    def upload(self, path: Path) -> None:
        """Upload a file as the picture."""
        for button in self.all("#picture button[aria-label='Clear'], #picture button[aria-label='Remove Image']"):
            button.click()
        self.wait(lambda: self.all("#picture input[type=file]"))
        self.one("#picture input[type=file]").send_keys(str(path))

    def type(self, field: str, text: str) -> None:
        """Put a text in the place of what a field holds."""
        element = self.one(f"{field} textarea, {field} input[type=text], {field} input[type=number]")
        element.send_keys("\ue009a\ue000")  # control and a, then none held
        element.send_keys(text or "\ue017")
        element.send_keys("\ue004")  # on to the next, so that it is taken over

    def choose(self, field: str, name: str) -> None:
        """An entry of a list."""
        self.one(f"{field} input").click()

        def named() -> list[Any]:
            return [own for own in self.all("[role=option]") if own.get_attribute("aria-label") == name]

        self.wait(named)[0].click()

    def attack(self) -> str:
        """Click on Attack, wait for the end, and give the line that says how it ended."""
        self.wait(lambda: self.one("#run").is_enabled())
        self.driver.execute_script("document.querySelector('#status .status').dataset.old = true")
        self.one("#run").click()
        self.wait(lambda: self.all("#status .status:not([data-old])"))
        self.wait(lambda: self.one("#run").is_enabled() and not self.one("#stop").is_enabled())
        return self.status

    def shares(self, column: str) -> dict[str, list[float]]:
        """Of a column by class the probabilities, clean and attacked."""
        rows = self.all(f"{column} tr[data-class]")
        return {
            row.get_attribute("data-class"): [
                float(bar.get_attribute("data-share")) for bar in row.find_elements("css selector", ".bar")
            ]
            for row in rows
        }

    def errors(self) -> list[str]:
        """What the browser complains of."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def browsing(address: str, width: int = 1360, height: int = 1500) -> Iterator[Browser]:
    """A browser on a page."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--disable-dev-shm-usage", f"--window-size={width},{height}", "--disable-gpu"):
        options.add_argument(flag)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Browser(driver, address)
    finally:
        driver.quit()
