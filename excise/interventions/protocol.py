"""What every intervention is: something done to a model that can be named, sized, undone, matched and folded.

Kinds (`weights`, `heads`) are modules beside this one; how they are found and read from files is in `kinds`. What an
intervention does to answers is judged elsewhere, by this protocol alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

if TYPE_CHECKING:
    from excise.models.loading import LoadedModel


class Intervention(Protocol):
    """Something done to a model. Answers under it are kept under its fingerprint."""

    @property
    def unit(self) -> str:
        """What it takes of a model: weights, heads, channels."""

    @property
    def count(self) -> int:
        """How many of its unit it takes."""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits: equal for interventions that do the same to every model, and else different."""

    @property
    def folded_as(self) -> str | None:
        """How an ordinary checkpoint holds it, in words; None where none can."""

    def applied(self, loaded: LoadedModel) -> AbstractContextManager[LoadedModel]:
        """The model under the intervention, which is bit for bit the old one after the context.

        Contexts nest, and end so after an exception, too. Raises ExciseError, before anything is changed, for a model
        that it was not made for.
        """

    def fold(self, loaded: LoadedModel) -> None:
        """Write it into the model's own weights for good. Raises ExciseError as `applied` does, and where no ordinary
        checkpoint can hold it."""

    def control(self, seed: int, known: str | None = None) -> Intervention:
        """Its matched control: the same size without the knowledge. A recipe, which is made where it is applied.

        known: the control's fingerprint, where it has been made before.
        """


class StoredIntervention(Intervention, Protocol):
    """An intervention that lies in a file: what a module of a kind offers as `KIND`."""

    kind: ClassVar[str]

    def save(self, path: Path | str) -> None:
        """Write it as safetensors, in full or not at all. The metadata name its kind (`kind`).

        Raises ExciseError, naming the file, where it cannot be written.
        """

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` has written. Raises ExciseError where the file is absent, damaged or of another kind."""


@contextmanager
def edited(loaded: LoadedModel, intervention: Intervention | None) -> Iterator[LoadedModel]:
    """The model under an intervention, or as it is where there is none."""
    if intervention is None:
        yield loaded
    else:
        with intervention.applied(loaded) as changed:
            yield changed
