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
from urllib.parse import quote

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
NO_BROWSER = "no Chromium with chromedriver on this machine (Debian: apt-get install chromium chromium-driver)"
PATIENCE = 180.0  # seconds; a loaded machine takes many times what a quiet one does

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, *, patience: float = PATIENCE, pause: float = 0.25) -> T:
    """The first true value of `condition`. Raises AssertionError naming `what` when there is none in time."""
    end = time.monotonic() + patience
    while True:
        try:
            if found := condition():
                return found
        except StaleElementReferenceException:
            pass  # React replaced the element between finding and reading it
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
        """All runs, latest first: runId, status, jobName, tags."""
        data = self.ask(
            "{ runsOrError { ... on Runs { results { runId status jobName assetSelection { path } tags { key value } } } } }"
        )
        return data["runsOrError"]["results"]

    def finished_run(self, run_id: str) -> str:
        """Wait until a run has ended; its status."""

        def ended() -> str | None:
            [status] = [run["status"] for run in self.runs() if run["runId"] == run_id]
            return status if status in {"SUCCESS", "FAILURE", "CANCELED"} else None

        return until(ended, f"end of run {run_id}")


def free_port() -> int:
    """A port of this machine nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def dagster_dev(home: Path, arguments: Sequence[str] = (), *, folder: Path = ROOT, log: Path) -> Iterator[DagsterUI]:
    """`dagster dev` with its history in `home`, run in `folder`; webserver, daemon and code server end with the block."""
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
            # Started with SIGINT ignored, as by some runners of tests, Dagster would ignore it and SIGTERM both.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
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

        until(listening, f"answer from dagster dev:\n{log.read_text(errors='replace')[-4000:]}")
        ui.ask("mutation { setNuxSeen }")  # a form for one's address covers a new installation's UI otherwise
        yield ui
    finally:
        _end_group(process)


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


@contextmanager
def chromium(*, width: int = 1400, height: int = 900) -> Iterator[webdriver.Chrome]:
    """A headless Chromium whose page is `width` x `height` pixels."""
    options = Options()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--hide-scrollbars",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    try:
        driver.set_page_load_timeout(PATIENCE)
        driver.set_script_timeout(PATIENCE)
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        yield driver
    finally:
        driver.quit()
