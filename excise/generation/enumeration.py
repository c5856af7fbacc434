"""The exact distribution of a model's short answers: its answer tree enumerated, likeliest prefixes first.

A number is a few tokens, and truncated sampling leaves few of them at each step, so most of an answer's probability
sits in a small tree that one visit per prefix resolves: means, SMD and inlier ratio follow without Monte-Carlo error,
with the unvisited (*leftover*) mass as a rigorous bound. Drawing answers is in `excise.generation.sampling`, from whose
distributions these trees are made; what the metrics mean is in `excise.evaluation.metrics` (method, A1).

Which is cheaper: a prefix costs the same here and there, and both read the prompt once. Where a model answers with a
number alone, its tree has tens of prefixes, 100 samples visit nearly all of them, and enumeration costs no more while
being worth any number of samples. Where it writes sentences the tree grows beyond any `max_nodes`: such a prompt
*rambles*, and sampling is cheaper; `exact_completions` goes over to it by itself. Low temperature and small top-p make
trees small; with top_p 1 and no top_k only a model that is sure of itself has one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from excise.errors import ExciseError
from excise.generation.completions import (
    CACHE_SCHEMA,
    COMPLETIONS_SCHEMA,
    CompletionCache,
    Work,
    cache_address,
    complete,
    peak_memory,
)
from excise.interventions.protocol import Intervention, edited
from excise.models.encoding import encode, reader, require_positions
from excise.outcomes import Answer, Outcome
from excise.outcomes.answers import continued
from excise.outcomes.kinds.number import numbers_of
from excise.progress import Progress, silent

if TYPE_CHECKING:
    from excise.generation.sampling import SamplingParameters
    from excise.generation.tree import Rows
    from excise.models.loading import LoadedModel

EXACT_SCHEMA = {**COMPLETIONS_SCHEMA, "probability": pl.Float64, "leftover": pl.Float64}
"""One row per distinct answer, `sample` numbering a prompt's answers from the likeliest on. `leftover` is the mass of
the prompt's unvisited answers; null where the prompt was sampled instead, each sample with probability 1 / samples."""
EXACT_SETTINGS = ("answers", "leftover", "max_nodes", "samples")
"""What the column `parameters` of enumerated answers holds beside the sampling parameters."""
TREE_CACHE_SCHEMA = {**CACHE_SCHEMA, "probability": pl.Float64, "leftover": pl.Float64, "nodes": pl.Int64}
"""An enumerated prompt in the cache of completions, a row per answer; one without any has a row of probability 0."""
CACHE_COLUMNS = {"cpu": 1 << 14, "cuda": 1 << 17, "mps": 1 << 14}
"""Columns, all prompts of a batch together, whose keys and values are held at once."""
NODES_PER_ROUND = 32
"""Prefixes of one prompt expanded side by side. The same for every prompt, so that neighbours change no result."""
DUST = 1 / 8
"""Share of the allowed leftover that may be answers of full length too unlikely to be listed."""


# --- enumeration ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerDistribution:
    """The answers of one prompt, likeliest first.

    tokens: the answers' tokens without the stop token; stops: that token, None where max_new_tokens cut the answer
    off; probability: float64 [n], with sum 1 - leftover; values: float64 [n], NaN = unparsed; nodes: prefixes read;
    complete: whether leftover is as small as asked, which it is not where the model rambles.
    """

    tokens: tuple[tuple[int, ...], ...]
    stops: tuple[int | None, ...]
    probability: np.ndarray
    values: np.ndarray
    leftover: float
    nodes: int
    complete: bool

    def listed(self) -> list[tuple[list[int], bool, float, float]]:
        """Token ids with the stop token, whether that is there, probability and value of every answer; where none was
        found, one of probability 0, as the prompt still has a leftover to tell."""
        found = zip(self.tokens, self.stops, self.probability.tolist(), self.values.tolist(), strict=True)
        return [
            ([*tokens, *([] if stop is None else [stop])], stop is not None, probability, value)
            for tokens, stop, probability, value in found
        ] or [([], False, 0.0, math.nan)]


