"""Figures as text, with as many digits as they bear, and never rounded onto the other side of a bound.

Here single figures, intervals and names of levels become text. Sentences and tables of them are made in `reporting`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from excise.evaluation.table import TINY, Estimate, scaled

FEW = "†"
"""Behind an interval: it comes from so few names that it says little."""


def level_label(level: str) -> str:
    """A level's name as people read it: `prompt-specific`, `within-context`, `cross-context`."""
    return level.replace("_", "-")


def floor_text(floor: float) -> str:
    """A threshold with the decimals it was given, two at least: `0.90`, `0.875`."""
    text = f"{floor:.6f}".rstrip("0")
    return text if len(text) >= 4 else f"{floor:.2f}"


def ratio_against(ratio: float | None, floor: float) -> str:
    """The ratio with two decimals, or as many as it takes not to look like a floor it misses, or like 0 or 1."""
    if ratio is None:
        return "unknown"
    decimals = 2
    while ratio < floor <= round(ratio, decimals) and decimals < 6:
        decimals += 1
    return ratio_text(ratio) if decimals == 2 else f"{ratio:.{decimals}f}"


def points_text(estimate: Estimate) -> str:
    """A difference of two shares: `85 percentage points [70, 99]`."""
    value, *interval = interval_text(scaled(estimate, 100.0), decimals=0).split(" ", 1)
    return " ".join([value, "percentage points", *interval])


def decimals_of(values: Iterable[float | None]) -> int:
    """Decimals for three significant digits of the largest of the values, none from 100 on."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    if largest < TINY:
        return 0
    return min(max(2 - math.floor(math.log10(largest)), 0), 6)


def fixed_text(value: float, decimals: int) -> str:
    """A figure with these decimals and commas; what is rounded to 0 has no sign."""
    text = f"{value:,.{decimals}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.,") else text


def number_text(value: float | None, decimals: int, compact: bool = False) -> str:
    """The same, `-` for None; compact: thousands as k, millions as M."""
    if value is None:
        return "-"
    if compact:
        for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= factor:
                return fixed_text(value / factor, decimals_of([value / factor])) + suffix
    return fixed_text(value, decimals)


def ratio_text(value: float | None) -> str:
    """A share with two decimals, or as many as it takes not to look like 0 or 1 where it is neither; `-` for None."""
    if value is None:
        return "-"
    decimals = 2
    while round(value, decimals) in (0.0, 1.0) and value not in (0.0, 1.0) and decimals < 6:
        decimals += 1
    return number_text(value, decimals)


def pair_text(first: Estimate, second: Estimate, compact: bool) -> str:
    if first.value is None and second.value is None:
        return "-"
    decimals = decimals_of([first.value, second.value])
    return f"{number_text(first.value, decimals, compact)} / {number_text(second.value, decimals, compact)}"


def interval_text(
    estimate: Estimate, *, decimals: int | None = None, signed: bool = False, compact: bool = False
) -> str:
    """`70.1 [60.2, 81.3]`; the estimate alone where there is no interval; `-` where there is no estimate.

    A dagger stands behind an interval from few names.
    """
    if estimate.value is None:
        return "-"
    if decimals is None:
        decimals = decimals_of([estimate.value, estimate.low, estimate.high])
    text = number_text(estimate.value, decimals, compact)
    if signed and estimate.value > 0 and text.strip("0.,"):
        text = "+" + text
    if not estimate.has_interval:
        return text
    ends = f"[{number_text(estimate.low, decimals, compact)}, {number_text(estimate.high, decimals, compact)}]"
    return f"{text} {ends}{FEW if estimate.few_names else ''}"


def p_text(value: float | None) -> str:
    """A p-value with three decimals, never 0: `0.031`, `< 0.001`; `-` for None."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def p_equals(value: float) -> str:
    """`p = 0.031`, `p < 0.001`."""
    text = p_text(value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def per_cent(estimate: Estimate, *, signed: bool = False, compact: bool = False) -> str:
    """A share and its interval in whole per cent, without the sign: `92 [80, 99]`; 99.7 is not rounded to 100."""
    decimals = 0
    value = estimate.value
    while not signed and value is not None and value < 1 <= round(value, 2 + decimals) and decimals < 3:
        decimals += 1
    return interval_text(scaled(estimate, 100.0), decimals=decimals, signed=signed, compact=compact)


def percent_text(estimate: Estimate, *, compact: bool = False) -> str:
    """A share as whole per cent: `92 %`; `-` where there is no estimate."""
    return "-" if estimate.value is None else f"{per_cent(Estimate(estimate.value), compact=compact)} %"


def density_text(estimate: Estimate) -> str:
    """Two significant digits: `0.030 %`, `5.0 %`."""
    if estimate.value is None:
        return "-"
    percent = 100 * estimate.value
    if percent == 0:
        return "0 %"
    return f"{fixed_text(percent, min(max(1 - math.floor(math.log10(abs(percent))), 0), 6))} %"
