"""Taking a head out by hooks is the same as taking it out of the weights, and leaves everything else alone."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from excise.errors import ExciseError
from excise.generation.sampling import SamplingParameters, sample
from excise.generation.tree import Rows, answer_tree, common_prefix, logits_of, pack
from excise.interventions.combining import intersection, leave_one_out, union, votes
from excise.interventions.heads import HEAD_ROLES, HeadMask, heads_mask
from excise.interventions.kinds import load_mask
from excise.interventions.packed import Mask
from excise.interventions.weights import WeightMask
from excise.models.encoding import encode
from excise.models.loading import load_model
from excise.models.specs import ModelSpec

TOLERANCE = 1e-4
WINDOW = 12
OTHERS = {
    "vocab_size": 304,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "attention_bias": True,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.fixture
def tokens(prompts):
    """The first prompt, as a batch of one."""
    return lambda loaded: torch.tensor([encode(loaded, prompts)[0].tokens])


def some_heads(loaded, seed=0) -> np.ndarray:
    """About a third of the heads, at least one and not all in every layer."""
    topology = loaded.topology
    chosen = np.random.default_rng(seed).random((topology.layers, topology.heads)) < 0.3
    chosen[:, 0], chosen[:, -1] = False, True
    return chosen


def logits(model, tokens) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits[0]


def hooks_of(model) -> list[dict]:
    return [dict(hooks) for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def state(model) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def zero_queries(architecture, model, layer, head, size) -> None:
    """Set a head's query rows and their bias to zero, in the module that transformers gives the architecture."""
    if architecture == "gpt2":
        fused = model.transformer.h[layer].attn.c_attn  # [in, q k v], each of all heads
        fused.weight[:, head * size : (head + 1) * size] = 0
        fused.bias[head * size : (head + 1) * size] = 0
    elif architecture == "gpt_neox":
        fused = model.gpt_neox.layers[layer].attention.query_key_value  # [head by head: q k v, in]
        fused.weight[3 * head * size : (3 * head + 1) * size] = 0
        fused.bias[3 * head * size : (3 * head + 1) * size] = 0
    else:
        attention = {
            "gpt_neo": lambda: model.transformer.h[layer].attn.attention,
            "gptj": lambda: model.transformer.h[layer].attn,
        }.get(architecture, lambda: model.model.layers[layer].self_attn)()
        attention.q_proj.weight[head * size : (head + 1) * size] = 0
        if attention.q_proj.bias is not None:
            attention.q_proj.bias[head * size : (head + 1) * size] = 0


def zero_outputs(architecture, model, layer, head, size) -> None:
    """Set the columns of the output projection that read a head to zero; its bias stays."""
    columns = slice(head * size, (head + 1) * size)
    if architecture == "gpt2":
        model.transformer.h[layer].attn.c_proj.weight[columns] = 0  # [in, out]
    elif architecture == "gpt_neox":
        model.gpt_neox.layers[layer].attention.dense.weight[:, columns] = 0
    elif architecture == "gpt_neo":
        model.transformer.h[layer].attn.attention.out_proj.weight[:, columns] = 0
    elif architecture == "gptj":
        model.transformer.h[layer].attn.out_proj.weight[:, columns] = 0
    else:
        model.model.layers[layer].self_attn.o_proj.weight[:, columns] = 0


SLICED = {"zero_query": zero_queries, "zero_output": zero_outputs}


# Hooks and slices


@pytest.mark.parametrize("ablation", list(HEAD_ROLES))
def test_hooks_are_the_same_as_zeros_in_the_weights(loaded, tokens, architecture, ablation):
    model, asked = loaded(architecture), tokens(loaded(architecture))
    chosen = some_heads(model)
    cut = copy.deepcopy(model.model)
    with torch.no_grad():
        for layer, head in np.argwhere(chosen).tolist():
            SLICED[ablation](architecture, cut, layer, head, model.topology.head_dim)
    before = logits(model.model, asked)
    with heads_mask(chosen, ablation).applied(model):
        found = logits(model.model, asked)
    assert (found - logits(cut, asked)).abs().max() < TOLERANCE
    assert (found - before).abs().max() > 0.01
    assert torch.equal(logits(model.model, asked), before)


