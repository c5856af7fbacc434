"""Cards that are none: a device `cards` whose tensors lie in main memory and are kept apart as real cards keep them.

Numbers are those of the CPU, bit for bit, but an operation on tensors of two cards, or of a card and the CPU, fails
where it would fail on real ones. So a machine without a card can show that a model spread over several still works.
`on_cards` registers the device for the rest of the process: run it in one of its own. Cards may lack a dtype, as an
Apple GPU lacks float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "cards"
CPU = torch.device("cpu")
ANYWHERE = ("copy_", "to", "_to_copy", "lift_fresh")
"""Operations that take tensors of several devices."""
LACKING: set[torch.dtype] = set()
"""Dtypes that no card has."""
INDICES_OF_THE_CPU = ("index", "index_put_", "index_put", "_unsafe_index")
"""Operations whose indices may be the CPU's."""


class OnCard(torch.Tensor):
    """A tensor of a card. held: the same numbers on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, card: int) -> OnCard:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(DEVICE, card),
        )

    def __init__(self, held: torch.Tensor, card: int) -> None:
        self.held = held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:
        return f"OnCard({self.held!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, given: tuple, named: dict | None = None) -> Any:
        return _run(function, given, named or {})


def _run(function: Any, given: tuple, named: dict) -> Any:
    name = function.overloadpacket.__name__
    asked = [each for each in tree_leaves((given, named)) if isinstance(each, torch.device)]
    card = _common_card(name, given, named)
    if asked:
        card = (asked[0].index or 0) if asked[0].type == DEVICE else None

    def on_cpu(each: Any) -> Any:
        return each.held if isinstance(each, OnCard) else CPU if isinstance(each, torch.device) else each

    found = function(*tree_map(on_cpu, given), **tree_map(on_cpu, named))
    of_cards = any(isinstance(each, OnCard) for each in tree_leaves((given, named)))
    for each in tree_leaves(found):
        # What comes from a card in another dtype is converted there.
        if isinstance(each, torch.Tensor) and each.dtype in LACKING and (card is not None or of_cards):
            raise TypeError(f"{name}: cannot convert a tensor of {DEVICE} to {each.dtype}, which these lack")
    if function._schema.is_mutable:  # what was changed is returned as it is
        changed = named.get("out", given[0])
        return changed if found is not None else None
    if card is None:
        return found
    return tree_map(lambda each: OnCard(each, card) if isinstance(each, torch.Tensor) else each, found)


def _common_card(name: str, given: tuple, named: dict) -> int | None:
    """The card of all tensors, None for the CPU. Raises RuntimeError where they are on several devices."""
    looked_at = given[:1] if name in INDICES_OF_THE_CPU else (given, named)
    tensors = [each for each in tree_leaves(looked_at) if isinstance(each, torch.Tensor)]
    cards = {each.device.index for each in tensors if isinstance(each, OnCard)}
    if name in ANYWHERE:
        first = given[0]
        return first.device.index if isinstance(first, OnCard) else None
    if name in INDICES_OF_THE_CPU:
        rest = [each for each in tree_leaves(given[1:]) if isinstance(each, OnCard)]
        cards |= {each.device.index for each in rest}
    apart = [each for each in tensors if not isinstance(each, OnCard) and each.dim()]
    if len(cards) > 1 or (cards and apart):
        places = sorted({str(each.device) for each in tensors})
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {', '.join(places)}")
    return next(iter(cards), None)


class _Cards(TorchDispatchMode):
    """Makes what is made for a card one of its tensors."""

    def __torch_dispatch__(self, function: Any, types: Any, given: tuple = (), named: dict | None = None) -> Any:
        return _run(function, given, named or {})


@contextmanager
def on_cards(*lacking: torch.dtype) -> Iterator[None]:
    """The device `cards` with as many cards as are named, for the block. lacking: dtypes that they do not have."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if torch._C._get_privateuse1_backend_name() != DEVICE:
        _setup_privateuseone_for_python_backend(DEVICE)
    before, inference_mode = torch._C._only_lift_cpu_tensors(), torch.inference_mode
    torch._C._set_only_lift_cpu_tensors(True)
    # Tensors that wrap others cannot be viewed in inference mode.
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else nullcontext()
    LACKING.update(lacking)
    try:
        with _Cards():
            yield
    finally:
        LACKING.clear()
        torch._C._set_only_lift_cpu_tensors(before)
        torch.inference_mode = inference_mode
