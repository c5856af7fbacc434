"""Files of scores: where one lies, how it is written and read. What is in it belongs to the score's own module."""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from excise.attribution.answered import Answered
from excise.attribution.score import Score, Stream, Tensors
from excise.errors import ExciseError
from excise.files.tensors import NO_ROOM, save_tensors


def address(score: Score, answered: Answered) -> str:
    """The name of a variation's file: what decides its content, and nothing else.

    Prompts go in as their tokens, so that a prompt that is rendered in another way has another address. How many rows
    a pass takes decides nothing.
    """
    decisive = score.decided_by(answered)
    asked = [*(list(prompt.tokens) for prompt in answered.encoded), *decisive.prompts]
    number = {prompt.prompt_id: place for place, prompt in enumerate(answered.encoded)}
    sides = {answered.comparison.majority: "majority", answered.comparison.minority: "minority"}
    answers = [
        [number[prompt_id], sides[group], *values]
        for prompt_id, group, *values in decisive.rows.select("prompt_id", "group", *decisive.columns).iter_rows()
    ]
    content = [score.version, answered.loaded.fingerprint, score.name, list(decisive.settings), asked, answers]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def write(path: Path, content: Tensors | Stream, score: Score, answered: Answered) -> None:
    """Write what a score has measured, in full or not at all.

    Raises ExciseError for scores that are not finite, and where the file cannot be written.
    """
    if isinstance(content, Stream):
        pieces = ((key, _finite(piece, score, answered)) for key, piece in content.pieces)
        _save_stream(path, content.shapes, pieces)
        return
    for tensor in content.tensors.values():
        _finite(tensor, score, answered)
    save_tensors(path, content.tensors, content.metadata)


def _finite(scores: np.ndarray, score: Score, answered: Answered) -> np.ndarray:
    from excise.generation.tree import not_finite

    if not np.isfinite(scores.sum(dtype=np.float64)):
        variation, what = answered.completions["variation"][0], f"{score.name} scores"
        raise ExciseError(f"variation {variation}: {not_finite(answered.loaded, what)}")
    return scores


def _save_stream(path: Path, shapes: Mapping[str, tuple[int, ...]], pieces: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write float32 tensors as safetensors while they are made, so that one at a time is in memory.

    The format is a header of JSON that says where each tensor lies, and the tensors behind it.
    """
    header, begins, place = {}, {}, 0
    for key, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}
        begins[key] = place
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    written = set()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key, piece in pieces:
                if piece.shape != shapes[key]:
                    raise ValueError(f"{key} has shape {piece.shape}, not {shapes[key]}")
                file.seek(8 + len(text) + begins[key])
                file.write(np.ascontiguousarray(piece, dtype="<f4").data)
                written.add(key)
        if written != set(shapes):
            raise ValueError(f"{path}: no scores for {', '.join(sorted(set(shapes) - written))}")
        os.replace(partial, path)
    except OSError as error:
        raise ExciseError(f"{path}: cannot be written ({error}); {NO_ROOM}") from error
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a file of scores, and its metadata. Raises ExciseError where there is none."""
    from safetensors import safe_open

    require(path)
    with safe_open(path, framework="numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 - not a mapping


def require(path: Path) -> None:
    """Raise ExciseError where a file of scores is gone."""
    if not Path(path).is_file():
        raise ExciseError(f"{path}: this attribution file is gone; materialize attribution_scores again")