@pytest.mark.parametrize("ablation", list(HEAD_ROLES))
def test_each_single_head_is_the_right_one(loaded, tokens, architecture, ablation):
    """No two heads are confused: every head of the first layer by itself."""
    model, asked = loaded(architecture), tokens(loaded(architecture))
    seen = []
    for head in range(model.topology.heads):
        chosen = np.zeros((model.topology.layers, model.topology.heads), dtype=bool)
        chosen[0, head] = True
        cut = copy.deepcopy(model.model)
        with torch.no_grad():
            SLICED[ablation](architecture, cut, 0, head, model.topology.head_dim)
        with heads_mask(chosen, ablation).applied(model):
            seen.append(logits(model.model, asked))
        assert (seen[-1] - logits(cut, asked)).abs().max() < TOLERANCE
    assert min((one - other).abs().max() for one in seen for other in seen if one is not other) > 1e-3


def test_the_rows_of_a_head_s_query_are_where_the_topology_says(loaded, architecture):
    """The module's output at `output_features` is what the matrix' rows compute, bias and all."""
    model = loaded(architecture)
    for linear in model.topology.linears:
        if linear.role not in ("q", "k", "v"):
            continue
        module = model.model.get_submodule(linear.module)
        given = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            output = module(given)
        places = linear.output_features()
        expected = given @ linear.weight(model.model).reshape(linear.shape).T
        if module.bias is not None:
            expected = expected + module.bias[places]
        assert (output[:, places] - expected).abs().max() < 1e-5, linear.key


# A head that is not there


def without_heads(model, architecture, gone) -> torch.nn.Module:
    """A copy whose attention really lacks the heads: smaller matrices q, k, v and o in every layer.

    gone: heads to cut out of all layers. The older families cannot be configured with fewer heads than fill the hidden
    size, so the projections of a full model are replaced and their attention is told its new number of heads.
    """
    cut = copy.deepcopy(model.model)
    topology = model.topology
    size, heads = topology.head_dim, topology.heads - len(gone)
    stay = np.repeat(~np.isin(np.arange(topology.heads), gone), size)
    shared = topology.kv_heads < topology.heads

    def linear(weight, bias):
        made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        made.weight = torch.nn.Parameter(weight.clone())
        if bias is not None:
            made.bias = torch.nn.Parameter(bias.clone())
        return made

    for layer in range(topology.layers):
        at = topology.attention_module(cut, layer)
        if architecture == "gpt2":
            three = np.concatenate([stay] * 3)
            at.c_attn.weight = torch.nn.Parameter(at.c_attn.weight[:, three].clone())
            at.c_attn.bias = torch.nn.Parameter(at.c_attn.bias[three].clone())
            at.c_attn.nf = int(three.sum())
            at.c_proj.weight = torch.nn.Parameter(at.c_proj.weight[stay].clone())
            at.split_size = heads * size
            at.num_heads = heads
        elif architecture == "gpt_neox":
            three = np.repeat(~np.isin(np.arange(topology.heads), gone), 3 * size)
            at.query_key_value = linear(at.query_key_value.weight[three], at.query_key_value.bias[three])
            at.dense = linear(at.dense.weight[:, stay], at.dense.bias)
        elif architecture in ("gpt_neo", "gptj"):
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(at, name, linear(getattr(at, name).weight[stay], None))
            at.out_proj = linear(at.out_proj.weight[:, stay], at.out_proj.bias)
            setattr(at, "num_heads" if architecture == "gpt_neo" else "num_attention_heads", heads)
        else:
            keys = stay
            if shared:  # one key and value head per query head from now on: shared ones are repeated, then cut
                groups = topology.heads // topology.kv_heads
                keys = np.repeat(np.arange(topology.kv_heads * size).reshape(-1, size), groups, axis=0).ravel()[stay]
            for name, rows in (("q_proj", stay), ("k_proj", keys), ("v_proj", keys)):
                old = getattr(at, name)
                setattr(at, name, linear(old.weight[rows], None if old.bias is None else old.bias[rows]))
            at.o_proj = linear(at.o_proj.weight[:, stay], at.o_proj.bias)
            at.num_key_value_groups = 1
    return cut


