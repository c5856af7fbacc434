"""Attribution: what each weight contributes, from the unpruned model's prompts and answers.

Here is the one entry to all scores of a variation and the files they are kept in; each score has a module of its own. A
file is addressed by what decides its content, so a score that is there already is never computed again, and one that
was begun goes on (`parts`). Turning scores into masks belongs to `excise.strategies.build`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from excise.errors import ExciseError
from excise.evaluation.judged import judged
from excise.files.parts import Parts
from excise.files.tensors import NO_ROOM, save_tensors
from excise.models.encoding import encode, require_same_prompts
from excise.models.loading import LoadedModel
from excise.outcomes import Outcome
from excise.progress import Progress, silent
from excise.scenarios import Comparison

if TYPE_CHECKING:
    from excise.attribution.gap_gradient import GapGradient
    from excise.generation.completions import CompletionCache
    from excise.generation.tree import AnswerTree

SCORES = ("wanda", "attention", "snip", "gap_gradient")
OF_VALUES = ("gap_gradient",)
"""Scores that are made of what the answers are worth; the others take any text."""
PARTS = ".parts"
"""Suffix of the folder beside a file of scores that holds what there is of it while it is made."""
VERSION = "5"
"""Part of every file's address; to be raised when a score's computation changes."""
GAP_GRADIENT_KEEP = 0.01
"""Share of each matrix kept as candidates: far above the densities at which a model survives."""
SNIP_WEIGHTINGS = ("minority", "majority")
SNIP_SAMPLES = 4
"""Samples per prompt that SNIP takes: every answer needs a backward pass of its own."""


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
    outcome: Outcome,
    scores: Iterable[str],
    permutations: int,
    seed: int,
    folder: Path,
    cache: CompletionCache | None = None,
    progress: Progress = silent,
) -> list[AttributionFile]:
    """Compute, or find, the scores of every variation in `completions` (the unpruned model's).

    scores: names of SCORES. permutations: random relabellings of the names to keep norms for (the `permuted` control).
    cache: of the answers that `gap_gradient` enumerates.
    Answers of groups that are not compared are left aside. Returns one file per variation and score, in the order of
    `scored_places`, which leaves out what cannot be learned. Raises ExciseError for a score that is not known, where
    the model would now read other prompts than those answered, and for scores that are not finite.
    """
    loaded = loaded.asked_for(outcome)
    require_same_prompts(encode(loaded, prompts), completions)
    scores = list(scores)
    wanted = scored_places(completions, scores, comparison=comparison, outcome=outcome)
    compared = completions.filter(pl.col("group").is_in([comparison.majority, comparison.minority]))
    files = []
    for (variation,), answers in compared.group_by("variation", maintain_order=True):
        # In the order of the address, as random signs of gap_gradient follow the answers.
        rows = answers.sort("prompt_id", "sample")
        some = prompts.filter(pl.col("prompt_id").is_in(rows["prompt_id"].unique().to_list())).sort("prompt_id")
        for score in scores:
            if (variation, score) not in wanted:
                continue
            address = _address(loaded, some, rows, score, comparison, outcome, permutations, seed)
            path = folder / score / f"{address}.safetensors"
            reused, started = path.is_file(), time.perf_counter()
            if not reused:
                measure = {"wanda": _input_norms, "attention": _attention, "gap_gradient": _gap_gradient}
                parts, label = Parts(path.with_suffix(PARTS)), f"{score} {variation}"
                if score == "snip":
                    _write_snip(path, loaded, some, rows, comparison, progress, label, parts)
                else:
                    tensors, metadata = measure[score](
                        loaded, some, rows, comparison, outcome, permutations, seed, progress, label, parts, cache
                    )
                    for tensor in tensors.values():
                        _require_finite(loaded, score, variation, tensor)
                    save_tensors(path, tensors, metadata)
                parts.clear()
            files.append(
                AttributionFile(variation, score, path, path.stat().st_size, reused, time.perf_counter() - started)
            )
    return files


def scored_places(
    completions: pl.DataFrame,
    scores: Iterable[str],
    *,
    comparison: Comparison,
    outcome: Outcome,
) -> list[tuple[str, str]]:
    """(variation, score) of all that `attribute` can learn from these completions.

    A score of `OF_VALUES` needs a variation that can be judged (`excise.evaluation.judged`), by values above 0 where
    differences are judged on a log scale; `attention` needs names that wrote something in each group, and in each half
    of any relabelling; the others take answers of any kind. Raises ExciseError for a score that is not known.
    """
    scores, groups = list(scores), [comparison.majority, comparison.minority]
    if unknown := [score for score in scores if score not in SCORES]:
        raise ExciseError(f"strategies: score {unknown[0]!r} is not known; known are {', '.join(SCORES)}")
    compared = completions.filter(pl.col("group").is_in(groups))
    valued = compared
    if outcome.log_scale:
        valued = compared.with_columns(value=pl.when(pl.col("value") > 0).then(pl.col("value")))
    able = {score: set(judged(valued, groups, outcome.cluster)) for score in OF_VALUES}
    able["attention"] = {
        variation for (variation,), rows in compared.group_by("variation") if _enough_written(rows, groups)
    }
    return [
        (variation, score)
        for variation in compared["variation"].unique(maintain_order=True)
        for score in scores
        if score not in able or variation in able[score]
    ]


def _enough_written(rows: pl.DataFrame, groups: list[str]) -> bool:
    """Whether each group, and each half of any relabelling of the names, has an answer with a token to attend from."""
    wrote = pl.col("token_ids").list.len() - pl.col("finished").cast(pl.Int64) > 0
    names = rows.group_by("group", "subject").agg(wrote=wrote.any())
    sizes = dict(names.group_by("group").len().iter_rows())
    writing = dict(names.group_by("group").agg(pl.col("wrote").sum()).iter_rows())
    silent = names.height - sum(writing.values())
    return min(writing.get(group, 0) for group in groups) > 0 and silent < min(sizes.values())


def relabelled(prompts: pl.DataFrame, comparison: Comparison, seed: int, draw: int) -> set[str]:
    """The subjects that count as the minority in a random relabelling of the names; the groups keep their sizes."""
    subjects = (
        prompts.select("subject", "group")
        .unique(maintain_order=True)
        .filter(pl.col("group").is_in([comparison.majority, comparison.minority]))
        .sort("subject")
    )
    size = (subjects["group"] == comparison.minority).sum()
    order = np.random.default_rng([seed, draw]).permutation(subjects.height)
    return set(subjects["subject"].gather(order[:size]).to_list())


def read_norms(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Norms of a `wanda` file: {weighting: {"layer.site": float32 [in]}}.

    Weightings: minority, majority, pooled, and permuted_minority_i / permuted_majority_i per relabelling. The file does
    without the pooled ones: squares of norms are means over sequences, and it knows how many each group has.
    """
    tensors, metadata = _load(path)
    names = json.loads(metadata["weightings"])
    found = {name: {key: tensor[row] for key, tensor in tensors.items()} for row, name in enumerate(names)}
    if "pooled" not in found:
        counts = np.array(json.loads(metadata["sequences"]), dtype=np.float64)
        shares = counts / counts.sum()
        found["pooled"] = {
            key: np.sqrt(
                sum(
                    share * tensor[names.index(side)].astype(np.float64) ** 2
                    for share, side in zip(shares, ("minority", "majority"), strict=True)
                )
            ).astype(np.float32)
            for key, tensor in tensors.items()
        }
    return found


def read_attention(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Scores of an `attention` file: {"mean" or "max": {weighting: float32 [layers, heads]}}; weightings as norms."""
    tensors, metadata = _load(path)
    names = json.loads(metadata["weightings"])
    return {how: dict(zip(names, tensors[how], strict=True)) for how in ("mean", "max")}


def read_snip(path: Path, key: str, weighting: str) -> np.ndarray:
    """Scores of one matrix, float32 [out, in], for `weighting` minority or majority; only these are read."""
    from safetensors import safe_open

    _require_file(path)
    with safe_open(path, framework="numpy") as file:
        return file.get_slice(key)[SNIP_WEIGHTINGS.index(weighting)]


def read_candidates(path: Path) -> GapGradient:
    """The candidates of a `gap_gradient` file."""
    from excise.attribution.gap_gradient import Candidates, GapGradient

    tensors, metadata = _load(path)
    shapes = {key: tuple(shape) for key, shape in json.loads(metadata["shapes"]).items()}
    candidates = {key: Candidates(*(tensors[f"{key}/{part}"] for part in ("index", "drop", "harm"))) for key in shapes}
    return GapGradient(float(metadata["damping"]), candidates, shapes)


def _address(
    loaded: LoadedModel,
    prompts: pl.DataFrame,
    rows: pl.DataFrame,
    score: str,
    comparison: Comparison,
    outcome: Outcome,
    permutations: int,
    seed: int,
) -> str:
    """What decides a file's content, and nothing else: for each score its answers, groups and settings.

    prompts, rows: those of one variation and of the compared groups, in a fixed order. Prompts go in as their tokens,
    so that a prompt that is rendered in another way has another address. How many rows a pass takes decides nothing.
    """
    encoded = encode(loaded, prompts)
    asked: list[object] = [list(each.tokens) for each in encoded]
    number = {each.prompt_id: place for place, each in enumerate(encoded)}
    sides = {comparison.majority: "majority", comparison.minority: "minority"}
    settings: list[object] = []
    columns = ["token_ids", "finished"]
    if score in ("wanda", "attention"):
        settings = [sorted(relabelled(prompts, comparison, seed, draw)) for draw in range(permutations)]
        columns += ["subject"] if permutations else []
        asked += [list(each.name) for each in encoded if score == "attention"]
    elif score == "snip":
        rows, columns = rows.filter(pl.col("sample") < SNIP_SAMPLES), ["token_ids"]
    else:
        parameters = json.loads(rows["parameters"][0])
        settings = [
            outcome.log_scale,
            seed,
            GAP_GRADIENT_KEEP,
            *(parameters[name] for name in ("temperature", "top_k", "top_p")),
        ]
        columns += ["value"]
    answers = [
        [number[prompt_id], sides[group], *decisive]
        for prompt_id, group, *decisive in rows.select("prompt_id", "group", *columns).iter_rows()
    ]
    content = [VERSION, loaded.fingerprint, score, settings, asked, answers]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _trees(
    loaded: LoadedModel, prompts: pl.DataFrame, rows: pl.DataFrame, weights: np.ndarray
) -> tuple[list[int], list[AnswerTree], list[tuple[int, int]]]:
    """The trunk's tokens, one answer tree per prompt, and where its columns carry the name; weights: [rows, W]."""
    from excise.generation.tree import answer_tree, common_prefix

    encoded = encode(loaded, prompts)
    # Names that begin alike must not have their first tokens in the trunk.
    length = min(common_prefix([prompt.tokens for prompt in encoded]), *(prompt.name[0] for prompt in encoded))
    numbered = rows.with_row_index("row")
    trees = []
    for prompt in encoded:
        own = numbered.filter(pl.col("prompt_id") == prompt.prompt_id)
        answers = [
            (ids[:-1], ids[-1]) if finished else (ids, None)
            for ids, finished in own.select("token_ids", "finished").iter_rows()
        ]
        trees.append(answer_tree(prompt.tokens[length:], answers, weights[own["row"].to_numpy()]))
    names = [(prompt.name[0] - length, prompt.name[1] - length) for prompt in encoded]
    return list(encoded[0].tokens[:length]), trees, names


def _weightings(prompts, rows, comparison, permutations, seed) -> dict[str, np.ndarray]:
    """Which rows count for the minority, the majority, both, and either side of each relabelling: bool [rows] each."""
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
    return weightings


def _input_norms(loaded, prompts, rows, comparison, outcome, permutations, seed, progress, label, parts, cache):
    from excise.attribution.wanda import input_norms

    weightings = _weightings(prompts, rows, comparison, permutations, seed)
    del weightings["pooled"]  # made of both sides when it is read
    weights = np.stack([each.astype(np.float64) for each in weightings.values()], axis=1)
    trunk, trees, _ = _trees(loaded, prompts, rows, weights)
    norms = input_norms(loaded, trunk, trees, weights.sum(axis=0), progress=progress, label=label, parts=parts)
    sequences = [int(weightings[side].sum()) for side in ("minority", "majority")]
    return {f"{layer}.{site}": value for (layer, site), value in norms.items()}, {
        "weightings": json.dumps(list(weightings)),
        "sequences": json.dumps(sequences),
    }


def _attention(loaded, prompts, rows, comparison, outcome, permutations, seed, progress, label, parts, cache):
    from excise.attribution.attention import attention_to_name

    weightings = _weightings(prompts, rows, comparison, permutations, seed)
    weights = np.stack([each.astype(np.float64) for each in weightings.values()], axis=1)
    trunk, trees, names = _trees(loaded, prompts, rows, weights)
    scores = attention_to_name(loaded, trunk, trees, names, progress=progress, label=label, parts=parts)
    return scores, {"weightings": json.dumps(list(weightings))}


def _write_snip(path, loaded, prompts, rows, comparison, progress, label, parts):
    """Scores of all matrices, appended to the file as they come: they are as large as the model, twice."""
    from excise.attribution.snip import snip
    from excise.generation.tree import common_prefix

    encoded = encode(loaded, prompts)
    length = common_prefix([prompt.tokens for prompt in encoded])
    tokens = {prompt.prompt_id: prompt.tokens[length:] for prompt in encoded}
    counted = (
        rows.filter(
            pl.col("group").is_in([comparison.majority, comparison.minority]) & (pl.col("sample") < SNIP_SAMPLES)
        )
        .group_by("prompt_id", "group", "token_ids", maintain_order=True)
        .agg(pl.len().alias("times"))
    )
    answers = [(tokens[prompt], tuple(ids)) for prompt, ids in counted.select("prompt_id", "token_ids").iter_rows()]
    sides = [counted["group"].to_numpy() == getattr(comparison, side) for side in SNIP_WEIGHTINGS]
    weights = np.stack([side * counted["times"].to_numpy().astype(float) for side in sides], axis=1)
    roles = tuple(dict.fromkeys(linear.role for linear in loaded.topology.linears))
    pieces = snip(
        loaded, encoded[0].tokens[:length], answers, weights, roles=roles, progress=progress, label=label, parts=parts
    )

    def finite() -> Iterator[tuple[str, np.ndarray]]:
        for key, piece in pieces:
            _require_finite(loaded, "snip", rows["variation"][0], piece)
            yield key, piece

    _save_stream(path, {linear.key: (2, *linear.shape) for linear in loaded.topology.linears}, finite())


def _gap_gradient(loaded, prompts, rows, comparison, outcome, permutations, seed, progress, label, parts, cache):
    from excise.attribution.gap_free import ask
    from excise.attribution.gap_gradient import gap_gradient
    from excise.generation.sampling import SamplingParameters

    asked = ask(
        loaded,
        prompts,
        rows,
        place=rows["variation"][0],
        comparison=comparison,
        outcome=outcome,
        significance=1.0,
        seed=seed,
        cache=cache,
    )
    trees = [
        replace(name.tree, edge_visits=np.stack([each @ name.paths for each in (name.own - name.target, name.own)], 1))
        for name in asked.names
    ]
    found = gap_gradient(
        loaded,
        asked.trunk,
        trees,
        SamplingParameters(**json.loads(rows["parameters"][0])),
        roles=tuple(dict.fromkeys(linear.role for linear in loaded.topology.linears)),
        keep=GAP_GRADIENT_KEEP,
        seed=seed,
        progress=progress,
        label=label,
        parts=parts,
    )
    tensors = {}
    for key, each in found.candidates.items():
        tensors |= {f"{key}/index": each.index, f"{key}/drop": each.drop, f"{key}/harm": each.harm}
    return tensors, {"damping": repr(float(found.damping)), "shapes": json.dumps(found.shapes)}


def _require_finite(loaded: LoadedModel, score: str, variation: str, scores: np.ndarray) -> None:
    from excise.generation.tree import not_finite

    if not np.isfinite(scores.sum(dtype=np.float64)):
        raise ExciseError(f"variation {variation}: {not_finite(loaded, f'{score} scores')}")


def _save_stream(path: Path, shapes: dict[str, tuple[int, ...]], pieces: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write float32 tensors as safetensors while they are made, so that one at a time is in memory.

    The format is a header of JSON that says where each tensor lies, and the tensors behind it.
    """
    header, place = {}, 0
    for key, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    written = set()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key, piece in pieces:
                if piece.shape != shapes[key]:
                    raise ValueError(f"{key} has shape {piece.shape}, not {shapes[key]}")
                file.seek(8 + len(text) + header[key]["data_offsets"][0])
                file.write(np.ascontiguousarray(piece, dtype="<f4").data)
                written.add(key)
        if written != set(shapes):
            raise ValueError(f"{path}: no scores for {', '.join(sorted(set(shapes) - written))}")
        os.replace(partial, path)
    except OSError as error:
        raise ExciseError(f"{path}: cannot be written ({error}); {NO_ROOM}") from error
    finally:
        partial.unlink(missing_ok=True)


def _require_file(path: Path) -> None:
    if not Path(path).is_file():
        raise ExciseError(f"{path}: this attribution file is gone; materialize attribution_scores again")


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import safe_open

    _require_file(path)
    with safe_open(path, framework="numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 - not a mapping
