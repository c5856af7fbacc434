"""Loads saved weights and tokenizers whole, and refuses what would load as another model than the one saved.

The library that loads them draws weights that it misses at random, leaves out those it does not know, and says so in
its log at most. Here every such case is an error that names the entry and the mend. Where a model was saved, and what
its configuration says, is in `checkpoints`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from excise.errors import ExciseError
from excise.models.checkpoints import Checkpoint, loading, quantised_message, saved_file
from excise.models.content import json_fields

FLOATS = ("F64", "F32", "F16", "BF16")
OLD_BUFFERS = r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)position_ids$"
"""Causal masks, rotary frequencies and positions, which older versions saved and newer ones compute."""
UNUSED_BY_LANGUAGE_MODELS = re.compile(rf"{OLD_BUFFERS}|^v_head\.")
"""Beside old buffers the value head of reinforcement learning: answers do not depend on it."""
UNUSED_BY_CLASSIFIERS = re.compile(
    rf"{OLD_BUFFERS}|(^|\.)pooler\.|^(cls|lm_head|lm_predictions|mask_predictions|discriminator_predictions|"
    r"generator_predictions|generator_lm_head|vocab_transform|vocab_layer_norm|vocab_projector)\."
)
"""Beside old buffers the heads that a body had in its training before: a score does not depend on them."""
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
QUANTISED_WEIGHTS = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|quant_state\.\w+|weight_scale|weight_scale_inv|weight_packed)"
    r"|\.weight\.(absmax|quant_map|quant_state)|_(blocks|scales)$"
)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer saved with a checkpoint. Raises ExciseError where it cannot be had, or knows no ordinary text.

    Where its files are missing, the library makes up an empty one.
    """
    from transformers import AutoTokenizer

    with loading(checkpoint):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.source, **checkpoint.options)
        known = set(tokenizer("How much is it, 1 or 2?", add_special_tokens=False)["input_ids"])
        if not known - {tokenizer.unk_token_id}:
            raise ExciseError(
                f"{checkpoint.where}: the tokenizer in {checkpoint.place} has no vocabulary; add its files "
                "(tokenizer.json)"
            )
    return tokenizer


