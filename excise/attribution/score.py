"""What a score is: one record, which its module offers, and what passes between a score, its file and a selection.

To add one is to add a module with such a record: here among `excise.attribution.BUILT_IN`, or in an installed package
that names it in its entry points `excise.scores`. How selections rank what is read is `excise.strategies`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from excise.attribution.answered import Answered
from excise.conditions import RANDOM
from excise.files.parts import Work

if TYPE_CHECKING:
    from excise.attribution.gap_gradient import GapGradient
    from excise.models.loading import LoadedModel
    from excise.models.topology import Linear

FRACTIONS, COUNTS = frozenset({"tau_min", "tau_maj"}), frozenset({"k_min", "k_maj"})
"""Parameters of a set difference: shares of what is ranked together, or numbers of heads."""


@dataclass(frozen=True)
class Tensors:
    """What a file of scores holds, all at once."""

    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stream:
    """What a file of scores holds, float32, one tensor after the other: they need not fit into memory together.

    shapes: of all of them, by name.
    """

    shapes: Mapping[str, tuple[int, ...]]
    pieces: Iterable[tuple[str, np.ndarray]]


@dataclass(frozen=True)
class Decisive:
    """What decides the content of a file beside the model, the tokens of the prompts and the groups.

    rows: the answers that count. columns: what of them. settings: parameters. prompts: more about the prompts. The
    last two as JSON takes them.
    """

    rows: pl.DataFrame
    columns: Sequence[str]
    settings: Sequence[object] = ()
    prompts: Sequence[object] = ()


@dataclass(frozen=True)
class Streams:
    """Scores of one variation as a set difference ranks them, array by array: matrices, or one array of all heads."""

    keys: tuple[str, ...]
    of: Callable[[str, str], np.ndarray]
    """(key, weighting) -> scores [out, in], or [layers, heads]; weightings as `Answered.weightings` names them."""

    def stream(self, weighting: str) -> Iterator[tuple[str, np.ndarray]]:
        return ((key, self.of(key, weighting)) for key in self.keys)


@dataclass(frozen=True)
class Wanted:
    """What of a file is read. linears: the matrices whose weights may be pruned. reduce: how attention to the tokens of
    a name becomes one number."""

    loaded: LoadedModel
    linears: Sequence[Linear] = ()
    reduce: str = "mean"


@dataclass(frozen=True)
class HeadRanking:
    """Heads of a whole scenario as `fasp` and `lowest` rank them, in the order of the table `head_impacts`.

    harm: pruned are the lowest; infinite where it is not defined, so that the head is not pruned. need: protected are
    the highest; None: none is. Null where it is not known; each has the name of its column.
    """

    harm: pl.Series
    need: pl.Series | None = None


def by_group(answered: Answered) -> Decisive:
    """What decides scores of the answers' tokens, of either group and of either half of every relabelling."""
    draws = range(answered.permutations)
    return Decisive(
        answered.completions,
        ["token_ids", "finished", *(["subject"] if draws else [])],
        [sorted(answered.relabelled(draw)) for draw in draws],
    )


@dataclass(frozen=True)
class Score:
    """How important weights or heads are, by name: how a file of it is made and read, and what it fits.

    A score of a variation has `measure`, `decided_by` and, for a set difference, `read`, for a measured path
    `candidates`. A score of whole heads over a scenario, read from the table `head_impacts`, has `rank` alone.
    """

    name: str
    selection: str
    """That works on it: set_difference, measured_path, fasp or lowest."""
    ablations: tuple[str, ...]
    """What may be done to what is selected, the usual first."""
    parameters: tuple[frozenset[str], ...]
    """Sets of the selection's parameters, one of which is needed."""
    optional: tuple[str, ...] = ()
    """Parameters that may be given."""
    scopes: tuple[str, ...] = ("global",)
    """What may be ranked together, the usual first."""
    controls: tuple[str, ...] = (RANDOM,)
    """Controls that can be made: all but the random one need its scores under other weightings."""
    densest: float = 1.0
    """The largest share of all weights that can be selected."""
    of_values: bool = False
    """Whether it is made of what the answers are worth; others take any text."""
    drawn: bool = False
    """Whether it is drawn at random, so that a seed belongs to the definition of its masks."""

    version: str = "1"
    """Part of every file's address; to be raised when the computation changes."""
    able: Callable[[pl.DataFrame, Sequence[str]], bool] = lambda rows, groups: True
    """(a variation's answers of the compared groups, the groups) -> whether it can be learned from them."""
    decided_by: Callable[[Answered], Decisive] = by_group
    """Of a variation: what decides the content of its file."""
    measure: Callable[[Answered, Work], Tensors | Stream] | None = None
    """Of a variation: what its file holds. Scores that are not finite are refused by who writes it."""
    read: Callable[[Path, Wanted], Streams] | None = None
    """Of a file: scores that a set difference ranks, float32."""
    candidates: Callable[[Path], GapGradient] | None = None
    """Of a file: the weights that a measured path may take."""
    rank: Callable[[pl.DataFrame, int], HeadRanking] | None = None
    """(the table `head_impacts` with the columns magnitude and gradient, by layer and head; a seed) -> a ranking."""

    @property
    def of_scenario(self) -> bool:
        """Whether it is of whole heads over a scenario, and not of one variation."""
        return self.rank is not None


def head_score(name: str, rank: Callable[[pl.DataFrame, int], HeadRanking], **fields: Any) -> Score:
    """A score of whole heads over a scenario, of which the share alpha is pruned (FASP, sections 4 and 5).

    fields: those of `Score` that differ.
    """
    usual = {
        "selection": "lowest",
        "ablations": ("zero_output",),
        "parameters": (frozenset({"alpha"}),),
        "optional": ("paper_ties",),
    }
    return Score(name, rank=rank, **usual | fields)
