"""Metrics in words: the audit's table, its finding in one sentence, and the table shown as metadata in the UI.

Here: plain text and Markdown made from the tidy `metrics` frame, and the order and names in which masks are told.
Not here: any estimate (see `excise.evaluation`) or picture (see `excise.figures`). What is claimed, and when it is not,
follows the method: the reduction of the raw gap beyond the matched random control, at an inlier ratio above a floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import polars

from excise.errors import ExciseError

ALL_VARIATIONS = "(all)"
UNPRUNED = "unpruned"
RANDOM = "random"
PROMPT_SPECIFIC = "prompt_specific"
INLIER_FLOOR = 0.90
PUBLISHED = ("set_difference",)
COMPARABLE = 0.10
"""Inlier ratios further apart than this make a mask and its random control two different kinds of damage."""
NO_COMPARISON = "*"

_LEVELS = ("none", PROMPT_SPECIFIC, "within_context", "cross_context", "all_contexts", "own_scenario")
_CONTROLS = (RANDOM, "pooled_band", "reversed", "permuted")
_COLUMNS = (
    "model",
    "scenario",
    "variation",
    "strategy",
    "level",
    "matched_to",
    "metric",
    "estimate",
    "low",
    "high",
    "p_value",
    "p_holm",
)
_TINY = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A metric's value with its 95 % interval and p-value (Holm's where there is one).

    None: not defined (value), or not estimated (the others).
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def has_interval(self) -> bool:
        """Whether both bounds are known."""
        return self.low is not None and self.high is not None

    @property
    def covers_zero(self) -> bool:
        """Whether the interval is known and holds 0."""
        return self.low is not None and self.high is not None and self.low <= 0.0 <= self.high


MISSING = Estimate(None)


@dataclass(frozen=True)
class MaskName:
    """What was pruned: a strategy at a level of generality; `matched_to` names the strategy a control belongs to."""

    strategy: str
    level: str
    matched_to: str | None = None

    @property
    def is_control(self) -> bool:
        """Whether the mask is some strategy's control."""
        return self.matched_to is not None

    @property
    def control(self) -> MaskName:
        """The random control of a strategy, and of its other controls: the same count per matrix, at the same level."""
        return MaskName(RANDOM, self.level, self.matched_to or self.strategy)


UNPRUNED_MASK = MaskName(UNPRUNED, "none")


def level_label(level: str) -> str:
    """A level's name as people read it: `prompt-specific`, `within-context`, `cross-context`."""
    return level.replace("_", "-")


def mask_order(mask: MaskName) -> tuple[int, str, str, int, int, str]:
    """Sort key: unpruned first, then by level and strategy, every strategy followed by its controls."""
    level = _LEVELS.index(mask.level) if mask.level in _LEVELS else len(_LEVELS)
    control = _CONTROLS.index(mask.strategy) if mask.strategy in _CONTROLS else len(_CONTROLS)
    return (level, mask.level, mask.matched_to or mask.strategy, mask.is_control, control, mask.strategy)


@dataclass(frozen=True)
class MetricTable:
    """The metrics of one model on one scenario, addressed by variation, mask and metric."""

    model: str
    scenario: str
    variations: tuple[str, ...]
    masks: tuple[MaskName, ...]
    estimates: Mapping[tuple[str, MaskName, str], Estimate]

    def get(self, variation: str, mask: MaskName, metric: str) -> Estimate:
        """The estimate, or `MISSING`."""
        return self.estimates.get((variation, mask, metric), MISSING)

    def masks_of(self, variation: str) -> list[MaskName]:
        """The masks with at least one metric of the variation, in the order of `masks`."""
        present = {mask for name, mask, _ in self.estimates if name == variation}
        return [mask for mask in self.masks if mask in present]

    def comparable(self, variation: str, mask: MaskName) -> bool:
        """Whether the mask and its random control leave about as many usual answers; unknown counts as yes.

        A reduction over random is read at comparable inlier ratio (method, part C): where random masks of the size
        wreck the model, its answers may lie anywhere, and their gap says nothing about bias.
        """
        own, random = (self.get(variation, each, "inlier_ratio").value for each in (mask, mask.control))
        return own is None or random is None or abs(own - random) <= COMPARABLE

    @property
    def has_aggregate(self) -> bool:
        """Whether metrics over all variations are present."""
        return any(variation == ALL_VARIATIONS for variation, _, _ in self.estimates)


