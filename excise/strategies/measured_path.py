"""A path of masks that close a gap, and the one of them to take: small steps with fresh gradients, each measured.

Predictions of what zeroing a weight does add up badly: divergences of single weights miss what they do together, and
the best of a hundred million noisy scores are the luckiest. So the gradient of the loss of
`excise.attribution.gap_distance` is taken anew after every few weights, at the model as pruned so far; a weight that
has come to harm is put back. Every few steps the pruned model is measured on the names that the path is made of, never
on those it is judged by: the gap, spread, commonest answer and excess change of every variation. A path that has moved
away from the gap-free answers goes back and takes smaller steps. The mask is the place within the damage budgets whose
answers are nearest to the gap-free ones; where none closes enough of the gap, there is none, and that is a result.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from excise.attribution.gap_distance import GAP_WEIGHT, Asked, Batch, Measured, batch_of, distance, measure
from excise.files.parts import PARTS, Parts, Work
from excise.files.tensors import load_with_metadata, save_tensors
from excise.interventions.heads import HeadMask
from excise.interventions.packed import Mask
from excise.interventions.weights import WeightMask
from excise.models.loading import LoadedModel
from excise.progress import Progress, silent
from excise.strategies.units import Units, gradient, gradient_and_squares, sizes

VERSION = "2"
"""Part of every path's address; to be raised when its computation changes."""
STEPS = 24
MEASURED_EVERY = 4
"""Steps of a path, and after how many of them the pruned model is measured."""
SHARE = 0.25
"""A step goes so far that the loss is predicted to fall by this share, to begin with."""
MOMENTUM = 0.7
"""Weight of earlier steps' gradients in a step's: each sees some of the names alone."""
NAMES = 12
"""Names that a step's gradient is made of, of one variation or two; of more, four of each of six."""
SOURCES = 6
FISHER_ROWS = 4
"""Names of a batch whose answers share random signs: smaller batches estimate divergences better."""
ENOUGH = 0.95
"""A path ends where so much of the gap is closed and at most `NEAR` of the divergence from the targets is left."""
NEAR = 0.1
MARGIN = 0.75
"""Share of a damage budget that the path's own names may use up: names it has not seen answer a little worse."""
NO_GAP = "no gap can be told on the names that masks are made of"
NO_MASK = "no mask closes the gap within the damage budgets"


@dataclass(frozen=True)
class Budgets:
    """The damage that a mask may do to the names it is made of, in any of its variations
    (`excise.attribution.gap_distance.Measured`): least spread_ratio, largest commonest_rise, largest excess_change, as
    of the metrics of these names. lost: share of the listed answers that a place may lose, at most: beyond it, what is
    left does not tell what the model says. least_closed: share of the gap, at least, that a mask must close to be
    one."""

    spread: float
    commonest: float
    change: float
    lost: float = 0.05
    least_closed: float = 0.25

    def allow(self, now: Measured) -> bool:
        """Whether a variation keeps them, with a `MARGIN`. What cannot be told is not kept."""
        return (
            1 - now.spread <= MARGIN * (1 - self.spread)
            and now.commonest <= MARGIN * self.commonest
            and now.excess <= MARGIN * self.change
            and now.outside <= self.lost
        )


@dataclass(frozen=True)
class Step:
    """A measured place of a path.

    step, pruned: steps so far, weights or heads pruned. closed: share of the gap that is closed, mean over the
    variations that have one. within: whether all damage budgets are kept and no gap grew. measured: by variation.
    distance: from the gap-free answers, as `excise.attribution.gap_distance.loss` a name, mean over the variations.
    """

    step: int
    pruned: int
    closed: float
    within: bool
    measured: Mapping[str, Measured]
    distance: float

    @property
    def divergence(self) -> float:
        """Of the answers from the targets, mean over the variations, nats."""
        return float(np.mean([now.divergence for now in self.measured.values()]))


@dataclass(frozen=True)
class MeasuredPath:
    """The mask, or None and the reason; the places that were measured, the unedited model's first; the step that was
    taken; and the file, if it is kept in one."""

    mask: Mask | None
    reason: str
    steps: tuple[Step, ...]
    taken: int | None = None
    file: Path | None = None


