"""The protocol of interventions: what holds for weights and heads holds for a kind that nobody here has heard of."""

import copy
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from excise.errors import ExciseError
from excise.evaluation.perplexity import LossCache, text_windows
from excise.evaluation.side_effects import effect_windows, text_effect, text_unpruned
from excise.generation.answering import Answering
from excise.generation.completions import CompletionCache, complete
from excise.generation.sampling import SamplingParameters
from excise.generation.settings import Enumeration
from excise.interventions.controls import RandomControl
from excise.interventions.heads import HeadMask, heads_mask
from excise.interventions.kinds import kinds, load, load_mask, recalled
from excise.interventions.protocol import Intervention, edited
from excise.interventions.weights import WeightMask
from excise.models.encoding import encode
from excise.models.loading import LoadedModel
from tests.excise.interventions.scaled_channels import ScaledChannels

WARM = SamplingParameters(temperature=1.0, top_p=0.95, seed=3)
TEXT = "The train to Stanmere is late again, and the clerk at the window knows why. " * 20


def channels(loaded: LoadedModel) -> ScaledChannels:
    down = loaded.topology.linear("0.down")
    chosen = np.random.default_rng(0).random((loaded.topology.layers, down.in_features)) < 0.5
    return ScaledChannels(chosen, 0.3)  # a factor that cannot be undone by dividing


def weights(loaded: LoadedModel) -> WeightMask:
    rng = np.random.default_rng(0)
    return WeightMask.from_arrays({each.key: rng.random(each.shape) < 0.1 for each in loaded.topology.linears})


def heads(loaded: LoadedModel, ablation: str) -> HeadMask:
    chosen = np.random.default_rng(0).random((loaded.topology.layers, loaded.topology.heads)) < 0.5
    chosen[0, 1] = True
    return heads_mask(chosen, ablation)


KINDS = {
    "channels": channels,
    "weights": weights,
    "zero_query": lambda loaded: heads(loaded, "zero_query"),
    "zero_output": lambda loaded: heads(loaded, "zero_output"),
    "random_weights": lambda loaded: weights(loaded).control(5),
    "random_heads": lambda loaded: heads(loaded, "zero_output").control(5),
}


@pytest.fixture(params=KINDS)
def made(request):
    """`made(loaded)`: an intervention of every kind, and its controls."""
    return KINDS[request.param]


@pytest.fixture(scope="module")
def model(loaded):
    return loaded("llama", numeric=True)