def answer_distributions(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    parameters: SamplingParameters,
    *,
    leftover: float = 0.01,
    max_nodes: int = 256,
    values: Values = numbers_of,
    prefixes: Sequence[str] | None = None,
    batch_prompts: int | None = None,
    on_batch: Callable[[dict[int, AnswerDistribution]], None] = lambda batch: None,
    progress: Progress = silent,
    label: str = "enumerating",
) -> list[AnswerDistribution]:
    """Enumerate the answers of each prompt, as `excise.generation.sampling.sample` would draw them, in the order of the
    prompts.

    prompts: token ids per prompt. leftover: mass that may stay unvisited, 0 for none. max_nodes: prefixes read per
    prompt at most. values: what answers are worth (`Outcome.values`). prefixes: per prompt, what of its answers stands
    in it already. batch_prompts: prompts per batch (default: as many as the device takes). on_batch gets the
    distributions of each finished batch by the number of the prompt.

    Every round expands each prompt's likeliest prefixes, all but the unlikeliest that sum to at most `leftover`.
    Unvisited mass only splits up further, so on the way to `leftover` no prefix is read that expanding strictly one by
    one would have spared. Where max_nodes comes first, the last round's choice is by level as much as by likelihood.
    Raises ExciseError for a leftover outside [0, 1), for max_nodes below 1, for a prompt that leaves no room for an
    answer, and for logits that are not finite.
    """
    import torch

    from excise.generation.sampling import PREFILL_TOKENS
    from excise.generation.tree import Rows, common_prefix
    from excise.models.memory import FittingBatches

    if not 0 <= leftover < 1:
        raise ExciseError(f"exact answers: leftover is {leftover!r}, but must be at least 0 and below 1, such as 0.01")
    if max_nodes < 1:
        raise ExciseError(f"exact answers: max_nodes is {max_nodes!r}, but must be at least 1")
    if not len(prompts):
        return []
    places: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        require_positions(loaded, f"prompt {index}", len(prompt), parameters.max_new_tokens)
        places.setdefault(tuple(prompt), []).append(index)
    begun = [""] * len(prompts) if prefixes is None else prefixes
    value_of = {prefix: _values(loaded, values, prefix) for prefix in set(begun)}
    found: dict[int, AnswerDistribution] = {}
    progress(label, 0, len(prompts))
    with torch.inference_mode():
        queue = sorted(places, key=lambda prompt: (len(prompt), places[prompt]))
        trunk_length = common_prefix(queue)
        trunk = Rows(loaded, queue[0][:trunk_length])
        longest, kind = len(queue[-1]) - trunk_length, loaded.device.type
        size = batch_prompts or max(
            1, min(PREFILL_TOKENS[kind] // longest, CACHE_COLUMNS[kind] // (longest + max_nodes))
        )

        def enumerated(batch: Sequence[tuple[int, ...]]) -> list[_Tree]:
            return _enumerate_batch(loaded, trunk, trunk_length, batch, parameters, leftover, max_nodes)

        for batch, trees in FittingBatches(size, loaded.device).over(queue, enumerated):
            finished = {}
            for prompt, tree in zip(batch, trees, strict=True):
                found_by_prefix = {
                    begun[index]: _distribution(tree, leftover, value_of[begun[index]]) for index in places[prompt]
                }
                finished |= {index: found_by_prefix[begun[index]] for index in places[prompt]}
            on_batch(finished)
            found |= finished
            progress(label, len(found), len(prompts))
    return [found[index] for index in range(len(prompts))]


@dataclass
class _Tree:
    """One prompt's tree while it grows.

    nodes: expanded prefixes as (tokens, columns of the row they occupy, mass); the frontier's arrays [F] say which
    prefixes come next: their mass, the node above, and the token. dust: mass given up. answers: (tokens, stop, mass).
    """

    nodes: list[tuple[tuple[int, ...], tuple[int, ...], float]]
    mass: np.ndarray = field(default_factory=lambda: np.zeros(0))
    above: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    token: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    dust: float = 0.0
    answers: list[tuple[tuple[int, ...], int | None, float]] = field(default_factory=list)

    @property
    def leftover(self) -> float:
        return self.dust + float(self.mass[::-1].sum())


def _enumerate_batch(
    loaded: LoadedModel,
    trunk: Rows,
    trunk_length: int,
    prompts: Sequence[Sequence[int]],
    parameters: SamplingParameters,
    leftover: float,
    max_nodes: int,
) -> list[_Tree]:
    import torch

    rows = trunk.copy(len(prompts))
    lengths = np.array([len(prompt) for prompt in prompts])
    width = lengths.max() - trunk_length
    tokens = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : lengths[row] - trunk_length] = prompt[trunk_length:]
    attends = np.tril(np.ones((trunk_length + width, trunk_length + width), dtype=bool))[None, trunk_length:]
    positions = trunk_length + np.arange(width)[None]
    shape = (len(prompts), -1, -1)
    hidden = rows.forward(
        torch.from_numpy(tokens), torch.from_numpy(positions).expand(shape[:2]), torch.from_numpy(attends).expand(shape)
    )
    trees = [_Tree([((), (), 1.0)]) for _ in prompts]
    expanded = [(row, 0) for row in range(len(prompts))]
    alive = np.arange(len(prompts))
    place = (np.arange(len(prompts)), lengths - trunk_length - 1)
    columns = trunk_length + width
    while True:
        _branch(
            loaded,
            hidden[tuple(map(torch.from_numpy, place))],
            [(trees[t], node) for t, node in expanded],
            parameters,
            leftover,
            max_nodes,
        )
        chosen = [_next_nodes(trees[tree], leftover, max_nodes) for tree in alive]
        going = np.flatnonzero([len(each) for each in chosen])
        if not len(going):
            return trees
        if len(going) < len(alive):
            rows.keep(going)
        alive, chosen = alive[going], [chosen[row] for row in going]
        width = max(map(len, chosen))
        tokens = np.zeros((len(alive), width), dtype=np.int64)
        positions = np.repeat(lengths[alive][:, None], width, axis=1)
        attends = np.zeros((len(alive), width, columns + width), dtype=bool)
        place, expanded = ([], []), []
        for row, (index, picks) in enumerate(zip(alive, chosen, strict=True)):
            tree = trees[index]
            attends[row, : len(picks), : lengths[index]] = True
            for slot, pick in enumerate(picks):
                above, path, _ = tree.nodes[tree.above[pick]]
                token, path = int(tree.token[pick]), (*path, columns + slot)
                tokens[row, slot] = token
                positions[row, slot] += len(above)
                attends[row, slot, list(path)] = True
                place[0].append(row)
                place[1].append(slot)
                expanded.append((index, len(tree.nodes)))
                tree.nodes.append(((*above, token), path, float(tree.mass[pick])))
            rest = np.delete(np.arange(len(tree.mass)), picks)
            tree.mass, tree.above, tree.token = tree.mass[rest], tree.above[rest], tree.token[rest]
        hidden = rows.forward(*map(torch.from_numpy, (tokens, positions, attends)))
        place = tuple(map(np.array, place))
        columns += width