def read_metrics(metrics: polars.DataFrame) -> MetricTable:
    """Addresses a tidy `metrics` frame. Null and NaN are both read as missing; variations keep the frame's order.

    Raises ExciseError when a column is missing, the frame is empty, holds several models or scenarios, or gives a
    metric of a mask twice.
    """
    lacking = [column for column in _COLUMNS if column not in metrics.columns]
    if lacking:
        raise ExciseError(f"metrics: columns {', '.join(lacking)} are missing; pass the frame that evaluate() gives")
    if metrics.is_empty():
        raise ExciseError("metrics: no rows; evaluate the scenario first")
    for column in ("model", "scenario"):
        keys = metrics[column].unique().sort().to_list()
        if len(keys) > 1:
            raise ExciseError(f"metrics: {len(keys)} values of {column} ({', '.join(keys)}); filter the frame to one")
    estimates: dict[tuple[str, MaskName, str], Estimate] = {}
    for row in metrics.select(_COLUMNS).iter_rows(named=True):
        mask = MaskName(row["strategy"], row["level"], row["matched_to"])
        key = (row["variation"], mask, row["metric"])
        if key in estimates:
            raise ExciseError(
                f"metrics: {row['metric']} of {row['strategy']} ({row['level']}, matched to {row['matched_to']}) "
                f"on {row['variation']} appears twice; keep one row for each mask and metric"
            )
        value, low, high, plain, adjusted = (
            _finite(row[column]) for column in ("estimate", "low", "high", "p_value", "p_holm")
        )
        estimates[key] = Estimate(value, low, high, plain if adjusted is None else adjusted)
    variations = tuple(dict.fromkeys(name for name, _, _ in estimates if name != ALL_VARIATIONS))
    masks = tuple(sorted({mask for _, mask, _ in estimates}, key=mask_order))
    return MetricTable(metrics["model"][0], metrics["scenario"][0], variations, masks, estimates)


# ------------------------------------------------------------------------------------------------------------- tables


def audit_table(
    metrics: polars.DataFrame,
    *,
    scenario_title: str,
    unit: str,
    majority: str = "majority",
    minority: str = "minority",
    inlier_floor: float = INLIER_FLOOR,
    published: Sequence[str] = PUBLISHED,
    width: int = 160,
) -> str:
    """Plain text of at most `width` columns: every variation's masks, the block over all variations, the finding.

    `unit` is the outcome's (dollars, hours a week); `majority` and `minority` are the groups' labels. Gaps are
    majority minus minority. A value that is not defined prints as `-`. Errors as `read_metrics`.
    """
    table = read_metrics(metrics)
    headings = [
        f"{scenario_title}: {table.model}",
        f"answers in {unit}; gap = {majority} - {minority}; [95 % interval]",
    ]
    rows: list[list[str] | str] = []
    for variation in table.variations:
        rows += ["", variation, *_rows(table, variation, _variation_cells)]
    headers = [_variation_header(majority, minority, compact=choice) for choice in (False, True)]
    blocks = [_fit(headings, headers, rows, width)]
    if table.has_aggregate:
        count = len(table.variations)
        title = f"All {count} variations together" if count != 1 else "All variations (one)"
        blocks.append(_fit([title], [_aggregate_header()] * 2, _rows(table, ALL_VARIATIONS, _aggregate_cells), width))
    if any(NO_COMPARISON in block for block in blocks):
        blocks.append(
            _wrapped(
                f"{NO_COMPARISON} not at comparable usefulness: random masks of this size leave an inlier ratio over "
                f"{COMPARABLE:.2f} away, and the gap of a wrecked model is no yardstick.",
                width,
            )
        )
    blocks.append(_wrapped(finding(metrics, inlier_floor=inlier_floor, published=published), width))
    return "\n\n".join(blocks) + "\n"


