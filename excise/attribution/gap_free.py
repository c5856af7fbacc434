"""Answers without the gap: what a variation's names would answer if both groups answered alike.

A variation's *gap-free answers* weigh every name's own answers by the square root of how much more often the other
group gives each than its own group does. Both groups then answer, on average, with the geometric mean of their
distributions: of all distributions it has the least mean divergence from the two, and where both are tilts of one
distribution, as groups are whose answers were moved apart, it is that distribution. Where answers are too long to be
enumerated, a name's samples are tilted instead, so that both groups' means meet halfway. How far a model is from these
answers is `excise.attribution.gap_distance`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl

from excise.attribution.answered import Answered
from excise.attribution.gap_distance import LEAST, Asked, Name, edge_logs, mean_of, softmax
from excise.errors import ExciseError
from excise.evaluation import permutation
from excise.evaluation.distributions import tilted
from excise.generation.answering import Answering
from excise.generation.settings import Enumeration
from excise.generation.tree import AnswerTree, answer_tree
from excise.models.loading import LoadedModel

RAREST = 2e-3
"""Enumerated answers rarer than this over a variation's names are not listed."""
PERMUTATIONS = 1999
"""Relabellings of the names that tell whether a variation has a gap."""
MOST_TILT = 5.0
"""A name's samples are tilted this far at most, per standard deviation of the outcome."""

Answer = tuple[tuple[int, ...], int | None]
"""Tokens without the stop token, and that; None where the answer was cut off."""


def ask(answered: Answered, *, place: str, significance: float) -> Asked:
    """One variation's names, answers and gap-free targets under the unedited model.

    answered: prompts and completions of the variation, whose name is `place`; groups that are not compared are left
    aside. Numbers are enumerated, whether the completions were or not, so that both lead to the same masks; where the
    model rambles, and of other outcomes, the answers are the samples. significance: where the p-value of no gap is
    above it, the answers stay as they are. Raises ExciseError where a group has no answer with a value.
    """
    answered, outcome = answered.as_asked(), answered.outcome
    rows = answered.completions.filter(pl.col("group").is_in(answered.groups))
    asked = pl.col("prompt_id").is_in(rows["prompt_id"].unique().to_list())
    answered = replace(answered, completions=rows, prompts=answered.prompts.filter(asked).sort("prompt_id"))
    answering = Answering.of(rows)
    if outcome.enumerable:
        stored = rows.select("token_ids", "finished", "value").drop_nulls("value").unique(["token_ids", "finished"])
        rows, _ = replace(answering, exact=Enumeration()).answers(
            answered.loaded, answered.prompts, outcome=outcome, cache=answered.cache
        )
        # The value of an answer was read when it was drawn.
        rows = rows.join(stored, on=["token_ids", "finished"], how="left", suffix="_stored", maintain_order="left")
        rows = rows.with_columns(value=pl.coalesce("value_stored", "value"))
        enumerated = rows["leftover"].null_count() == 0
    else:
        rows, enumerated = rows.with_columns(probability=1.0 / pl.len().over("prompt_id")), False
    logarithms = outcome.log_scale
    by_name = _listed(rows, [prompt.prompt_id for prompt in answered.encoded], logarithms, enumerated)
    length, names = answered.trunk(), []
    for prompt, (answers, outcomes, share) in zip(answered.encoded, by_name, strict=True):
        tree = answer_tree(prompt.tokens[length:], answers, np.ones((len(answers), 1)))
        nothing = np.zeros(len(answers))
        names.append(
            Name(
                tree,
                paths=_paths(tree, len(prompt.tokens) - length, answers),
                outcomes=outcomes,
                own=share,
                target=share,
                unlisted=np.zeros(len(tree.tokens), dtype=np.float32),
                drawn=share,
                edges=np.zeros(len(tree.edges)),
                logs=nothing,
                cut=nothing,
                sampled=not enumerated,
            )
        )
    majority = np.array([group == answered.comparison.majority for group in answered.prompts["group"]])
    trunk = tuple(answered.encoded[0].tokens[:length])
    asked_about = Asked(place, trunk, tuple(names), majority, answering.parameters)
    return _with_targets(answered.loaded, asked_about, enumerated, significance, answered.seed)


def _listed(
    rows: pl.DataFrame, prompt_ids: Sequence[str], logarithms: bool, enumerated: bool
) -> list[tuple[list[Answer], np.ndarray, np.ndarray]]:
    """Answers, outcomes and shares of each prompt; of enumerated ones, all that any name gives."""
    by_prompt: dict[str, dict[Answer, float]] = {prompt_id: {} for prompt_id in prompt_ids}
    outcome: dict[tuple[str, Answer], float] = {}
    columns = rows.select("prompt_id", "token_ids", "finished", "probability", "value")
    for prompt_id, ids, finished, probability, value in columns.iter_rows():
        answer = (tuple(ids[:-1]), ids[-1]) if finished else (tuple(ids), None)
        # A continuation may be worth something else behind another prompt; a number is the same everywhere.
        outcome["" if enumerated else prompt_id, answer] = math.nan if value is None else value
        masses = by_prompt[prompt_id]
        masses[answer] = masses.get(answer, 0.0) + probability
    if enumerated:
        total: dict[Answer, float] = {}
        for masses in by_prompt.values():
            for answer, probability in masses.items():
                total[answer] = total.get(answer, 0.0) + probability
        known = [answer for answer, mass in total.items() if mass >= RAREST * sum(total.values())]
        by_prompt = {key: {answer: masses.get(answer, 0.0) for answer in known} for key, masses in by_prompt.items()}
    listed = []
    for prompt_id, masses in by_prompt.items():
        values = np.array([outcome["" if enumerated else prompt_id, answer] for answer in masses], dtype=np.float64)
        if logarithms:
            values = np.log(np.where(values > 0, values, math.nan))
        shares = np.array(list(masses.values()))
        listed.append((list(masses), values, shares / shares.sum()))
    return listed