def _next_nodes(tree: _Tree, leftover: float, max_nodes: int) -> np.ndarray:
    """The frontier's prefixes to expand next, likeliest first; none where the tree is done. Forgets the hopeless ones.

    A prefix behind more likelier ones than may still be read is never reached, since later prefixes only add to them.
    """
    able = max_nodes - len(tree.nodes)
    order = np.argsort(-tree.mass, kind="stable")
    if able < len(order):
        tree.dust += float(tree.mass[order[able:]].sum())
        kept = np.sort(order[:able])
        tree.mass, tree.above, tree.token = tree.mass[kept], tree.above[kept], tree.token[kept]
        order = np.argsort(-tree.mass, kind="stable")
    unread = tree.dust + np.cumsum(tree.mass[order][::-1])[::-1]
    return order[: min(int((unread > leftover).sum()), NODES_PER_ROUND)]


def _branch(
    loaded: LoadedModel,
    hidden,
    expanded: Sequence[tuple[_Tree, int]],
    parameters: SamplingParameters,
    leftover: float,
    max_nodes: int,
) -> None:
    """Put the next tokens of expanded nodes into their trees. hidden: [nodes, hidden]."""
    from excise.generation.sampling import LOGIT_ROWS, next_tokens
    from excise.generation.tree import logits_of

    stops = np.array(sorted(loaded.stop_tokens), dtype=np.int64)
    grown: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for start in range(0, len(hidden), LOGIT_ROWS):
        for numbers, ids, cumulative in next_tokens(logits_of(loaded, hidden[start : start + LOGIT_ROWS]), parameters):
            # What a uniform number's search in the cumulative distribution returns, and how often.
            share = np.diff(cumulative.numpy(), axis=1, prepend=0.0)
            for number, own, shares in zip(numbers, ids.numpy(), share, strict=True):
                possible = shares > 0
                grown[start + int(number)] = own[possible], shares[possible]
    # In the order in which they were chosen, whatever the order of the distributions: ties must fall alike.
    for number, (tree, node) in enumerate(expanded):
        ids, shares = grown[number]
        above, _, mass = tree.nodes[node]
        ends = np.isin(ids, stops)
        stopped = zip(ids[ends].tolist(), (mass * shares[ends]).tolist(), strict=True)
        tree.answers += [(above, stop, own) for stop, own in stopped]
        ids, shares = ids[~ends], shares[~ends]
        last = len(above) + 1 == parameters.max_new_tokens
        rising = np.argsort(shares, kind="stable")
        if last:
            given_up = np.searchsorted(np.cumsum(shares[rising]), DUST * leftover, side="right")
        else:  # as in _next_nodes
            given_up = max(0, len(shares) - (max_nodes - len(tree.nodes)))
        tree.dust += mass * float(shares[rising[:given_up]].sum())
        kept = np.sort(rising[given_up:])
        ids, masses = ids[kept], mass * shares[kept]
        if last:
            cut_off = zip(ids.tolist(), masses.tolist(), strict=True)
            tree.answers += [((*above, token), None, own) for token, own in cut_off]
        else:
            tree.mass = np.concatenate([tree.mass, masses])
            tree.above = np.concatenate([tree.above, np.full(len(ids), node)])
            tree.token = np.concatenate([tree.token, ids])