@dataclass(frozen=True)
class Course:
    """What a path is followed with: the share of all weights, or heads, that may be pruned at most, what that may cost,
    and how many steps are taken at most (None: `STEPS`)."""

    density: float
    budgets: Budgets
    seed: int
    steps: int | None = None


def measured_path(
    loaded: LoadedModel, asked: Sequence[Asked], units: Units, course: Course, *, work: Work | None = None
) -> MeasuredPath:
    """Follow one path, for all the variations `asked` together, and choose its mask.

    units: what may be pruned. A variation whose targets do not close a gap is kept as it is.
    """
    work, budgets, steps = work or Work("measured path"), course.budgets, course.steps or STEPS
    first = step_of(0, 0, asked, [measure(loaded, variation) for variation in asked], budgets)
    if not any(variation.closing for variation in asked):
        return MeasuredPath(None, NO_GAP, (first,))
    most = max(1, int(course.density * units.total))
    done, state = work.parts.begun("path")
    walk = _Walk(units, most, state) if done else None
    for step in range(done + 1, steps + 1):
        work.report(step - 1, steps)
        if walk is None:
            walk = _first_look(loaded, asked, units, most, first.distance, course.seed)
        else:
            walk.look(loaded, _batches(loaded, asked, course.seed, step))
        walk.go()
        if step % MEASURED_EVERY == 0 or step == steps:
            with units.mask(walk.active).applied(loaded):
                walk.note(step, asked, [measure(loaded, variation) for variation in asked])
            if walk.ended(asked, budgets, first):
                break
        work.parts.keep("path", step, walk.state())
    work.report(steps, steps)
    chosen = None if walk is None else walk.chosen(asked, budgets)
    path = (first,) if walk is None else (first, *walk.steps(asked, budgets))
    if walk is None or chosen is None:
        return MeasuredPath(None, NO_MASK, path)
    step, _, active = walk.noted[chosen]
    return MeasuredPath(units.mask(active), "", path, step)


def kept_path(
    loaded: LoadedModel,
    asked: Sequence[Asked],
    units: Units,
    course: Course,
    *,
    folder: Path,
    progress: Progress = silent,
    label: str = "measured path",
) -> MeasuredPath:
    """`measured_path` kept in a file that is named by what decides it: found again, or gone on with after a kill."""
    path = folder / f"{_address(loaded, asked, units, course)}.safetensors"
    if path.is_file():
        return replace(_read(path, units), file=path)
    work = Work(label, progress, Parts(path.with_suffix(PARTS)))
    followed = measured_path(loaded, asked, units, course, work=work)
    tensors = {
        "numbers": np.array([[astuple(figures) for figures in step.measured.values()] for step in followed.steps]),
        "steps": np.array(
            [(step.step, step.pruned, step.closed, step.within, step.distance) for step in followed.steps]
        ),
    }
    if followed.mask is not None:
        tensors |= {f"mask/{key}": np.flatnonzero(followed.mask.array(key)) for key in followed.mask.shapes}
    metadata = {
        "reason": followed.reason,
        "taken": json.dumps(followed.taken),
        "places": json.dumps([variation.place for variation in asked]),
    }
    save_tensors(path, tensors, metadata)
    work.parts.clear()
    return replace(followed, file=path)


def _read(path: Path, units: Units) -> MeasuredPath:
    tensors, metadata = load_with_metadata(path)
    places = json.loads(metadata["places"])
    steps = tuple(
        Step(
            int(step),
            int(count),
            closed,
            bool(within),
            {place: Measured(*row) for place, row in zip(places, rows.tolist(), strict=True)},
            distance,
        )
        for (step, count, closed, within, distance), rows in zip(tensors["steps"], tensors["numbers"], strict=True)
    )
    if metadata["reason"]:
        return MeasuredPath(None, metadata["reason"], steps)
    arrays = {}
    for key, shape in units.mask_shapes.items():
        array = np.zeros(math.prod(shape), dtype=bool)
        array[tensors[f"mask/{key}"]] = True
        arrays[key] = array.reshape(shape)
    kind = HeadMask if units.places is None else WeightMask
    return MeasuredPath(kind.from_arrays(arrays), "", steps, json.loads(metadata["taken"]))


