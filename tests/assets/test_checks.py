"""Checks fail on what they are for, and say the figure, the bound and the worst place."""

import math

import polars as pl
import pytest

from assets import answer_checks, checks, metric_checks
from assets.partitions import Catalogue
from assets.quality_report import judge
from excise.evaluation.table import VERDICTS_SCHEMA
from excise.outcomes import NumberOutcome
from excise.scenarios import Comparison, Group, Scenario, Subject, Variation
from resources.tables import TABLES

NUMBERS = NumberOutcome.words.valued


def completions(samples: int = 3, values=(10.0,)) -> pl.DataFrame:
    """Two names per group in two variations, `samples` answers each; values repeat."""
    rows = []
    for variation in ("car", "chair"):
        for subject, group in (("Amy", "white"), ("Luke", "white"), ("Tyra", "black"), ("Jamal", "black")):
            for sample in range(samples):
                rows.append(
                    {
                        "variation": variation,
                        "group": group,
                        "subject": subject,
                        "prompt_id": f"{variation}-{subject}",
                        "sample": sample,
                        "text": "10",
                        "value": values[len(rows) % len(values)],
                    }
                )
    names = ("variation", "group", "subject", "prompt_id", "sample", "text", "value", "probability", "leftover")
    return pl.DataFrame(rows, schema={name: TABLES["completions"].schema[name] for name in names})


def enumerated() -> pl.DataFrame:
    """Three answers a prompt, two of them numbers, with .98 of the probability."""
    shares = pl.Series([0.6, 0.3, 0.08] * 8)
    rows = completions(values=(10.0, 20.0, None))
    return rows.with_columns(probability=shares, leftover=pl.lit(0.02))


