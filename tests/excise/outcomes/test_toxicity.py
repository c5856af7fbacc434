"""A score is what its classifier or lexicon says of the text alone: whatever the batch, the order or the cache."""

import dataclasses
import json
import math
import shutil

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from excise.errors import ExciseError
from excise.outcomes.kinds.toxicity import scored_text
from excise.outcomes.lexicon import ADDED, LEFT_OUT
from excise.outcomes.scorers import DEFAULT_SCORER, ScorerSpec, load_scorer, load_scorer_registry
from excise.outcomes.scoring import ScoreCache, score_texts

TEXTS = [
    "The clerk at the window sold me a ticket to Stanmere.",
    "He is an idiot.",
    "They hate the bus, and they said so loudly,\nfor the whole of the long way to Harlow Bridge and back.",
    "Yes",
    "Nobody knows.",
]
LABELS = ("toxicity", "insult", "threat")
# What the axes of FASP are made of, in words of our own choice.
IDENTITIES = (
    "Muslim",
    "Jewish",
    "Christian",
    "Hindu",
    "Buddhist",
    "Sikh",
    "atheist",
    "Catholic",
    "Black",
    "white",
    "Asian",
    "Hispanic",
    "Latina",
    "Arab",
    "African",
    "Native American",
    "gay",
    "lesbian",
    "bisexual",
    "asexual",
    "queer",
    "straight",
    "homosexual",
    "transgender",
    "trans",
    "cisgender",
    "non-binary",
    "intersex",
    "female",
    "male",
    "Mexican",
    "Chinese",
    "Nigerian",
    "Indian",
    "Russian",
    "Iranian",
    "immigrant",
    "refugee",
    "disabled",
    "deaf",
    "blind",
    "old",
    "young",
    "poor",
    "rich",
    "overweight",
    "widowed",
    "autistic",
)


@pytest.fixture(scope="session")
def classifier(tiny_model, tmp_path_factory):
    """`classifier("bert")`: a folder with a tiny random sequence classifier and a tokenizer. Options: config fields."""

    def make(kind, *, seed=0, labels=LABELS, problem_type="single_label_classification", **config):
        folder = tmp_path_factory.mktemp(kind)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model("gpt2"))
        tokenizer.save_pretrained(folder)
        made = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[kind](
            vocab_size=304,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=200,
            pad_token_id=0,
            initializer_range=0.5,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            problem_type=problem_type,
            **config,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformers.AutoModelForSequenceClassification.from_config(made).float().save_pretrained(folder)
        return folder

    return make


def load(folder, **fields):
    spec = ScorerSpec(key="tiny", folder=folder, **({"label": "insult"} | fields))
    return load_scorer("tiny", {"tiny": spec})


def logits_by_hand(folder, text) -> torch.Tensor:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].double()


def lexicon(**fields):
    return load_scorer("own", {"own": ScorerSpec(key="own", builtin="negative_wording", **fields)})


@pytest.fixture(scope="module")
def default():
    return load_scorer(DEFAULT_SCORER, load_scorer_registry()[0])


# --- the lexicon -----------------------------------------------------------------------------------------------------


def test_negative_words_by_hand(default):
    # The lexicon rates idiot -2.3 and stupid -2.4.
    one, two, none = default.score(["He is an idiot.", "He is a stupid idiot.", "He is a clerk."])
    assert one == pytest.approx(2.3 / math.sqrt(2.3**2 + 15))
    assert two == pytest.approx(4.7 / math.sqrt(4.7**2 + 15))
    assert none == 0


def test_praise_does_not_offset_abuse_and_negation_does(default):
    plain, praised, negated, denied = default.score(
        ["You idiot, go home", "Dear friends: you idiot, go home", "You are not an idiot", "There is no idiot"]
    )
    assert plain == praised > 0
    assert negated == denied == 0


@pytest.mark.parametrize("identity", IDENTITIES)
def test_naming_who_somebody_is_is_not_hostile(default, identity):
    texts = [f"I'm {identity}.", f"My neighbour is a {identity} woman.", f"We talked about {identity} people."]
    assert default.score(texts).tolist() == [0, 0, 0]


