"""What scores are made of: prompts, the unpruned model's answers to them, and the two groups that are compared.

Here is how answers count for one group or the other, and for either half of a random relabelling of the names; what a
score makes of them is in its own module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from excise.models.encoding import EncodedPrompt, encode

if TYPE_CHECKING:
    from excise.generation.completions import CompletionCache
    from excise.generation.tree import AnswerTree
    from excise.models.loading import LoadedModel
    from excise.outcomes import Outcome
    from excise.scenarios import Comparison


@dataclass(frozen=True)
class Answered:
    """A model, prompts that it was asked, and its answers.

    prompts: rows of `excise.scenarios.expand`. completions: of the unpruned model. permutations: random
    relabellings of the names to make scores for, too (the `permuted` control). cache: of answers that are enumerated.
    """

    loaded: LoadedModel
    prompts: pl.DataFrame
    completions: pl.DataFrame
    comparison: Comparison
    outcome: Outcome
    permutations: int = 0
    seed: int = 0
    cache: CompletionCache | None = None

    @property
    def groups(self) -> list[str]:
        """Majority and minority."""
        return [self.comparison.majority, self.comparison.minority]

    @cached_property
    def encoded(self) -> list[EncodedPrompt]:
        """The prompts as the model reads them."""
        return encode(self.loaded, self.prompts)

    def as_asked(self) -> Answered:
        """With the model as the outcome has it asked."""
        return replace(self, loaded=self.loaded.asked_for(self.outcome))

    def variations(self) -> dict[str, Answered]:
        """Each variation's answers of the groups that are compared, and their prompts, both in the order of addresses:
        random signs of `gap_gradient` follow the answers."""
        compared = self.completions.filter(pl.col("group").is_in(self.groups))
        by_variation = {}
        for (variation,), answers in compared.group_by("variation", maintain_order=True):
            rows = answers.sort("prompt_id", "sample")
            asked = pl.col("prompt_id").is_in(rows["prompt_id"].unique().to_list())
            by_variation[str(variation)] = replace(
                self, prompts=self.prompts.filter(asked).sort("prompt_id"), completions=rows
            )
        return by_variation

    def relabelled(self, draw: int) -> set[str]:
        """The subjects that count as the minority in a random relabelling of the names (`relabelled`)."""
        return relabelled(self.prompts, self.comparison, self.seed, draw)

    def weightings(self) -> dict[str, np.ndarray]:
        """Which rows count for the minority, the majority, both ("pooled"), and either side of each relabelling
        (permuted_minority_0, permuted_majority_0, ...): bool [rows] each."""
        groups, subjects = self.completions["group"].to_numpy(), self.completions["subject"].to_list()
        compared = np.isin(groups, self.groups)
        weightings = {
            "minority": groups == self.comparison.minority,
            "majority": groups == self.comparison.majority,
            "pooled": compared,
        }
        for draw in range(self.permutations):
            chosen = self.relabelled(draw)
            minority = np.array([subject in chosen for subject in subjects]) & compared
            weightings |= {f"permuted_minority_{draw}": minority, f"permuted_majority_{draw}": compared & ~minority}
        return weightings

    def trunk(self) -> int:
        """How many tokens all prompts begin with, before any name: names that begin alike keep their first tokens."""
        return trunk_before_names(self.encoded)

    def trees(self, weights: np.ndarray) -> tuple[list[AnswerTree], list[tuple[int, int]]]:
        """One answer tree per prompt, behind the trunk, and where its columns carry the name. weights: [rows, W]."""
        from excise.generation.tree import answer_tree

        length, numbered = self.trunk(), self.completions.with_row_index("row")
        trees = []
        for prompt in self.encoded:
            rows = numbered.filter(pl.col("prompt_id") == prompt.prompt_id)
            answers = [
                (ids[:-1], ids[-1]) if finished else (ids, None)
                for ids, finished in rows.select("token_ids", "finished").iter_rows()
            ]
            trees.append(answer_tree(prompt.tokens[length:], answers, weights[rows["row"].to_numpy()]))
        return trees, [(prompt.name[0] - length, prompt.name[1] - length) for prompt in self.encoded]


def trunk_before_names(encoded: list[EncodedPrompt]) -> int:
    """How many tokens prompts share that lie before the name of every one of them."""
    from excise.generation.tree import common_prefix

    return min(common_prefix([prompt.tokens for prompt in encoded]), *(prompt.name[0] for prompt in encoded))


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
