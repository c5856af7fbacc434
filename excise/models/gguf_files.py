"""Turns GGUF files into folders of safetensors, and refuses those that hold what the converted model would not do.

Folders of safetensors are read in `excise.models.checkpoints` and `weights`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from excise.errors import ExciseError
from excise.models.checkpoints import named_failures
from excise.models.content import make_folder
from excise.models.weights import listed

INSTEAD_OF_GGUF = "Name the safetensors that it was made from, with hub or folder"
SPLITS = (
    "gpt-2",
    "smollm",
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "smaug-bpe",
    "tekken",
    "qwen2",
    "deepseek-r1-qwen",
    "kormo",
    "megrez",
)
"""Ways to split a text before its tokens (`tokenizer.ggml.pre`) that a converted byte-level tokenizer follows."""


def convert_gguf(
    where: str, find: Callable[[], Path], sha256: str, home: Path, require: Callable[[str, str], object]
) -> Path:
    """Turn a GGUF file into a folder of safetensors and tokenizer, once for all entries. Returns the folder.

    Quantised numbers become the float32 numbers they stand for. find: gives the file, if it has not been converted yet.
    sha256: of the file; it names the folder, in `home`. require: raises ExciseError for a `model_type` that is of no
    use; takes what the message begins with, too. Raises ExciseError where the file is broken, or holds what the
    converted model would not do.
    """
    target = home / f"gguf-{sha256[:16]}"
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    file = find()
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "trust_remote_code": False,
    }
    names, places = _read_gguf(where, file)
    with named_failures(where, f"{file} cannot be converted", INSTEAD_OF_GGUF):
        require(AutoConfig.from_pretrained(**options).model_type, f"{where}: ")
        causal: Any = AutoModelForCausalLM  # its stub does not know output_loading_info
        quantised, info = causal.from_pretrained(
            **options, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        if missing := sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]):
            raise ExciseError(
                f"{where}: {file} lacks {listed(missing)}, which would be drawn at random. Name a whole file (parts "
                "are merged by llama-gguf-split --merge), or the safetensors that it was made from"
            )
        taken = {places.get_name(name, try_suffixes=(".weight", ".bias")) for name in quantised.state_dict()}
        if dropped := sorted(set(names) - taken):
            raise ExciseError(
                f"{where}: {file} holds {listed(dropped)}, which the conversion would drop. {INSTEAD_OF_GGUF}"
            )
        tokenizer = AutoTokenizer.from_pretrained(**options)
        fields = {name: value for name, value in quantised.config.to_dict().items() if name != "quantization_config"}
        model = AutoModelForCausalLM.from_config(type(quantised.config).from_dict(fields), dtype=torch.float32)
        model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    make_folder(home)
    partial = home / f".{target.name}.{os.getpid()}"
    try:
        with named_failures(
            where, f"the converted model cannot be written to {home}", "Free space, or set EXCISE_DATA"
        ):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        os.replace(partial, target)
    except OSError:
        # Another process finished the same conversion first; its folder holds the same weights.
        shutil.rmtree(partial)
        if not (target / "config.json").is_file():
            raise
    return target


def _read_gguf(where: str, file: Path) -> tuple[list[str], Any]:
    """The names of a GGUF file's tensors, and the map from the library's names to GGUF's.

    Raises ExciseError where the file cannot be read, or says something that the conversion drops in silence.
    """
    import gguf

    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ExciseError(f"{where}: {file} is no GGUF file; name one, or a saved model's folder with folder")
    with named_failures(where, f"{file} cannot be read as GGUF", "Fetch it anew, it may be cut short"):
        reader = gguf.GGUFReader(file)
        kind = reader.fields["general.architecture"].contents()
        names = [tensor.name for tensor in reader.tensors]

    def value(name: str) -> Any:
        return reader.fields[name].contents() if name in reader.fields else None

    architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if kind not in architectures:
        raise ExciseError(f"{where}: {file} holds architecture {kind!r}, which is not known; name another model")
    lost = []
    scaling, factor = value(f"{kind}.rope.scaling.type"), value(f"{kind}.rope.scaling.factor")
    if scaling not in (None, "none") or factor not in (None, 0, 1):
        lost.append("scales its positions (rope.scaling)")
    if value(f"{kind}.attention.sliding_window") and not kind.startswith("gemma"):
        lost.append("attends to a window only (sliding_window)")
    if value("tokenizer.ggml.model") == "gpt2" and value("tokenizer.ggml.pre") not in SPLITS:
        lost.append(f"splits text before its tokens in a way of its own ({value('tokenizer.ggml.pre')})")
    if lost:
        raise ExciseError(f"{where}: {file} {' and '.join(lost)}, which the conversion would drop. {INSTEAD_OF_GGUF}")
    return names, gguf.get_tensor_name_map(architectures[kind], value(f"{kind}.block_count") or 0)