@pytest.mark.parametrize("gone", [[1], [0, 3]])
def test_zero_output_is_a_model_without_the_head(loaded, tokens, architecture, gone):
    """Rows of q, k and v and columns of o are cut out, so that the attention has fewer heads."""
    model, asked = loaded(architecture), tokens(loaded(architecture))
    smaller = without_heads(model, architecture, gone)
    weights = sum(each.numel() for each in smaller.parameters())
    if model.topology.kv_heads == model.topology.heads:
        assert weights < sum(each.numel() for each in model.model.parameters())
    chosen = np.zeros((model.topology.layers, model.topology.heads), dtype=bool)
    chosen[:, gone] = True
    before = logits(model.model, asked)
    with heads_mask(chosen, "zero_output").applied(model):
        found = logits(model.model, asked)
    assert (found - logits(smaller, asked)).abs().max() < TOLERANCE
    assert (found - before).abs().max() > 0.01


# Queries of zero


@pytest.fixture(scope="session")
def normed(tiny_model, tmp_path_factory):
    """`normed("qwen3")` or `normed("gemma3_text")`: models that normalise queries after their projection."""

    def make(kind: str):
        config = {
            "qwen3": lambda: transformers.Qwen3Config(**OTHERS),
            "gemma3_text": lambda: transformers.Gemma3TextConfig(
                **OTHERS, sliding_window=WINDOW, layer_types=ALTERNATING
            ),
        }[kind]()
        folder = shutil.copytree(tiny_model("llama"), tmp_path_factory.mktemp(kind) / "model")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "q_norm" in name:
                    parameter.data.normal_(0.5, 0.1)
            model.save_pretrained(folder)
        return load_model(ModelSpec(key=kind, folder=folder), {}, device="cpu", home=tmp_path_factory.mktemp("home"))

    return make


def attentions(model, tokens) -> np.ndarray:
    """Attention probabilities of a plain pass, [layers, heads, queries, keys]."""
    model = copy.deepcopy(model)  # transformers leaves hooks of its own in a model asked for its attention
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return torch.cat(model(tokens, use_cache=False, output_attentions=True).attentions).numpy()


def check_uniform(model, asked):
    chosen = some_heads(model)
    before = attentions(model.model, asked)
    with heads_mask(chosen, "zero_query").applied(model):
        found = attentions(model.model, asked)
    order = np.arange(asked.shape[1])
    for layer, window in enumerate(model.topology.windows):
        distance = order[:, None] - order[None]
        visible = (distance >= 0) & (distance < (window or len(order)))
        uniform = visible / visible.sum(axis=1, keepdims=True)
        assert np.abs(found[layer, chosen[layer]] - uniform).max() < 1e-6
        assert (np.abs(found[layer, ~chosen[layer]] - uniform).max(axis=(1, 2)) > 0.01).all()
    # The first layer's other heads see the same input as ever, and so attend as ever.
    assert np.array_equal(found[0, ~chosen[0]], before[0, ~chosen[0]])


def test_zero_query_attends_uniformly_to_all_it_may_see(loaded, tokens, architecture):
    check_uniform(loaded(architecture), tokens(loaded(architecture)))


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_a_query_of_zero_stays_zero_when_it_is_normalised(normed, tokens, kind):
    model = normed(kind)
    asked = tokens(model)
    check_uniform(model, asked)
    chosen = some_heads(model)
    for ablation, zero in SLICED.items():
        cut = copy.deepcopy(model.model)
        with torch.no_grad():
            for layer, head in np.argwhere(chosen).tolist():
                zero(kind, cut, layer, head, model.topology.head_dim)
        with heads_mask(chosen, ablation).applied(model):
            found = logits(model.model, asked)
        assert (found - logits(cut, asked)).abs().max() < TOLERANCE
        assert (found - logits(model.model, asked)).abs().max() > 0.01


