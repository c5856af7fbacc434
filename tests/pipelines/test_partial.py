"""A pretrained model that answers most variations with text: what can be judged is judged, the rest is explained.

The model is a tiny real one without a chat template. After the things of `NUMBERS` it goes on with a few digits, after
all others with letters. `make paper` is run once over two scenarios, one of which has a single variation that cannot be
judged; variants of it have a run of their own.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from assets.partitions import read_catalogue
from excise.evaluation.metrics import standardized_mean_difference
from pipelines import paper
from resources.warehouse import Warehouse
from tests.conftest import DIGITS, SMALL_SCENARIO, blank, save_tiny_model

NUMBERS, TEXTS = ("lamp", "map", "jeep"), ("bench", "clock", "stove", "violin")
LETTERS = "bcdghklmnrstvwxyz"
STRATEGIES = {
    "set_difference": {
        "enabled": False,
        "score": "wanda",
        "selection": "set_difference",
        "parameters": {"tau_min": 0.4, "tau_maj": 0.35},
        "roles": ["q"],
    },
    "attention_heads": {
        "enabled": False,
        "score": "attention",
        "selection": "set_difference",
        "ablation": "zero_query",
        "parameters": {"k_min": 8, "k_maj": 4},
    },
    "gap_gradient": {
        "score": "gap_gradient",
        "selection": "measured_path",
        "parameters": {"density": 0.003, "significance": 1},
        "roles": ["v", "o", "down"],
        "levels": ["prompt_specific", "within_context", "cross_context", "all_contexts"],
    },
    "weights": {
        "score": "wanda",
        "selection": "set_difference",
        "parameters": {"tau_min": 0.4, "tau_maj": 0.3},
        "roles": ["q", "down"],
    },
}
SETTINGS = [
    "samples=6",
    "subjects_per_group=4",
    "held_out=false",
    "per_source=true",
    "random_draws=1",
    "relabellings=0",
    "resamples=30",
    "permutations=30",
    "variations=",
]


def save_writer(folder: Path) -> Path:
    """A tiny Llama whose next token follows from its last one: digits or the end after a digit and after the `p` that
    ends a thing of `NUMBERS`, else letters, none of which is a `p`."""
    import torch
    import transformers

    save_tiny_model(folder, "llama", chat_template=None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (p,) = {tokenizer(f"a {thing}")["input_ids"][-1] for thing in NUMBERS}
    assert p not in {tokenizer(f"a {thing}")["input_ids"][-1] for thing in TEXTS}
    digits, letters = (tokenizer.convert_tokens_to_ids(list(each)) for each in (DIGITS, LETTERS))
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    with torch.no_grad():
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        for layer in model.model.layers:
            for written in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                written.mul_(0.3)
                written[:2] = 0.0
        head.mul_(0.3)
        table[:, 0] = 5.0  # coordinate 0 is the same for all tokens, coordinate 1 says what comes next
        table[:, 1] = -5.0
        table[[*digits, p], 1] = 5.0
        head[:, 0], head[:, 1] = -3.0, 0.0
        head[[*digits, *letters, end], 0] = 0.5
        head[[*digits, end], 1], head[letters, 1] = 1.5, -1.5
        head[end, 1] = 1.9
    model.save_pretrained(folder)
    return folder


def scenario(things: tuple[str, ...]) -> dict:
    return SMALL_SCENARIO | {
        "replaces": True,
        "title": "Purchase",
        "templates": {"seller": "{name} sells a used {item}. In dollars I would pay for this {item}"},
        "variations": {thing: {"item": thing} for thing in things},
    }


@dataclass
class Street:
    """A folder of a user's files and what the commands printed."""

    folder: Path
    code: int = -1
    out: str = ""
    errors: str = ""

    @property
    def warehouse(self) -> Warehouse:
        return Warehouse(folder=str(self.folder / "data"))

    def write(self, key: str, content: dict) -> None:
        (self.folder / "scenarios" / f"{key}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def paper(self, *arguments: str) -> None:
        options = [part for each in SETTINGS if not each.endswith("=") for part in ("--set", each)]
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            self.code = paper.main(["--model", "writer", "--preset", "paper", *options, *arguments])
        self.out, self.errors = out.getvalue(), errors.getvalue()

    def checks(self, scenario: str, name: str) -> dict[str, dict]:
        rows = self.warehouse.read("checks", scenario=scenario, check_name=name).iter_rows(named=True)
        return {row["asset"]: row for row in rows}


@pytest.fixture(scope="module")
def open_street(tmp_path_factory) -> Iterator:
    """`open_street("name") -> Street`: each with a folder of its own, of the same model."""
    model = save_writer(tmp_path_factory.mktemp("writer"))
    with pytest.MonkeyPatch.context() as patch:

        def made(**scenarios: dict) -> Street:
            folder = tmp_path_factory.mktemp("street")
            for name in ("scenarios", "home"):
                (folder / name).mkdir()
            (folder / "home" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
            (folder / "models.yaml").write_text(
                yaml.safe_dump({"writer": {"folder": str(model), "prompt_format": "raw"}})
            )
            (folder / "strategies.yaml").write_text(yaml.safe_dump(STRATEGIES))
            patch.setenv("DAGSTER_HOME", str(folder / "home"))
            patch.setenv("EXCISE_DATA", str(folder / "data"))
            patch.setattr("tempfile.tempdir", str(folder))
            patch.setattr("excise.reporting.figures.save", blank)
            patch.setattr(paper, "SCENARIO_FOLDERS", [folder / "scenarios"])
            patch.setattr(paper, "MODEL_FILES", [folder / "models.yaml"])
            patch.setattr(paper, "STRATEGY_FILES", [folder / "strategies.yaml"])
            street = Street(folder)
            for key, content in scenarios.items():
                street.write(key, content)
            return street

        yield made


@pytest.fixture(scope="module")
def street(open_street) -> Street:
    made = open_street(purchase=scenario(NUMBERS[:2] + TEXTS[:3]), hobby=scenario(TEXTS[3:]) | {"replaces": False})
    made.paper("--scenarios", "purchase,hobby")
    return made


@pytest.mark.trial(26)
def test_what_can_be_judged_is_judged_and_the_rest_is_explained_in_two_lines(street):
    assert "failed" not in street.errors, street.errors
    lines = street.out.splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith("writer|purchase"))
    assert lines[first].startswith(
        "writer|purchase: 3 of 5 variations cannot be judged, the other 2 are judged; share of answers that hold "
        'a number: bench (0 %), clock (0 %), stove (0 %); bench answered "'
    )
    assert lines[first + 1].startswith('What helps: an answer_prefix in the templates of the scenario, such as "$"')
    assert "a chat model; more samples" in lines[first + 1]
    assert lines[first - 1] == lines[first + 2] == ""
    metrics = street.warehouse.read("metrics", scenario="purchase")
    rows = metrics.filter(pl.col("metric") == "gap_mean", pl.col("variation") != "(all)")
    assert set(rows.filter(pl.col("estimate").is_not_null())["variation"]) == {"lamp", "map"}


def test_the_check_names_each_with_parse_rate_answers_and_a_mend(street):
    check = street.checks("purchase", "judged_variations")["completions"]
    assert (check["passed"], check["severity"], check["figure"], check["floor"]) == (False, "WARN", 2.0, 5.0)
    for thing in TEXTS[:3]:
        assert f'{thing} (0 % of the answers hold a number: "' in check["message"]
    assert check["message"].count('"') >= 3 * 6
    assert "answer_prefix" in check["message"]
    nothing = street.checks("hobby", "judged_variations")["completions"]
    assert (nothing["passed"], nothing["severity"], nothing["figure"]) == (False, "ERROR", 0.0)
    assert street.checks("hobby", "judged_variations")["evaluation_metrics"]["severity"] == "ERROR"


def test_metrics_of_judged_variations_are_those_of_their_answers_alone(street):
    completions = street.warehouse.read("completions", scenario="purchase")
    metrics = street.warehouse.read("metrics", scenario="purchase", strategy="unpruned", metric="smd")
    smd = dict(metrics.select("variation", "estimate").rows())
    for thing in NUMBERS[:2]:
        values = [
            completions.filter(variation=thing, group=group)["value"].fill_null(np.nan).to_numpy()
            for group in ("white", "black")
        ]
        assert smd[thing] == pytest.approx(standardized_mean_difference(*values, winsorize=(0.05, 0.95)))
    assert smd["(all)"] == pytest.approx(np.mean([smd[thing] for thing in NUMBERS[:2]]))
    assert [smd[thing] for thing in TEXTS[:3]] == [None] * 3


def test_every_row_over_all_variations_says_of_how_many_it_is(street):
    metrics = street.warehouse.read("metrics", scenario="purchase", variation="(all)")
    places = metrics.select("strategy", "level", "matched_to").unique()
    counts = metrics.filter(pl.col("metric") == "judged_variations")
    assert counts.select("strategy", "level", "matched_to").unique().height == places.height > 5
    assert set(counts["n"]) == {5}
    assert counts.filter(strategy="unpruned")["estimate"].item() == 2.0


def test_scores_that_need_no_numbers_are_made_of_every_variation(street):
    files = street.warehouse.read("attribution_files", scenario="purchase")
    by_score = {score: set(files.filter(score=score)["variation"]) for score in ("wanda", "gap_gradient")}
    assert by_score == {"wanda": {*NUMBERS[:2], *TEXTS[:3]}, "gap_gradient": set(NUMBERS[:2])}


def test_variations_that_cannot_be_judged_are_not_asked_under_masks(street):
    assert set(street.warehouse.read("pruned_completions", scenario="purchase")["variation"]) == set(NUMBERS[:2])
    assert street.warehouse.read("pruned_completions", scenario="hobby").is_empty()


def test_a_scenario_that_cannot_be_judged_tells_its_parse_rate_and_nothing_else(street):
    rows = street.warehouse.read("metrics", scenario="hobby")
    assert set(rows["variation"]) == {"violin"}
    assert set(rows["strategy"]) == {"unpruned"}
    told = rows.filter(pl.col("estimate").is_not_null())
    assert dict(told.select("metric", "estimate").rows()) == {"parse_rate": 0.0, "density": 0.0}
    assert "writer|hobby: 1 of 1 variations cannot be judged, nothing is judged" in street.out


def test_masks_of_values_lack_the_scenario_that_cannot_be_judged_and_say_so(street):
    masks = street.warehouse.read("masks", scenario="purchase", asset="cross_context_masks", matched_to=None)
    assert set(masks["strategy"]) == {"weights"}  # its scores need no numbers
    message = street.checks("purchase", "mask_density")["cross_context_masks"]["message"]
    assert "hobby: no variation can be judged, so there is no mask (gap_gradient)" in message
    assert "gap_gradient has no mask across contexts" in message
    assert set(street.warehouse.read("transfer_matrix")["scenario"]) == {"purchase"}


def test_where_all_can_be_judged_nothing_is_explained(street):
    from excise.evaluation.judged import explained

    catalogue = read_catalogue([street.folder / "scenarios"], [], [])
    purchase = catalogue.scenarios["purchase"]
    rows = street.warehouse.read("completions", scenario="purchase")
    assert explained(rows.filter(pl.col("variation").is_in(NUMBERS)), purchase) == []
    assert len(explained(rows, purchase)) == 2


def test_answers_enumerated_exactly_are_judged_by_their_probability(open_street):
    street = open_street(purchase=scenario(NUMBERS[:2] + TEXTS[:1]))
    street.paper("--scenarios", "purchase", "--set", "answers=exact", "--set", "max_nodes=60")
    assert "evaluate writer|purchase: done" in street.errors, street.errors
    assert street.checks("purchase", "judged_variations")["completions"]["figure"] == 2.0


def test_a_scenario_alone_goes_through_whether_its_only_variation_can_be_judged_or_not(open_street):
    """Figures made of the earlier variation do not stay beside the new ones."""
    street = open_street(purchase=scenario(NUMBERS[:1]))
    for things, judged in ((NUMBERS[:1], {"lamp"}), (TEXTS[:1], set())):
        street.write("purchase", scenario(things))
        street.paper("--scenarios", "purchase")
        assert "evaluate writer|purchase: done" in street.errors, street.errors
        assert "analyse writer: done" in street.errors, street.errors
        metrics = street.warehouse.read("metrics", scenario="purchase")
        known = metrics.filter(pl.col("metric") == "gap_mean", pl.col("estimate").is_not_null())
        assert set(known["variation"]) - {"(all)"} == judged
        assert set(street.warehouse.read("pruned_completions", scenario="purchase")["variation"]) == judged
        assert ("cannot be judged" in street.out) == (not judged)


def test_analyses_of_a_model_of_which_nothing_can_be_judged_are_empty_and_say_so(open_street):
    street = open_street(purchase=scenario(TEXTS[:1]))
    street.paper("--scenarios", "purchase", "--set", "strategies=gap_gradient")
    assert "analyse writer: done" in street.errors, street.errors
    assert street.code == 1  # nothing of what was asked for could be computed
    for table in ("mask_overlap", "mask_distribution", "transfer_matrix"):
        assert street.warehouse.read(table).is_empty()