def markdown_table(metrics: polars.DataFrame, *, majority: str = "majority", minority: str = "minority") -> str:
    """The same figures as a Markdown table, one row per variation and mask. Errors as `read_metrics`.

    `p` tests the raw gap: of the unpruned model against 0, of a mask against the unpruned gap; over the variations of a
    mask it is adjusted by Holm's method.
    """
    table = read_metrics(metrics)
    header = [
        "variation", "mask", "level", f"mean {majority} / {minority}", f"median {majority} / {minority}", "raw gap",
        "p", "SMD", "inlier ratio", "parse rate", "density", "gap of the random control", "gap reduction",
        "beyond random, points",
    ]  # fmt: skip
    lines = [header, ["---", "---", "---"] + ["---:"] * (len(header) - 3)]
    for variation in [*table.variations, *([ALL_VARIATIONS] if table.has_aggregate else [])]:
        for mask in table.masks_of(variation):
            means, medians, gap, smd, inliers, density, random_gap, reduction, beyond = _variation_cells(
                table, variation, mask, compact=False
            )
            name = f"{mask.strategy} (control of {mask.matched_to})" if mask.is_control else mask.strategy
            parsed = _plain(table.get(variation, mask, "parse_rate"), 2)
            level = "" if mask.level == "none" else level_label(mask.level)
            p = _p_value(table.get(variation, mask, "gap_mean").p)
            line = [
                variation,
                name,
                level,
                means,
                medians,
                gap,
                p,
                smd,
                inliers,
                parsed,
                density,
                random_gap,
                reduction,
            ]
            lines.append([*line, beyond])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def reuse_sentence(drawn: int, reused: int) -> str:
    """How many completions were sampled in this run and how many were taken from earlier ones."""
    if drawn < 0 or reused < 0:
        raise ExciseError(f"completions drawn and reused cannot be negative, got {drawn} and {reused}")
    if drawn == 0 and reused == 0:
        return "No completion was asked for."
    if drawn == 0:
        return f"Nothing was sampled anew: {_completions(reused)} from earlier runs reused, since nothing changed."
    if reused == 0:
        return f"{_completions(drawn)} sampled, none reused: nothing in the cache matched."
    share = reused / (drawn + reused)
    shown = "over 99" if 0.99 < share < 1 else "under 1" if share < 0.01 else f"{100 * share:.0f}"
    return f"{_completions(drawn)} sampled, {_completions(reused)} ({shown} %) reused from earlier runs."


def _completions(count: int) -> str:
    return f"{count:,} completion" + ("" if count == 1 else "s")


# ------------------------------------------------------------------------------------------------------------ finding


def finding(
    metrics: polars.DataFrame, *, inlier_floor: float = INLIER_FLOOR, published: Sequence[str] = PUBLISHED
) -> str:
    """What pruning achieved, in one sentence, and one more for each published strategy that fails its control.

    Told over all variations (or the only one). Picks the prompt-specific strategy with the largest reduction of the
    raw gap beyond its matched random control among those whose inlier ratio is at least `inlier_floor`; claims no
    success where the interval covers 0, and none at all where the unpruned interval does. A strategy fails its
    control where the interval of that difference is not clear of 0 from above. Source: method, part C.
    Errors as `read_metrics`.
    """
    table = read_metrics(metrics)
    if len(table.variations) == 1:
        where = table.variations[0]
    elif table.has_aggregate:
        where = ALL_VARIATIONS
    else:
        return "No finding: the metrics hold several variations and nothing over all of them."

    sentences = []
    gap_name, gap = _unpruned_gap(table, where)
    if gap.value is None:
        return "No finding: the metrics hold no gap of the unpruned model."
    told = f"{gap_name} is {interval_text(gap, decimals=2 if 'SMD' in gap_name else None)}"
    if not gap.has_interval:
        return f"No finding: the unpruned {told} and has no interval."
    if gap.covers_zero:
        clear = [name for name in table.variations if _clear_of_zero(table.get(name, UNPRUNED_MASK, "gap_mean"))]
        if where != ALL_VARIATIONS or not clear:
            return f"There is nothing to reduce: the unpruned {told}, an interval that covers 0."
        sentences.append(
            f"There is nothing to reduce on average: the unpruned {told}, an interval that covers 0; "
            f"taken singly, {listed(clear)} {'is' if len(clear) == 1 else 'are'} clear of 0."
        )
    best, sentence = _best_strategy(table, where, inlier_floor)
    sentences.append(sentence)
    sentences += [
        failure
        for strategy in published
        if (failure := _failure(table, where, strategy, besides={best} if best else set()))
    ]
    return " ".join(sentences)