Values = Callable[[Sequence[Answer]], list[float | None]]
"""What answers are worth; None: nothing that could be counted."""
ValueOf = Callable[[Sequence[int], bool], float]
"""From an answer's tokens without the stop token, and whether there was one, to its value; NaN = unparsed."""


def _values(loaded: LoadedModel, values: Values, prefix: str) -> ValueOf:
    read = reader(loaded)

    def value_of(tokens: Sequence[int], finished: bool) -> float:
        text, ended = read(tokens)
        (value,) = values([Answer("", continued(prefix, text), finished or ended)])
        return math.nan if value is None else value

    return value_of


def _distribution(tree: _Tree, leftover: float, value_of: ValueOf) -> AnswerDistribution:
    answers = sorted(tree.answers, key=lambda answer: (-answer[2], answer[0], answer[1] or 0))
    return _valued(answers, tree.leftover, len(tree.nodes), leftover, value_of)


def _valued(
    answers: Sequence[tuple[tuple[int, ...], int | None, float]],
    unread: float,
    nodes: int,
    leftover: float,
    value_of: ValueOf,
) -> AnswerDistribution:
    """answers: (tokens, stop, probability), likeliest first; unread: the mass that they leave over."""
    values = [value_of(tokens, stop is not None) for tokens, stop, _ in answers]
    return AnswerDistribution(
        tuple(answer[0] for answer in answers),
        tuple(answer[1] for answer in answers),
        np.array([answer[2] for answer in answers], dtype=np.float64),
        np.array(values, dtype=np.float64),
        unread,
        nodes,
        unread <= leftover,
    )


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Enumeration:
    """How far answer trees are read: leftover mass at most, prefixes per prompt at most (`answer_distributions`)."""

    leftover: float = 0.01
    max_nodes: int = 256


