"""Where a model's layers go: one device, several cards, or main memory for what they have no room for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from excise.errors import ExciseError

if TYPE_CHECKING:
    import torch


DeviceMap = Mapping[str, int | str]
CARD_SHARE = 0.8
"""Share of a card's free memory that weights may fill; the rest is for keys, values and logits."""


def placement(config: Any, dtype: torch.dtype, free: Mapping[int | str, int]) -> DeviceMap:
    """Where the parts of a model go, as a device map of accelerate: {module: number of a card, or "cpu"}.

    config: a `transformers` configuration. free: bytes by number of the card, and of main memory under "cpu". The model
    goes to the first card that has room for all of it; else its layers are spread evenly over the cards; what they have
    no room for stays in main memory and is sent to a card for every pass, which is slow. Raises ExciseError where even
    that is too small.
    """
    import torch
    from accelerate import infer_auto_device_map, init_empty_weights
    from accelerate.utils import get_balanced_memory
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    size = sum(parameter.numel() for parameter in model.parameters()) * torch.finfo(dtype).bits // 8
    room = {card: int(CARD_SHARE * bytes_free) for card, bytes_free in free.items() if card != "cpu"}
    for card, most in room.items():
        if size <= most:
            return {"": card}
    room["cpu"] = free.get("cpu", 0)
    whole = list(model._no_split_modules or ())
    if len(room) > 2:
        room = get_balanced_memory(model, max_memory=room, no_split_module_classes=whole)
    devices = infer_auto_device_map(model, max_memory=room, no_split_module_classes=whole)
    if "disk" in devices.values():
        there = ", ".join(f"{place}: {bytes_free / 2**30:.1f}" for place, bytes_free in free.items())
        raise ExciseError(
            f"the model's weights take {size / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, more than there "
            f"is room for (GiB free, by card and on the cpu: {there}); free memory, or set a smaller dtype"
        )
    return dict(devices)


def places_of(model: torch.nn.Module) -> dict[str, torch.device]:
    """Where accelerate has put the parts of a model; empty where it has not been asked."""
    import torch

    devices = getattr(model, "hf_device_map", None) or {}
    return {
        part: torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        for part, place in devices.items()
    }


def _offloading(module: torch.nn.Module) -> Any:
    """The hook by which accelerate fetches a module's weights for each pass; None where they stay on its device."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])  # several are one of several
    return next((part for part in hooks if getattr(part, "offload", False)), None)


def kept_weight(module: torch.nn.Module, name: str = "weight") -> torch.Tensor:
    """A module's weight, or its parameter of that name, in the memory it is kept in."""
    hook = _offloading(module)
    return cast("torch.Tensor", getattr(module, name)) if hook is None else hook.weights_map[name]


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    """A module's weight as it stands: without numbers where accelerate fetches them for each pass."""
    return cast("torch.Tensor", module.weight)


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module computes."""
    import torch

    hook = _offloading(module)
    if hook is None:
        return weight_of(module).device
    place = hook.execution_device
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def pick_device(device: str = "auto") -> torch.device:
    """`auto` takes cuda, then mps, then cpu; cuda without a number is as many cards as a model needs.

    Raises ExciseError when a named device is not there.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ExciseError(f"device {device!r} is not known; use auto, cpu, cuda or mps") from error
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ExciseError(f"device {device!r} is not supported; use auto, cpu, cuda or mps")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ExciseError(f"device {device!r}: no CUDA device is available here; use auto or cpu")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ExciseError(f"device {device!r}: Metal is not available here; use auto or cpu")
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on cuda, float16 on mps, float32 on the CPU."""
    import torch

    if dtype == "auto":
        return {"cuda": torch.bfloat16, "mps": torch.float16}.get(device.type, torch.float32)
    chosen = getattr(torch, dtype, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ExciseError(f"dtype {dtype!r} is not known; use auto, float32, bfloat16 or float16")
    return chosen


def cards_of(config: Any, dtype: torch.dtype) -> DeviceMap:
    from accelerate.utils import get_max_memory

    return placement(config, dtype, get_max_memory())
