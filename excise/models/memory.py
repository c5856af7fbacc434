"""Running out of memory: how each kind of device says it, and batches that shrink until they fit.

How large a first batch is, and what is computed of it, is decided by whoever runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

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


def shrinking_batches(
    queue: Sequence[Item], size: int, device: torch.device, run: Callable[[Sequence[Item]], Result]
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Run a queue in batches of at most `size`, which is halved whenever memory runs out; yields each with its result.

    Raises what `run` raises, a lack of memory only where a batch holds a single item.
    """
    start = 0
    while start < len(queue):
        batch = queue[start : start + size]
        full = False
        try:
            result = run(batch)
        except (MemoryError, RuntimeError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            full = True
        if full:  # the error is gone here, and with it the frames that hold the failed batch's tensors
            size = max(1, size // 2)
            give_back(device)
            continue
        start += len(batch)
        yield batch, result