@dataclass(frozen=True)
class Answering:
    """How the answers of a partition are had: `samples` a prompt; or, with `exact`, enumerated, and sampled where the
    model rambles."""

    samples: int
    parameters: SamplingParameters
    exact: Enumeration | None = None

    @classmethod
    def of(cls, rows: pl.DataFrame) -> Answering:
        """As rows that are there were had, by their columns parameters and sample."""
        from excise.generation.sampling import SamplingParameters

        known = json.loads(rows["parameters"][0])
        if known.pop("answers", "sampled") == "exact":
            samples = known.pop("samples")
            exact = Enumeration(known.pop("leftover"), known.pop("max_nodes"))
            return cls(samples, SamplingParameters(**known), exact)
        return cls(rows["sample"].max() + 1, SamplingParameters(**known))

    def answers(
        self,
        loaded: LoadedModel,
        prompts: pl.DataFrame,
        *,
        outcome: Outcome,
        intervention: Intervention | None = None,
        cache: CompletionCache | None = None,
        progress: Progress = silent,
        **scoring,
    ) -> tuple[pl.DataFrame, Work]:
        """Rows with the columns of EXACT_SCHEMA, where `probability` and `leftover` are null for plain samples.

        scoring: scorer and scores as in `complete`. Progress counts as many completions as samples would be.
        """
        if self.exact is None:
            rows, work = complete(
                loaded,
                prompts,
                self.samples,
                self.parameters,
                outcome=outcome,
                intervention=intervention,
                cache=cache,
                progress=progress,
                **scoring,
            )
            nothing = pl.lit(None, pl.Float64)
            return rows.with_columns(probability=nothing, leftover=nothing), work
        return exact_completions(
            loaded,
            prompts,
            self.parameters,
            outcome=outcome,
            leftover=self.exact.leftover,
            max_nodes=self.exact.max_nodes,
            samples=self.samples,
            intervention=intervention,
            cache=cache,
            progress=lambda label, done, total: progress(label, done * self.samples, total * self.samples),
        )