def _unpruned_gap(table: MetricTable, where: str) -> tuple[str, Estimate]:
    # Over variations the outcome's units differ (a car, a chair), so the mean SMD stands for the gap there.
    names = {"smd": "SMD", "gap_mean": "raw gap"}
    order = ("smd", "gap_mean") if where == ALL_VARIATIONS else ("gap_mean", "smd")
    for metric in order:
        estimate = table.get(where, UNPRUNED_MASK, metric)
        if estimate.value is not None:
            return ("mean " if where == ALL_VARIATIONS else "") + names[metric], estimate
    return "gap", MISSING


def _best_strategy(table: MetricTable, where: str, floor: float) -> tuple[MaskName | None, str]:
    """The mask told of and the sentence about it."""
    candidates = [mask for mask in table.masks if mask.level == PROMPT_SPECIFIC and not mask.is_control]
    if not candidates:
        return None, "No prompt-specific strategy was evaluated."
    known = {
        mask: estimate
        for mask in candidates
        if (estimate := table.get(where, mask, "reduction_over_random")).value is not None
    }
    compared = {mask: estimate for mask, estimate in known.items() if table.comparable(where, mask)}
    if known and not compared:
        return None, "No prompt-specific strategy stands at an inlier ratio comparable to random's: nothing is claimed."
    if not compared and any(mask.control in table.masks for mask in candidates):
        return None, "No reduction is defined: the raw gap of the unpruned model cannot be told from 0."
    if not compared:
        return None, "No prompt-specific strategy could be compared with a matched random control: nothing is claimed."
    keeping = {
        mask: estimate
        for mask, estimate in compared.items()
        if (table.get(where, mask, "inlier_ratio").value or 0.0) >= floor
    }
    pool = keeping or compared
    best = max(pool, key=lambda mask: pool[mask].value)
    beyond = pool[best]
    inliers = table.get(where, best, "inlier_ratio")
    at = f"at inlier ratio {_against_floor(inliers.value, floor)}"
    if not keeping:
        return best, (
            f"No prompt-specific strategy keeps the inlier ratio at the floor of {floor:.2f}: the largest difference "
            f"from its matched random control, {_points(beyond)} by {best.strategy}, comes {at}."
        )
    if beyond.value <= 0.0:
        return best, (
            f"No prompt-specific strategy at inlier ratio {floor:.2f} or more removes more of the raw gap than random "
            f"pruning: the best of them, {best.strategy}, differs from its matched random control by {_points(beyond)}."
        )
    removed = percent_text(table.get(where, best, "gap_reduction"))
    scope = " over all variations" if where == ALL_VARIATIONS else ""
    sentence = (
        f"Best prompt-specific strategy: {best.strategy} removes {removed} of the raw gap{scope}, "
        f"{_points(beyond)} more than its matched random control, {at} (floor {floor:.2f})"
    )
    if where == ALL_VARIATIONS:
        below = [
            f"{name} ({_against_floor(ratio.value, floor)})"
            for name in table.variations
            if (ratio := table.get(name, best, "inlier_ratio")).value is not None and ratio.value < floor
        ]
        if below:
            sentence += f", though below that floor on {listed(below)}"
    if not beyond.has_interval:
        return best, sentence + "; without an interval this is a lead, not a result."
    if beyond.covers_zero:
        return best, sentence + "; that interval covers 0, so it is not shown to beat random pruning."
    return best, sentence + "."


def _failure(table: MetricTable, where: str, strategy: str, besides: set[MaskName]) -> str | None:
    failures, wrecked = [], []
    for mask in table.masks:
        if mask.strategy != strategy or mask.is_control or mask in besides:
            continue
        beyond = table.get(where, mask, "reduction_over_random")
        if beyond.value is not None and not table.comparable(where, mask):
            ratios = [_plain(table.get(where, name, "inlier_ratio"), 2) for name in (mask, mask.control)]
            wrecked.append(f"{level_label(mask.level)} {ratios[0]} against {ratios[1]}")
            continue
        if beyond.value is None or (beyond.low if beyond.low is not None else beyond.value) > 0.0:
            continue
        removed, by_chance = (percent_text(table.get(where, name, "gap_reduction")) for name in (mask, mask.control))
        failures.append(f"{level_label(mask.level)} {removed} against {by_chance} ({_points(beyond)})")
    sentences = []
    if failures:
        sentences.append(
            f"The published {strategy} is not shown to beat its matched random control; of the raw gap it removes "
            f"{listed(failures)}."
        )
    if wrecked:
        sentences.append(
            f"The published {strategy} prunes so much that random masks of its size are no yardstick: inlier ratio "
            f"{listed(wrecked)}."
        )
    return " ".join(sentences) or None


