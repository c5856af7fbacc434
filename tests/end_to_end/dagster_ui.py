"""A running Dagster UI and a real browser in front of it.

Here belongs how the UI is started, asked and clicked: what a test claims, or a picture shows, is said where this is
used. The UI is a React application without stable names, so elements are found by the text a person reads.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

from selenium import webdriver
from selenium.common.exceptions import ElementClickInterceptedException, StaleElementReferenceException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
NO_BROWSER = "no Chromium with chromedriver on this machine (Debian: apt-get install chromium chromium-driver)"
PATIENCE = 300.0  # seconds; a loaded machine takes many times what a quiet one does

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, *, patience: float = PATIENCE, pause: float = 0.25) -> T:
    """The first true value of `condition`. Raises AssertionError naming `what` when there is none in time."""
    end = time.monotonic() + patience
    while True:
        try:
            if found := condition():
                return found
        except (StaleElementReferenceException, ElementClickInterceptedException):
            pass  # React replaced the element between finding and using it, or something still covers it
        if time.monotonic() > end:
            raise AssertionError(f"after {patience:.0f} s still no {what}")
        time.sleep(pause)


class DagsterUI:
    """The GraphQL side of a running UI at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """The `data` of a GraphQL answer. Raises AssertionError on errors."""
        request = urllib.request.Request(
            f"{self.url}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer["errors"]
        return answer["data"]

    def runs(self) -> list[dict[str, Any]]:
        """All runs, latest first: runId, status, jobName, tags (a dict)."""
        query = "{ runsOrError { ... on Runs { results { runId status jobName tags { key value } } } } }"
        found = self.ask(query)["runsOrError"]["results"]
        return [run | {"tags": {tag["key"]: tag["value"] for tag in run["tags"]}} for run in found]

    def next_run(self, before: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Wait for a run that is not among those of `before`, and until it has ended."""
        known = {run["runId"] for run in before}

        def ended() -> dict[str, Any] | None:
            new = [run for run in self.runs() if run["runId"] not in known]
            return new[0] if new and new[0]["status"] in {"SUCCESS", "FAILURE", "CANCELED"} else None

        return until(ended, "end of the run just launched", patience=2 * PATIENCE)

    def groups(self) -> dict[str, str]:
        """The group of every asset."""
        nodes = self.ask("{ assetNodes { assetKey { path } groupName } }")["assetNodes"]
        return {"/".join(node["assetKey"]["path"]): node["groupName"] for node in nodes}

    def location(self) -> str:
        """The name of the only code location."""
        query = "{ repositoriesOrError { ... on RepositoryConnection { nodes { location { name } } } } }"
        [node] = self.ask(query)["repositoriesOrError"]["nodes"]
        return node["location"]["name"]


def free_port() -> int:
    """A port of this machine nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def dagster_dev(home: Path, arguments: Sequence[str] = (), *, folder: Path = ROOT, log: Path) -> Iterator[DagsterUI]:
    """`dagster dev` with its history in `home`, run in `folder`. All its processes end with the block."""
    port = free_port()
    environment = os.environ | {
        "DAGSTER_HOME": str(home),
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "dagster", "dev", "--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_interruptible,
        )
    try:
        ui = DagsterUI(f"http://127.0.0.1:{port}")

        def listening() -> bool:
            assert process.poll() is None, f"dagster dev ended:\n{log.read_text(errors='replace')[-4000:]}"
            try:
                with urllib.request.urlopen(f"{ui.url}/server_info", timeout=10) as response:
                    return response.status == 200
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                return False

        until(listening, f"answer from dagster dev; its output is in {log}")
        ui.ask("mutation { setNuxSeen }")  # a form for one's address covers a new installation's UI otherwise
        yield ui
    finally:
        _end_group(process)


def _interruptible() -> None:
    """In the child: be interrupted by SIGINT, which some runners of tests ignore, and when the parent is killed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        import ctypes

        set_signal_at_parents_death = 1
        ctypes.CDLL(None).prctl(set_signal_at_parents_death, signal.SIGINT)


def _end_group(process: subprocess.Popen) -> None:
    """Interrupt, then kill, everything `process` has started."""
    for number, patience in ((signal.SIGINT, 20), (signal.SIGKILL, 20)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue
        # The leader is gone; what it started may still be there, and gets the next signal.


class Page:
    """What a person sees of a UI in a browser window, and does with it."""

    def __init__(self, driver: webdriver.Chrome, ui: DagsterUI) -> None:
        self.driver = driver
        self.ui = ui

    def open(self, path: str, **query: str) -> None:
        """Go to a page of the UI by its path."""
        self.driver.get(f"{self.ui.url}{path}" + (f"?{urlencode(query)}" if query else ""))

    def open_lineage(self) -> None:
        """The lineage graph with every group unfolded."""
        groups = sorted({f"global@global:{group}" for group in self.ui.groups().values()})
        self.open("/asset-groups", expanded=",".join(groups))

    def open_job(self, job: str) -> None:
        """The page of a job."""
        self.open(f"/locations/{self.ui.location()}/jobs/{job}")

    def open_asset(self, asset: str, view: str, partition: str) -> None:
        """A tab of an asset, `partitions` or `checks`, at a partition."""
        self.open(f"/assets/{asset}", view=view, partition=partition)

    @property
    def text(self) -> str:
        """All visible text."""
        return self.driver.find_element(By.TAG_NAME, "body").text

    def shows(self, *texts: str) -> None:
        """Wait until each of the texts can be read on the page."""
        for text in texts:
            until(lambda text=text: text in self.text, f"{text!r} on {self.driver.current_url}")

    def find(self, text: str, *, after: str | None = None) -> WebElement | None:
        """The first visible element with exactly this text; only behind one with the text `after`, if given."""
        start = f"//*[normalize-space(text())='{after}']/following::*" if after else "//*"
        for element in self.driver.find_elements(By.XPATH, f"{start}[normalize-space(text())='{text}']"):
            if element.is_displayed():
                return element
        return None

    def click(self, text: str, *, after: str | None = None) -> None:
        """Wait for an element by its text and click it."""

        def clicked() -> bool:
            element = self.find(text, after=after)
            if element is None or not element.is_enabled():
                return False
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
            element.click()
            return True

        until(clicked, f"{text!r} to click on {self.driver.current_url}")

    def materialize_all(self) -> None:
        """Open the dialog that launches runs of the job on the page, past Dagster's question about upstream data."""
        first, dialog = "Confirm", "Select a partition or create one"
        self.click("Materialize all…")
        until(lambda: self.find(first) or self.find(dialog), f"dialog on {self.driver.current_url}")
        if self.find(first):
            self.click(first)

    def choose(self, dimension: str, key: str) -> None:
        """In the dialog that launches runs, choose a partition of one dimension."""

        def chosen() -> bool:
            # A dialog that is still being drawn may close the list again.
            opened = "Select all" in self.text
            element = self.find(key if opened else "Select a partition or create one", after=dimension)
            if element is not None:
                element.click()
            return opened and element is not None

        until(chosen, f"{key!r} among the partitions of {dimension}", pause=1.0)
        self.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        until(lambda: "Select all" not in self.text, "end of the list of partitions")

    def launch(self) -> dict[str, Any]:
        """Press the dialog's button for a single run; that run, when it has ended."""
        before = self.ui.runs()
        self.click("Launch 1 run")
        return self.ui.next_run(before)

    def picture(self, name: str) -> tuple[int, int]:
        """Unfold the picture `name` among the metadata; the width and height it is drawn with, in pixels."""
        self.click("[Show Markdown]", after=name)
        script = """return [...document.images].filter(image => image.src.startsWith('data:image/png') && image.complete
            && image.naturalWidth > 0).map(image => [image.width, image.height])"""
        [size] = until(lambda: self.driver.execute_script(script), f"picture {name}")
        return tuple(size)

    def console_errors(self) -> list[str]:
        """What the browser's console has complained about since the last call, warnings left out."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def browser_page(ui: DagsterUI, *, width: int = 1400, height: int = 900) -> Iterator[Page]:
    """A window of `width` x `height` pixels of a headless Chromium."""
    options = Options()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--hide-scrollbars",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    try:
        driver.set_page_load_timeout(PATIENCE)
        driver.set_script_timeout(PATIENCE)
        set_window(driver, width, height)
        yield Page(driver, ui)
    finally:
        driver.quit()


def set_window(driver: webdriver.Chrome, width: int, height: int, *, scale: float = 1.0) -> None:
    """Give the page `width` x `height` pixels of layout; a screenshot has `scale` times as many."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
