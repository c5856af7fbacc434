"""How a stage asks the model: caches of its answers and scores, the scorer, and the text for perplexity."""

from typing import TYPE_CHECKING

from assets.partitions import Catalogue
from assets.stage import Step
from excise.errors import ExciseError
from excise.scenarios import Scenario
from resources.settings import Audit

if TYPE_CHECKING:
    from excise.evaluation.perplexity import Window
    from excise.generation.answering import Answering
    from excise.generation.under_masks import Asking
    from excise.models.loading import LoadedModel
    from excise.outcomes.scorers import Scorer


def asking_of(step: Step, loaded: "LoadedModel", how: "Answering", scorer: "Scorer | None" = None) -> "Asking":
    """The loaded model asked about the step's scenario, its answers and their scores kept."""
    from excise.generation.completions import CompletionCache
    from excise.generation.under_masks import Asking
    from excise.outcomes.scoring import ScoreCache

    cache, scores = CompletionCache(step.artifacts.completion_cache), ScoreCache(step.artifacts.score_cache)
    return Asking(loaded, how, step.scenario.outcome, cache, scorer, scores)


def windows_of(loaded: "LoadedModel", audit: Audit) -> list["Window"]:
    """The windows of the text that perplexity is measured on."""
    from excise.evaluation.perplexity import text_windows
    from excise.evaluation.texts import read_text

    return text_windows(
        loaded,
        read_text(audit.text),
        mode=audit.perplexity_mode,
        size=audit.text_window,
        stride=audit.text_stride,
        limit_tokens=audit.text_tokens,
    )


def scorer_of(catalogue: Catalogue, scenario: Scenario) -> "Scorer | None":
    """The loaded scorer of a scenario whose answers a scorer values, else None."""
    key = scenario.outcome.scored_by
    if key is None:
        return None
    from excise.outcomes.scorers import load_scorer

    if key not in catalogue.scorers:
        raise ExciseError(f"scenario {scenario.key}: outcome.scorer: {catalogue.scorers.why_not(key)}")
    return load_scorer(key, catalogue.scorers)