def _address(loaded: LoadedModel, asked: Sequence[Asked], units: Units, course: Course) -> str:
    """What decides a path, and nothing else."""
    decided = [course.density, astuple(course.budgets), course.seed, course.steps or STEPS]
    settings = [VERSION, loaded.fingerprint, *decided, GAP_WEIGHT, sorted(units.shapes)]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for variation in asked:
        decisive = [
            variation.place,
            variation.trunk,
            asdict(variation.parameters),
            variation.closing,
            variation.majority.tolist(),
        ]
        digest.update(json.dumps(decisive).encode())
        for name in variation.names:
            for array in (name.tree.tokens, name.tree.parents, name.tree.edges, name.outcomes, name.own, name.drawn):
                digest.update(np.ascontiguousarray(array).data)
    for key, places in (units.places or {}).items():
        digest.update(key.encode())
        digest.update(places.numpy().data)
    return digest.hexdigest()[:24]


def step_of(step: int, count: int, asked: Sequence[Asked], measured: Sequence[Measured], budgets: Budgets) -> Step:
    """What is measured at a place, with what it closes and whether it keeps the budgets."""
    shares = [_closed(variation, now) for variation, now in zip(asked, measured, strict=True) if variation.closing]
    within = all(share >= 0 for share in shares) and all(budgets.allow(now) for now in measured)
    places = [variation.place for variation in asked]
    mean = float(np.mean(shares)) if shares else math.nan
    return Step(step, count, mean, within, dict(zip(places, measured, strict=True)), _distance(asked, measured))


def _distance(asked: Sequence[Asked], measured: Sequence[Measured]) -> float:
    """Mean over the variations."""
    return float(np.mean([distance(variation, now) for variation, now in zip(asked, measured, strict=True)]))


def _closed(asked: Asked, now: Measured) -> float:
    return 1 - abs(now.gap) / abs(asked.gap)