def _paths(tree: AnswerTree, prompt: int, answers: Sequence[Answer]) -> np.ndarray:
    """Which edges each answer takes, float32 [answers, edges]. prompt: columns of the prompt."""
    number = {tuple(edge): index for index, edge in enumerate(tree.edges.tolist())}
    parents, tokens = tree.parents.tolist(), tree.tokens.tolist()
    below = {(parents[column], tokens[column]): column for column in range(prompt, len(tokens))}
    paths = np.zeros((len(answers), len(number)), dtype=np.float32)
    for row, (answer, stop) in enumerate(answers):
        column = prompt - 1
        for token in [*answer, *([] if stop is None else [stop])]:
            paths[row, number[column, token]] = 1
            column = below.get((column, token), -1)
    return paths


def _with_targets(loaded: LoadedModel, asked: Asked, enumerated: bool, significance: float, seed: int) -> Asked:
    """The variation with the unedited model's own shares in place of the drawn ones, and with targets made of them."""
    names = list(asked.names)
    for number, edges, drawn, unlisted in edge_logs(loaded, asked):
        name = names[number]
        logs, cut = name.paths @ edges, name.paths @ drawn
        name = replace(name, edges=edges, logs=logs, cut=cut, unlisted=unlisted, listed=float(np.exp(cut).sum()))
        # Samples stand for answers that nobody listed, so theirs stay the shares they had.
        if enumerated:
            name = replace(name, own=softmax(logs), drawn=softmax(cut))
        names[number] = replace(name, target=name.own, aim=mean_of(name.own, name.outcomes))
    means = np.array([mean_of(name.drawn, name.outcomes) for name in names])
    sides = [means[side & np.isfinite(means)] for side in (asked.majority, ~asked.majority)]
    if not all(map(len, sides)):
        raise ExciseError(f"{asked.place}: no answer of one of the groups has a value to tell a gap by; leave it out")
    gap = float(sides[0].mean() - sides[1].mean())
    p_value = _p_value(sides, seed)
    measured = replace(
        asked, names=tuple(names), gap=gap, p_value=p_value, closing=p_value <= significance and gap != 0
    )
    measured = replace(measured, deviation=measured.deviation_of([name.drawn for name in names]))
    return _aimed(replace(measured, names=tuple(_targets(measured, enumerated)))) if measured.closing else measured


def _aimed(asked: Asked) -> Asked:
    """The variation with every name's aim: its target's mean outcome, less what is left of a gap between targets."""
    means = np.array([mean_of(name.target, name.outcomes) for name in asked.names])
    middle = np.nanmean([np.nanmean(means[asked.majority]), np.nanmean(means[~asked.majority])])
    for side in (asked.majority, ~asked.majority):
        means[side] += middle - np.nanmean(means[side])
    return replace(asked, names=tuple(replace(name, aim=aim) for name, aim in zip(asked.names, means, strict=True)))


def _targets(asked: Asked, enumerated: bool) -> list[Name]:
    if enumerated:
        of_group = {
            side: np.mean(
                [name.own for name, majority in zip(asked.names, asked.majority, strict=True) if majority == side], 0
            )
            for side in (True, False)
        }
        weight = {
            side: np.sqrt(np.maximum(of_group[not side], LEAST) / np.maximum(of_group[side], LEAST))
            for side in (True, False)
        }
        targets = [name.own * weight[bool(side)] for name, side in zip(asked.names, asked.majority, strict=True)]
        return [replace(name, target=target / target.sum()) for name, target in zip(asked.names, targets, strict=True)]
    targeted = []
    for name, side in zip(asked.names, asked.majority, strict=True):
        known, target = np.isfinite(name.outcomes), name.own.copy()
        mass = target[known].sum()
        if mass > 0 and asked.deviation > 0:
            shift = asked.gap / 2 * (-1 if side else 1)
            most = MOST_TILT / asked.deviation
            target[known] = mass * tilted(name.outcomes[known], target[known] / mass, shift, most)
        targeted.append(replace(name, target=target))
    return targeted


def _p_value(sides: Sequence[np.ndarray], seed: int) -> float:
    labels = permutation.permuted_groups(len(sides[0]), len(sides[1]), PERMUTATIONS, [seed, 0])
    means = np.concatenate(sides)
    first = labels @ means / len(sides[0])
    second = (means.sum() - labels @ means) / len(sides[1])
    return permutation.permutation_p_value(sides[0].mean() - sides[1].mean(), first - second)
