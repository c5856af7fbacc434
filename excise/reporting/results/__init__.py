"""The page of results: the warehouse's tables of the planted models as Markdown, beside what is known to be true.

Here frames become words and tables, and a figure becomes a verdict by a stated rule; nothing is estimated here (see
`evaluation`), and one model's audit is told in `audit_table` and `finding`. The biases are known because they were
planted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from excise.errors import ExciseError
from excise.evaluation.rounding import FEW
from excise.evaluation.table import MetricTable
from excise.evaluation.thresholds import stored_thresholds
from excise.reporting.results.analyses import localisation_section, overlap_section, transfer_section
from excise.reporting.results.frames import (
    COLUMNS,
    PLANTED_SCENARIO,
    Judged,
    ResultFrames,
    metric_tables,
    strategies_of_heads,
    tolerances_text,
)
from excise.reporting.results.masks import expectation_section, masks_section
from excise.reporting.results.usefulness import PUBLISHED, equal_usefulness_section
from excise.reporting.results.verdicts import (
    ANSWERS_COLLAPSED,
    BEATS_RANDOM,
    NO_GAP,
    NO_GAP_ON_AVERAGE,
    NO_REDUCTION,
    NO_YARDSTICK,
    NOT_BEYOND,
)
from excise.reporting.words import few_names_warning


def results_markdown(
    frames: ResultFrames,
    *,
    scenarios: Sequence[str] = (PLANTED_SCENARIO,),
    published: Sequence[str] = PUBLISHED,
) -> str:
    """The whole page as Markdown.

    scenarios: those that get tables of all masks; the first is compared at equal usefulness, at the floor of the inlier
    ratio of its grid search. published: strategies that are not ours.

    Raises ExciseError where a frame lacks a column or gives a figure twice, and where the thresholds of a partition are
    not there.
    """
    for name, columns in COLUMNS.items():
        frame = getattr(frames, name)
        missing = [column for column in columns if column not in frame.columns]
        if missing and not frame.is_empty():
            raise ExciseError(f"results: the frame {name} lacks the column(s) {', '.join(missing)}")
    tables = metric_tables(frames.metrics, scenarios)
    heads = strategies_of_heads(frames.masks)
    judged = {
        (model, scenario): stored_thresholds(
            frames.thresholds, asset="evaluation_metrics", model=model, scenario=scenario
        )
        for model, scenario in sorted(
            {*tables, *(frames.transfer.select("model", "scenario").rows() if len(frames.transfer) else ())}
        )
    }
    sections = [
        "## What each mask removes\n\n" + masks_section(tables, heads, judged),
        "## Expected and found\n\n" + expectation_section(tables, judged),
        "## At equal usefulness\n\n" + equal_usefulness_section(tables, frames, scenarios[0], published),
        "## From one scenario to another\n\n" + transfer_section(frames.transfer, judged),
        "## Where the masks lie, against where the change was planted\n\n" + localisation_section(frames.localisation),
        "## What masks share\n\n" + overlap_section(frames.overlap),
    ]
    return "\n\n".join([_guide(judged, sections, tables), *sections]) + "\n"


def _guide(judged: Judged, sections: Sequence[str], tables: Mapping[tuple[str, str], MetricTable]) -> str:
    """How to read the page: the verdicts by the thresholds the audits were judged by."""
    guide = _GUIDE.format(apart=tolerances_text(judged))
    if any(FEW in section for section in sections):
        names = [
            estimate.names
            for table in tables.values()
            for estimate in table.estimates.values()
            if estimate.few_names and estimate.names is not None
        ]
        guide += f"\n* {FEW} {few_names_warning(min(names)) if names else 'The interval comes from few names.'}"
    return guide


_GUIDE = f"""# Results

This page is made from the warehouse's tables; a later run overwrites it.

## The question

Is the bias of a model one general thing that can be pruned once, or does every context have its own? On an ordinary
model nobody knows the answer, so the methods are first tried where it is known. The planted models are one small chat
model with a change of our own making: `planted-general` answers one group lower in every scenario, through one shared
change; `planted-specific` does so in purchases alone; `planted-neutral` treats the groups alike. A method that can
tell a general bias from a specific one reduces the gap of the first with masks from any context, that of the second
only with masks from purchases, and claims nothing on the third.

## How to read the tables

* *Gap reduction* is the share of the raw gap of mean answers that a mask removes. Over several variations the gaps are
  first divided by the size of the variation's answers, so that cars do not swamp chairs; hence no raw gaps in dollars.
* *Beyond random* is that share less the share which random masks of the same size in every matrix remove, in percentage
  points. Any damage moves a gap: only what goes beyond it speaks for the choice of the weights.
* *SMD* is the standardized mean difference, unpruned and pruned. Noise alone lowers it.
* *Inlier ratio* is the share of answers in the unpruned model's usual range, of the mask and of its random control.
* Brackets hold 95 % intervals from resampled names. Levels: *prompt-specific* masks come from the variation they are
  judged on, *within-context* masks from all other variations of the scenario, *cross-context* masks from all other
  scenarios, *all-contexts* masks from all scenarios, the judged one among them (ours).
* Verdicts: *{BEATS_RANDOM}*: the interval beyond random lies above 0, the gap is reduced, and the inlier ratios of mask
  and control are at most {{apart}} apart. *{NO_YARDSTICK}*: they are further apart, so the two are different kinds of
  damage. *{NOT_BEYOND}*: the interval reaches 0 or lies below it; an effect was not shown, which does not prove that
  there is none. *{NO_REDUCTION}*: the mask widens the gap, if less than random ones do. *{NO_GAP}*: the interval of the
  unpruned gap covers 0, which does not prove that there is none. *{NO_GAP_ON_AVERAGE}*: it covers 0, but single
  variations have a gap. *{ANSWERS_COLLAPSED}*: under the mask a group answers (nearly) always the same."""
