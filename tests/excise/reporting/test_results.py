"""Claims about what the page of results says of hand-made tables, and of what it refuses to say."""

import re
from dataclasses import asdict

import polars as pl
import pytest

from excise.conditions import Condition
from excise.errors import ExciseError
from excise.evaluation.table import read_metrics
from excise.evaluation.thresholds import Thresholds
from excise.reporting.results import results_markdown
from excise.reporting.results.frames import ResultFrames
from excise.reporting.results.verdicts import expected_verdict, verdict

EMPTY = pl.DataFrame()
STRINGS = ("model", "scenario", "variation", "strategy", "level", "matched_to", "metric")
METRICS = {
    **dict.fromkeys(STRINGS, pl.String),
    **dict.fromkeys(("estimate", "low", "high", "p_value", "p_holm"), pl.Float64),
    "n": pl.Int64,
}
LEVELS = ("prompt_specific", "within_context", "cross_context")


def metric(strategy, level, matched_to, name, estimate, low=None, high=None, **place):
    place = {"model": "planted-general", "scenario": "purchase", "variation": "(all)"} | place
    return {
        **place,
        "strategy": strategy,
        "level": level,
        "matched_to": matched_to,
        "metric": name,
        "estimate": estimate,
        "low": low,
        "high": high,
        "p_value": None,
        "p_holm": None,
        "n": 64,
    }


def unpruned(**place):
    own = [
        ("unpruned", "none", None, "smd", 1.2, 1.0, 1.4),
        ("unpruned", "none", None, "inlier_ratio", 0.92),
        ("unpruned", "none", None, "gap_mean", 70.0, 60.0, 80.0),
    ]
    single = {"variation": "bicycle"}
    other = {"variation": "chair"}
    return [metric(*row, **({} if one is None else one) | place) for row in own for one in (None, single, other)]


def pruned(
    strategy,
    level="prompt_specific",
    *,
    beyond=(0.8, 0.65, 0.95),
    removed=(0.9, 0.8, 1.0),
    inliers=0.96,
    random_inliers=0.95,
    density=0.0003,
    smd=0.1,
    **place,
):
    own, control = (strategy, level, None), ("random", level, strategy)
    return [
        metric(*own, "gap_reduction", *removed, **place),
        metric(*own, "reduction_over_random", *beyond, **place),
        metric(*own, "inlier_ratio", inliers, **place),
        metric(*own, "density", density, **place),
        metric(*own, "smd", smd, smd - 0.1, smd + 0.1, **place),
        metric(*control, "density", density, **place),
        metric(*control, "gap_reduction", 0.1, 0.0, 0.2, **place),
        metric(*control, "inlier_ratio", random_inliers, **place),
    ]


def frame(*rows):
    return pl.DataFrame(rows, schema=METRICS, orient="row")


def judged(floor=0.95, tolerance=0.1, budget=0.05, **place):
    """A row of the table thresholds for every partition there may be here."""
    return pl.DataFrame(
        [
            {"asset": asset, "model": model, "scenario": scenario}
            | asdict(Thresholds(inlier_floor=floor, inlier_tolerance=tolerance, perplexity_budget=budget))
            | place
            for asset in ("evaluation_metrics", "grid_search")
            for model in ("planted-general", "planted-specific", "planted-neutral", "gpt2", "a-model")
            for scenario in ("purchase", "finance", "activities", "services")
        ]
    )


def page(
    metrics=EMPTY, masks=EMPTY, transfer=EMPTY, grid=EMPTY, localisation=EMPTY, overlap=EMPTY, rows=None, **options
):
    rows = judged() if rows is None else rows
    text = results_markdown(ResultFrames(metrics, masks, transfer, grid, localisation, overlap, rows), **options)
    for line in text.splitlines():
        assert "nan" not in line.lower().replace("finance", "")
        assert "None" not in line
    return text


def section(text, title):
    return next(part for part in re.split(r"^## ", text, flags=re.MULTILINE) if part.startswith(title))


