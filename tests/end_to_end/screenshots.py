"""The pictures of the UI in the README, taken from this folder's own results: `python -m tests.end_to_end.screenshots`.

Run it after `make demo`, with nobody at the UI. It looks only: the rerun's dialog is opened and left.
"""

import argparse
import io
import os
import tempfile
from pathlib import Path

from PIL import Image

from tests.end_to_end.dagster_ui import ROOT, Page, browser_page, dagster_dev, set_window, until

IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT = 1400, 900
STILL = 1.5  # seconds without a change after which a page counts as drawn
LARGEST = 300_000


def main() -> None:
    """Take all four."""
    parser = argparse.ArgumentParser(prog="python -m tests.end_to_end.screenshots", description=__doc__.splitlines()[0])
    parser.add_argument("--partition", default="planted-specific|purchase")
    parser.add_argument("--folder", type=Path, default=IMAGES, help="where the pictures go")
    chosen = parser.parse_args()
    home = Path(os.environ.get("DAGSTER_HOME", ROOT))
    with (
        tempfile.TemporaryDirectory() as logs,
        dagster_dev(home, log=Path(logs) / "dagster.log") as ui,
        browser_page(ui, width=WIDTH, height=HEIGHT) as page,
    ):
        lineage(page, chosen.folder / "lineage.png")
        partition(page, chosen.partition, chosen.folder / "partition.png")
        checks(page, chosen.partition, chosen.folder / "checks.png")
        rerun(page, chosen.partition, chosen.folder / "rerun.png")


def lineage(page: Page, path: Path) -> None:
    """The graph, drawn in a larger window: only there do the assets show more than their names."""
    page.open("/asset-groups")
    page.click("Hide navigation")
    set_window(page.driver, 3000, 2400, scale=0.5)  # less high, and the graph loses its first and last assets
    page.open_lineage()
    page.shows(*(name[:10] for name in page.ui.groups()), "% filled")  # the graph shortens long names
    save(page, path)
    set_window(page.driver, WIDTH, HEIGHT)


def partition(page: Page, key: str, path: Path) -> None:
    """A partition's page with its picture unfolded."""
    set_window(page.driver, WIDTH, 1000)
    page.open_asset("evaluation_metrics", "partitions", key)
    page.shows(key, "Materialized", "finding")
    page.picture("disparity_by_level")
    save(page, path)
    set_window(page.driver, WIDTH, HEIGHT)


def checks(page: Page, key: str, path: Path) -> None:
    """The checks of the same partition."""
    page.open_asset("evaluation_metrics", "checks", key)
    page.shows("inlier_ratio", "metrics_finite", key, "Evaluation result")
    save(page, path)


def rerun(page: Page, key: str, path: Path) -> None:
    """The dialog that materializes one partition again."""
    page.open_asset("completions", "partitions", key)
    page.shows(key, "completions_drawn")
    page.click("Materialize…")
    page.shows("Launch 1 run")
    save(page, path)


def save(page: Page, path: Path) -> None:
    """Wait until the page stands still, and save it with at most 256 colours."""
    last = [b""]

    def still() -> bytes | None:
        now = page.driver.get_screenshot_as_png()
        before, last[0] = last[0], now
        return now if now == before else None

    shot = until(still, "page that stands still", pause=STILL)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)
    size = path.stat().st_size
    assert size < LARGEST, f"{path} has {size:,} bytes"
    print(f"{path}: {size:,} bytes")


if __name__ == "__main__":
    main()
