"""The Dagster UI as a newcomer uses it: a real browser, a real `dagster dev`, a tiny model and a small scenario.

The tests share one installation and one audit, launched by clicking; the rerun comes last. Each of the user's files has
one broken entry, so all of this is what a user sees with a mistake in every file.
"""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from resources.warehouse import Warehouse
from tests.conftest import BROKEN_FILES, FAULTS_OF_BROKEN_FILES, SMALL_SCENARIO
from tests.end_to_end.dagster_ui import (
    CHROMEDRIVER,
    CHROMIUM,
    NO_BROWSER,
    ROOT,
    browser_page,
    dagster_dev,
    set_window,
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason=NO_BROWSER),
]

PARTITION = "tiny|lamp"
ASSETS = (
    "prompts",
    "completions",
    "attribution_scores",
    "pruning_masks",
    "cross_conte",  # the graph shortens long names: cross_conte…_masks
    "pruned_completions",
    "side_effects",
    "stability",
    "evaluation_metrics",
    "restoration",
    "grid_search",
    "mask_overlap",
    "mask_distribution",
    "transfer_matrix",
    "quality_report",
)
CODE_LOCATION = """
from pathlib import Path

from pipelines.definitions import build_definitions
from resources.gpu import GPUResource
from resources.settings import AuditSettings

HERE = Path(__file__).parent
defs = build_definitions(
    data_folder=HERE / "data",
    scenario_folders=[HERE / "scenarios"],
    model_files=[HERE / "models.yaml"],
    strategy_files=[HERE / "strategies.yaml"],
    scorer_files=[HERE / "scorers.yaml"],
    resource_overrides={
        "gpu": GPUResource(folder=str(HERE / "data"), device="cpu", lock_folder=str(HERE)),
        "settings": AuditSettings(samples=4, random_draws=1, resamples=40, permutations=40),
    },
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model) -> Path:
    """A user's folder: a model and a scenario of their own, a broken entry in each file, an empty history."""
    folder = tmp_path_factory.mktemp("ui")
    (folder / "history").mkdir()
    shutil.copy(ROOT / "dagster.yaml", folder / "history")
    (folder / "scenarios").mkdir()
    (folder / "scenarios" / "lamp.yaml").write_text(yaml.safe_dump(SMALL_SCENARIO, sort_keys=False), encoding="utf-8")
    models = yaml.safe_dump({"tiny": {"folder": str(tiny_model("llama", numeric=True))}})
    for name, text in BROKEN_FILES.items():
        (folder / name).write_text(text + (models if name == "models.yaml" else ""), encoding="utf-8")
    (folder / "tiny_audit.py").write_text(CODE_LOCATION, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def page(folder):
    """A browser window in front of the UI."""
    location = ["-f", str(folder / "tiny_audit.py")]
    with (
        dagster_dev(folder / "history", location, folder=folder, log=folder / "dagster.log") as ui,
        browser_page(ui) as page,
    ):
        yield page


@pytest.fixture(scope="module")
def audit(page):
    """The run of `audit_scenario` for one partition, launched from the job's page."""
    page.open_job("audit_scenario")
    page.materialize_all()
    page.choose("model", "tiny")
    page.choose("scenario", "lamp")
    return page.launch()


def metadata(page, name: str) -> str:
    """The value shown beside a name in the metadata of a partition's page."""
    page.shows(name)
    lines = page.text.splitlines()
    return lines[lines.index(name) + 1]


def test_the_lineage_graph_shows_every_stage(page):
    set_window(page.driver, 1400, 2000)  # what lies outside of the window is not drawn
    page.open_lineage()
    page.shows(*ASSETS)
    set_window(page.driver, 1400, 900)
    assert page.console_errors() == []


def test_audit_scenario_runs_for_the_partition_chosen_in_the_dialog(page, audit):
    assert audit["jobName"] == "audit_scenario"
    assert audit["tags"]["dagster/partition"] == PARTITION
    assert audit["status"] == "SUCCESS"
    page.open(f"/runs/{audit['runId']}")
    page.shows("Success", "audit_scenario", PARTITION)


@pytest.mark.parametrize(
    ("asset", "picture", "known"),
    [
        ("completions", "answers_by_group", "parse_rate"),
        ("pruning_masks", "mask_density_by_layer", "dagster/row_count"),
        ("evaluation_metrics", "disparity_by_level", "finding"),
    ],
)
def test_a_partition_shows_its_metadata_and_its_picture(page, audit, asset, picture, known):
    page.open_asset(asset, "partitions", PARTITION)
    page.shows(PARTITION, "Materialized", "dagster/table_name", "dagster/column_schema", known)
    width, height = page.picture(picture)
    assert width >= 400
    assert height >= 200
    assert page.console_errors() == []


def test_the_checks_of_a_partition_show_their_status_figure_and_bound(page, audit, folder):
    page.open_asset("evaluation_metrics", "checks", PARTITION)
    page.shows("metrics_finite", "inlier_ratio", PARTITION, "Evaluation result", "bound", "figure", "worst")
    shown = dict(re.findall(r"^(\w+)\n(Succeeded|Failed)$", page.text, re.MULTILINE))
    stored = Warehouse(folder=str(folder / "data")).read("checks", model="tiny", scenario="lamp")
    own = [row for row in stored.to_dicts() if row["asset"] == "evaluation_metrics"]
    assert shown == {row["check_name"]: "Succeeded" if row["passed"] else "Failed" for row in own}
    [inlier] = [row for row in own if row["check_name"] == "inlier_ratio"]
    page.shows(inlier["message"])


@pytest.mark.trial(14)
def test_the_broken_entry_of_every_file_is_named_where_a_user_looks(page, audit):
    page.open_asset("completions", "partitions", PARTITION)
    page.shows("files_with_mistakes", *FAULTS_OF_BROKEN_FILES)
    page.open_asset("quality_report", "checks", PARTITION)
    page.shows("all_checks_pass", *FAULTS_OF_BROKEN_FILES)


@pytest.mark.trial(14)
def test_a_run_that_asks_for_the_broken_entry_fails_and_names_it(page, audit):
    page.open_job("audit_scenario")
    page.materialize_all()
    page.choose("model", "bad")
    page.choose("scenario", "lamp")
    run = page.launch()
    assert run["status"] == "FAILURE"
    page.open(f"/runs/{run['runId']}")
    page.shows("Failure", FAULTS_OF_BROKEN_FILES[0])


def test_a_partition_materialized_again_from_its_page_draws_nothing(page, audit):
    page.open_asset("completions", "partitions", PARTITION)
    drawn = metadata(page, "completions_drawn")
    assert int(drawn) > 0
    assert metadata(page, "completions_reused") == "0"
    page.click("Materialize…")
    page.shows("Launch runs to materialize completions", "1 partition")
    rerun = page.launch()
    assert rerun["status"] == "SUCCESS"
    assert rerun["tags"]["dagster/partition"] == PARTITION
    page.open_asset("completions", "partitions", PARTITION)
    page.shows(rerun["runId"][:8])
    assert metadata(page, "completions_drawn") == "0"
    assert metadata(page, "completions_reused") == drawn
    page.shows("View all historical events (2)")