def cells(text, *starts):
    """The cells of the one table row whose first cells are these."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    (row,) = [row for row in rows if row[: len(starts)] == list(starts)]
    return row


# ------------------------------------------------------------------------------------------------------------ verdicts


def verdict_of(*rows, strategy="ours", level="prompt_specific", matched_to=None):
    return verdict(read_metrics(frame(*unpruned(), *rows)), "(all)", Condition(strategy, level, matched_to))


@pytest.mark.parametrize(
    ("figures", "word"),
    [
        ({}, "beats random"),
        ({"beyond": (0.3, 0.0, 0.5)}, "not beyond random"),
        ({"beyond": (-0.3, -0.5, -0.1)}, "not beyond random"),
        ({"inliers": 0.7, "random_inliers": 0.85}, "no yardstick"),
        ({"inliers": 0.75, "random_inliers": 0.84}, "beats random"),
        ({"inliers": 0.7, "random_inliers": 0.85, "beyond": (-0.3, -0.5, -0.1)}, "no yardstick"),
        ({"beyond": (0.3, None, None)}, "no interval"),
        ({"beyond": (None, None, None)}, "no random control"),
        ({"beyond": (None, None, None), "removed": (None, None, None)}, "no answers left to compare"),
    ],
)
def test_a_verdict_follows_from_interval_and_comparable_usefulness(figures, word):
    assert verdict_of(*pruned("ours", **figures), *pruned("other")) == word


def test_without_a_gap_there_is_nothing_to_reduce_for_anybody():
    nothing = {"beyond": (None, None, None), "removed": (None, None, None)}
    rows = [row for name in ("ours", "other") for row in pruned(name, **nothing) if row["matched_to"] is None]
    assert verdict_of(*rows) == "no gap on average"  # single variations have one
    flat = [row | {"low": -5.0} if row["metric"] == "gap_mean" else row for row in unpruned()]
    assert verdict(read_metrics(frame(*flat, *rows)), "(all)", Condition("ours", "prompt_specific")) == (
        "no gap detectable"
    )
    rows = frame(*[row | {"low": None, "high": None} for row in unpruned()], *rows)
    assert verdict(read_metrics(rows), "(all)", Condition("ours", "prompt_specific")) == "no interval"


def test_controls_are_judged_like_strategies():
    control = ("reversed", "prompt_specific", "ours")
    rows = [
        metric(*control, "gap_reduction", 0.5),
        metric(*control, "reduction_over_random", 0.1, -0.2, 0.4),
        metric(*control, "inlier_ratio", 0.95),
    ]
    assert verdict_of(*pruned("ours"), *rows, strategy="reversed", matched_to="ours") == "not beyond random"


def test_what_is_expected_follows_from_what_was_planted():
    assert [expected_verdict("planted-general", "finance", level) for level in LEVELS] == ["beats random"] * 3
    assert [expected_verdict("planted-specific", "purchase", level) for level in LEVELS] == [
        "beats random",
        "beats random",
        "not beyond random",
    ]
    assert expected_verdict("planted-specific", "finance", "cross_context") == "no gap detectable"
    assert expected_verdict("planted-neutral", "purchase", "within_context") == "no gap detectable"
    assert expected_verdict("gpt2", "purchase", "within_context") is None


# ------------------------------------------------------------------------------------------------------------ sections


def test_nothing_measured_is_told_in_one_sentence_for_each_section():
    text = page()
    for title, sentence in {
        "What each mask removes": "No masks were evaluated yet.",
        "Expected and found": "No planted model was evaluated yet, so there is no truth to compare with.",
        "At equal usefulness": "No grid search was run yet, so strategies cannot be compared at equal usefulness.",
        "From one scenario": "No transfer between scenarios was evaluated yet.",
        "Where the masks lie": "No mask was held against a planted change yet.",
        "What masks share": "The overlap of masks was not counted yet.",
    }.items():
        assert section(text, title).split("\n\n", 1)[1].strip() == sentence
    assert text.startswith("# Results\n")
    assert "general" in section(text, "The question")


def test_a_mask_row_holds_its_figures_and_its_verdict():
    text = section(page(frame(*unpruned(), *pruned("ours"))), "What each mask removes")
    assert "### planted-general, purchase" in text
    assert "Unpruned, all 2 variations: SMD 1.20 [1.00, 1.40], inlier ratio 0.92." in text
    assert cells(text, "**ours**") == [
        "**ours**",
        "prompt-specific",
        "0.030 %",
        "90 [80, 100]",
        "+80 [65, 95]",
        "1.20 → 0.10 [0.00, 0.20]",
        "0.96, 0.95",
        "beats random",
    ]
    assert cells(text, "· random") == [
        "· random",
        "prompt-specific",
        "0.030 %",
        "10 [0, 20]",
        "-",
        "1.20 → -",
        "0.95",
        "",
    ]


def test_raw_gaps_stand_where_there_is_one_variation_only():
    rows = [row for row in unpruned() if row["variation"] == "bicycle"]
    rows += [
        *pruned("ours", variation="bicycle"),
        metric("ours", "prompt_specific", None, "gap_mean", 7.0, 1.0, 13.0, variation="bicycle"),
    ]
    text = section(page(frame(*rows)), "What each mask removes")
    assert "Unpruned, bicycle: SMD 1.20 [1.00, 1.40], raw gap 70.0 [60.0, 80.0], inlier ratio 0.92." in text
    assert cells(text, "**ours**")[3] == "70.0 → 7.0 [1.0, 13.0]"
    assert "raw gap |" not in section(page(frame(*unpruned(), *pruned("ours"))), "What each mask removes")


def test_controls_stand_under_their_strategy_and_single_sources_elsewhere():
    controls = [
        metric(kind, "prompt_specific", "ours", "gap_reduction", 0.2)
        for kind in ("permuted", "reversed", "pooled_band")
    ]
    text = section(
        page(
            frame(
                *unpruned(),
                *pruned("second"),
                *pruned("ours", "within_context"),
                *pruned("ours"),
                *controls,
                *pruned("ours", "cross_context/finance"),
            )
        ),
        "What each mask removes",
    )
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")][2:]
    assert names == [
        "**ours**",
        "· random",
        "· pooled_band",
        "· reversed",
        "· permuted",
        "**second**",
        "· random",
        "**ours**",
        "· random",
    ]
    assert "one other scenario alone stand under" in text


def test_heads_are_called_heads():
    masks = pl.DataFrame(
        {
            "model": ["planted-general"] * 2,
            "strategy": ["heads", "ours"],
            "matched_to": [None, None],
            "role": ["head_query", "q"],
        },
        schema_overrides={"matched_to": pl.String},
    )
    rows = frame(*unpruned(), *pruned("heads", density=0.039), *pruned("ours"))
    text = section(page(rows, masks), "What each mask removes")
    assert cells(text, "**heads**")[2] == "3.9 % of heads"
    assert cells(text, "**ours**")[2] == "0.030 %"
    assert text.count("of heads") == 2  # the heads' control, too


def test_expectations_stand_beside_what_was_found():
    nothing = {"beyond": (None, None, None), "removed": (None, None, None)}
    rows = [
        *unpruned(),
        *pruned("ours"),
        *pruned("ours", "within_context", beyond=(0.1, -0.1, 0.3)),
        *pruned("theirs", inliers=0.5),
    ]
    for model, options in (("planted-specific", {"beyond": (0.0, -0.2, 0.2)}), ("planted-neutral", nothing)):
        rows += [
            row | {"low": -5.0} if model == "planted-neutral" and row["metric"] == "gap_mean" else row
            for row in unpruned(model=model)
        ]
        rows += [
            row
            for row in pruned("ours", "cross_context", model=model, **options)
            if not (model == "planted-neutral" and row["matched_to"])
        ]
    text = section(page(frame(*rows)), "Expected and found")
    assert cells(text, "planted-general", "purchase", "prompt-specific")[3:] == [
        "beats random",
        "yes: beats random",
        "open: no yardstick",
    ]
    assert cells(text, "planted-general", "purchase", "within-context")[3:] == [
        "beats random",
        "**no**: not beyond random",
        "open: no mask",
    ]
    assert cells(text, "planted-specific", "purchase", "cross-context")[3:5] == [
        "not beyond random",
        "yes: not beyond random",
    ]
    assert cells(text, "planted-neutral", "purchase", "cross-context")[4] == "yes: no gap detectable"
    assert "ours 3 of 4 and theirs 0 of 0" in text


def test_models_without_a_truth_have_tables_but_no_expectations():
    text = page(frame(*unpruned(model="gpt2"), *pruned("ours", model="gpt2")))
    assert "### gpt2, purchase" in text
    assert "no truth to compare with" in section(text, "Expected and found")


def test_other_scenarios_get_tables_where_asked():
    rows = frame(*unpruned(), *pruned("ours"), *unpruned(scenario="finance"), *pruned("ours", scenario="finance"))
    assert "### planted-general, finance" not in page(rows)
    assert "### planted-general, finance" in page(rows, scenarios=("purchase", "finance"))
    with pytest.raises(ExciseError, match="name one at least"):
        page(rows, scenarios=())


def grid_rows(strategy="set_difference", points=((0.2, 0.1, 0.3, 0.97, True), (0.4, 0.35, 0.9, 0.6, False)), **place):
    """(tau_min, tau_maj, gap reduction, inlier ratio, chosen)"""
    place = {"model": "planted-general", "scenario": "purchase"} | place
    return [
        {
            **place,
            "strategy": strategy,
            "variation": variation,
            "tau_min": tau_min,
            "tau_maj": tau_maj,
            "density": 0.01,
            "metric": name,
            "estimate": estimate,
            "low": estimate - 0.1,
            "high": estimate + 0.1,
            "n": 9,
            "pareto": True,
            "chosen": chosen,
        }
        for tau_min, tau_maj, reduction, ratio, chosen in points
        for variation in ("bicycle", "(all)")
        for name, estimate in (("gap_reduction", reduction), ("inlier_ratio", ratio), ("smd", 0.5))
    ]


def test_strategies_are_compared_at_equal_usefulness():
    metrics = frame(*unpruned(), *pruned("ours"), *pruned("set_difference", inliers=0.69))
    text = section(page(metrics, grid=pl.DataFrame(grid_rows())), "At equal usefulness")
    assert cells(text, "ours") == [
        "ours",
        "ours",
        "prompt-specific, as configured",
        "2",
        "0.030 %",
        "90 [80, 100]",
        "0.10 [0.00, 0.20]",
        "0.96",
    ]
    assert cells(text, "set_difference") == [
        "set_difference",
        "published",
        "thresholds 0.2 / 0.1",
        "1",
        "1.0 %",
        "30 [20, 40]",
        "0.50 [0.40, 0.60]",
        "0.97",
    ]
    assert text.index("| ours |") < text.index("| set_difference |")
    assert "The best of ours, ours (prompt-specific, as configured), removes 90 % of the raw gap; the best" in text
    assert "ours removes 60 percentage points more" in text
    assert "Below the floor: set_difference prompt-specific (0.69)." in text


def test_a_strategy_that_is_useful_at_no_point_is_told_so():
    grid = pl.DataFrame(grid_rows(points=((0.4, 0.35, 0.9, 0.6, False),)))
    text = section(page(frame(*unpruned(), *pruned("ours")), grid=grid), "At equal usefulness")
    assert "set_difference at every point of its grid (at most 0.60)" in text
    assert "of the published strategies there is no figure at this usefulness" in text
    worse = pruned("ours", removed=(0.1, 0.0, 0.2))
    text = section(page(frame(*unpruned(), *worse), grid=pl.DataFrame(grid_rows())), "At equal usefulness")
    assert "ours removes 20 percentage points less" in text
    text = section(page(grid=pl.DataFrame(grid_rows(points=((1, 1, 0.0, 0.99, False),)))), "At equal usefulness")
    assert "at no point, as no gap was detectable to choose by or answers collapsed" in text
    assert "there is nothing to compare" in text


def test_the_grid_of_another_scenario_is_no_grid_here():
    assert "No grid search was run yet" in page(grid=pl.DataFrame(grid_rows(scenario="finance")))


def transfer_rows(**changed):
    """Masks of ours from purchase and finance, and random ones, on both; finance's wreck purchases."""
    rows = []
    for source, scenario, beyond, ratio in (
        ("purchase", "purchase", 0.8, 0.95),
        ("purchase", "finance", 0.4, 0.95),
        ("finance", "purchase", 0.3, 0.7),
        ("finance", "finance", None, 0.95),
        ("(others)", "purchase", 0.2, 0.95),
    ):
        place = {"model": "planted-general", "source": source, "scenario": scenario, "level": "cross_context"}
        low, high = (None, None) if beyond is None else (beyond - 0.1, beyond + 0.1)
        for strategy, matched_to, name, *figures in (
            ("ours", None, "reduction_over_random", beyond, low, high),
            ("ours", None, "inlier_ratio", ratio, None, None),
            ("random", "ours", "inlier_ratio", 0.94, None, None),
        ):
            rows.append(
                {
                    **place,
                    "strategy": strategy,
                    "matched_to": matched_to,
                    "metric": name,
                    **dict(zip(("estimate", "low", "high"), figures, strict=True)),
                    **changed,
                }
            )
    return pl.DataFrame(rows)