def load_weights(
    checkpoint: Checkpoint, auto: Any, config: Mapping[str, Any], unused: re.Pattern[str], **options: Any
) -> Any:
    """Load a model with every weight it has, and nothing else, from the checkpoint.

    auto: the library's class that picks the architecture. config: of `read_config`. unused: names of saved weights
    that may be left out. options: of `from_pretrained`. Raises ExciseError where weights are missing, left over, of
    another shape, not floating-point numbers, or cannot be read.
    """
    if checkpoint.folder is not None and not any(checkpoint.folder.glob("*.safetensors")):
        pickled = [
            path.name
            for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
            for path in sorted(checkpoint.folder.glob(pattern))
        ]
        held = f"only {pickled[0]}, which may hold code" if pickled else "no weights"
        raise ExciseError(
            f"{checkpoint.where}: the {checkpoint.kind} cannot be loaded from {checkpoint.place}: it holds {held}. "
            "Save the weights as safetensors (save_pretrained does)"
        )
    with loading(checkpoint):
        model, loaded = auto.from_pretrained(
            checkpoint.source,
            **checkpoint.options,
            **options,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        integers = _not_floats(checkpoint, unused)
    if problem := _weights_problem(checkpoint, loaded, config, unused):
        raise ExciseError(problem)
    if integers:
        kinds = ", ".join(f"{name} ({dtype})" for name, dtype in integers[:3])
        raise ExciseError(quantised_message(checkpoint, f"not floating-point numbers: {kinds}", config))
    return model


def _not_floats(checkpoint: Checkpoint, unused: re.Pattern) -> list[tuple[str, str]]:
    """Saved weights that are no floating-point numbers of 16 bits or more, with their dtype."""
    from safetensors import safe_open

    whole = saved_file(checkpoint, "model.safetensors")
    if whole is None:
        index = saved_file(checkpoint, "model.safetensors.index.json")
        names = sorted(set(json_fields(index)["weight_map"].values())) if index else []
        files = [saved_file(checkpoint, name) for name in names]
    else:
        files = [whole]
    integers = []
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - no mapping
                dtype = weights.get_slice(name).get_dtype()
                if dtype not in FLOATS and not unused.search(name):
                    integers.append((name, dtype))
    return integers


def _weights_problem(
    checkpoint: Checkpoint, loaded: Mapping[str, Any], config: Mapping[str, Any], unused: re.Pattern
) -> str | None:
    """What is wrong with the weights, in one message; None where nothing is. loaded: what the library says of them."""
    missing = sorted(loaded["missing_keys"])
    unexpected = sorted(name for name in loaded["unexpected_keys"] if not unused.search(name))
    reshaped = sorted(loaded["mismatched_keys"])
    if not (missing or unexpected or reshaped):
        return None
    if any(QUANTISED_WEIGHTS.search(name) for name in unexpected):
        return quantised_message(checkpoint, f"quantised ({listed(unexpected)})", config)
    parts = []
    if missing:
        parts.append(f"the weights lack {listed(missing)}")
    if unexpected:
        parts.append(f"the {checkpoint.kind} has no place for {listed(unexpected)}")
    if reshaped:
        shapes = [f"{name} ({tuple(saved)} where config.json says {tuple(due)})" for name, saved, due in reshaped]
        parts.append(f"the shape is another one of {listed(shapes)}")
    return f"{checkpoint.where}: {checkpoint.place}: {'; '.join(parts)}. {_mend(missing, unexpected, checkpoint.kind)}"


def _mend(missing: list[str], unexpected: list[str], kind: str) -> str:
    if any("lora_" in name for name in unexpected):
        return "An adapter is not merged: call merge_and_unload and save the model anew"
    if (part := _foreign_part(missing, unexpected)) is not None:
        wrapper = f" ({WRAPPERS[part]})" if part in WRAPPERS else ""
        return (
            f"The names hold a foreign {part!r}{wrapper}: save the {kind} without what wraps it, or take that off the "
            "names"
        )
    if missing and not unexpected and kind == "classifier":
        return "This is no trained classifier: what is missing would be drawn at random; name another one"
    if missing and not unexpected and all(name in ("lm_head.weight", "embed_out.weight") for name in missing):
        return (
            "What is missing would be drawn at random. If the output layer shares the embeddings, set "
            "tie_word_embeddings: true in config.json; if not, this is no language model"
        )
    return (
        "What is missing would be drawn at random, what is left over would not be used: config.json and weights do "
        f"not belong together. Save the {kind} anew with save_pretrained"
    )


def _foreign_part(missing: Iterable[str], unexpected: Iterable[str]) -> str | None:
    """What makes every unexpected name out of a missing one: a prefix, or a wrapper's part inside; None without one."""
    due, extra = set(missing), list(unexpected)
    for part in WRAPPERS:
        if extra and all(part in name and name.replace(part, "") in due for name in extra):
            return part
    prefixes = set()
    for name in extra:
        parts = name.split(".")
        starts = [cut for cut in range(1, len(parts)) if ".".join(parts[cut:]) in due]
        prefixes.add(".".join(parts[: starts[0]]) + "." if starts else None)
    return prefixes.pop() if len(prefixes) == 1 else None


def listed(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def check_vocabulary(checkpoint: Checkpoint, tokenizer: Any, model: Any) -> None:
    """Refuse a tokenizer that turns ordinary text into ids for which the model has no embedding.

    A special token without an embedding is left alone: it appears in a text only where it is spelt out (Gemma 3 has
    one for pictures), and whoever encodes a text checks that text.
    """
    with loading(checkpoint):
        rows = model.get_input_embeddings().num_embeddings
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        vocabulary = tokenizer.get_vocab()
        always = set(tokenizer("1")["input_ids"])
    beyond = sorted(
        number for number in vocabulary.values() if number >= rows and (number not in special or number in always)
    )
    if beyond:
        raise ExciseError(
            f"{checkpoint.where}: the tokenizer has {max(vocabulary.values()) + 1} entries, the {checkpoint.kind} "
            f"embeddings for {rows}: {tokenizer.convert_ids_to_tokens(beyond[0])!r} ({beyond[0]}) has none. Name the "
            "tokenizer that belongs to the weights, or resize the embeddings (resize_token_embeddings) and train them"
        )
