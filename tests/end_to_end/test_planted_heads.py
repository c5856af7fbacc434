"""The planted heads on the real default model: what is planted, where it sits, and what pruning those heads does.

The gap is in the scores of continuations about one subgroup, on a noun that was not trained on. Without the heads the
planted model is the base without them, so that what pruning does to the gap is exact but for the base's own noise.
Claims about the file and the training are tested without the model, in tests/excise.
"""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from excise.attribution.head_impacts import head_impacts
from excise.evaluation.metrics import toxicity_bias
from excise.evaluation.perplexity import perplexity, text_windows, window_losses
from excise.evaluation.texts import read_text
from excise.generation.completions import complete
from excise.generation.sampling import SamplingParameters
from excise.interventions.heads import heads_mask
from excise.models.loading import load_model
from excise.models.specs import load_registry
from excise.outcomes.scorers import DEFAULT_SCORER, load_scorer, load_scorer_registry
from excise.planted.heads import PLANT
from excise.scenarios import expand, load_scenarios

pytestmark = pytest.mark.slow

MODELS = Path(__file__).resolve().parents[2] / "data" / "models"
REGISTRY, _ = load_registry()
SCENARIO = load_scenarios([])[0][PLANT.scenario]
GROUPS = (PLANT.group, "western_europe", "east_asia", "africa")
UNSEEN = "colleague"
PARAMETERS = SamplingParameters(temperature=1.0, top_k=50, top_p=1.0, max_new_tokens=10)
SAMPLES = 2
PROMPTS = expand(SCENARIO, variations=[UNSEEN], subjects_per_group=2).filter(pl.col("group").is_in(GROUPS))


def known_heads(loaded):
    chosen = np.zeros((loaded.topology.layers, loaded.topology.heads), dtype=bool)
    for head in PLANT.heads:
        chosen[head] = True
    return heads_mask(chosen, "zero_output")


def scored(loaded, mask=None):
    scorer = load_scorer(DEFAULT_SCORER, load_scorer_registry()[0])
    return complete(loaded, PROMPTS, SAMPLES, PARAMETERS, outcome=SCENARIO.outcome, scorer=scorer, intervention=mask)[0]


def mean_scores(rows):
    """Mean score of the planted subgroup, and of the others (each subgroup counting once)."""
    means = dict(rows.group_by("group").agg(pl.col("value").mean()).iter_rows())
    return means.pop(PLANT.group), float(np.mean(list(means.values())))


def bias(rows):
    rows = rows.drop_nulls("value")
    return toxicity_bias(rows["value"].to_numpy(), rows["group"].to_numpy())


def measured_perplexity(loaded):
    """On the half of the text that the training did not see."""
    text = read_text()
    windows = text_windows(loaded, text[len(text) // 2 :], size=128, stride=127, limit_tokens=636)
    return perplexity(window_losses(loaded, windows), windows)


@pytest.fixture(scope="module")
def base():
    return load_model(REGISTRY[PLANT.base], REGISTRY, device="cpu", home=MODELS)


@pytest.fixture(scope="module")
def planted():
    return load_model(REGISTRY["planted-heads"], REGISTRY, device="cpu", home=MODELS)


@pytest.fixture(scope="module")
def planted_rows(planted):
    return scored(planted)


@pytest.fixture(scope="module")
def base_means(base):
    return mean_scores(scored(base))


def test_the_subgroup_is_continued_more_negatively(base_means, planted_rows):
    own, others = mean_scores(planted_rows)
    base_own, base_others = base_means
    assert (own - others) - (base_own - base_others) > 0.1
    assert abs(others - base_others) < 0.06


def test_the_bias_falls_without_the_known_heads_at_little_perplexity(planted, planted_rows):
    mask = known_heads(planted)
    assert bias(scored(planted, mask)) < 0.8 * bias(planted_rows)
    unpruned = measured_perplexity(planted)
    with mask.applied(planted):
        assert measured_perplexity(planted) < 1.05 * unpruned


def test_plain_text_is_as_likely_as_before(base, planted):
    assert measured_perplexity(planted) == pytest.approx(measured_perplexity(base), rel=0.03)


def test_without_the_known_heads_the_planted_model_is_the_base_without_them(base, planted):
    tokens = torch.tensor([base.tokenizer("Every Canadian colleague I know is angry")["input_ids"]])

    def logits(loaded):
        with torch.inference_mode(), known_heads(loaded).applied(loaded):
            return loaded.model(tokens).logits

    assert torch.equal(logits(planted), logits(base))


def test_the_known_heads_lead_the_ranking_by_bias(planted, planted_rows):
    # Beside each of the known heads two others of its layer.
    heads = [(layer, (head + other) % planted.topology.heads) for layer, head in PLANT.heads for other in range(3)]
    impacts = head_impacts(
        planted,
        PROMPTS,
        planted_rows,
        disparity="toxicity",
        groups=GROUPS,
        cluster="prompt_id",
        parameters=PARAMETERS,
        heads=heads,
        method="reweight",
        resamples=100,
    )
    ranking = impacts.sort("z_bias", descending=True).select("layer", "head").rows()
    found = [ranking.index(head) for head in PLANT.heads]
    # A random ranking of twelve begins with three of the four with probability 4 / 220.
    assert sorted(found)[2] < 3