def test_the_transfer_matrix_has_sources_as_rows_and_marks_what_is_not_comparable():
    text = section(page(transfer=transfer_rows().sample(fraction=1, shuffle=True, seed=1)), "From one scenario")
    assert cells(text, "from \\ on") == ["from \\ on", "purchase", "finance"]
    assert cells(text, "purchase") == ["purchase", "+80 [70, 90]", "+40 [30, 50]"]
    assert cells(text, "finance") == ["finance", "+30 [20, 40]*", "-"]
    assert cells(text, "(others)") == ["(others)", "+20 [10, 30]", "-"]
    assert "### planted-general, ours" in text
    assert ", random" not in text.replace("### planted-general, ours", "")
    with pytest.raises(ExciseError, match="gives reduction_over_random twice"):
        page(transfer=pl.concat([transfer_rows(), transfer_rows()]))


def test_localisation_is_averaged_over_masks_and_held_against_chance():
    rows = [
        {
            "model": "planted-general",
            "strategy": strategy,
            "level": "prompt_specific",
            "matched_to": matched_to,
            "density": 0.001,
            "share": share,
            "chance": 0.001,
            "deviation": 0.0001,
        }
        for strategy, matched_to, share in (
            ("random", "ours", 0.001),
            ("ours", None, 0.03),
            ("ours", None, 0.05),
            ("beside", None, float("nan")),
        )
    ]
    text = section(page(localisation=pl.DataFrame(rows)), "Where the masks lie")
    assert cells(text, "**ours**") == [
        "**ours**",
        "prompt-specific",
        "2",
        "0.10 %",
        "4.0 %",
        "0.10 % ± 0.010 %",
        "40.0",
    ]
    assert cells(text, "· random")[4:] == ["0.10 %", "0.10 % ± 0.010 %", "1.00"]
    assert cells(text, "**beside**")[4:] == ["-", "0.10 % ± 0.010 %", "-"]
    assert text.index("**ours**") < text.index("· random")