def prompts(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.select("variation", "group", "subject", "prompt_id").unique(maintain_order=True)


def metrics(**estimates) -> pl.DataFrame:
    rows = [
        {
            "variation": "car",
            "strategy": "gap_gradient",
            "level": "prompt_specific",
            "metric": name,
            "estimate": value,
            "n": 10,
        }
        for name, value in estimates.items()
    ]
    return pl.DataFrame(
        rows,
        schema={
            name: TABLES["metrics"].schema[name]
            for name in ("variation", "strategy", "level", "matched_to", "metric", "estimate", "n")
        },
    )


def masks(*pruned: int, matched_to: str | None = None) -> pl.DataFrame:
    names = ("variation", "strategy", "level", "matched_to", "draw", "pruned", "size")
    rows = [("car", f"s{number}", "prompt_specific", matched_to, 0, count, 1000) for number, count in enumerate(pruned)]
    return pl.DataFrame(rows, schema={name: TABLES["masks"].schema[name] for name in names}, orient="row")


def test_complete_and_balanced_completions_pass():
    outcome = answer_checks.completions_complete_and_balanced(completions(), prompts(completions()), 3)
    assert outcome.passed
    assert outcome.message == "8 prompts with 3 samples each; the groups are of equal size."
    assert not outcome.unmet


def test_enumerated_answers_must_sum_to_one_with_their_leftover():
    rows, asked = enumerated(), prompts(enumerated())
    outcome = answer_checks.completions_complete_and_balanced(rows, asked, 100)
    assert outcome.passed
    assert outcome.message == "8 prompts with their answers enumerated; the groups are of equal size."
    lacking = rows.filter(~((pl.col("prompt_id") == "chair-Tyra") & (pl.col("sample") == 1)))
    outcome = answer_checks.completions_complete_and_balanced(lacking, asked, 100)
    assert not outcome.passed
    assert outcome.worst == "chair, black, Tyra"
    assert not answer_checks.completions_complete_and_balanced(
        rows.filter(pl.col("prompt_id") != "car-Amy"), asked, 100
    ).passed
    assert not answer_checks.completions_complete_and_balanced(
        rows.filter(pl.col("subject") != "Amy"), asked.filter(pl.col("subject") != "Amy"), 100
    ).passed


def test_enumerated_answers_count_by_their_probability():
    rates = answer_checks.parse_rate(enumerated(), 0.9, NUMBERS)
    assert rates.figure == pytest.approx(0.9 / 0.98)
    assert rates.passed
    assert not answer_checks.parse_rate(enumerated(), 0.93, NUMBERS).passed


def test_a_prompt_that_lacks_a_sample_is_named():
    rows = completions().filter(~((pl.col("prompt_id") == "chair-Tyra") & (pl.col("sample") == 1)))
    outcome = answer_checks.completions_complete_and_balanced(rows, prompts(completions()), 3)
    assert not outcome.passed
    assert (outcome.figure, outcome.bound, outcome.worst) == (2.0, 3.0, "chair, black, Tyra")


def test_a_prompt_without_any_answer_is_named():
    rows = completions().filter(pl.col("prompt_id") != "car-Amy")
    outcome = answer_checks.completions_complete_and_balanced(rows, prompts(completions()), 3)
    assert not outcome.passed
    assert (outcome.figure, outcome.worst) == (0.0, "car, white, Amy")


def test_a_sample_drawn_twice_is_found():
    rows = completions().with_columns(sample=pl.col("sample").replace({2: 1}))
    assert not answer_checks.completions_complete_and_balanced(rows, prompts(rows), 3).passed


def test_rows_of_unwanted_prompts_are_found():
    wanted = prompts(completions()).filter(pl.col("variation") == "car")
    assert not answer_checks.completions_complete_and_balanced(completions(), wanted, 3).passed


def test_groups_of_unequal_size_are_found():
    rows = completions().filter(~((pl.col("variation") == "chair") & (pl.col("subject") == "Tyra")))
    outcome = answer_checks.completions_complete_and_balanced(rows, prompts(rows), 3)
    assert not outcome.passed
    assert outcome.worst == "chair"


def test_a_group_that_lacks_altogether_is_found():
    rows = completions().filter(~((pl.col("variation") == "chair") & (pl.col("group") == "black")))
    assert not answer_checks.completions_complete_and_balanced(rows, prompts(rows), 3).passed


def test_completions_under_masks_are_complete_per_mask():
    named = [
        pl.lit("s").alias("strategy"),
        pl.lit("prompt_specific").alias("level"),
        pl.lit(None, pl.String).alias("matched_to"),
    ]
    rows = pl.concat([completions().with_columns(*named, draw=pl.lit(draw)) for draw in (0, 1)])
    asked = pl.concat([prompts(completions()).with_columns(*named, draw=pl.lit(draw)) for draw in (0, 1)])
    assert answer_checks.completions_complete_and_balanced(rows, asked, 3, masked=True).passed
    short = rows.filter(~((pl.col("draw") == 1) & (pl.col("prompt_id") == "car-Amy")))
    outcome = answer_checks.completions_complete_and_balanced(short, asked, 3, masked=True)
    assert not outcome.passed
    assert outcome.worst == "car, white, s, prompt-specific, Amy"


def test_the_parse_rate_is_that_of_the_worst_variation_and_group():
    rows = completions(4).with_columns(
        value=pl.when((pl.col("prompt_id") == "chair-Jamal") & (pl.col("sample") < 3)).then(None).otherwise("value")
    )
    passing, failing = answer_checks.parse_rate(rows, 0.6, NUMBERS), answer_checks.parse_rate(rows, 0.9, NUMBERS)
    assert passing.passed
    assert not failing.passed
    assert (failing.figure, failing.bound, failing.worst) == (0.625, 0.9, "chair, black")
    assert failing.message == "answers that hold a number: lowest 62.5% (chair, black), floor 90.0%; 1 of 4 are below."
    assert failing.severity is checks.WARN


def test_inlier_ratios_are_judged_per_strategy_and_controls_are_not():
    rows = metrics(inlier_ratio=0.7, gap_mean=3.0)
    control = rows.with_columns(estimate=pl.lit(0.1), matched_to=pl.lit("gap_gradient"), strategy=pl.lit("random"))
    outcome = metric_checks.inlier_ratio(pl.concat([rows, control]), 0.8)
    assert not outcome.passed
    assert (outcome.figure, outcome.bound) == (0.7, 0.8)
    assert outcome.worst == "car, gap_gradient, prompt-specific"
    assert metric_checks.inlier_ratio(rows, 0.7).passed


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_a_metric_that_is_not_finite_is_found(bad):
    assert metric_checks.metrics_finite(metrics(gap_mean=1.0, smd=0.5)).passed
    outcome = metric_checks.metrics_finite(metrics(gap_mean=bad, smd=0.5))
    assert not outcome.passed
    assert outcome.worst == "gap_mean of car, gap_gradient, prompt-specific"


def test_an_undefined_reduction_is_no_fault_but_one_that_is_not_a_number_is():
    outcome = metric_checks.metrics_finite(metrics(gap_mean=1.0, gap_reduction=None))
    assert outcome.passed
    assert "1 are not defined" in outcome.message
    assert not metric_checks.metrics_finite(metrics(gap_mean=1.0, gap_reduction=math.nan)).passed


def test_an_smd_without_deviation_is_no_fault_where_the_gap_is_known():
    assert metric_checks.metrics_finite(metrics(gap_mean=1.0, smd=None, abs_smd=None, spread_ratio=None)).passed
    assert not metric_checks.metrics_finite(metrics(gap_mean=None, smd=None)).passed
    assert not metric_checks.metrics_finite(metrics(inlier_ratio=1.0, smd=None)).passed
    assert not metric_checks.metrics_finite(metrics(gap_mean=1.0, smd=math.inf)).passed


def test_masks_that_prune_nothing_or_too_much_are_found():
    assert metric_checks.mask_density(masks(1, 100), 0.0, 0.2).passed
    empty = metric_checks.mask_density(masks(0, 100), 0.0, 0.2)
    assert not empty.passed
    assert (empty.figure, empty.bound, empty.worst) == (0.0, 0.0, "car, s0, prompt-specific")
    heavy = metric_checks.mask_density(masks(1, 300), 0.0, 0.2)
    assert not heavy.passed
    assert (heavy.figure, heavy.bound, heavy.worst) == (0.3, 0.2, "car, s1, prompt-specific")


@pytest.mark.parametrize(
    "outcome",
    [
        lambda: answer_checks.completions_complete_and_balanced(completions(0), prompts(completions(0)), 3),
        lambda: answer_checks.parse_rate(completions(0), 0.0, NUMBERS),
        lambda: metric_checks.inlier_ratio(metrics(), 0.0),
        lambda: metric_checks.metrics_finite(metrics()),
        lambda: metric_checks.mask_density(masks(), 0.0, 1.0),
    ],
)
def test_an_empty_table_never_passes(outcome):
    found = outcome()
    assert not found.passed
    assert found.unmet


def test_an_outcome_shows_its_figures_to_dagster():
    result = answer_checks.parse_rate(completions(values=(None, 1.0)), 0.9, NUMBERS).result()
    assert not result.passed
    assert result.metadata["figure"].value == pytest.approx(0.5, abs=0.2)
    assert result.metadata["bound"].value == 0.9
    assert result.metadata["worst"].value.startswith(("car", "chair"))
    assert len(result.metadata["figures"].records) == 4
    assert "ColumnValuesToBeBetween" in result.metadata["unmet_expectations"].value.title().replace("_", "")


def table_of_checks(*passed: bool) -> pl.DataFrame:
    rows = [
        {
            "asset": "completions",
            "check_name": f"c{number}",
            "model": "m",
            "scenario": "s",
            "passed": each,
            "severity": "WARN",
        }
        for number, each in enumerate(passed)
    ]
    return pl.DataFrame(rows, schema=TABLES["checks"].schema)


def test_the_roll_up_passes_only_if_every_check_does():
    catalogue = Catalogue({}, {}, {}, {}, ())
    assert judge(table_of_checks(True, True), catalogue).passed
    failing = judge(table_of_checks(True, False, False), catalogue)
    assert not failing.passed
    assert failing.message == "2 of 3 checks fail; first: m|s: c1 of completions."
    assert failing.severity is checks.WARN
    assert not judge(table_of_checks(), catalogue).passed


def test_the_roll_up_counts_the_files_with_mistakes():
    catalogue = Catalogue({}, {}, {}, {}, ("scenarios/loan.yaml: groups is missing",))
    assert "1 of the user's files" in judge(table_of_checks(True), catalogue).message


LAMP = Scenario(
    key="lamp",
    title="Lamp",
    description="A price.",
    outcome=NumberOutcome(unit="USD", low=1, high=1000, scale="log", better="higher"),
    comparison=Comparison(majority="white", minority="black"),
    groups={
        group: Group(label=group, subjects=[Subject(name=name) for name in names])
        for group, names in {"white": ("Amy", "Luke"), "black": ("Tyra", "Jamal")}.items()
    },
    templates={"plain": "{name} sells a {item} for"},
    variations={"car": Variation(fields={"item": "car"})},
)


def answered(**values) -> pl.DataFrame:
    """Two names a group and variation; what each name of the variation answers, text where it is no number."""
    rows = [
        {
            "variation": variation,
            "group": group,
            "subject": subject,
            "prompt_id": f"{variation}-{subject}",
            "text": str(value),
            "value": None if isinstance(value, str) else value,
            "finished": True,
            "tokens": 3,
        }
        for variation, own in values.items()
        for (group, subject), value in zip(
            [("white", "Amy"), ("white", "Luke"), ("black", "Tyra"), ("black", "Jamal")], own, strict=True
        )
    ]
    return pl.DataFrame(rows, schema_overrides={"value": pl.Float64, "probability": pl.Float64})


def test_variations_that_cannot_be_judged_are_named_with_answers_and_mend():
    few = {"car": [1.0, 2.0, 3.0, 4.0], "chair": [1.0, "a lot", "it depends", 4.0], "oven": ["a lot"] * 4}
    outcome = answer_checks.judged_variations(answered(**few), LAMP)
    assert (outcome.passed, outcome.severity, outcome.figure, outcome.bound) == (False, checks.WARN, 1.0, 3.0)
    assert outcome.message.startswith("2 of 3 variations cannot be judged, which takes answers about two names")
    assert 'chair (50 % of the answers hold a number: "a lot", "it depends", "1.0")' in outcome.message
    assert 'oven (0 % of the answers hold a number: "a lot")' in outcome.message
    assert "answer_prefix" in outcome.message
    assert [row["names"] for row in outcome.table] == [1, 0]
    assert answer_checks.judged_variations(answered(car=few["car"]), LAMP).passed
    nothing = answer_checks.judged_variations(answered(oven=few["oven"]), LAMP)
    assert (nothing.passed, nothing.severity) == (False, checks.ERROR)
    assert nothing.result().metadata["figures"] is not None


def test_a_mask_that_silences_a_variation_is_named():
    def under(level: str, matched_to: str | None = None, **values) -> pl.DataFrame:
        return answered(**values).with_columns(
            strategy=pl.lit("gap_gradient"), level=pl.lit(level), matched_to=pl.lit(matched_to, pl.String)
        )

    whole = under("prompt_specific", car=[1.0, 2.0, 3.0, 4.0])
    silent = under("within_context", car=["no", "no", 3.0, 4.0])
    control = under("prompt_specific", "gap_gradient", car=["no"] * 4)
    assert answer_checks.judged_under_masks(pl.concat([whole, control]), LAMP, ["car"], 1).passed
    outcome = answer_checks.judged_under_masks(pl.concat([whole, silent]), LAMP, ["car"], 1)
    assert (outcome.passed, outcome.severity, outcome.worst) == (False, checks.WARN, "car")
    assert "1 of 2 masks" in outcome.message
    assert "car, white, gap_gradient, within-context (50 % with a value)" in outcome.message
    part = answer_checks.judged_under_masks(whole, LAMP, ["car"], 3)
    assert (part.passed, part.severity) == (False, checks.WARN)
    assert "Over 1 of 3 variations" in part.message
    assert answer_checks.judged_under_masks(whole.clear(), LAMP, [], 3).severity == checks.ERROR


def test_figures_that_lack_for_want_of_answers_are_no_fault():
    """But one that lacks although the groups answered is."""

    def silenced(n: int) -> pl.DataFrame:
        found = metrics(mean_majority=5.0, mean_minority=None, gap_mean=None, smd=None, parse_rate=0.5)
        return found.with_columns(n=pl.when(pl.col("metric") == "mean_minority").then(n).otherwise(10))

    assert metric_checks.metrics_finite(silenced(0)).passed
    assert not metric_checks.metrics_finite(silenced(3)).passed
    together = silenced(0).with_columns(variation=pl.lit("(all)"), n=10)
    assert metric_checks.metrics_finite(pl.concat([silenced(0), together])).passed
    assert not metric_checks.metrics_finite(together).passed
    assert not metric_checks.metrics_finite(metrics(mean_majority=None, parse_rate=None).with_columns(n=0)).passed


# Damage by masks that close a gap


def verdict(closes=True, failed=(), unknown=(), **place):
    return (
        {"model": "tiny", "scenario": "lamp", "variation": "chair", "strategy": "gap_gradient"}
        | {"level": "prompt_specific", "matched_to": None, "closes": closes, "failed": list(failed)}
        | {"unknown": list(unknown), "not_measured": [], "success": closes and not failed and not unknown}
        | place
    )


def judged_damage(*verdicts):
    return metric_checks.within_budgets(pl.DataFrame(verdicts, schema=VERDICTS_SCHEMA, orient="row"))


def test_a_mask_that_closes_the_gap_and_breaks_a_budget_is_named_with_the_budget():
    collapse = ["spread_ratio 0.44 below 0.60"]
    control = verdict(failed=collapse, matched_to="gap_gradient")
    found = judged_damage(verdict(), verdict(failed=collapse, variation="car"), control)
    assert not found.passed
    assert found.figure == 1
    assert found.worst == "car, gap_gradient, prompt-specific"
    assert found.message == (
        "Masks that close a gap: 2; of these break a budget: 1. car, gap_gradient, prompt-specific: spread_ratio 0.44 "
        "below 0.60."
    )


def test_a_budget_of_a_closing_mask_that_is_not_known_is_told():
    found = judged_damage(verdict(unknown=["text_kl not known"]))
    assert not found.passed
    assert "a budget is not known: 1. chair, gap_gradient, prompt-specific: text_kl not known" in found.message


def test_masks_that_close_no_gap_and_those_that_keep_all_budgets_pass():
    assert judged_damage(verdict()).message == "Masks that close a gap: 1 of 1. All keep every budget."
    found = judged_damage(verdict(closes=False, failed=["spread_ratio 0.44 below 0.60"]))
    assert found.passed
    assert found.message == "None of 1 masks is shown to close a gap, so no budget is held against any."
    assert judged_damage().message == "There is no mask to judge."