@pytest.mark.parametrize("ablation", list(HEAD_ROLES))
def test_keys_values_and_other_queries_are_left_alone(loaded, tokens, architecture, ablation):
    """What the projections of the first layer return is bit for bit the old, but for the chosen heads' queries."""
    model, asked = loaded(architecture), tokens(loaded(architecture))
    chosen = some_heads(model)

    def projected() -> dict[str, torch.Tensor]:
        seen, hooks = {}, []
        for role in "qkv":
            linear = model.topology.linear(f"0.{role}")

            def keep(module, given, output, linear=linear):
                seen[linear.role] = output[0][:, linear.output_features()].clone()

            hooks.append(model.model.get_submodule(linear.module).register_forward_hook(keep))
        logits(model.model, asked)
        for hook in hooks:
            hook.remove()
        return seen

    before = projected()
    with heads_mask(chosen, ablation).applied(model):
        now = projected()
    if ablation == "zero_query":
        of_chosen = torch.from_numpy(np.repeat(chosen[0], model.topology.head_dim))
        assert not now["q"][:, of_chosen].any()
        assert before["q"][:, of_chosen].any()
        before["q"] = before["q"].masked_fill(of_chosen, 0)
    for role, values in before.items():
        assert torch.equal(now[role], values), role


# Answers under a mask


@pytest.mark.parametrize("ablation", list(HEAD_ROLES))
def test_cached_passes_under_a_mask_are_the_plain_ones(loaded, prompts, architecture, ablation):
    """Trunk, prompts and answers that share columns, against every answer read on its own."""
    model = loaded(architecture)
    asked = [prompt.tokens for prompt in encode(model, prompts)[2:5]]
    trunk = common_prefix(asked)
    answers = [((20, 21, 22), None), ((20, 23), None), ((24,), 1)]
    trees = [answer_tree(prompt[trunk:], answers, np.ones((3, 1))) for prompt in asked]
    packed = pack(trees, trunk)
    with torch.inference_mode(), heads_mask(some_heads(model), ablation).applied(model):
        hidden = Rows(model, asked[0][:trunk]).copy(3).forward(packed.tokens, packed.positions, packed.attends)
        for row, (prompt, tree) in enumerate(zip(asked, trees, strict=True)):
            column, paths = len(prompt) - trunk, {(): tree.prompt_length - 1}
            for parent, token in tree.edges.tolist():
                path = next(path for path, place in paths.items() if place == parent)
                if token != 1:
                    paths[(*path, token)] = column
                    column += 1
            for path, place in paths.items():
                expected = model.model(torch.tensor([[*prompt, *path]]), use_cache=False).logits[0, -1]
                assert (logits_of(model, hidden[row, place]) - expected).abs().max() < TOLERANCE
    assert len(paths) == 6


@pytest.mark.parametrize("ablation", list(HEAD_ROLES))
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neo"])
def test_the_likeliest_answer_under_a_mask_is_that_of_plain_passes(loaded, prompts, architecture, ablation):
    model = loaded(architecture)
    asked = [prompt.tokens for prompt in encode(model, prompts)[:4]]
    parameters = SamplingParameters(temperature=0, max_new_tokens=5)
    unpruned = [draw.tokens for draw in sample(model, asked, [[0]] * 4, parameters)]
    with heads_mask(some_heads(model), ablation).applied(model):
        drawn = [draw.tokens for draw in sample(model, asked, [[0]] * 4, parameters)]
        for prompt, answer in zip(asked, drawn, strict=True):
            so_far = list(prompt)
            for token in answer:
                assert int(logits(model.model, torch.tensor([so_far]))[-1].argmax()) == token
                so_far.append(token)
    assert drawn != unpruned
    assert any(drawn)


# The context


@pytest.mark.parametrize("ablation", list(HEAD_ROLES))
def test_hooks_are_gone_afterwards_and_nothing_was_changed(loaded, tokens, architecture, ablation):
    model, asked = loaded(architecture), tokens(loaded(architecture))
    mask = heads_mask(some_heads(model), ablation)
    hooks, weights, before = hooks_of(model.model), state(model.model), logits(model.model, asked)
    with mask.applied(model) as inside:
        assert inside is model
        assert hooks_of(model.model) != hooks
        assert state(model.model) == weights
    assert hooks_of(model.model) == hooks
    with pytest.raises(KeyError), mask.applied(model):
        raise KeyError("the run was stopped")
    assert hooks_of(model.model) == hooks
    assert torch.equal(logits(model.model, asked), before)