def test_slurs_are_hostile(default):
    words = [word for words in ADDED.values() for word in words]
    assert default.score([f"They are {word}." for word in words]).min() > 0.5


def test_what_is_changed_in_the_lexicon_is_really_changed(default):
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    published = SentimentIntensityAnalyzer().lexicon
    left_out = [word for words in LEFT_OUT.values() for word in words]
    assert all(published[word] < 0 for word in left_out)
    assert not any(word in published for words in ADDED.values() for word in words)
    assert default.score([f"It is {word} here." for word in left_out]).max() == 0


def test_what_the_lexicon_does_not_measure(default):
    prejudice, bad_news = default.score(["Women belong in the kitchen.", "He died of cancer."])
    assert prejudice == 0
    assert bad_news > 0.5
    assert "not toxicity" in default.measures


def test_shouting_counts_unless_texts_are_lower_cased():
    shouted, quiet = lexicon(), lexicon(lower_case=True)
    texts = ["you are an IDIOT", "you are an idiot"]
    assert shouted.score(texts)[0] > shouted.score(texts)[1] == quiet.score(texts)[0] == quiet.score(texts)[1]
    assert shouted.fingerprint != quiet.fingerprint == lexicon(lower_case=True).fingerprint
    assert len(quiet.fingerprint) == 16


# --- classifiers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_label_out_of_all_by_softmax(classifier, kind):
    folder = classifier(kind)
    flat = [text.replace("\n", " ") for text in TEXTS]
    expected = [float(torch.softmax(logits_by_hand(folder, text), -1)[1]) for text in flat]
    scores = load(folder).score(TEXTS)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scores.dtype == np.float64
    assert np.ptp(scores) > 0.01
    np.testing.assert_allclose(load(folder).score(TEXTS[::-1]), scores[::-1], atol=1e-6)


def test_labels_that_stand_by_themselves_by_sigmoid(classifier):
    folder = classifier("roberta", problem_type="multi_label_classification")
    expected = float(torch.sigmoid(logits_by_hand(folder, TEXTS[0])[1]))
    assert load(folder).score(TEXTS[:1])[0] == pytest.approx(expected, abs=1e-5)
    forced = load(classifier("roberta"), activation="sigmoid")
    assert forced.score(TEXTS[:1])[0] == pytest.approx(expected, abs=1e-5)
    alone = load(folder, activation="softmax").score(TEXTS[:1])[0]
    assert alone == pytest.approx(float(torch.softmax(logits_by_hand(folder, TEXTS[0]), -1)[1]), abs=1e-5)


def test_the_only_label_needs_no_name(classifier):
    scorer = load(classifier("bert", labels=("toxic",), problem_type="multi_label_classification"), label=None)
    assert scorer.label == "toxic"
    assert "'toxic'" in scorer.measures


SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
ACTIVATIONS = {
    "none": lambda logits: logits,
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: torch.softmax(logits, -1),
}


@pytest.mark.trial(11)
@pytest.mark.parametrize(
    ("labels", "problem", "named", "used"),
    [
        (("toxic",), REGRESSION, None, "none"),
        (("toxic",), REGRESSION, "sigmoid", "sigmoid"),
        (("toxic",), MULTI, None, "sigmoid"),
        (("toxic",), None, "sigmoid", "sigmoid"),
        (("toxic",), None, "none", "none"),
        (LABELS, REGRESSION, None, "none"),
        (LABELS, MULTI, None, "sigmoid"),
        (LABELS, SINGLE, None, "softmax"),
        (LABELS, SINGLE, "sigmoid", "sigmoid"),
        (LABELS, None, "softmax", "softmax"),
        (("calm", "toxic"), None, None, "softmax"),
    ],
)
def test_an_output_becomes_a_score_as_the_classifier_was_trained_or_the_entry_says(
    classifier, labels, problem, named, used
):
    """The classifier's outputs for this text lie in 0..1, so that every reading of them gives a score."""
    folder = classifier("bert", labels=labels, problem_type=problem)
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"] *= 0.001
    weights["classifier.bias"][:] = torch.linspace(0.3, 0.6, len(labels))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    scorer = load(folder, label=labels[-1], **({} if named is None else {"activation": named}))
    expected = float(ACTIVATIONS[used](logits_by_hand(folder, TEXTS[0]))[-1])
    assert scorer.activation == used
    assert scorer.score(TEXTS[:1])[0] == pytest.approx(expected, abs=1e-6)
    assert scorer.measures.startswith("output for" if used == "none" else "probability of")
    assert (used in scorer.measures) == (used != "none")


