"""A family from outside: one entry, and the model is scored, pruned and looked at head by head like any other.

Phi-3 is like Llama, but for one projection that computes q, k and v, and one that computes gate and up.
"""

import copy

import numpy as np
import pytest
import torch
import transformers

from excise.attribution import Answered, attribute
from excise.attribution.continuation import every_head
from excise.attribution.readers import window_parts
from excise.attribution.wanda import read_norms
from excise.errors import ExciseError
from excise.evaluation.perplexity import Window, window_losses
from excise.generation.completions import complete
from excise.generation.sampling import SamplingParameters
from excise.interventions.heads import heads_mask
from excise.interventions.weights import WeightMask
from excise.models.encoding import encode
from excise.models.families import BUILT_IN, family_of
from excise.models.loading import load_model
from excise.models.specs import ModelSpec
from tests.conftest import save_tokenizer

ENTRY = """
from excise.models.families import Family, in_every_layer

PHI3 = Family(
    model_type="phi3",
    layers="model.layers",
    attention="self_attn",
    qkv="qkv_proj",
    o="o_proj",
    gate_up="gate_up_proj",
    down="down_proj",
    windows=in_every_layer,
)
"""
HEADS, KV_HEADS, SIZE, HIDDEN, INNER = 6, 2, 10, 48, 80
PLACES = {"q": (0, 60), "k": (60, 80), "v": (80, 100), "gate": (0, 80), "up": (80, 160)}
"""Rows of qkv_proj and gate_up_proj."""


