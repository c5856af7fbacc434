"""Running out of memory: how each kind of device says it, and batches that shrink until they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Unit = TypeVar("Unit")
Made = TypeVar("Made")

SAID_WHEN_FULL = (
    "MPS backend out of memory",
    "Invalid buffer size",  # an Apple GPU, of one tensor larger than its largest buffer
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",  # the CPU, on Linux and macOS
    "not enough memory: you tried to allocate",  # the CPU, on Windows
)
"""What messages of memory errors hold that come without a type of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU, has no room left: a smaller batch may do."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID_WHEN_FULL)


def give_back(device: torch.device) -> None:
    """Free the memory that torch keeps aside on a device, so that the next batch may have it in other pieces."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


@dataclass
class FittingBatches:
    """Batches of at most `size` units for a device; half as many whenever memory runs out, from then on."""

    size: int
    device: torch.device

    def over(
        self, queue: Sequence[Unit], compute: Callable[[Sequence[Unit]], Made], *, evenly: bool = False
    ) -> Iterator[tuple[Sequence[Unit], Made]]:
        """(batch, what `compute` makes of it) until the queue is done. evenly: batches of equal size.

        Raises what `compute` raises, out of memory for a batch of one, too.
        """
        start = 0
        while start < len(queue):
            left = len(queue) - start
            size = -(-left // -(-left // self.size)) if evenly else self.size
            batch = queue[start : start + size]
            try:
                made = compute(batch)
            except (MemoryError, RuntimeError) as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
                self.size = len(batch) // 2
            else:
                start += len(batch)
                yield batch, made
                continue
            # Only now, as the error is gone and with it the tensors of the pass that failed.
            give_back(self.device)