@pytest.mark.trial(11)
@pytest.mark.parametrize("labels", [("toxic",), LABELS])
def test_what_an_output_is_is_asked_where_nothing_says_it(classifier, labels):
    with pytest.raises(ExciseError, match=r"tiny\.activation: the classifier does not say what .* activation: sigmoid"):
        load(classifier("bert", labels=labels, problem_type=None), label=labels[0])


def test_a_softmax_over_one_output_is_refused(classifier):
    folder = classifier("bert", labels=("toxic",), problem_type=None)
    with pytest.raises(ExciseError, match=r"tiny\.activation: the softmax of a single output is always 1"):
        load(folder, label="toxic", activation="softmax")


@pytest.mark.trial(11)
@pytest.mark.parametrize("bias", [1.5, -0.2])
def test_an_output_that_is_no_score_of_0_to_1_is_refused(classifier, bias):
    folder = classifier("bert", labels=("toxic",), problem_type=REGRESSION)
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"].zero_()
    weights["classifier.bias"].fill_(bias)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExciseError, match=rf"scorer tiny: gives {bias} to the text .* outside 0\.\.1.*activation"):
        load(folder, label=None)
    scorer = load(folder, label=None, activation="sigmoid")
    np.testing.assert_allclose(scorer.score(TEXTS), 1 / (1 + math.exp(-bias)), atol=1e-6)


def test_an_output_that_leaves_0_to_1_for_some_text_is_refused_there(classifier):
    scorer = load(classifier("bert", labels=("toxic",), problem_type=None), label=None, activation="sigmoid")
    scorer = dataclasses.replace(scorer, activation="none")
    with torch.no_grad():
        scorer.model.classifier.bias.fill_(7)
    with pytest.raises(ExciseError, match="outside 0"):
        scorer.score(TEXTS)


def test_a_classifier_that_fails_on_any_text_is_refused(classifier):
    folder = classifier("bert")
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExciseError, match="broken"):
        load(folder)


def test_labels_that_do_not_name_one_output_each_are_refused(classifier):
    folder = classifier("bert")
    path = folder / "config.json"
    plain = json.loads(path.read_text())
    for names in ({0: "toxicity", 1: "insult", 2: "insult"}, {1: "a", 2: "b", 3: "insult"}):
        path.write_text(json.dumps(plain | {"id2label": names}))
        with pytest.raises(ExciseError, match="id2label"):
            load(folder)


def gpt2_classifier(folder, tiny_model, **config):
    """A tiny GPT-2 that classifies by its last token."""
    transformers.AutoTokenizer.from_pretrained(tiny_model("gpt2")).save_pretrained(folder)
    made = transformers.GPT2Config(
        vocab_size=304,
        n_embd=32,
        n_head=4,
        n_layer=2,
        n_positions=200,
        initializer_range=0.5,
        eos_token_id=1,
        bos_token_id=None,
        id2label={0: "mild", 1: "harsh"},
        label2id={"mild": 0, "harsh": 1},
        **config,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        transformers.AutoModelForSequenceClassification.from_config(made).float().save_pretrained(folder)
    return folder


def configure_tokenizer(folder, **fields):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.trial(21)
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "gpt2 with a padding token", "gpt2 with another one"])
@pytest.mark.parametrize("tokenizer", [{"pad_token": None}, {}, {"padding_side": "left"}])
def test_a_score_is_that_of_the_text_alone(classifier, tiny_model, tmp_path, kind, tokenizer):
    """Whether there is a padding token, which one, and on which side it would stand."""
    if kind.startswith("gpt2"):
        padding = {"gpt2": None, "gpt2 with a padding token": 0, "gpt2 with another one": 7}[kind]
        folder = gpt2_classifier(tmp_path, tiny_model, pad_token_id=padding)
    else:
        folder = classifier(kind, labels=("mild", "harsh"))
    configure_tokenizer(folder, **tokenizer)
    scorer = load(folder, label="harsh")
    assert (scorer.tokenizer.pad_token_id is None) == ("pad_token" in tokenizer)
    texts = [*(text.replace("\n", " ") for text in TEXTS), "Yes", "Not", "Yet", TEXTS[1]]
    expected = [float(torch.softmax(logits_by_hand(folder, text), -1)[1]) for text in texts]
    np.testing.assert_allclose(scorer.score(texts), expected, atol=1e-5)


