"""A scorer that is any sequence classifier: the score is what it says of one of its labels.

Here: what its outputs mean, how many tokens it reads, and its passes. Not here: how its files are read and refused
(`excise.models.checkpoints`), and what of an answer is scored.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from excise.errors import ExciseError
from excise.models.checkpoints import Checkpoint, named_failures, pinned, read_config
from excise.models.content import content_of, digest, files_of
from excise.models.placement import pick_device
from excise.models.weights import UNUSED_BY_CLASSIFIERS, check_vocabulary, load_tokenizer, load_weights
from excise.outcomes.scorers import Activation, ScorerSpec, as_read

TOKENS_AT_ONCE = {"cpu": 1 << 11, "mps": 1 << 13, "cuda": 1 << 15}
ACTIVATION_OF_PROBLEM: Mapping[str, Activation] = {
    "regression": "none",
    "multi_label_classification": "sigmoid",
    "single_label_classification": "softmax",
}
"""How a classifier's outputs become scores, by what its config says it was trained for."""


@dataclass(frozen=True)
class ClassifierScorer:
    """What a sequence classifier says of one label, computed in float32.

    activation: `sigmoid` where labels stand by themselves and `softmax` where one of them holds, both of which give a
    probability; `none` where the output is the score itself. Texts longer than `max_length` tokens are cut there
    (None: never).
    """

    key: str
    fingerprint: str
    measures: str
    label: str
    activation: Activation
    lower_case: bool
    max_length: int | None
    index: int = field(repr=False)
    model: Any = field(repr=False, compare=False)
    tokenizer: Any = field(repr=False, compare=False)

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Texts of one length go through the classifier together, so that no score depends on padding.

        A text in which the tokenizer finds nothing, or nothing that it knows, is unscored. Raises ExciseError where a
        score is no number or, without an activation, outside 0..1.
        """
        import torch

        scores = np.full(len(texts), np.nan)
        prepared = {number: text for number, raw in enumerate(texts) if (text := as_read(raw, self.lower_case))}
        if not prepared:
            return scores
        encoded = self.tokenizer(
            list(prepared.values()), truncation=self.max_length is not None, max_length=self.max_length
        )
        rows = dict(zip(prepared, range(len(prepared)), strict=True))
        by_length: dict[int, list[int]] = {}
        marks = {*self.tokenizer.all_special_ids, self.tokenizer.unk_token_id}
        for number, row in rows.items():
            tokens = encoded["input_ids"][row]
            length = 0 if self.tokenizer.unk_token_id in tokens and marks.issuperset(tokens) else len(tokens)
            by_length.setdefault(length, []).append(number)
        for number in by_length.pop(0, ()):
            del rows[number]
        self._check_embeddings(encoded["input_ids"])
        device = self.model.device
        taken = inspect.signature(self.model.forward).parameters
        for length, numbers in sorted(by_length.items()):
            # A decoder without a padding token in its config reads one text at a time.
            alone = self.model.config.pad_token_id is None
            most = 1 if alone else max(1, TOKENS_AT_ONCE.get(device.type, 1 << 11) // length)
            for start in range(0, len(numbers), most):
                chosen = numbers[start : start + most]
                batch = {
                    name: torch.tensor([values[rows[number]] for number in chosen], device=device)
                    for name, values in encoded.items()
                    if name in taken
                }
                with torch.inference_mode():
                    logits = self.model(**batch, return_dict=True).logits.cpu().double()
                if self.activation == "sigmoid":
                    logits = torch.sigmoid(logits)
                elif self.activation == "softmax":
                    logits = torch.softmax(logits, -1)
                scores[chosen] = logits[:, self.index].numpy()
        for number in rows:
            if not np.isfinite(scores[number]):
                raise ExciseError(
                    f"scorer {self.key}: no number for the text {texts[number]!r}; its weights are broken"
                )
            if not 0 <= scores[number] <= 1:
                raise ExciseError(
                    f"scorer {self.key}: gives {scores[number]:.4g} to the text {texts[number]!r}, outside 0..1. In "
                    "scorers.yaml, set activation: sigmoid (one label by itself) or softmax (one label out of all) if "
                    "its card says so; if it measures on another scale, choose another classifier"
                )
        return scores

    def _check_embeddings(self, ids: Sequence[Sequence[int]]) -> None:
        rows = self.model.get_input_embeddings().num_embeddings
        largest = max(max(token_ids, default=0) for token_ids in ids)
        if largest >= rows:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ExciseError(
                f"scorer {self.key}: a text holds {token!r} ({largest}), and the classifier has embeddings for {rows} "
                "tokens only; name one whose tokenizer fits its weights"
            )


def load_classifier(spec: ScorerSpec, device: str) -> ClassifierScorer:
    import torch
    from transformers import AutoModelForSequenceClassification

    where = f"scorers.yaml: {spec.key}"
    checkpoint = pinned(Checkpoint(where, "classifier", spec.folder, spec.hub, spec.revision))
    fields = read_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    model = load_weights(
        checkpoint, AutoModelForSequenceClassification, fields, UNUSED_BY_CLASSIFIERS, dtype=torch.float32
    )
    check_vocabulary(checkpoint, tokenizer, model)
    labels = _labels(where, model.config)
    label = next(iter(labels)) if spec.label is None and len(labels) == 1 else spec.label
    if label not in labels:
        problem = "names no label" if label is None else f"the classifier has no label {label!r}"
        raise ExciseError(f"{where}.label: {problem}; there are {', '.join(labels)}")
    activation = _activation(where, spec.activation, model.config.problem_type, len(labels))
    max_length = _max_length(model, tokenizer)
    if spec.folder is not None:
        content, shown = content_of(files_of(spec.folder)), spec.folder.name
    else:
        content, shown = digest(spec.hub or "", checkpoint.revision or ""), spec.hub or ""
    fingerprint = digest("classifier", content, label, activation, str(spec.lower_case), str(max_length))
    noun = "output for" if activation == "none" else "probability of"
    how = "as it is" if activation == "none" else activation
    measures = f"{noun} the label {label!r} by the classifier {shown} ({how})" + (
        ", lower-cased" if spec.lower_case else ""
    )
    model.to(pick_device(device)).eval().requires_grad_(False)
    scorer = ClassifierScorer(
        spec.key, fingerprint, measures, label, activation, spec.lower_case, max_length, labels[label], model, tokenizer
    )
    with named_failures(where, "the classifier cannot score a text", "Name another one"):
        scorer.score(["He took the bus.", "He is an idiot."])
    return scorer


def _labels(where: str, config: Any) -> dict[str, int]:
    """The classifier's labels with their outputs. Raises ExciseError where a name does not tell which output it is."""
    names = {int(index): str(name) for index, name in config.id2label.items()}
    if sorted(names) != list(range(len(names))) or len(set(names.values())) != len(names):
        raise ExciseError(
            f"{where}: id2label in its config.json must name every output once, from 0 on; it has {names}. Mend it in "
            "a local copy"
        )
    return {name: index for index, name in names.items()}


def _activation(where: str, named: Activation | None, problem: str | None, outputs: int) -> Activation:
    """The entry's activation, else that of what the classifier was trained for; nothing is guessed from its outputs.

    Two labels without either exclude each other, as everywhere in `transformers`.
    """
    function = named or ACTIVATION_OF_PROBLEM.get(problem or "") or ("softmax" if outputs == 2 else None)
    if function is None:
        raise ExciseError(
            f"{where}.activation: the classifier does not say what its {outputs} "
            f"output{'s are' if outputs > 1 else ' is'} (problem_type in its config.json). Its card tells: set "
            "activation: sigmoid (a label by itself), softmax (one label out of all) or none (the output is the score)"
        )
    if function == "softmax" and outputs == 1:
        raise ExciseError(
            f"{where}.activation: the softmax of a single output is always 1; set activation: sigmoid or none"
        )
    return function


def _max_length(model: Any, tokenizer: Any) -> int | None:
    """Tokens the classifier can read; None: any number. RoBERTa counts positions from behind its padding token."""
    import torch

    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    # A tokenizer without a limit says 1e30, an architecture without one -1.
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < 1 << 31]
    return min(known, default=None)
