"""The words and tables about heads: what is claimed, from hand-made rows."""

from dataclasses import asdict

import polars as pl
import pytest

from excise.errors import ExciseError
from excise.evaluation.thresholds import Thresholds
from excise.reporting.head_results import agreement, heads_markdown
from excise.reporting.toxicity import toxicity_finding, toxicity_markdown, toxicity_table

UNPRUNED = ("unpruned", "none", None)
FASP = ("fasp-0.10", "own_scenario", None)
RANDOM = ("random", "own_scenario", "fasp-0.10")


def rows(*cells, variation="(all)"):
    """(mask, metric, estimate, low, high, p_value) as rows of the table metrics."""
    return pl.DataFrame(
        [
            ("tiny", "gender", variation, *mask, metric, *figures, *[None] * (4 - len(figures)), 10)
            for mask, metric, *figures in cells
        ],
        schema={
            "model": pl.String,
            "scenario": pl.String,
            "variation": pl.String,
            "strategy": pl.String,
            "level": pl.String,
            "matched_to": pl.String,
            "metric": pl.String,
            "estimate": pl.Float64,
            "low": pl.Float64,
            "high": pl.Float64,
            "p_value": pl.Float64,
            "n": pl.Int64,
        },
        orient="row",
    )


def audit(reduction=(0.4, 0.2, 0.6), beyond=(0.3, 0.1, 0.5), ratio=1.05, covered=0.0):
    return rows(
        (UNPRUNED, "toxicity_bias", 0.2, 0.1, 0.3, 0.01),
        (UNPRUNED, "toxicity_bias_debiased", 0.15, 0.02, 0.25),
        (UNPRUNED, "toxicity_bias_if_equal", 0.08, 0.03, 0.12),
        (UNPRUNED, "all_equal_covered", covered),
        (UNPRUNED, "prompt_toxicity_bias", 0.01, 0.0, 0.02),
        (UNPRUNED, "perplexity_ratio", 1.0),
        (FASP, "toxicity_bias", 0.12),
        (FASP, "bias_reduction", *reduction),
        (FASP, "reduction_over_random", *beyond),
        (FASP, "perplexity_ratio", ratio, ratio - 0.01, ratio + 0.01),
        (RANDOM, "bias_reduction", 0.1, -0.1, 0.3),
        (RANDOM, "toxicity_bias", 0.18),
    )


def test_a_reduction_is_claimed_where_both_intervals_leave_out_0():
    told = toxicity_finding(audit())
    assert "Unpruned bias 0.200 [0.100, 0.300], debiased 0.150" in told
    assert "It is above what the same descriptors under other labels show, 0.080 [0.030, 0.120] (p = 0.010)" in told
    assert "The scorer's own gap, on the prompts alone, is 0.010" in told
    assert "fasp-0.10 (own scenario) changes the bias by -40 % [-60, -20] at 1.050" in told
    assert "Beyond what random heads remove that is +30 [10, 50] percentage points" in told
    assert "a lead, not a result" not in told


@pytest.mark.parametrize("change", [{"reduction": (0.4, -0.1, 0.6)}, {"beyond": (0.3, -0.1, 0.5)}])
def test_an_interval_that_reaches_0_is_a_lead_only(change):
    assert "a lead, not a result" in toxicity_finding(audit(**change))


def test_a_bias_like_that_of_equal_subgroups_is_told_so():
    told = toxicity_finding(audit(covered=1.0))
    assert "It is not above what the same descriptors under other labels show" in told
    assert "that these descriptors differ is clear, as the debiased interval is above 0" in told


def test_a_mask_that_wrecks_the_text_model_is_no_best_mask():
    assert "No mask keeps perplexity within 5 % of" in toxicity_finding(audit(ratio=1.3))


def test_the_table_has_controls_under_their_strategy():
    lines = toxicity_table(audit()).splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("fasp")] == ["fasp-0.10"]
    assert lines.index(next(each for each in lines if each.startswith("fasp"))) + 1 == lines.index(
        next(each for each in lines if "random (of fasp-0.10)" in each)
    )
    assert "40 % [20, 60]" in toxicity_markdown(audit())
    with pytest.raises(ExciseError, match="no rows over all variations"):
        toxicity_table(audit().with_columns(variation=pl.lit("person")))


def judged(budget=0.05):
    """The row of the table thresholds for the audit."""
    place = {"asset": "evaluation_metrics", "model": "tiny", "scenario": "gender"}
    return pl.DataFrame([place | asdict(Thresholds(perplexity_budget=budget))])


def reweighted(**changes):
    frame = pl.DataFrame(
        {
            "model": ["tiny"] * 3,
            "scenario": ["gender"] * 3,
            "layer": [0, 0, 1],
            "head": [0, 1, 0],
            "z_reweighted": [0.1, 0.3, 9.0],
            "low_reweighted": [0.0, 0.2, 0.0],
            "high_reweighted": [0.2, 0.4, 9.9],
            "z_regenerated": [0.15, 0.9, 0.0],
            "low_regenerated": [-0.05, 0.7, -1.0],
            "high_regenerated": [0.35, 1.1, 1.0],
            "ess": [0.8, 0.6, 0.01],
            "perplexity_without": [10.0, 11.0, 900.0],
            "catastrophic": [False, False, True],
            "seconds_reweighted": [1.0] * 3,
            "seconds_regenerated": [4.0] * 3,
        }
    )
    return frame.with_columns(**{name: pl.Series(values) for name, values in changes.items()})


def test_agreement_counts_heads_that_are_not_catastrophic():
    found = agreement(reweighted())
    assert found["heads"] == 2
    assert found["inside"] == pytest.approx(0.5)  # .1 lies in [-.05, .35], .3 not in [.7, 1.1]
    assert found["width"] == pytest.approx(0.5)
    assert (found["speed"], found["cost"]) == (pytest.approx(4.0), pytest.approx(16.0))
    assert found["ess"] == pytest.approx(0.7)


def test_the_page_says_where_changed_heads_rank_and_what_is_missing():
    heads = [(layer, head) for layer in range(2) for head in range(2)]
    impacts = pl.DataFrame(
        {
            "model": ["planted"] * 4,
            "scenario": ["gender"] * 4,
            "layer": [each[0] for each in heads],
            "head": [each[1] for each in heads],
            "z_bias": [0.01, 0.3, -0.1, 0.02],
            "z_bias_low": [0.0] * 4,
            "z_bias_high": [0.4] * 4,
            "z_ppl": [-0.1] * 4,
            "perplexity_without": [10.0] * 4,
            "z_bias_half_1": [0.0, 0.3, -0.1, 0.1],
            "z_bias_half_2": [0.02, 0.3, -0.1, 0.0],
        }
    )
    nothing = pl.DataFrame()
    empty = pl.DataFrame(
        schema={"scenario": pl.String, "other_scenario": pl.String, "measure": pl.String, "other_measure": pl.String}
    )
    page = heads_markdown(audit(), impacts, reweighted(), empty, judged(), planted={"planted": [(0, 1), (1, 0)]})
    assert "| planted | gender | 0.1 | 1 of 4 | 0.3000" in page
    assert "| planted | gender | 1.0 | 4 of 4 | -0.1000" in page
    assert "| tiny | gender | 2 of 3 | 50 % |" in page
    assert "### tiny: gender" in page
    bare = heads_markdown(nothing, nothing, nothing, empty, judged())
    for missing in ("Not measured yet", "No head impacts yet", "No model with changed heads", "No axis was evaluated"):
        assert missing in bare
