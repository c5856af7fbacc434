"""Perplexity of a text under a causal language model: cut the text into windows, sum the losses, say how sure that is.

Here: windows of a text (the standard sliding ones, or those of FASP's released code), the losses and the intervals over
resampled windows. Not here: the text itself (`texts`), pruning or heads; losses are taken of the model as it stands,
under whatever masks or hooks the caller has put on it, so two calls on the same windows make a paired comparison.
Method: B2, B3.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl

from excise.errors import ExciseError
from excise.evaluation.bootstrap import percentile_interval, resampled_names
from excise.files.tables import read_table, save_table
from excise.models.encoding import opening_tokens, positions, require_embeddings, require_positions
from excise.models.loading import LoadedModel
from excise.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from excise.interventions.protocol import Intervention

SIZE = 256
"""Default window. Short, because the embedded text is: intervals need many windows more than long ones."""
PAPER_STRIDE = 512
TOKENS_AT_ONCE = {"cpu": 1 << 11, "mps": 1 << 12, "cuda": 1 << 14}
LOGITS_AT_ONCE = {"cpu": 1 << 22, "mps": 1 << 24, "cuda": 1 << 26}

Mode = Literal["sliding", "paper"]


@dataclass(frozen=True)
class Window:
    """A stretch of tokens of which the last `scored` count; those before them are context only.

    1 <= scored < len(tokens): the first token of a window has no context, so the first token of a text is never scored.
    """

    tokens: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Interval:
    """A figure with its bootstrap percentile interval and standard error; NaN where there is one window only."""

    estimate: float
    low: float
    high: float
    standard_error: float


# --- windows ---------------------------------------------------------------------------------------------------------


def sliding_windows(tokens: Sequence[int], size: int, stride: int) -> list[Window]:
    """Overlapping windows that score every token but the first exactly once.

    Windows begin every `stride` tokens and hold `size` of them (the last one maybe fewer); each scores the tokens that
    no window before it has scored, so every token after the first window has at least `size - stride` tokens before it.
    Raises ExciseError unless 1 <= stride < size and there are two tokens.
    """
    if not 1 <= stride < size:
        raise ExciseError(f"windows: stride ({stride}) must be at least 1 and less than size ({size})")
    _enough(tokens)
    windows, begin, scored_to = [], 0, 1
    while scored_to < len(tokens):
        end = min(begin + size, len(tokens))
        windows.append(Window(tuple(tokens[begin:end]), end - scored_to))
        begin, scored_to = begin + stride, end
    return windows


def paper_windows(tokens: Sequence[int], max_positions: int) -> list[Window]:
    """The windows of FASP's released code: a quarter of the model's positions, one every 512 tokens (method B2).

    Where the quarter is shorter than 512 (GPT-2: 256) the text between two windows is left out and a whole window but
    its first token is scored; where it is longer (Llama-2: 1,024) windows overlap as sliding ones do. A last window of
    one token, whose mean loss is undefined, is left out. Raises ExciseError for fewer than two tokens or 8 positions.
    """
    size = max_positions // 4
    if size < 2:
        raise ExciseError(f"windows: a quarter of {max_positions} positions is no window; use the mode sliding")
    _enough(tokens)
    windows, end = [], 0
    for begin in range(0, len(tokens), PAPER_STRIDE):
        previous, end = end, min(begin + size, len(tokens))
        if scored := min(end - previous, end - begin - 1):
            windows.append(Window(tuple(tokens[begin:end]), scored))
        if end == len(tokens):
            break
    return windows


def _enough(tokens: Sequence[int]) -> None:
    if len(tokens) < 2:
        raise ExciseError(f"windows: the text has {len(tokens)} tokens; perplexity needs at least two")


def text_windows(
    loaded: LoadedModel,
    text: str,
    *,
    mode: Mode = "sliding",
    size: int | None = None,
    stride: int | None = None,
    limit_tokens: int | None = None,
) -> list[Window]:
    """Tokenize `text` and cut it into windows.

    size, stride: of sliding windows, in tokens; SIZE (or the model's positions, if fewer) and half of it by default.
    Published figures often use 1024 and 512. limit_tokens: measure on the first so many tokens of the text only.

    Where the tokenizer begins texts with a special token (Llama, Gemma), every sliding window begins with it, within
    its size and never scored: those models are lost without it. The mode `paper` follows the released code, which has
    it at the beginning of the text alone. Raises ExciseError for sizes that the model's positions do not allow.
    """
    limit = positions(loaded)
    if limit_tokens is not None and limit_tokens < 2:
        raise ExciseError(f"limit_tokens: {limit_tokens} tokens are no text; give at least 2")
    tokens = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:limit_tokens]
    opening = opening_tokens(loaded.tokenizer)
    if mode == "paper":
        if size is not None or stride is not None:
            raise ExciseError("windows: the mode paper has its own size and stride; leave them out or use mode sliding")
        if limit is None:
            raise ExciseError(f"{loaded.key}: its config names no max_position_embeddings; use the mode sliding")
        return paper_windows([*opening, *tokens], limit)
    if mode != "sliding":
        raise ExciseError(f"windows: mode {mode!r} is not known; use sliding or paper")
    size = min(SIZE, limit or SIZE) if size is None else size
    if limit is not None and size > limit:
        raise ExciseError(
            f"windows: size {size} is more than the {limit} positions of {loaded.key}; give less (text_window)"
        )
    room = size - len(opening)
    stride = max(1, room // 2) if stride is None else stride
    return [Window((*opening, *window.tokens), window.scored) for window in sliding_windows(tokens, room, stride)]


def require_windows(loaded: LoadedModel, windows: Sequence[Window]) -> None:
    """Raise ExciseError for a window without a scored token, without one before it, longer than the model reads, or
    with a token that it has no embedding for."""
    for number, window in enumerate(windows):
        if not 1 <= window.scored < len(window.tokens):
            raise ExciseError(
                f"window {number}: {window.scored} of {len(window.tokens)} tokens scored; it must be at least one and "
                "leave the first out"
            )
        require_positions(loaded, f"window {number}", len(window.tokens))
        require_embeddings(loaded, f"window {number}", window.tokens)


# --- losses ----------------------------------------------------------------------------------------------------------


def window_losses(
    loaded: LoadedModel,
    windows: Sequence[Window],
    *,
    batch: int | None = None,
    progress: Progress = silent,
    label: str = "perplexity",
) -> np.ndarray:
    """Summed negative log likelihood of each window's scored tokens, in nats: float64 [windows].

    Windows of equal length run together, `batch` of them (by default as many as the device takes well; fewer after
    running out of memory). Logits are computed for scored tokens only and in chunks, so a large vocabulary costs no
    memory. Raises ExciseError for a window longer than the model's positions or without a scored token.
    """
    from excise.models.memory import shrinking_batches

    require_windows(loaded, windows)
    if batch is not None and batch < 1:
        raise ExciseError(f"batch: {batch} windows at once are none; give at least 1")
    losses = np.zeros(len(windows))
    by_length: dict[int, list[int]] = {}
    for number, window in enumerate(windows):
        by_length.setdefault(len(window.tokens), []).append(number)
    done = 0
    progress(label, done, len(windows))
    for length, numbers in by_length.items():
        most = batch or max(1, TOKENS_AT_ONCE.get(loaded.device.type, 1 << 11) // length)

        def of_batch(chosen: Sequence[int]) -> np.ndarray:
            return _batch_losses(loaded, [windows[number] for number in chosen])

        for chosen, batch_losses in shrinking_batches(numbers, most, loaded.device, of_batch):
            losses[list(chosen)] = batch_losses
            done += len(chosen)
            progress(label, done, len(windows))
    return losses


def _batch_losses(loaded: LoadedModel, windows: Sequence[Window]) -> np.ndarray:
    import torch

    with torch.inference_mode():
        states, targets = scored_states(loaded, windows)
        losses = torch.cat(list(token_losses(loaded, states, targets, logits_at_once(loaded))))
    return sums_by_window(losses.cpu().numpy(), windows)


def token_losses(
    loaded: LoadedModel, states: torch.Tensor, targets: torch.Tensor, at_once: int
) -> Iterator[torch.Tensor]:
    """Negative log likelihood of tokens, in nats, float32, `at_once` of them after the other.

    states: last hidden states before them, [tokens, hidden]. targets: the tokens, [tokens].
    """
    import torch

    from excise.generation.tree import logits_of

    for start in range(0, len(targets), at_once):
        logits = logits_of(loaded, states[start : start + at_once])
        yield torch.nn.functional.cross_entropy(logits, targets[start : start + at_once], reduction="none")


def scored_states(loaded: LoadedModel, windows: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states [tokens, hidden] before every scored token of windows of equal length, which run together,
    and those tokens [tokens]: window by window, in the order of the text. Called in inference mode."""
    import torch

    tokens = torch.tensor([window.tokens for window in windows], device=loaded.device)
    hidden = loaded.last_hidden(tokens, use_cache=False)[:, :-1]
    counts = torch.tensor([window.scored for window in windows], device=loaded.device)
    scored = torch.arange(tokens.shape[1] - 1, device=loaded.device) >= tokens.shape[1] - 1 - counts[:, None]
    return hidden[scored], tokens[:, 1:][scored]


def logits_at_once(loaded: LoadedModel) -> int:
    """For how many tokens logits are made together."""
    vocabulary = loaded.model.get_output_embeddings().weight.shape[0]
    return max(1, LOGITS_AT_ONCE.get(loaded.device.type, 1 << 24) // vocabulary)


def sums_by_window(figures: np.ndarray, windows: Sequence[Window]) -> np.ndarray:
    """Figures of all scored tokens [tokens], window by window, summed: float64 [windows]."""
    ends = np.cumsum([window.scored for window in windows])
    return np.add.reduceat(np.asarray(figures, dtype=np.float64), [0, *ends[:-1]])


class LossCache:
    """Window losses as files, addressed by model, intervention and text, so that no perplexity is computed twice."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def window_losses(
        self, loaded: LoadedModel, windows: Sequence[Window], intervention: Intervention | None = None
    ) -> np.ndarray:
        """`window_losses` under an intervention, or unpruned, from the folder if they are there."""
        from excise.interventions.protocol import edited

        done = None if intervention is None else intervention.fingerprint
        content = json.dumps([loaded.fingerprint, done, [[*window.tokens, window.scored] for window in windows]])
        path = self.folder / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.parquet"
        if path.is_file():
            return read_table(path, ["loss"])["loss"].to_numpy()
        with edited(loaded, intervention):
            losses = window_losses(loaded, windows)
        save_table(path, pl.DataFrame({"loss": losses}))
        return losses


# --- perplexity ------------------------------------------------------------------------------------------------------


def perplexity(losses: np.ndarray, windows: Sequence[Window], mode: Mode = "sliding") -> float:
    """Perplexity from `window_losses`, with the windows they belong to.

    sliding: exp of the mean loss per scored token. paper: exp of the mean over windows of each window's mean loss, as
    FASP's released code has it: the same where windows score equally many tokens.
    """
    losses = _checked(losses, windows)
    return float(_statistic(mode, windows)(np.ones((1, len(losses))), losses)[0])


def perplexity_interval(
    losses: np.ndarray,
    windows: Sequence[Window],
    mode: Mode = "sliding",
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Perplexity with a bootstrap interval over windows.

    Windows are drawn anew as if they were independent; neighbours share a subject, so the interval is a little narrow.
    It says how much another text of this kind could differ, not how much two models do: for that take
    `perplexity_difference`, where the text's own difficulty cancels.
    """
    losses = _checked(losses, windows)
    statistic = _statistic(mode, windows)
    return _interval(lambda weights: statistic(weights, losses), len(losses), resamples, seed)


def perplexity_difference(
    losses_a: np.ndarray,
    losses_b: np.ndarray,
    windows: Sequence[Window],
    mode: Mode = "sliding",
    *,
    relative: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Perplexity of a less that of b on the same windows, paired: every resample draws the same windows for both.

    With a = the model as it is and b = the model without a head this is FASP's z_ppl (method B3), negative for a head
    that helps. relative: as a share of b's perplexity.
    """
    losses_a, losses_b = _checked(losses_a, windows), _checked(losses_b, windows)
    statistic = _statistic(mode, windows)

    def difference(weights: np.ndarray) -> np.ndarray:
        a, b = statistic(weights, losses_a), statistic(weights, losses_b)
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(a) & np.isfinite(b), a / b - 1 if relative else a - b, np.nan)

    return _interval(difference, len(losses_a), resamples, seed)


def _checked(losses: np.ndarray, windows: Sequence[Window]) -> np.ndarray:
    losses = np.asarray(losses, dtype=np.float64)
    if losses.shape != (len(windows),) or not len(windows):
        raise ExciseError(f"perplexity: losses of shape {losses.shape} for {len(windows)} windows; one loss per window")
    return losses


def _statistic(mode: Mode, windows: Sequence[Window]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Perplexity [n] as a function of how often each window counts [n, windows] and of the losses [windows]."""
    if mode not in ("sliding", "paper"):
        raise ExciseError(f"perplexity: mode {mode!r} is not known; use sliding or paper")
    counts = np.array([window.scored for window in windows], dtype=np.float64)

    def statistic(weights: np.ndarray, losses: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):  # infinite where it is too large to tell
            if mode == "paper":
                return np.exp(weights @ (losses / counts) / weights.sum(1))
            return np.exp((weights @ losses) / (weights @ counts))

    return statistic


def _interval(of_weights: Callable[[np.ndarray], np.ndarray], windows: int, resamples: int, seed: int) -> Interval:
    if resamples < 2:
        raise ExciseError(f"resamples: {resamples} are too few for an interval; give at least 2")
    figures = of_weights(resampled_names(windows, resamples, np.random.default_rng(seed)))
    estimate, drawn = figures[0], figures[1:]
    if windows < 2:
        return Interval(float(estimate), float("nan"), float("nan"), float("nan"))
    low, high = percentile_interval(drawn) if np.isfinite(estimate) else (np.nan, np.nan)
    deviation = np.std(drawn, ddof=1) if np.isfinite(drawn).all() else np.nan
    return Interval(float(estimate), low, high, float(deviation))