def test_a_text_in_which_the_tokenizer_finds_nothing_is_unscored(classifier):
    folder = classifier("bert")
    path = folder / "tokenizer.json"
    strip = {"type": "Replace", "pattern": {"Regex": "[\u200b]"}, "content": ""}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": strip}))
    scores = load(folder).score(["\u200b", "He ran."])
    assert np.isnan(scores).tolist() == [True, False]


def test_a_tokenizer_without_a_limit_leaves_that_of_the_classifier_or_none(classifier, tiny_model, tmp_path):
    folder = classifier("bert")
    configure_tokenizer(folder, model_max_length=int(1e30))
    assert load(folder).max_length == 200
    config = transformers.XLNetConfig(
        vocab_size=304,
        d_model=32,
        n_layer=1,
        n_head=4,
        d_inner=48,
        pad_token_id=0,
        initializer_range=0.5,
        id2label={0: "mild", 1: "harsh"},
        label2id={"mild": 0, "harsh": 1},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        transformers.AutoModelForSequenceClassification.from_config(config).float().save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_model("gpt2")).save_pretrained(tmp_path)
    endless = load(tmp_path, label="harsh")
    assert endless.max_length is None
    text = TEXTS[0] * 20
    expected = float(torch.softmax(logits_by_hand(tmp_path, text), -1)[1])
    np.testing.assert_allclose(endless.score([text, "Yes"])[0], expected, atol=1e-5)


def test_another_label_gives_another_score(classifier):
    folder = classifier("bert")
    all_labels = sum(load(folder, label=label).score(TEXTS) for label in LABELS)
    np.testing.assert_allclose(all_labels, 1, atol=1e-6)


def test_lower_casing_is_the_scorers(classifier):
    folder = classifier("bert")
    cased, lowered = load(folder), load(folder, lower_case=True)
    shouted = [text.upper() for text in TEXTS]
    quiet = [text.lower() for text in TEXTS]
    np.testing.assert_allclose(lowered.score(shouted), cased.score(quiet), atol=1e-6)
    assert np.abs(cased.score(shouted) - cased.score(quiet)).max() > 1e-3


@pytest.mark.parametrize(("kind", "limit"), [("bert", 200), ("roberta", 199)])
def test_texts_are_cut_at_the_positions_the_classifier_has(classifier, kind, limit):
    folder = classifier(kind)
    scorer = load(folder)
    assert scorer.max_length == limit
    text = TEXTS[0] * 9
    ids = scorer.tokenizer(text)["input_ids"]
    assert len(ids) > limit
    with torch.inference_mode():
        expected = torch.softmax(scorer.model(torch.tensor([ids[:limit]])).logits[0].double(), -1)[1]
    assert scorer.score([text])[0] == pytest.approx(float(expected), abs=1e-6)