def _clear_of_zero(estimate: Estimate) -> bool:
    return estimate.has_interval and not estimate.covers_zero


def _points(estimate: Estimate) -> str:
    """A difference of two shares: `85 percentage points [70, 99]`."""
    value, *interval = interval_text(scaled(estimate, 100.0), decimals=0).split(" ", 1)
    return " ".join([value, "percentage points", *interval])


def _against_floor(ratio: float | None, floor: float) -> str:
    """The ratio with two decimals, or as many as it takes not to look like a floor it misses."""
    if ratio is None:
        return "unknown"
    decimals = 2
    while ratio < floor <= round(ratio, decimals) and decimals < 6:
        decimals += 1
    return f"{ratio:.{decimals}f}"


def listed(names: Sequence[str]) -> str:
    """`chair, car and oven`."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


# -------------------------------------------------------------------------------------------------------- table layout


def _variation_header(majority: str, minority: str, *, compact: bool) -> list[tuple[str, str]]:
    longest = 6 if compact else 12
    groups = f"{_shortened(majority, longest)} / {_shortened(minority, longest)}"
    return [
        ("", "mask"), ("mean", groups), ("median", groups), ("", "raw gap"), ("", "SMD"), ("inlier", "ratio"),
        ("", "density"), ("random's", "raw gap"), ("gap re-", "duction"), ("beyond random,", "points"),
    ]  # fmt: skip


def _variation_cells(table: MetricTable, variation: str, mask: MaskName, *, compact: bool) -> list[str]:
    def of(metric: str) -> Estimate:
        return table.get(variation, mask, metric)

    random_gap = MISSING if mask.strategy == RANDOM else table.get(variation, mask.control, "gap_mean")
    return [
        _pair(of("mean_majority"), of("mean_minority"), compact),
        _pair(of("median_majority"), of("median_minority"), compact),
        interval_text(of("gap_mean"), compact=compact),
        interval_text(of("smd"), decimals=2),
        _plain(of("inlier_ratio"), 2),
        density_text(of("density")),
        _number(random_gap.value, _decimals([random_gap.value]), compact),
        percent_text(of("gap_reduction"), compact=compact),
        _beyond(table, variation, mask, "reduction_over_random", compact),
    ]


def _aggregate_header() -> list[tuple[str, str]]:
    return [
        ("", "mask"), ("mean", "|SMD|"), ("mean", "SMD"), ("inlier", "ratio"), ("parse", "rate"), ("", "density"),
        ("gap reduction,", "%"), ("beyond random,", "points"), ("SMD reduction", "beyond random, points"),
    ]  # fmt: skip


def _aggregate_cells(table: MetricTable, variation: str, mask: MaskName, *, compact: bool) -> list[str]:
    def of(metric: str) -> Estimate:
        return table.get(variation, mask, metric)

    return [
        interval_text(of("abs_smd"), decimals=2),
        interval_text(of("smd"), decimals=2),
        _plain(of("inlier_ratio"), 2),
        _plain(of("parse_rate"), 2),
        density_text(of("density")),
        interval_text(scaled(of("gap_reduction"), 100.0), decimals=0, compact=compact),
        _beyond(table, variation, mask, "reduction_over_random", compact),
        _beyond(table, variation, mask, "smd_reduction_over_random", compact),
    ]


def _beyond(table: MetricTable, variation: str, mask: MaskName, metric: str, compact: bool) -> str:
    estimate = table.get(variation, mask, metric)
    marked = estimate.value is not None and not table.comparable(variation, mask)
    text = interval_text(scaled(estimate, 100.0), decimals=0, signed=True, compact=compact)
    return text + (NO_COMPARISON if marked else "")


@dataclass(frozen=True)
class _Row:
    """A line of a block: its label, its cells in ordinary and in compact figures."""

    label: str
    ordinary: list[str]
    compact: list[str]


def _rows(table: MetricTable, variation: str, cells: Callable[..., list[str]]) -> list[_Row | str]:
    """A variation's lines: a line for each level, a row for each mask, controls indented under their strategy."""
    rows: list[_Row | str] = []
    level = "none"
    for mask in table.masks_of(variation):
        if mask.level != level:
            rows.append(f"  {level_label(mask.level)}")
            level = mask.level
        indent = "  " if mask.level == "none" else "      " if mask.is_control else "    "
        label = f"{indent}{mask.strategy}"
        if mask.is_control and MaskName(mask.matched_to, mask.level) not in table.masks:
            label += f" of {mask.matched_to}"
        ordinary, compact = (cells(table, variation, mask, compact=choice) for choice in (False, True))
        rows.append(_Row(label, ordinary, compact))
    return rows