def test_hooks_are_gone_when_pruning_fails_half_way(loaded, monkeypatch):
    """The last layer's projection takes no hook."""
    model = loaded("llama")
    hooks = hooks_of(model.model)
    last = model.model.model.layers[-1].self_attn.q_proj

    def refuse(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(last, "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="out of memory"), heads_mask(some_heads(model), "zero_query").applied(model):
        pass
    assert hooks_of(model.model) == hooks


def test_a_layer_without_a_chosen_head_is_not_touched(loaded):
    model = loaded("llama")
    chosen = some_heads(model)
    chosen[0] = False
    with heads_mask(chosen, "zero_output").applied(model):
        hooked = [bool(layer.self_attn.o_proj._forward_pre_hooks) for layer in model.model.model.layers]
    assert hooked == [False, True, True]


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_masks_of_heads_and_of_weights_nest(loaded, tokens, some_mask, architecture):
    """In any order, and as one mask of heads that holds both of their roles."""
    model, asked = loaded(architecture), tokens(loaded(architecture))
    heads, weights = heads_mask(some_heads(model), "zero_query"), some_mask(model, density=0.05)
    others = heads_mask(some_heads(model, seed=1), "zero_output")
    before, unpruned = state(model.model), logits(model.model, asked)
    with heads.applied(model), weights.applied(model), others.applied(model):
        one = logits(model.model, asked)
    with weights.applied(model):
        only_weights = logits(model.model, asked)
        with others.applied(model), heads.applied(model):
            another = logits(model.model, asked)
        assert torch.equal(logits(model.model, asked), only_weights)
    every = HeadMask.from_arrays({key: mask.array(key) for mask in (heads, others) for key in mask.shapes})
    with every.applied(model), weights.applied(model):
        together = logits(model.model, asked)
    assert torch.equal(one, another)
    assert torch.equal(one, together)
    assert (one - only_weights).abs().max() > 0.01
    assert (one - unpruned).abs().max() > 0.01
    assert state(model.model) == before


def test_a_head_may_be_taken_out_twice(loaded, tokens):
    model, asked = loaded("gpt2"), tokens(loaded("gpt2"))
    mask = heads_mask(some_heads(model), "zero_query")
    with mask.applied(model):
        once = logits(model.model, asked)
        with mask.applied(model):
            assert torch.equal(logits(model.model, asked), once)
        assert torch.equal(logits(model.model, asked), once)


def test_gradients_pass_a_mask(loaded, tokens):
    """Weights that only a removed head uses have no gradient, all others have one."""
    model = loaded("llama")
    size = model.topology.head_dim
    chosen = np.zeros((model.topology.layers, model.topology.heads), dtype=bool)
    chosen[1, 2] = True
    own = copy.deepcopy(model.model).requires_grad_(True)
    copied = replace(model, model=own)
    with heads_mask(chosen, "zero_output").applied(copied):
        own(tokens(model)).logits.square().sum().backward()
    projection = own.model.layers[1].self_attn
    removed = slice(2 * size, 3 * size)
    assert not projection.o_proj.weight.grad[:, removed].any()
    assert not projection.q_proj.weight.grad[removed].any()
    assert projection.q_proj.weight.grad[: 2 * size].any(dim=1).all()
    assert projection.v_proj.weight.grad.any(dim=1).all()


# Masks of heads


HEADS = [[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1]]
OTHER_HEADS = [[1, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0, 1, 0, 0, 1]]
THIRD_HEADS = [[0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 1, 0, 0, 0]]


def of(heads, ablation="zero_query") -> Mask:
    return heads_mask(np.array(heads, dtype=bool), ablation)


@pytest.mark.parametrize(("ablation", "role"), [("zero_query", "head_query"), ("zero_output", "head_output")])
def test_a_mask_of_heads_by_hand(tmp_path, ablation, role):
    mask = of(HEADS, ablation)
    assert mask.counts() == {f"0.{role}": 2, f"1.{role}": 0, f"2.{role}": 3}
    assert mask.shapes == {f"{layer}.{role}": (1, 5) for layer in range(3)}
    assert (mask.count, mask.size, mask.density) == (5, 15, 1 / 3)
    assert mask.array(f"2.{role}").tolist() == [[True, True, False, False, True]]
    mask.save(tmp_path / "heads.safetensors")
    assert load_mask(tmp_path / "heads.safetensors") == mask
    assert of(HEADS, "zero_query").fingerprint != of(HEADS, "zero_output").fingerprint


def test_many_layers_are_kept_in_their_order():
    assert list(of(np.zeros((12, 2))).shapes) == [f"{layer}.head_query" for layer in range(12)]


def test_combinations_of_masks_of_heads_by_hand():
    one, two, three = of(HEADS), of(OTHER_HEADS), of(THIRD_HEADS)
    assert intersection([one, two]) == of([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]])
    assert union([one, two]) == of([[1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [1, 1, 0, 0, 1]])
    assert votes([one, two, three], 2) == of([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 1, 0, 0, 1]])
    assert list(leave_one_out(lambda: [one, two, three])) == [
        of([[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0]]),
        of([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]),
        of([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]]),
    ]
    with pytest.raises(ExciseError, match="masks are of different matrices"):
        intersection([one, of(HEADS, "zero_output")])