def exact_completions(
    loaded: LoadedModel,
    prompts: pl.DataFrame,
    parameters: SamplingParameters,
    *,
    outcome: Outcome,
    leftover: float = 0.01,
    max_nodes: int = 256,
    samples: int | None = 100,
    intervention: Intervention | None = None,
    cache: CompletionCache | None = None,
    progress: Progress = silent,
    label: str = "enumerating",
    batch_prompts: int | None = None,
) -> tuple[pl.DataFrame, Work]:
    """The answers of every prompt with their probabilities, under an intervention if one is given.

    prompts: rows of `excise.scenarios.expand`. The outcome may replace max_new_tokens of `parameters`. leftover,
    max_nodes: as in `answer_distributions`. samples: how often a prompt that rambles is sampled instead; None keeps
    what was enumerated, with a larger leftover. cache: trees and samples that are there are not made again, new ones
    are added batch by batch. Returns rows with the columns of EXACT_SCHEMA in the order of prompts, and what they
    cost; there a prefix counts as a token and a distinct answer as a completion.
    Raises ExciseError for an outcome whose answers are too long.
    """
    if not outcome.enumerable:
        raise ExciseError(f"exact answers: the outcome is {outcome.kind}, but only numbers are short enough; sample it")
    parameters = replace(parameters, max_new_tokens=outcome.answer_tokens(parameters.max_new_tokens))
    loaded = loaded.asked_for(outcome)
    prefixes = (
        [prefix or "" for prefix in prompts["answer_prefix"]]
        if "answer_prefix" in prompts.columns
        else ([""] * prompts.height)
    )
    encoded = encode(loaded, prompts, new_tokens=parameters.max_new_tokens)
    keys = [prompt.hash for prompt in encoded]
    settings = json.dumps(
        asdict(parameters) | dict(zip(EXACT_SETTINGS, ("exact", leftover, max_nodes, samples), strict=True)),
        sort_keys=True,
    )
    address = cache_address(loaded, intervention, tree_settings(settings))
    value_of = {prefix: _values(loaded, outcome.values, prefix) for prefix in set(prefixes)}
    begun = dict(zip(keys, prefixes, strict=True))
    known = _read_trees(cache, address, {key: value_of[prefix] for key, prefix in begun.items()}, leftover)
    asked = {prompt.hash: prompt.tokens for prompt in encoded}
    missing = [key for key in asked if key not in known]

    def keep(batch: dict[int, AnswerDistribution]) -> None:
        if cache:
            cache.add(address, _tree_rows({missing[number]: each for number, each in batch.items()}))

    progress(label, len(asked) - len(missing), len(asked))
    started = time.perf_counter()
    with edited(loaded, intervention if missing else None):
        fresh = answer_distributions(
            loaded,
            [asked[key] for key in missing],
            parameters,
            leftover=leftover,
            max_nodes=max_nodes,
            values=outcome.values,
            prefixes=[begun[key] for key in missing],
            batch_prompts=batch_prompts,
            on_batch=keep,
            progress=lambda _, done, __: progress(label, len(asked) - len(missing) + done, len(asked)),
        )
    seconds = time.perf_counter() - started if missing else 0.0
    known |= zip(missing, fresh, strict=True)
    found = [known[key] for key in keys]
    rambling = [index for index, each in enumerate(found) if not each.complete and samples is not None]
    instead, new = set(rambling), set(missing)
    table: dict[str, list] = {name: [] for name in ("order", *EXACT_SCHEMA)}
    drawn = 0
    read = reader(loaded)
    for order, (row, each) in enumerate(zip(prompts.iter_rows(named=True), found, strict=True)):
        if order in instead:
            continue
        for number, (ids, finished, probability, value) in enumerate(each.listed()):
            tokens = ids[:-1] if finished else ids
            if prefixes[order] != begun[keys[order]]:  # the same prompt, of which more, or less, is its answer's
                value = value_of[prefixes[order]](tokens, finished)
            cells = {name: row[name] for name in COMPLETIONS_SCHEMA if name in row}
            cells |= {
                "order": order,
                "model": loaded.key,
                "sample": number,
                "text": read(tokens)[0],
                "value": None if math.isnan(value) else value,
                "finished": finished,
                "tokens": len(ids),
                "token_ids": ids,
                "seed": parameters.seed,
                "model_fingerprint": loaded.fingerprint,
                "parameters": settings,
                "prompt_hash": keys[order],
                "probability": probability,
                "leftover": each.leftover,
            }
            for name, column in table.items():
                column.append(cells[name])
            drawn += keys[order] in new
    rows = pl.DataFrame(table, schema={"order": pl.Int64, **EXACT_SCHEMA})
    nodes = sum(each.nodes for each in fresh)
    work = Work(drawn, rows.height - drawn, seconds, nodes, peak_memory(loaded.devices))
    if rambling:
        sampled, cost = complete(
            loaded,
            prompts[rambling],
            samples,
            parameters,
            outcome=outcome,
            intervention=intervention,
            cache=cache,
            batch_prompts=batch_prompts,
        )
        sampled = sampled.with_columns(
            pl.Series("order", np.repeat(rambling, samples), pl.Int64),
            pl.lit(settings).alias("parameters"),
            pl.lit(1 / samples).alias("probability"),
            pl.lit(None, pl.Float64).alias("leftover"),
        )
        rows = pl.concat([rows, sampled.select(rows.columns)])
        work += cost
    return rows.sort("order", "sample").drop("order"), work


def _tree_rows(found: dict[str, AnswerDistribution]) -> pl.DataFrame:
    """Rows of TREE_CACHE_SCHEMA; found: by the prompt's key."""
    rows = [
        (key, number, ids, finished, probability, each.leftover, each.nodes)
        for key, each in found.items()
        for number, (ids, finished, probability, _) in enumerate(each.listed())
    ]
    return pl.DataFrame(rows, schema=TREE_CACHE_SCHEMA, orient="row")


