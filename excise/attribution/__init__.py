"""Attribution: what each weight contributes, from the unpruned model's prompts and answers.

Here is the one entry to all scores of a variation and the files they are kept in; each score has a module of its own. A
file is addressed by what decides its content, so a score that is there already is never computed again. Turning scores
into masks belongs to `excise.strategies`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from excise.encoding import encode
from excise.errors import ExciseError
from excise.models import LoadedModel
from excise.progress import Progress, silent
from excise.scenarios import Comparison, NumberOutcome

if TYPE_CHECKING:
    from excise.attribution.gap_gradient import GapGradient
    from excise.tree import AnswerTree

SCORES = ("wanda", "gap_gradient")
VERSION = "1"
"""Part of every file's address; to be raised when a score's computation changes."""
GAP_GRADIENT_KEEP = 0.01
"""Share of each matrix kept as candidates: far above the densities at which a model survives."""


@dataclass(frozen=True)
class AttributionFile:
    """One score of one variation on disk (safetensors) and how it came about."""

    variation: str
    score: str
    path: Path
    bytes: int
    reused: bool
    seconds: float


def attribute(
    loaded: LoadedModel,
    prompts: pl.DataFrame,
    completions: pl.DataFrame,
    *,
    comparison: Comparison,
    outcome: NumberOutcome,
    scores: Iterable[str],
    permutations: int,
    seed: int,
    folder: Path,
    progress: Progress = silent,
) -> list[AttributionFile]:
    """Compute, or find, the scores of every variation in `completions` (the unpruned model's).

    scores: names of SCORES. permutations: random relabellings of the names to keep norms for (the `permuted` control).
    Returns one file per variation and score. Raises ExciseError where a group has no parsed answer to learn from.
    """
    files = []
    for (variation,), rows in completions.group_by("variation", maintain_order=True):
        for score in scores:
            if score not in SCORES:
                raise ExciseError(f"strategies: score {score!r} is not known; known are {', '.join(SCORES)}")
            address = _address(loaded, rows, score, comparison, outcome, permutations, seed)
            path = folder / score / f"{address}.safetensors"
            reused, started = path.is_file(), time.perf_counter()
            if not reused:
                some = prompts.filter(pl.col("prompt_id").is_in(rows["prompt_id"].unique().to_list()))
                measure = _input_norms if score == "wanda" else _gap_gradient
                label = f"{score} {variation}"
                tensors, metadata = measure(
                    loaded, some, rows, comparison, outcome, permutations, seed, progress, label
                )
                _save(path, tensors, metadata)
            files.append(
                AttributionFile(variation, score, path, path.stat().st_size, reused, time.perf_counter() - started)
            )
    return files


def relabelled(prompts: pl.DataFrame, comparison: Comparison, seed: int, draw: int) -> set[str]:
    """The subjects that count as the minority in a random relabelling of the names; the groups keep their sizes."""
    subjects = prompts.select("subject", "group").unique(maintain_order=True).filter(
        pl.col("group").is_in([comparison.majority, comparison.minority])
    ).sort("subject")  # fmt: skip
    size = (subjects["group"] == comparison.minority).sum()
    order = np.random.default_rng([seed, draw]).permutation(subjects.height)
    return set(subjects["subject"].gather(order[:size]).to_list())


def read_norms(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Norms of a `wanda` file: {weighting: {"layer.site": float32 [in]}}.

    Weightings: minority, majority, pooled, and permuted_minority_i / permuted_majority_i per relabelling.
    """
    tensors, metadata = _load(path)
    names = json.loads(metadata["weightings"])
    return {name: {key: tensor[row] for key, tensor in tensors.items()} for row, name in enumerate(names)}


def read_candidates(path: Path) -> GapGradient:
    """The candidates of a `gap_gradient` file."""
    from excise.attribution.gap_gradient import Candidates, GapGradient

    tensors, metadata = _load(path)
    keys = dict.fromkeys(name.rsplit("/", 1)[0] for name in tensors)
    return GapGradient(
        float(metadata["disparity"]), float(metadata["damping"]),
        {key: Candidates(*(tensors[f"{key}/{part}"] for part in ("index", "drop", "harm"))) for key in keys},
    )  # fmt: skip


def _address(loaded: LoadedModel, rows: pl.DataFrame, score: str, *settings: object) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, loaded.fingerprint, score, [str(each) for each in settings]]).encode())
    decisive = rows.select("prompt_id", "group", "sample", "token_ids", "value", "parameters")
    digest.update(json.dumps(decisive.rows()).encode())
    return digest.hexdigest()[:24]