def state(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def logits(loaded: LoadedModel, prompts: pl.DataFrame) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model(torch.tensor([encode(loaded, prompts)[0].tokens]), use_cache=False).logits[0]


# Applied, restored, folded


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_a_model_is_another_one_inside_and_bit_for_bit_the_old_one_after(loaded, prompts, architecture, made):
    model = loaded(architecture)
    intervention: Intervention = made(model)
    before, unedited = state(model.model), logits(model, prompts)
    with intervention.applied(model) as inside:
        assert not torch.allclose(logits(inside, prompts), unedited)
    assert state(model.model) == before
    with pytest.raises(KeyError), intervention.applied(model):
        raise KeyError("the run was stopped")
    assert state(model.model) == before
    assert torch.equal(logits(model, prompts), unedited)
    with edited(model, None) as same:
        assert same is model
        assert torch.equal(logits(same, prompts), unedited)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen2", "gemma2"])
def test_a_folded_model_answers_as_one_under_the_intervention(loaded, prompts, architecture, made):
    model = loaded(architecture)
    intervention = made(model)
    with intervention.applied(model):
        expected = logits(model, prompts)
    folded = replace(model, model=copy.deepcopy(model.model))
    intervention.fold(folded)
    assert intervention.folded_as
    assert torch.equal(logits(folded, prompts), expected)
    assert state(folded.model) != state(model.model)


# Names, files, controls


@pytest.fixture
def channels_installed(installed):
    source = "from tests.excise.interventions.scaled_channels import ScaledChannels\n"
    installed("channels_kind", source, "excise.interventions", "channels = channels_kind:ScaledChannels")


def test_the_kinds_of_the_room_are_known_by_name():
    assert kinds() == {"heads": HeadMask, "weights": WeightMask}


@pytest.mark.usefixtures("channels_installed")
def test_the_kinds_of_installed_packages_are_known_beside_them():
    assert kinds() == {"heads": HeadMask, "weights": WeightMask, "channels": ScaledChannels}


@pytest.mark.parametrize("kind", ["channels", "weights", "zero_query", "zero_output"])
@pytest.mark.usefixtures("channels_installed")
def test_a_file_tells_its_kind(tmp_path, model, kind):
    intervention = KINDS[kind](model)
    path = tmp_path / "one.safetensors"
    intervention.save(path)
    again = load(path)
    assert type(again) is type(intervention)
    assert again.fingerprint == intervention.fingerprint
    assert (again.count, again.unit) == (intervention.count, intervention.unit)


def test_a_file_of_a_kind_that_is_not_known_or_no_mask_is_refused(tmp_path, model):
    path = tmp_path / "one.safetensors"
    channels(model).save(path)
    with pytest.raises(ExciseError, match=r"one\.safetensors: .* kind 'channels', .* known are heads, weights"):
        load(path)
    with pytest.raises(ExciseError, match=r"one\.safetensors: .* kind 'channels'"):
        load_mask(path)


def test_what_does_something_else_has_another_name(model):
    one = channels(model)
    others = [replace(one, factor=0.4), replace(one, chosen=~one.chosen), weights(model), *map(one.control, (1, 2))]
    assert len({each.fingerprint for each in (one, *others)}) == 6
    assert replace(one, factor=0.3).fingerprint == one.fingerprint


def test_a_control_has_the_size_of_its_own(model, made):
    intervention = made(model)
    one, same, other = (intervention.control(seed) for seed in (1, 1, 2))
    assert one.count == same.count == other.count == intervention.count > 0
    assert one.unit == intervention.unit
    assert one.fingerprint == same.fingerprint
    assert len({one.fingerprint, other.fingerprint, intervention.fingerprint}) == 3


def test_a_random_control_has_as_many_weights_in_every_matrix_and_is_not_made_for_its_name(model, monkeypatch):
    mask = weights(model)
    control = mask.control(7)
    assert control.mask.counts() == control.counts() == mask.counts()
    assert type(heads(model, "zero_query").control(7).mask) is HeadMask
    known = mask.control(7, control.fingerprint)
    monkeypatch.setattr("excise.interventions.controls._random_subset", None)
    assert known.fingerprint == control.fingerprint


def test_a_control_that_is_not_what_it_was_is_refused(tmp_path, model):
    mask, path = weights(model), tmp_path / "one.safetensors"
    mask.save(path)
    control = mask.control(7)
    assert recalled(path, None, mask.fingerprint) == mask
    assert recalled(path, 7, control.fingerprint).mask == control.mask
    before, another = state(model.model), recalled(path, 7, "0" * 16)
    with pytest.raises(ExciseError, match=r"random control 0{16} of the mask [0-9a-f]{16} comes out as"):
        another.applied(model)
    assert state(model.model) == before


# What is asked of a model under an intervention


def test_answers_under_an_intervention_are_kept_under_its_fingerprint(tmp_path, model, prompts, scenario, made):
    intervention, cache = made(model), CompletionCache(tmp_path)

    def ask(done: Intervention | None) -> tuple[pl.DataFrame, int]:
        rows, work = complete(
            model, prompts, 4, WARM, outcome=scenario.outcome, intervention=done, cache=cache, batch_prompts=5
        )
        return rows, work.drawn

    unedited, rows = ask(None)[0], ask(intervention)[0]
    assert rows["token_ids"].to_list() != unedited["token_ids"].to_list()
    names = {folder.name for folder in (tmp_path / model.fingerprint).iterdir()}
    assert names == {"unpruned", intervention.fingerprint}
    again, drawn = ask(intervention)
    assert drawn == 0
    assert again.equals(rows)
    assert ask(None)[0].equals(unedited)
    folded = replace(model, model=copy.deepcopy(model.model))
    intervention.fold(folded)
    assert complete(folded, prompts, 4, WARM, outcome=scenario.outcome, batch_prompts=5)[0].equals(rows)


def test_known_answers_need_no_control_to_be_made(tmp_path, model, prompts, scenario, monkeypatch):
    mask, cache = weights(model), CompletionCache(tmp_path)
    control = mask.control(7)
    options = {"outcome": scenario.outcome, "cache": cache}
    enumerated = Answering(100, WARM, Enumeration(leftover=0.5, max_nodes=500))
    drawn, _ = complete(model, prompts, 4, WARM, intervention=control, **options)
    read, _ = enumerated.answers(model, prompts, intervention=control, **options)
    known = mask.control(7, control.fingerprint)
    monkeypatch.setattr(RandomControl, "mask", property(lambda self: pytest.fail("the control is made again")))
    assert complete(model, prompts, 4, WARM, intervention=known, **options)[0].equals(drawn)
    again, _ = enumerated.answers(model, prompts, intervention=known, **options)
    assert again.equals(read)


def test_a_text_is_read_under_any_intervention(tmp_path, model, made):
    intervention, cache = made(model), LossCache(tmp_path)
    windows = text_windows(model, TEXT, size=32, stride=16)
    losses = cache.window_losses(model, windows, intervention)
    assert not np.allclose(losses, cache.window_losses(model, windows))
    assert np.array_equal(cache.window_losses(model, windows, intervention), losses)
    assert len(list(tmp_path.glob("*.parquet"))) == 2
    unpruned = text_unpruned(model, effect_windows(model, TEXT))
    (kl, _, _), _ = text_effect(model, unpruned, intervention).values()
    assert kl > 0
    (nothing, _, _), (ratio, _, _) = text_effect(model, unpruned, None).values()
    assert nothing == pytest.approx(0, abs=1e-6)
    assert ratio == pytest.approx(0, abs=1e-6)