def test_the_fingerprint_changes_with_what_decides_the_score(classifier, tmp_path):
    folder = classifier("bert")
    shutil.copytree(folder, tmp_path / "copy")
    same, moved = load(folder), load(tmp_path / "copy")
    others = [
        load(folder, label="threat"),
        load(folder, lower_case=True),
        load(folder, activation="sigmoid"),
        load(classifier("bert", seed=1)),
    ]
    assert same.fingerprint == moved.fingerprint
    assert len({same.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert "insult" in same.measures


def test_a_label_that_is_not_there_is_answered_with_those_that_are(classifier):
    folder = classifier("bert")
    with pytest.raises(ExciseError, match=r"tiny\.label: the classifier has no label 'toxic'; there are toxicity, ins"):
        load(folder, label="toxic")
    with pytest.raises(ExciseError, match="names no label; there are toxicity"):
        load(folder, label=None)


def test_a_model_without_a_trained_head_is_refused(tiny_model):
    with pytest.raises(ExciseError, match=r"the weights lack score\.weight\. This is no trained classifier"):
        load(tiny_model("gpt2"), label="LABEL_0")


def test_pickled_weights_are_refused(classifier, tmp_path):
    shutil.copytree(classifier("bert"), tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier("bert"))
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ExciseError, match="safetensors"):
        load(tmp_path / "pickled")


def test_a_folder_without_a_classifier_is_named(tmp_path):
    with pytest.raises(ExciseError, match=r"tiny\.folder: no config\.json"):
        load(tmp_path)


def test_broken_weights_give_an_error_instead_of_a_score(classifier):
    scorer = load(classifier("bert"))
    with torch.no_grad():
        scorer.model.classifier.bias[0] = float("nan")
    with pytest.raises(ExciseError, match="broken"):
        scorer.score(TEXTS)


def test_blank_texts_are_unscored_by_every_scorer(classifier, default):
    for scorer in (default, load(classifier("bert"))):
        scores = scorer.score(["", "He is an idiot.", " \n\t"])
        assert np.isnan(scores).tolist() == [True, False, True]
        assert np.isnan(scorer.score(["", " "])).all()
        assert scorer.score([]).shape == (0,)


# --- the registry ----------------------------------------------------------------------------------------------------


def test_the_scorers_that_come_with_excise():
    registry, problems = load_scorer_registry()
    assert problems == ()
    assert (registry["detoxify-unbiased"].hub, registry["detoxify-unbiased"].label) == (
        "unitary/unbiased-toxic-roberta",
        "toxicity",
    )
    assert (registry["toxic-bert"].hub, registry["toxic-bert"].label) == ("unitary/toxic-bert", "toxic")
    assert all(spec.lower_case for spec in registry.values())
    assert registry[DEFAULT_SCORER].builtin == "negative_wording"


def test_the_users_scorers_come_after_and_may_replace_them(tmp_path, classifier):
    shutil.copytree(classifier("bert"), tmp_path / "mine")
    file = tmp_path / "scorers.yaml"
    file.write_text("mine: {folder: mine, label: threat}\ntoxic-bert: {hub: own/one, label: bad, revision: v2}\n")
    registry, problems = load_scorer_registry([file, tmp_path / "none.yaml"])
    assert problems == ()
    assert registry["toxic-bert"].hub == "own/one"
    assert load_scorer("mine", registry).label == "threat"
    with pytest.raises(ExciseError, match=r"no scorer 'other'; .* negative-wording, detoxify-unbiased"):
        load_scorer("other", registry)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {hub: x/y, folder: z}", "a: needs exactly one of hub, folder, builtin; found hub, folder"),
        ("a: {label: toxic}", "found none"),
        ("a: {folder: z, revision: v1}", "revision goes with hub only"),
        ("a: {builtin: negative_wording, label: toxic}", "go with a classifier only"),
        ("a: {builtin: other}", "a.builtin"),
        ("a: {hub: x/y, lower_case: perhaps}", "a.lower_case"),
        ("a: {hub: x/y, threshold: 3}", "a.threshold"),
        ("a: x/y", "a: must hold fields"),
        ("a: {hub: x/y, key: a}", "a.key"),
        ("- a", "must map scorer keys"),
        ("a: {hub: x/y}\na: {hub: x/z}", "stands twice"),
        ("a: {hub: x/y", "not valid YAML"),
    ],
)
def test_a_mistake_is_named_and_takes_no_other_entry_down(tmp_path, text, message):
    file = tmp_path / "scorers.yaml"
    file.write_text(text)
    good = tmp_path / "more.yaml"
    good.write_text("b: {hub: x/y, label: toxic}")
    registry, problems = load_scorer_registry([file, good])
    assert [problem.file for problem in problems] == [file]
    assert str(file) in problems[0].message
    assert message in problems[0].message
    assert "b" in registry
    assert "a" not in registry


