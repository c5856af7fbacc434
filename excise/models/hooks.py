"""Hooks that remove themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that stay for the length of the block. handles: as registering returns them; where one of a generator
    cannot be registered, those before it are removed."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield
