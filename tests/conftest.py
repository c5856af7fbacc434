"""What every test may borrow: tiny random models of each supported family, saved as ordinary model folders.

They are real transformers models with a real byte-level tokenizer and a chat template, small enough to run in
milliseconds. Nothing here imitates the project's own code; tests of one stage keep their data beside that stage.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")

ARCHITECTURES = ("llama", "gpt2", "gpt_neo", "gptj", "gpt_neox", "qwen2", "gemma2", "mistral")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
VOCABULARY = 300
MODEL_VOCABULARY = 304  # a little larger than the tokenizer's, as in many published models
DIGITS = "0123456789"
# A few merges only: most characters stay one token, so that offsets and shared prefixes are easy to follow by hand.
TRAINING_TEXT = ("What should I offer for the used bicycle of Claire Becker? Answer with one number in dollars.",)


def save_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Train a byte-level BPE of 300 entries in memory and save it in `folder`. Any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(folder)


def tiny_config(architecture: str):
    """A transformers config of two or three layers, hidden size 32 to 48, for one of `ARCHITECTURES`."""
    import transformers as tf

    ids = {"vocab_size": MODEL_VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    grouped = {
        **ids,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
    }
    gpt = {**ids, "n_embd": 32, "n_head": 4, "n_positions": 1024, "initializer_range": 0.3}
    gpt |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    match architecture:
        case "llama":
            return tf.LlamaConfig(**grouped)
        case "qwen2":
            return tf.Qwen2Config(**grouped)
        case "mistral":
            return tf.MistralConfig(**grouped, sliding_window=None)
        case "gemma2":
            grouped |= {"initializer_range": 0.15}  # tied and scaled embeddings: larger ones only repeat the last token
            return tf.Gemma2Config(**grouped, head_dim=16, query_pre_attn_scalar=16, sliding_window=512)
        case "gpt2":
            return tf.GPT2Config(**gpt, n_layer=3)
        case "gptj":
            return tf.GPTJConfig(**gpt, n_layer=2, rotary_dim=4)
        case "gpt_neo":
            return tf.GPTNeoConfig(
                **ids,
                hidden_size=32,
                num_heads=4,
                num_layers=2,
                attention_types=[[["global", "local"], 1]],
                window_size=64,
                max_position_embeddings=1024,
                initializer_range=0.3,
                resid_dropout=0.0,
                embed_dropout=0.0,
                attention_dropout=0.0,
            )
        case "gpt_neox":
            return tf.GPTNeoXConfig(
                **ids,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=1024,
                initializer_range=0.3,
            )
    raise ValueError(f"no tiny model of architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}")


def lean_towards_numbers(model, tokenizer) -> None:
    """Change a tiny Llama's weights so that it mostly answers with a few digits and then ends.

    Coordinate 0 of every token embedding becomes a constant that no layer writes to; the output layer reads it
    with a positive weight for digits and the end token, with a negative one for all else.
    """
    import torch

    wanted = tokenizer.convert_tokens_to_ids([*DIGITS, "<|end|>"])
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 5.0
        for layer in model.model.layers:
            for written in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                written.mul_(0.3)
                written[0] = 0.0
        head = model.get_output_embeddings().weight
        head.mul_(0.6)
        head[wanted] *= 0.6
        head[:, 0] = -2.0
        head[wanted, 0] = 1.5
        head[wanted[-1], 0] = 1.9


def save_tiny_model(
    folder: Path,
    architecture: str,
    *,
    seed: int = 0,
    numeric: bool = False,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """Save a random model of `architecture` with its tokenizer in `folder` and return the folder.

    `numeric` (Llama only) makes most answers parse as a number. `chat_template=None` leaves the template out.
    """
    import torch
    import transformers

    save_tokenizer(folder, chat_template=chat_template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture)).float().eval()
        with torch.no_grad():  # biases start at zero in transformers; a mistake about them would go unseen
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0.0, 0.1)
    if numeric:
        if architecture != "llama":
            raise ValueError("numeric tiny models are made for llama only")
        lean_towards_numbers(model, tokenizer)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices are slower on many threads, and the machine may be shared."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("gpt2") -> folder`. Options: `seed`, `numeric`, `chat_template`. Each is made once per session."""
    made: dict[str, Path] = {}

    def make(architecture: str, **options) -> Path:
        key = json.dumps([architecture, options], sort_keys=True)
        if key not in made:
            made[key] = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture, **options)
        return made[key]

    return make