# --- scoring completions ---------------------------------------------------------------------------------------------


class Counting:
    """A scorer that notes what it is asked."""

    def __init__(self, scorer):
        self.scorer, self.asked = scorer, []
        self.key, self.fingerprint, self.measures = scorer.key, scorer.fingerprint, scorer.measures

    def score(self, texts):
        self.asked += texts
        return self.scorer.score(texts)


def test_each_text_is_scored_once_and_never_again(default, tmp_path):
    cache, texts = ScoreCache(tmp_path), [*TEXTS, "", *TEXTS[1:3], " "]
    first = Counting(default)
    scores = score_texts(first, texts, cache=cache)
    np.testing.assert_array_equal(scores, default.score(texts))
    assert sorted(first.asked) == sorted(TEXTS)
    again = Counting(default)
    more = score_texts(again, ["A nasty smell.", *texts], cache=ScoreCache(tmp_path))
    np.testing.assert_array_equal(more[1:], scores)
    assert again.asked == ["A nasty smell."]
    np.testing.assert_array_equal(score_texts(default, texts), scores)


def test_the_cache_keeps_scorers_apart(default, tmp_path):
    cache = ScoreCache(tmp_path)
    score_texts(default, TEXTS, cache=cache)
    other = Counting(lexicon())
    score_texts(other, TEXTS, cache=cache)
    assert len(other.asked) == len(TEXTS)
    assert {folder.name for folder in tmp_path.iterdir()} == {default.fingerprint, other.fingerprint}


def test_what_was_scored_before_a_run_was_killed_is_kept(default, tmp_path, monkeypatch):
    monkeypatch.setattr("excise.outcomes.scoring.TEXTS_AT_ONCE", 2)
    seen = []

    def killed(label, done, total):
        seen.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_texts(default, TEXTS, cache=ScoreCache(tmp_path), progress=killed)
    assert seen == [(0, 5), (2, 5), (4, 5)]
    rest = Counting(default)
    score_texts(rest, TEXTS, cache=ScoreCache(tmp_path))
    assert len(rest.asked) == 1


def test_a_half_written_file_is_not_read_and_a_broken_one_is_named(default, tmp_path):
    cache = ScoreCache(tmp_path)
    score_texts(default, TEXTS, cache=cache)
    folder = tmp_path / default.fingerprint
    (file,) = folder.iterdir()
    assert set(pl.read_parquet(file).columns) == {"text", "score"}
    (folder / ".other.partial").write_bytes(b"PAR1")
    assert len(cache.read(default.fingerprint)) == len(TEXTS)
    (folder / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ExciseError, match=r"broken\.parquet"):
        cache.read(default.fingerprint)


def test_the_continuation_alone_or_behind_its_prompt_is_scored(default):
    assert scored_text("I am old.", " So be it.", "continuation") == " So be it."
    assert scored_text("I am old.", " So be it.", "prompt+continuation") == "I am old. So be it."
    assert scored_text("I am old.", "So be it.", "prompt+continuation") == "I am old. So be it."
    assert scored_text("I am old", ", he said", "prompt+continuation") == "I am old, he said"
    assert scored_text("I am old.\n", "Yes", "prompt+continuation") == "I am old.\nYes"
    assert scored_text("I am old.", "", "prompt+continuation") == "I am old."
    assert np.isnan(default.score([scored_text("I am an idiot.", "", "continuation")])).all()
    with pytest.raises(ExciseError, match="scored: 'both'"):
        scored_text("a", "b", "both")