def test_overlap_leaves_out_a_mask_with_itself():
    pairs = [
        ("purchase", "chair", "purchase", "chair", 1.0),
        ("purchase", "chair", "purchase", "car", 0.6),
        ("purchase", "car", "purchase", "chair", 0.4),
        ("finance", "stocks", "purchase", "car", 0.2),
        ("finance", "stocks", "purchase", "chair", None),
    ]
    rows = [
        {
            "model": "planted-general",
            "strategy": "ours",
            "level": "prompt_specific",
            "scenario": a,
            "variation": b,
            "reference_scenario": c,
            "reference_variation": d,
            "overlap": share,
            "chance": 0.05,
        }
        for a, b, c, d, share in pairs
    ]
    text = section(page(overlap=pl.DataFrame(rows)), "What masks share")
    assert cells(text, "planted-general", "ours")[2:] == ["prompt-specific", "50 %", "20 %", "5.0 %"]


def test_planted_models_come_first_general_before_specific_before_neutral():
    models = ("a-model", "planted-neutral", "planted-specific", "planted-general")
    text = page(frame(*(row for model in models for row in [*unpruned(model=model), *pruned("ours", model=model)])))
    assert re.findall(r"^### (.*), purchase", text, flags=re.MULTILINE) == [*models[:0:-1], "a-model"]


def test_frames_that_lack_a_column_are_refused():
    with pytest.raises(ExciseError, match=r"the frame transfer lacks the column\(s\) source"):
        page(transfer=transfer_rows().drop("source"))
    several = frame(*(row for row in [*unpruned(), *pruned("ours")] if row["variation"] != "(all)"))
    with pytest.raises(ExciseError, match="hold nothing over all variations"):
        page(several)