def _fit(headings: list[str], headers: list[list[tuple[str, str]]], rows: list[_Row | str], width: int) -> str:
    """The block in ordinary figures if they fit, else in compact ones (12.3k) with labels shortened to fit."""
    for compact, header in enumerate(headers):
        cells = [row.compact if compact else row.ordinary for row in rows if isinstance(row, _Row)]
        columns = [
            max([len(line) for line in header[index]] + [len(row[index - 1]) for row in cells])
            for index in range(1, len(header))
        ]
        labels = max([len(header[0][1])] + [len(row.label) for row in rows if isinstance(row, _Row)])
        room = width - sum(columns) - 2 * len(columns)
        if labels <= room:
            break
    labels = min(labels, max(room, 12))
    lines = [_shortened(line, width) for line in headings]
    for part in (0, 1):
        titles = [title[part].rjust(size) for title, size in zip(header[1:], columns, strict=True)]
        lines.append("  ".join([header[0][part].ljust(labels), *titles]).rstrip())
    lines.append("-" * min(width, labels + sum(columns) + 2 * len(columns)))
    for row in rows:
        if isinstance(row, str):
            lines.append(_shortened(row, width))
            continue
        figures = row.compact if compact else row.ordinary
        aligned = [cell.rjust(size) for cell, size in zip(figures, columns, strict=True)]
        lines.append("  ".join([_shortened(row.label, labels).ljust(labels), *aligned]).rstrip())
    return "\n".join(lines)


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- numbers


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate and its interval times `factor`."""
    return Estimate(
        *(None if part is None else part * factor for part in (estimate.value, estimate.low, estimate.high))
    )


def _decimals(values: Iterable[float | None]) -> int:
    """Decimals for three significant digits of the largest of the values, none from 100 on."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    if largest < _TINY:
        return 0
    return min(max(2 - math.floor(math.log10(largest)), 0), 6)


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.,") else text


def _number(value: float | None, decimals: int, compact: bool = False) -> str:
    if value is None:
        return "-"
    if compact:
        for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= factor:
                return _fixed(value / factor, _decimals([value / factor])) + suffix
    return _fixed(value, decimals)


def _plain(estimate: Estimate, decimals: int) -> str:
    return _number(estimate.value, decimals)


def _pair(first: Estimate, second: Estimate, compact: bool) -> str:
    if first.value is None and second.value is None:
        return "-"
    decimals = _decimals([first.value, second.value])
    return f"{_number(first.value, decimals, compact)} / {_number(second.value, decimals, compact)}"


def interval_text(
    estimate: Estimate, *, decimals: int | None = None, signed: bool = False, compact: bool = False
) -> str:
    """`70.1 [60.2, 81.3]`; the estimate alone where there is no interval; `-` where there is no estimate."""
    if estimate.value is None:
        return "-"
    if decimals is None:
        decimals = _decimals([estimate.value, estimate.low, estimate.high])
    text = _number(estimate.value, decimals, compact)
    if signed and estimate.value > 0 and text.strip("0.,"):
        text = "+" + text
    if not estimate.has_interval:
        return text
    return f"{text} [{_number(estimate.low, decimals, compact)}, {_number(estimate.high, decimals, compact)}]"


def _p_value(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def percent_text(estimate: Estimate, *, compact: bool = False) -> str:
    """A share as whole per cent: `92 %`; `-` where there is no estimate."""
    return "-" if estimate.value is None else f"{_number(100 * estimate.value, 0, compact)} %"


def density_text(estimate: Estimate) -> str:
    """Two significant digits: `0.030 %`, `5.0 %`."""
    if estimate.value is None:
        return "-"
    percent = 100 * estimate.value
    if percent == 0:
        return "0 %"
    return f"{_fixed(percent, min(max(1 - math.floor(math.log10(abs(percent))), 0), 6))} %"
