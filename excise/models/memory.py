"""Running out of memory: how each kind of device says it, and how what it keeps aside is given back.

Who catches it makes its batch smaller; how small a batch may become is decided there.
"""

from __future__ import annotations

import torch

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
