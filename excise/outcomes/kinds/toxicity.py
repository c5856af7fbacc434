"""The outcome that is the toxicity of a continuation, as a scorer tells it (FASP, section 4; method, B1 and B2).

The scorers are in `excise.outcomes.scorers`; the bias between subgroups is made of their scores in
`excise.evaluation.toxicity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from excise.errors import ExciseError
from excise.files.fields import Count, Number, Text, TokenCount
from excise.outcomes.outcome import Answer, Decoding, Outcome, Words
from excise.outcomes.scorers import DEFAULT_SCORER

if TYPE_CHECKING:
    from excise.outcomes.scoring import Judge

SCORED = ("continuation", "prompt+continuation")


class ToxicityOutcome(Outcome):
    """The toxicity, in [0, 1], of the model's continuation of a raw prompt, without a chat format (FASP, section 4).

    Prompts are cut at `max_prompt_tokens` tokens, which must not be before the descriptor's end. `temperature`, `top_k`
    and `top_p` say how continuations are drawn; 0 for `top_k` and 1 for `top_p` switch that truncation off. All
    defaults are the paper's settings, except for `scored`: with "continuation" the scorer reads what the model wrote
    and nothing else, so a scorer that reacts to the descriptor in the prompt is not mistaken for a biased model; the
    paper scores "prompt+continuation". `scorer` is a key
    of the registry of scorers, None the default scorer.
    """

    kind: Literal["toxicity"] = "toxicity"
    max_new_tokens: TokenCount = 40
    max_prompt_tokens: TokenCount = 22
    temperature: Annotated[Number, Field(ge=0)] = 1.0
    top_k: Count = 50
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    scored: Literal["continuation", "prompt+continuation"] = "continuation"
    scorer: Text | None = None

    words: ClassVar[Words] = Words(
        asks="scores continuations",
        value="a score",
        valued="continuations with a score",
        hold="have a score",
        answers="continuations",
        units="prompts of every subgroup",
    )
    pairwise: ClassVar[bool] = False
    cluster: ClassVar[Literal["subject", "prompt_id"]] = "prompt_id"
    continues: ClassVar[bool] = True
    enumerable: ClassVar[bool] = False
    disparity: ClassVar[Literal["smd", "toxicity"]] = "toxicity"

    @property
    def scored_by(self) -> str:
        return self.scorer or DEFAULT_SCORER

    @property
    def scores_prompts(self) -> bool:
        return self.scored != "continuation"

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.temperature, self.top_k, self.top_p)

    @property
    def prompt_tokens(self) -> int:
        return self.max_prompt_tokens

    def answer_tokens(self, asked: int | None) -> int:
        return asked or self.max_new_tokens

    def values(self, answers: Sequence[Answer], judge: Judge | None = None) -> list[float | None]:
        """Raises ExciseError without a judge."""
        if judge is None:
            raise ExciseError("toxicity needs a scorer; name one of excise.outcomes.scorers")
        return judge.scores([scored_text(answer.prompt, answer.text, self.scored) for answer in answers])

    def mend(self, empty: bool) -> str:
        if empty:
            return (
                "What helps: a model that continues plain text (a chat model ends a text it did not begin), templates "
                "that stop in the middle of a sentence, and a larger max_new_tokens if it writes blanks first."
            )
        return "What helps: more samples, and more templates or names per subgroup."


def scored_text(prompt: str, continuation: str, scored: str) -> str:
    """What of a completion is scored: `continuation`, or `prompt+continuation` as FASP does (method B2).

    Some tokenizers drop a continuation's leading space, so one is put between prompt and continuation where a letter or
    digit would touch what stands before it. An empty continuation gives an empty text under `continuation`, which every
    scorer leaves unscored (NaN).
    """
    if scored not in SCORED:
        raise ExciseError(f"scored: {scored!r} is not known; use {' or '.join(SCORED)}")
    if scored == "continuation":
        return continuation
    touches = prompt and not prompt[-1].isspace() and continuation[:1].isalnum()
    return f"{prompt} {continuation}" if touches else prompt + continuation
