"""Generation: answers of a model, without computing a token twice.

Here: trees of answers, sampling, enumeration, and the cache of completions. Not here: prompts as tokens (`models`),
what an answer is worth (`outcomes`), and under which masks a model is asked (`interventions`).
"""

from excise.lazily import lazily

_PLACES = {
    "Answering": "excise.generation.answering",
    "CompletionCache": "excise.generation.completions",
    "Enumeration": "excise.generation.settings",
    "SamplingParameters": "excise.generation.sampling",
    "answer_distributions": "excise.generation.enumeration",
    "as_samples": "excise.generation.answering",
    "complete": "excise.generation.completions",
    "sample": "excise.generation.sampling",
}
__all__ = list(_PLACES)
__getattr__, __dir__ = lazily(__name__, _PLACES)