def _batches(loaded: LoadedModel, asked: Sequence[Asked], seed: int, step: int) -> list[Batch]:
    """The names of a step: in turn all variations', and within a variation all names before any comes again."""
    sources = min(len(asked), SOURCES)
    rows = max(4, NAMES // sources)
    batches = []
    for turn in range((step - 1) * sources, step * sources):
        number, visit = turn % len(asked), turn // len(asked)
        variation = asked[number]
        parts = len(variation.batches(rows))
        order = np.random.default_rng([seed, number, visit // parts])
        batches.append(batch_of(variation, variation.batches(rows, order)[visit % parts], loaded.device))
    return batches


class _Walk:
    """Where a path is: per unit, float32 or bool [units], in the order of its places.

    drop: predicted fall of the loss per name if the unit were pruned (of one that is: the rise if it were put back).
    harm: divergence that pruning it costs. height: the loss per name where the gradient was last taken. share: how far
    a step goes. start: the unedited model's distance from the targets.
    """

    def __init__(self, units: Units, most: int, state: Mapping[str, np.ndarray]) -> None:
        self.units, self.most = units, most
        self.weight, self.drop, self.harm = (torch.from_numpy(state[name]) for name in ("weight", "drop", "harm"))
        self.active = torch.from_numpy(state["active"])
        self.damping, self.height = state["damping"].item(), state["height"].item()
        self.share, self.start = state["share"].item(), state["start"].item()
        numbers, taken, kept = state["measured"], state["taken"], state["noted"]
        self.variations = numbers.shape[1]
        self.noted = [
            (int(step), [Measured(*row) for row in rows.tolist()], torch.from_numpy(active))
            for step, rows, active in zip(taken, numbers, kept, strict=True)
        ]

    def state(self) -> dict[str, torch.Tensor]:
        """All of it, for `Parts`."""
        numbers = [[astuple(figures) for figures in measured] for _, measured, _ in self.noted]
        shape = (len(self.noted), self.variations, len(Measured.FIELDS))
        return {
            "weight": self.weight,
            "drop": self.drop,
            "harm": self.harm,
            "active": self.active,
            "damping": torch.tensor(self.damping),
            "height": torch.tensor(self.height),
            "share": torch.tensor(self.share),
            "start": torch.tensor(self.start, dtype=torch.float64),
            "measured": torch.tensor(numbers, dtype=torch.float64).reshape(shape),
            "taken": torch.tensor([step for step, *_ in self.noted], dtype=torch.int64),
            "noted": torch.stack([active for *_, active in self.noted]) if self.noted else self.active[None][:0],
        }

    def look(self, loaded: LoadedModel, batches: Sequence[Batch]) -> None:
        """Take the gradient anew, at the model as pruned so far."""
        with self.units.mask(self.active).applied(loaded):
            slope, self.height = gradient(loaded, batches, self.units)
        self.drop = MOMENTUM * self.drop + (1 - MOMENTUM) * self.weight * slope

    def go(self) -> None:
        """Prune, or put back, the units that are predicted to lower the loss most for the divergence they cost."""
        sign = torch.where(self.active, -1.0, 1.0)
        drop = sign * self.drop
        usable = drop > self.harm
        if int(self.active.sum()) >= self.most:
            usable &= self.active
        score = torch.where(usable, drop / (self.harm + self.damping), -1.0)
        count = min(self.most, int(usable.sum()))
        best = torch.topk(score, count).indices
        falls = torch.cumsum(drop[best].double(), 0)
        chosen = best[: int(torch.searchsorted(falls, self.share * self.height)) + 1]
        self.active[chosen] = ~self.active[chosen]
        excess = int(self.active.sum()) - self.most
        if excess > 0:  # the last of those that came
            came = chosen[self.active[chosen]]
            self.active[came[len(came) - excess :]] = False

    def note(self, step: int, asked: Sequence[Asked], measured: Sequence[Measured]) -> None:
        """Keep what was measured here, and the units that are pruned; from a place that is farther from the targets
        than an earlier one, go back to that and take half the steps."""
        distances = [self.start, *(_distance(asked, figures) for _, figures, _ in self.noted)]
        places = [torch.zeros_like(self.active), *(active for *_, active in self.noted)]
        nearest = int(np.argmin(distances))
        self.noted.append((step, list(measured), self.active.clone()))
        if _distance(asked, measured) > distances[nearest]:
            self.active = places[nearest].clone()
            self.share /= 2

    def steps(self, asked: Sequence[Asked], budgets: Budgets) -> list[Step]:
        """The measured places."""
        return [step_of(step, int(active.sum()), asked, measured, budgets) for step, measured, active in self.noted]

    def ended(self, asked: Sequence[Asked], budgets: Budgets, first: Step) -> bool:
        """Whether the last measured place is as good as a path need be."""
        last = self.steps(asked, budgets)[-1]
        return last.within and last.closed >= ENOUGH and last.divergence <= NEAR * first.divergence

    def chosen(self, asked: Sequence[Asked], budgets: Budgets) -> int | None:
        """The place within the budgets that is nearest to the targets, of those that close enough; or None."""
        steps = self.steps(asked, budgets)
        usable = [number for number, place in enumerate(steps) if place.within and place.closed >= budgets.least_closed]
        return min(usable, key=lambda number: steps[number].distance, default=None)


def _first_look(loaded: LoadedModel, asked: Sequence[Asked], units: Units, most: int, start: float, seed: int) -> _Walk:
    """The start of a path: drop and divergence of every unit, over all names."""
    batches = [
        batch_of(variation, numbers, loaded.device) for variation in asked for numbers in variation.batches(FISHER_ROWS)
    ]
    names = sum(len(batch.numbers) for batch in batches)
    slope, squares, height = gradient_and_squares(loaded, batches, units, seed)
    weight = sizes(loaded, units)
    harm = 0.5 * weight.square() * squares / names
    return _Walk(
        units,
        most,
        {
            "weight": weight.numpy(),
            "drop": (weight * slope).numpy(),
            "harm": harm.numpy(),
            "active": np.zeros(len(weight), dtype=bool),
            "damping": harm.median().numpy(),
            "height": np.array(height),
            "share": np.array(SHARE),
            "start": np.array(start),
            "measured": np.zeros((0, len(asked), len(Measured.FIELDS))),
            "taken": np.zeros(0, dtype=np.int64),
            "noted": np.zeros((0, len(weight)), dtype=bool),
        },
    )