def _trees(
    loaded: LoadedModel, prompts: pl.DataFrame, rows: pl.DataFrame, weights: np.ndarray
) -> tuple[list[int], list[AnswerTree]]:
    """The trunk's tokens and one answer tree per prompt; weights: [rows, W]."""
    from excise.tree import answer_tree, common_prefix

    encoded = encode(loaded, prompts)
    length = common_prefix([prompt.tokens for prompt in encoded])
    numbered = rows.with_row_index("row")
    trees = []
    for prompt in encoded:
        own = numbered.filter(pl.col("prompt_id") == prompt.prompt_id)
        answers = [
            (ids[:-1], ids[-1]) if finished else (ids, None)
            for ids, finished in own.select("token_ids", "finished").iter_rows()
        ]
        trees.append(answer_tree(prompt.tokens[length:], answers, weights[own["row"].to_numpy()]))
    return list(encoded[0].tokens[:length]), trees


def _input_norms(loaded, prompts, rows, comparison, outcome, permutations, seed, progress, label):
    from excise.attribution.wanda import input_norms

    groups, subjects = rows["group"].to_numpy(), rows["subject"].to_list()
    compared = np.isin(groups, [comparison.majority, comparison.minority])
    weightings = {
        "minority": groups == comparison.minority,
        "majority": groups == comparison.majority,
        "pooled": compared,
    }
    for draw in range(permutations):
        chosen = relabelled(prompts, comparison, seed, draw)
        minority = np.array([subject in chosen for subject in subjects]) & compared
        weightings |= {f"permuted_minority_{draw}": minority, f"permuted_majority_{draw}": compared & ~minority}
    weights = np.stack([each.astype(np.float64) for each in weightings.values()], axis=1)
    trunk, trees = _trees(loaded, prompts, rows, weights)
    norms = input_norms(loaded, trunk, trees, weights.sum(axis=0), progress=progress, label=label)
    return {f"{layer}.{site}": value for (layer, site), value in norms.items()}, {
        "weightings": json.dumps(list(weightings))
    }


def _gap_gradient(loaded, prompts, rows, comparison, outcome, permutations, seed, progress, label):
    from excise.attribution.gap_gradient import advantages, gap_gradient
    from excise.sampling import SamplingParameters

    values = rows["value"].cast(pl.Float64).fill_null(math.nan).to_numpy()
    if outcome.scale == "log":
        values = np.log(np.where(values > 0, values, math.nan))
    groups = rows["group"].to_numpy()
    for group in (comparison.majority, comparison.minority):
        if not np.isfinite(values[groups == group]).any():
            raise ExciseError(
                f"variation {rows['variation'][0]}: no answer of group {group!r} is a number; nothing to attribute"
            )
    weight, disparity = advantages(values, groups, comparison.majority, comparison.minority)
    share = rows.select((1 / pl.len().over("prompt_id")).alias("share"))["share"].to_numpy()
    trunk, trees = _trees(loaded, prompts, rows, np.stack([weight, share], axis=1))
    parameters = SamplingParameters(**json.loads(rows["parameters"][0]))
    roles = tuple(dict.fromkeys(linear.role for linear in loaded.topology.linears))
    found = gap_gradient(
        loaded,
        trunk,
        trees,
        disparity,
        parameters,
        roles=roles,
        keep=GAP_GRADIENT_KEEP,
        seed=seed,
        progress=progress,
        label=label,
    )
    tensors = {}
    for key, each in found.candidates.items():
        tensors |= {f"{key}/index": each.index, f"{key}/drop": each.drop, f"{key}/harm": each.harm}
    return tensors, {"disparity": repr(float(found.disparity)), "damping": repr(float(found.damping))}


def _save(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    from safetensors.numpy import save_file

    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, partial, metadata=metadata)
        os.replace(partial, path)
    except OSError as error:
        raise ExciseError(f"{path}: cannot be written ({error}); free space or move EXCISE_DATA") from error


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import safe_open

    if not Path(path).is_file():
        raise ExciseError(f"{path}: this attribution file is gone; materialize attribution_scores again")
    with safe_open(path, framework="numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 - not a mapping