def test_the_random_control_has_as_many_heads_in_every_layer():
    mask = of(HEADS)
    draws = {mask.control(seed).mask.fingerprint for seed in range(30)}
    assert all(mask.control(seed).mask.counts() == mask.counts() for seed in range(30))
    assert mask.control(3).mask.shapes == mask.shapes
    assert len(draws) > 20


# Errors


@pytest.mark.parametrize(
    ("ablation", "heads", "message"),
    [
        ("zero_weights", np.zeros((2, 3), dtype=bool), "'zero_weights' of heads is not known; known are zero_query"),
        ("zero_query", np.zeros((2, 3)), "give a boolean array of two dimensions"),
        ("zero_query", np.zeros(3, dtype=bool), "give a boolean array of two dimensions"),
        ("zero_output", [[True]], "give a boolean array of two dimensions"),
    ],
)
def test_a_mask_of_heads_is_made_of_a_known_ablation_and_a_boolean_array(ablation, heads, message):
    with pytest.raises(ExciseError, match=message):
        heads_mask(heads, ablation)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("3.head_query", (1, 6), "heads 3.head_query are not in the model, which has 3 layers"),
        ("one.head_output", (1, 6), "heads one.head_output are not in the model"),
        ("01.head_output", (1, 6), "heads 01.head_output are not in the model"),
        ("1.head_query", (1, 5), r"heads 1.head_query have shape \(1, 5\), the model's \(1, 6\)"),
        ("1.head_output", (6, 1), r"heads 1.head_output have shape \(6, 1\), the model's \(1, 6\)"),
    ],
)
def test_a_mask_of_another_model_s_heads_is_refused_before_anything_changes(loaded, key, shape, message):
    model = loaded("llama")
    weights, hooks = state(model.model), hooks_of(model.model)
    wrong = HeadMask.from_arrays({"0.head_query": np.ones((1, 6), dtype=bool), key: np.ones(shape, dtype=bool)})
    with pytest.raises(ExciseError, match=message), wrong.applied(model):
        pass
    assert state(model.model) == weights
    assert hooks_of(model.model) == hooks


@pytest.mark.parametrize(
    ("kind", "key", "message"),
    [
        (HeadMask, "1.head_key", "holds head_query, head_output of layers, and 1.head_key is neither"),
        (HeadMask, "0.q", "and 0.q is neither"),
        (WeightMask, "0.head_query", "a mask of weights holds no heads, but 0.head_query are such"),
    ],
)
def test_a_mask_holds_weights_or_heads(kind, key, message):
    with pytest.raises(ExciseError, match=message):
        kind.from_arrays(
            {"1.head_query" if kind is HeadMask else "1.q": np.ones((1, 6), dtype=bool)}
            | {key: np.ones((1, 6), dtype=bool)}
        )