def _read_trees(
    cache: CompletionCache | None, address: str, value_of: Mapping[str, ValueOf], leftover: float
) -> dict[str, AnswerDistribution]:
    """The distributions that the cache holds of the prompts that `value_of` has, by the prompt's key."""
    rows = cache.read(address) if cache else pl.DataFrame(schema=TREE_CACHE_SCHEMA)
    if rows.is_empty():
        return {}
    rows = rows.filter(pl.col("prompt").is_in(list(value_of))).sort("prompt", "sample")
    found = {}
    for (key,), own in rows.group_by("prompt", maintain_order=True):
        listed = own.select("token_ids", "finished", "probability").rows()
        answers = [
            (tuple(ids[:-1] if finished else ids), ids[-1] if finished else None, probability)
            for ids, finished, probability in listed
            if probability > 0
        ]
        found[key] = _valued(answers, own["leftover"][0], own["nodes"][0], leftover, value_of[key])
    return found


def as_samples(rows: pl.DataFrame, samples: int) -> pl.DataFrame:
    """Distributions as `samples` answers a prompt that stand for them; rows of plain samples as they are.

    rows: with columns prompt_id, sample, probability and, if any, leftover. Every answer comes as often as the nearest
    whole numbers to its share of the known mass allow (systematic sampling: exact but for less than one answer), in an
    order in which any first few are spread over the distribution. probability and leftover are null then, and
    `parameters` are those of samples.
    """
    if "probability" not in rows.columns or rows["probability"].null_count() == rows.height:
        return rows
    # The golden ratio's multiples fill the unit interval evenly from the first on.
    rank = np.argsort(np.argsort((np.arange(samples) * (math.sqrt(5) - 1) / 2) % 1, kind="stable"))
    points = (rank + 0.5) / samples
    chosen: list[np.ndarray] = []
    own = rows.with_row_index("_row")
    for part in own.partition_by("prompt_id", maintain_order=True):
        part = part.sort("sample")
        if part["leftover"][0] is None:
            chosen.append(part["_row"].to_numpy())
            continue
        mass = np.cumsum(part["probability"].to_numpy())
        if not mass[-1] > 0:
            raise ExciseError(
                f"exact answers: no answer of prompt {part['prompt_id'][0]} was found; raise max_nodes, or sample"
            )
        chosen.append(part["_row"].to_numpy()[np.searchsorted(mass, points * mass[-1], side="right")])
    nothing = pl.lit(None, pl.Float64)
    found = rows[np.concatenate(chosen)].with_columns(
        sample=pl.concat([pl.int_range(len(each), eager=True) for each in chosen]),
        probability=nothing,
        leftover=nothing,
    )
    if "parameters" in found.columns:
        plain = {settings: sampling_settings(settings) for settings in found["parameters"].unique()}
        found = found.with_columns(pl.col("parameters").replace_strict(plain))
    return found


def sampling_settings(settings: str) -> str:
    """The sampling parameters alone of a value of the column `parameters`, JSON."""
    known = json.loads(settings)
    return json.dumps({name: value for name, value in known.items() if name not in EXACT_SETTINGS}, sort_keys=True)


def enumeration_settings(settings: str) -> str:
    """The parameters of answers enumerated as usual (`Enumeration`) in the place of those of `settings`, JSON both."""
    usual = asdict(Enumeration()) | {"answers": "exact"}
    return json.dumps(json.loads(sampling_settings(settings)) | usual, sort_keys=True)


def tree_settings(settings: str) -> str:
    """What decides an enumerated tree, of a value of the column `parameters`, JSON: nothing is drawn, so neither the
    seed nor the number of samples does."""
    known = json.loads(settings)
    return json.dumps({name: value for name, value in known.items() if name not in ("seed", "samples")}, sort_keys=True)