@pytest.fixture
def phi(installed, tmp_path):
    """A tiny Phi-3 with three queries to a key, heads that do not fill the hidden size, and windows of 12."""
    installed("phi_family", ENTRY, "excise.families", "phi3 = phi_family:PHI3")
    folder = tmp_path / "phi"
    save_tokenizer(folder)
    config = transformers.Phi3Config(
        vocab_size=304,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=SIZE,
        max_position_embeddings=1024,
        original_max_position_embeddings=1024,
        sliding_window=12,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return load_model(ModelSpec(key="phi", folder=folder), {}, device="cpu", home=tmp_path / "home")


def without(model: torch.nn.Module, layer: int, zero) -> torch.nn.Module:
    """A copy with some weights of a layer's attention or mlp set to zero by hand."""
    cut = copy.deepcopy(model)
    with torch.no_grad():
        zero(cut.model.layers[layer])
    return cut


TOKENS = torch.arange(30, 60)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def test_the_family_is_known_where_its_package_is_installed_alone(installed):
    with pytest.raises(ExciseError, match=r"architecture 'phi3' is not known; Excise knows llama, .*gpt_neox\. "):
        family_of("phi3")
    installed("phi_family", ENTRY, "excise.families", "phi3 = phi_family:PHI3")
    assert family_of("phi3").qkv == "qkv_proj"
    assert family_of("llama") == BUILT_IN[0]


@pytest.mark.parametrize(
    ("source", "point", "words"),
    [
        ("import nothing_of_this_name", "phi3 = broken_family:PHI3", "cannot be imported: No module named 'nothing_"),
        ("PHI3 = 3", "phi3 = broken_family:PHI3", "phi3 is 3; name a Family"),
        (ENTRY.replace("phi3", "gpt2"), "mine = broken_family:PHI3", "mine is a second Family named gpt2; rename it"),
    ],
)
def test_an_entry_point_that_is_of_no_use_is_named(installed, source, point, words):
    installed("broken_family", source, "excise.families", point)
    with pytest.raises(ExciseError, match=words):
        family_of("llama")


def test_the_parts_are_the_rows_of_the_fused_matrices(phi):
    topology = phi.topology
    assert (topology.heads, topology.kv_heads, topology.head_dim) == (HEADS, KV_HEADS, SIZE)
    assert topology.windows == (12, 12)
    roles = ["q", "k", "v", "o", "gate", "up", "down"]
    assert [linear.key for linear in topology.linears] == [f"{layer}.{role}" for layer in (0, 1) for role in roles]
    for linear in topology.linears:
        layer = phi.model.model.layers[linear.layer]
        own = {"o": layer.self_attn.o_proj, "down": layer.mlp.down_proj}
        fused = layer.self_attn.qkv_proj if linear.role in "qkv" else layer.mlp.gate_up_proj
        start, stop = PLACES.get(linear.role, (0, None))
        expected = own.get(linear.role, fused).weight[start:stop]
        assert linear.shape == tuple(expected.shape)
        assert torch.equal(linear.weight(phi.model), expected), linear.key
        assert linear.weight(phi.model).data_ptr() == expected.data_ptr()
        assert linear.output_features().tolist() == list(range(start, start + len(expected)))


def test_wanda_norms_are_those_of_plain_passes(phi, prompts, scenario, tmp_path):
    rows, _ = complete(phi, prompts, 3, SamplingParameters(temperature=0.9, seed=1), outcome=scenario.outcome)
    files = attribute(
        Answered(phi, prompts, rows, scenario.comparison, scenario.outcome), ["wanda"], folder=tmp_path / "scores"
    )
    tokens = {prompt.prompt_id: prompt.tokens for prompt in encode(phi, prompts)}
    for file in files:
        norms = read_norms(file.path)
        for side, group in (("minority", "black"), ("majority", "white")):
            some = rows.filter((rows["variation"] == file.variation) & (rows["group"] == group))
            squares: dict[str, list[torch.Tensor]] = {}
            hooks = []
            for number, layer in enumerate(phi.model.model.layers):
                for site, module in (
                    ("attention_input", layer.self_attn.qkv_proj),
                    ("attention_output", layer.self_attn.o_proj),
                    ("mlp_input", layer.mlp.gate_up_proj),
                    ("mlp_output", layer.mlp.down_proj),
                ):

                    def keep(module, given, place=f"{number}.{site}", squares=squares):
                        squares.setdefault(place, []).append(given[0][0].double().square().sum(dim=0))

                    hooks.append(module.register_forward_pre_hook(keep))
            with torch.inference_mode():
                for prompt_id, ids, finished in some.select("prompt_id", "token_ids", "finished").iter_rows():
                    phi.model(torch.tensor([[*tokens[prompt_id], *(ids[:-1] if finished else ids)]]), use_cache=False)
            for hook in hooks:
                hook.remove()
            assert set(squares) == set(norms[side])
            for place, each in squares.items():
                assert len(each) == 9
                expected = torch.stack(each).mean(dim=0).sqrt().numpy()
                np.testing.assert_allclose(norms[side][place], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("role", ["q", "k", "v", "gate", "up"])
def test_a_mask_of_a_part_prunes_its_rows_alone(phi, role):
    start, stop = PLACES[role]
    chosen = np.random.default_rng(0).random((stop - start, HIDDEN)) < 0.3

    def zero(layer):
        fused = layer.self_attn.qkv_proj if role in "qkv" else layer.mlp.gate_up_proj
        fused.weight[start:stop][torch.from_numpy(chosen)] = 0

    before = logits(phi.model)
    with WeightMask.from_arrays({f"1.{role}": chosen}).applied(phi):
        inside = logits(phi.model)
    assert torch.equal(inside, logits(without(phi.model, 1, zero)))
    assert not torch.allclose(inside, before, atol=1e-3)
    assert torch.equal(logits(phi.model), before)


@pytest.mark.parametrize("head", [0, 4])
def test_heads_go_as_they_go_by_hand(phi, head):
    chosen = np.zeros((2, HEADS), dtype=bool)
    chosen[1, head] = True
    own = slice(head * SIZE, (head + 1) * SIZE)

    def without_query(layer):
        layer.self_attn.qkv_proj.weight[own] = 0

    def without_output(layer):
        layer.self_attn.o_proj.weight[:, own] = 0

    for ablation, zero in (("zero_query", without_query), ("zero_output", without_output)):
        with heads_mask(chosen, ablation).applied(phi):
            found = logits(phi.model)
        torch.testing.assert_close(found, logits(without(phi.model, 1, zero)), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found, logits(phi.model), atol=1e-3)


def test_running_on_without_a_head_gives_the_losses_of_its_mask(phi):
    windows = [Window(tuple(range(30 + start, 60 + start)), 20) for start in (0, 7)]
    (part,) = window_parts(phi, windows)
    losses = {}

    def keep(layer, head, numbers):
        losses[layer, head] = numbers

    heads = {layer: range(HEADS) for layer in (0, 1)}
    every_head(phi, part.chunks, part.read, heads, unpruned=True, keep=keep)
    np.testing.assert_allclose(losses[None, None], window_losses(phi, windows), rtol=1e-5)
    for layer, head in ((0, 1), (1, 5)):
        chosen = np.zeros((2, HEADS), dtype=bool)
        chosen[layer, head] = True
        with heads_mask(chosen, "zero_output").applied(phi):
            np.testing.assert_allclose(losses[layer, head], window_losses(phi, windows), rtol=1e-5)
