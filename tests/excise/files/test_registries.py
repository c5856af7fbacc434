"""Users' YAML files: what is read, what is refused and in which words, and what a broken entry does to the others."""

import datetime
import os
from pathlib import Path

import pytest

from excise.errors import ExciseError
from excise.models.loading import load_model
from excise.models.specs import load_registry
from excise.outcomes.scorers import load_scorer_registry
from excise.scenarios import load_scenarios
from excise.strategies.config import load_strategies

WEIGHTS = "score: wanda, selection: set_difference, roles: [q, v], parameters: {tau_min: 0.3, tau_maj: 0.2}"
SCENARIO = """
title: Loan
description: How much a bank should lend.
outcome: {kind: number, unit: USD, low: 100, high: 100000, scale: log, better: higher}
groups:
  white: {label: white, subjects: [Jake Becker, Amy Becker]}
  black: {label: black, subjects: [Jamal Washington, Ebony Washington]}
comparison: {majority: white, minority: black}
templates: {only: "How much should I lend {name}, who wants a {item}? One number only."}
variations: {car: {item: car}, oven: {item: oven}}
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(registry, key: str) -> str:
    with pytest.raises(ExciseError) as error:
        registry[key]
    return str(error.value)


# --- a broken entry --------------------------------------------------------------------------------------------------


@pytest.mark.trial(14)
def test_the_right_entries_are_used_and_the_wrong_one_fails_by_name(tmp_path):
    path = write(
        tmp_path / "strategies.yaml",
        f"set_difference: {{{WEIGHTS}}}\nmine: {{{WEIGHTS}, scope: modle}}\n"
        "gap_gradient: {parameters: {density: 2}}\n",
    )
    strategies = load_strategies([path])
    assert strategies["set_difference"].parameters == {"tau_min": 0.3, "tau_maj": 0.2}
    assert strategies["attention_heads"] == load_strategies()["attention_heads"]
    assert f"{path}: mine.scope" in refusal(strategies, "mine")
    assert "(line 2)" in refusal(strategies, "mine")
    # A broken override is not the built-in entry either.
    assert f"{path}: gap_gradient: parameters.density is 2" in refusal(strategies, "gap_gradient")
    assert {"gap_gradient", "mine"} <= set(strategies.known)
    assert [problem.key for problem in strategies.problems] == ["mine", "gap_gradient"]


@pytest.mark.trial(14)
def test_a_broken_scenario_or_subject_set_is_not_replaced_by_the_one_that_comes_with_excise(tmp_path):
    folder = tmp_path / "scenarios"
    write(folder / "purchase.yaml", "title: Mine\nreplaces: true\n")
    write(folder / "subjects" / "becker_washington.yaml", "title: Mine\n")
    write(folder / "loan.yaml", SCENARIO)
    named = SCENARIO.replace("subjects: [Jake Becker, Amy Becker]", "subject_set: becker_washington/white")
    write(folder / "credit.yaml", named)
    scenarios, problems = load_scenarios([folder])
    assert "loan" in scenarios
    assert "purchase.yaml: groups" in refusal(scenarios, "purchase")
    assert "subject set becker_washington is broken" in refusal(scenarios, "credit")
    assert {"purchase", "credit"} <= set(scenarios.known)
    assert {problem.file.name for problem in problems} == {"purchase.yaml", "becker_washington.yaml", "credit.yaml"}


@pytest.mark.trial(14)
def test_a_broken_model_or_scorer_is_named_by_whoever_asks(tmp_path):
    models, _ = load_registry(
        [write(tmp_path / "models.yaml", "planted-neutral: {dtipe: float32}\nmine: {hub: a/b}\n")]
    )
    assert models["mine"].hub == "a/b"
    for key in ("planted-neutral", "planted-specific"):  # which is the former, changed
        assert "planted-neutral.dtipe: is not a known field; did you mean dtype?" in refusal(models, key)
    file = write(tmp_path / "scorers.yaml", "toxic-bert: {lable: x}\n")
    scorers, _ = load_scorer_registry([file])
    assert "did you mean label?" in refusal(scorers, "toxic-bert")
    assert "negative-wording" in scorers


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.trial(19)
@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("a...b", "two dots in a row"),
        ("a..b", "two dots in a row"),
        ("a.", "end with one"),
        ("m" * 101, "at most 100"),
        ("a b", "may hold letters"),
        ("a/b", "may hold letters"),
        ("a|b", "may hold letters"),
        ('"a\\tb"', "may hold letters"),
        ("Planted-Neutral", "capital letters alone"),
        ("no", "reads the key no as true or false, not as text: put it into quotes"),
        ("2024-01-01", "as a date"),
        ("1_000", "as a number"),
        ("~", "as nothing"),
        ("__ASSET_JOB", "holds none"),
    ],
)
def test_a_key_that_dagster_or_a_folder_refuses_is_named_and_the_others_work(tmp_path, key, words):
    models, problems = load_registry([write(tmp_path / "models.yaml", f"{key}: {{hub: a/b}}\nsound: {{hub: a/b}}\n")])
    assert set(models) == {*load_registry()[0], "sound"}
    (problem,) = problems
    assert words in problem.message
    assert "line 1" in problem.message


@pytest.mark.trial(19)
def test_scenarios_and_strategies_refuse_such_keys_too(tmp_path):
    long = "a" * 101
    scenarios, _ = load_scenarios([write(tmp_path / "scenarios" / f"{long}.yaml", SCENARIO).parent])
    assert "at most 100" in refusal(scenarios, long)
    strategies = load_strategies([write(tmp_path / "strategies.yaml", f"mine-0..5: {{{WEIGHTS}}}\n")])
    assert "two dots" in refusal(strategies, "mine-0..5")


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.trial(23)
def test_a_tilde_is_the_home_folder_and_the_rest_is_the_file_s(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = write(
        tmp_path / "sub" / "models.yaml",
        "a: {folder: ~/models/x, chat_template: ../t.jinja}\nb: {folder: /abs, chat_template: '~/t.jinja'}\n"
        "c: {base: a, low_rank: ~/c.safetensors}\nd: {folder: ''}\ne: {folder: ~nobody-of-that-name/x}\n",
    )
    models, _ = load_registry([path])
    home = tmp_path / "home"
    assert (models["a"].folder, models["a"].chat_template) == (home / "models" / "x", tmp_path / "t.jinja")
    assert (models["b"].folder, models["b"].chat_template) == (Path("/abs"), home / "t.jinja")
    assert models["c"].low_rank == home / "c.safetensors"
    assert "d.folder is empty" in refusal(models, "d")
    assert "no home folder" in refusal(models, "e")
    scorers, _ = load_scorer_registry([write(tmp_path / "scorers.yaml", "mine: {folder: ~/s}\n")])
    assert scorers["mine"].folder == home / "s"


@pytest.mark.trial(23)
def test_the_data_folder_and_the_text_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    from excise.evaluation.texts import read_text
    from pipelines.definitions import build_definitions

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EXCISE_DATA", "~/results")
    write(tmp_path / "text.txt", "A sentence.")
    assert read_text("~/text.txt") == "A sentence."
    resources = build_definitions().resources
    assert resources["warehouse"].path.is_relative_to(tmp_path / "results")
    assert resources["artifacts"].root == tmp_path / "results"
    assert not Path("~").exists()


# --- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.trial(25)
def test_merge_keys_work_in_every_registry(tmp_path):
    models, problems = load_registry(
        [
            write(
                tmp_path / "models.yaml",
                ".usual: &usual {prompt_format: raw, dtype: bfloat16}\n_more: &more {<<: *usual, revision: main}\n"
                "a: {<<: *usual, hub: x/y}\nb: {<<: [*more, *usual], hub: x/z, dtype: float32}\n"
                "c: &c {hub: x/c, dtype: float16}\nd: {<<: *c, hub: x/d}\n",
            )
        ]
    )
    assert not problems
    assert set(models) - set(load_registry()[0]) == {"a", "b", "c", "d"}
    assert (models["a"].prompt_format, models["a"].dtype) == ("raw", "bfloat16")
    assert (models["b"].dtype, models["b"].revision, models["b"].prompt_format) == ("float32", "main", "raw")
    assert (models["c"].hub, models["d"].hub, models["d"].dtype) == ("x/c", "x/d", "float16")
    scorers, problems = load_scorer_registry(
        [write(tmp_path / "scorers.yaml", "a: &a {hub: x/y, label: bad}\nb: {<<: *a, label: worse}\n")]
    )
    assert not problems
    assert (scorers["b"].hub, scorers["b"].label) == ("x/y", "worse")
    strategies = load_strategies(
        [write(tmp_path / "strategies.yaml", f"a: &a {{{WEIGHTS}}}\nb: {{<<: *a, controls: []}}\n")]
    )
    assert strategies["b"].parameters == strategies["a"].parameters
    assert strategies["b"].controls == ()
    merged = SCENARIO.replace("{item: car}", "&car {item: car}").replace("{item: oven}", "{<<: *car, item: oven}")
    scenarios, problems = load_scenarios([write(tmp_path / "scenarios" / "loan.yaml", merged).parent])
    assert not problems
    assert scenarios["loan"].variations["oven"].fields == {"item": "oven"}


@pytest.mark.trial(25)
@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{<<: 3, hub: a/b}", "expected a mapping or list of mappings for merging"),
        ("{hub: a/b, hub: a/c}", "line 1: the key 'hub' stands twice"),
        ("{<<: {hub: a/b, hub: a/c}}", "the key 'hub' stands twice"),
        ("{<<: {hub: a/b}, <<: {dtype: float32}}", "write <<: [*one, *other]"),
        ("{hub: a/b, revision: 1234567}", "revision: is 1234567, not text; put it into quotes"),
        ("{hub: a/b, revision: 0123}", "0123 is an octal number"),
        ("{hub: a/b, revision: 12:30:45}", "base 60"),
        ("{hub: a/b, revision: no}", "revision: is false, not text"),
        ("{hub: a/b, revision: 2024-01-02}", "revision: is 2024-01-02, not text"),
        ("{hub: a/b, revision: 2024-13-02}", "month must be in 1..12"),
        ("{hub: a/b, ? [x] : y}", "line 1: not valid YAML"),
        ("&r {hub: a/b, description: *r}", "line 1: not valid YAML"),
        ("", "but is empty"),
        ("a/b", "must hold fields"),
    ],
)
def test_what_yaml_makes_of_an_entry_is_right_or_refused_by_line(tmp_path, entry, words):
    models, problems = load_registry([write(tmp_path / "models.yaml", f"bad: {entry}\nsound: {{hub: a/b}}\n")])
    assert set(models) - set(load_registry()[0]) == {"sound"}
    (problem,) = problems
    assert problem.key == "bad"
    assert words in problem.message
    assert "line 1" in problem.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"m: {hub: [\n", "line 2: not valid YAML"),
        (b"- hub\n", "must map model keys to their fields, but is a list"),
        (b"m:\n\thub: a/b\n", "line 2: not valid YAML"),
        (b"m: {hub: a/b}\n---\nn: {hub: a/b}\n", "several documents"),
        ("m: {hub: a/b}\n".encode("utf-16"), "byte 1 is not UTF-8"),
        (b"m: \x07\n", "not valid YAML"),
        (b"m: *nowhere\n", "line 1: not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_fails_whatever_it_may_have_changed(tmp_path, content, words):
    path = tmp_path / "models.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    models, problems = load_registry([path])
    assert set(models) == set()
    assert models.known == tuple(load_registry()[0])
    (problem,) = problems
    assert (problem.file, problem.key) == (path, None)
    for key in ("planted-neutral", "m"):
        assert words in refusal(models, key)
        assert str(path) in refusal(models, key)


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"---\n", b"\xef\xbb\xbf# a mark\n", b"null\n"])
def test_an_empty_file_changes_nothing(tmp_path, content):
    (tmp_path / "strategies.yaml").write_bytes(content)
    assert load_strategies([tmp_path / "strategies.yaml"]) == load_strategies()


def test_numbers_are_what_they_look_like(tmp_path):
    text = (
        "a: {score: gap_gradient, selection: measured_path, roles: [q], "
        "parameters: {density: 1e-3, significance: 0_0.5}}\n"
    )
    strategies = load_strategies([write(tmp_path / "strategies.yaml", "\ufeff" + text)])
    assert strategies["a"].parameters == {"density": 0.001, "significance": 0.5}
    yes = write(tmp_path / "yes.yaml", text.replace("1e-3", "yes"))
    assert "a.parameters.density: is true, not a number" in refusal(load_strategies([yes]), "a")


def test_dates_in_a_scenario_are_shown_as_written(tmp_path):
    text = SCENARIO.replace("{item: car}", "{item: 2024-01-02}")
    scenarios, _ = load_scenarios([write(tmp_path / "scenarios" / "loan.yaml", text).parent])
    assert f"is {datetime.date(2024, 1, 2)}, not text" in refusal(scenarios, "loan")


def test_a_link_to_nowhere_is_no_missing_file(tmp_path):
    os.symlink(tmp_path / "gone", tmp_path / "models.yaml")
    models, (problem,) = load_registry([tmp_path / "models.yaml"])
    assert "cannot be read" in problem.message
    assert not models


# --- a later entry of a key ------------------------------------------------------------------------------------------


@pytest.mark.trial(36)
def test_new_thresholds_alone_are_merged_into_the_built_in_strategy(tmp_path):
    path = write(
        tmp_path / "strategies.yaml",
        "set_difference: {parameters: {tau_min: .1, tau_maj: .05}}\ngap_gradient: {parameters: {density: 1e-4}}\n"
        "attention_heads: {parameters: {k_min: 40, k_maj: 5}, controls: [random]}\nsnip: {enabled: true}\n"
        f"attention_heads_removed: {{{WEIGHTS}}}\ngap_gradient_heads: {{parameters: {{significance: null}}}}\n",
    )
    strategies, before = load_strategies([path]), load_strategies()
    assert not strategies.problems
    assert strategies["set_difference"] == before["set_difference"].model_copy(
        update={"parameters": {"tau_min": 0.1, "tau_maj": 0.05}}
    )
    assert strategies["gap_gradient"].parameters == {"density": 0.0001, "significance": 0.05, "lost": 0.05}
    assert strategies["attention_heads"].parameters == {"k_min": 40, "k_maj": 5}
    assert strategies["attention_heads"].controls == ("random",)
    assert strategies["attention_heads"].ablation == "zero_query"
    assert strategies["snip"] == before["snip"].model_copy(update={"enabled": True})
    assert strategies["attention_heads_removed"].score == "wanda"  # another score: an entry of its own
    assert strategies["attention_heads_removed"].ablation == "zero_weights"
    assert strategies["gap_gradient_heads"].parameters == {"density": 0.1, "lost": 0.05}


@pytest.mark.trial(36)
def test_an_entry_of_many_strategies_is_changed_as_a_whole(tmp_path):
    alphas = [f"{step / 50:.2f}" for step in range(1, 11)]
    strategies = load_strategies([write(tmp_path / "a.yaml", "fasp: {parameters: {gamma: 0.4}}\n")])
    assert {key: each.parameters["gamma"] for key, each in strategies.items() if key.startswith("fasp-")} == {
        f"fasp-{alpha}": 0.4 for alpha in alphas
    }
    strategies = load_strategies([write(tmp_path / "b.yaml", "fasp: {parameters: {alpha: [0.1, 0.125]}}\n")])
    assert [key for key in strategies if key.startswith("fasp-")] == ["fasp-0.10", "fasp-0.125"]
    strategies = load_strategies([write(tmp_path / "c.yaml", "fasp: {enabled: false}\n")])
    assert not any(each.enabled for key, each in strategies.items() if key.startswith("fasp-"))
    strategies = load_strategies([write(tmp_path / "d.yaml", "fasp-0.10: {parameters: {gamma: 0.5}}\n")])
    assert strategies["fasp-0.10"].parameters == {"alpha": 0.1, "gamma": 0.5}
    assert strategies["fasp-0.20"].parameters == {"alpha": 0.2, "gamma": 0.3}


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("fasp: {parameters: {alpha: []}}", "fasp", "fasp.parameters.alpha: give a number, or a list"),
        ("fasp: {parameters: {alpha: [0.1, 1e-1]}}", "fasp-0.10", "a value stands twice"),
        ("fasp: {parameters: {alpha: [0.1, yes]}}", "fasp-0.10", "give a number, or a list"),
        ("fasp: {parameters: [0.1]}", "fasp-0.10", "fasp.parameters"),
        ("fasp: {parameters: {alpha: [0.5, 0.9]}}", "fasp-0.50", "at most 1 together"),
        (f"mine: {{{WEIGHTS}, levels: []}}", "mine", "levels is empty"),
        (f"mine: {{{WEIGHTS}, outcomes: []}}", "mine", "outcomes is empty"),
        (f"mine: {{{WEIGHTS}, controls: [random, random]}}", "mine", "controls names a value twice"),
        (
            "mine-0.10: &a {score: head_impacts, selection: fasp, parameters: {alpha: 0.1, gamma: 0}}\n"
            "mine: {<<: *a, parameters: {alpha: [0.1], gamma: 0}}",
            "mine",
            "makes mine-0.10, which the entry mine-0.10 makes, too",
        ),
    ],
)
def test_no_strategy_vanishes_or_takes_the_name_of_another(tmp_path, text, key, words):
    assert words in refusal(load_strategies([write(tmp_path / "strategies.yaml", text)]), key)


@pytest.mark.trial(36)
def test_models_and_scorers_are_merged_unless_they_name_a_source(tmp_path):
    path = write(
        tmp_path / "models.yaml", "planted-neutral: {dtype: bfloat16}\nsmollm2-135m-instruct: {folder: mine}\n"
    )
    models, problems = load_registry([path])
    assert not problems
    before = load_registry()[0]["planted-neutral"]
    assert models["planted-neutral"] == before.model_copy(update={"dtype": "bfloat16"})
    assert (models["smollm2-135m-instruct"].wheel, models["smollm2-135m-instruct"].folder) == (None, tmp_path / "mine")
    scorers, _ = load_scorer_registry([write(tmp_path / "scorers.yaml", "toxic-bert: {label: threat}\n")])
    assert (scorers["toxic-bert"].hub, scorers["toxic-bert"].label) == ("unitary/toxic-bert", "threat")


# --- names -----------------------------------------------------------------------------------------------------------


def test_an_unknown_name_comes_with_the_likely_one():
    assert refusal(load_strategies(), "gap_gradeint").startswith(
        "there is no strategy 'gap_gradeint'; did you mean gap_gradient? There are set_difference, gap_gradient"
    )
    assert "did you mean purchase?" in refusal(load_scenarios()[0], "purchse")


@pytest.mark.trial(14)
@pytest.mark.parametrize("score", ["[wanda]", "{wanda: 1}", "5", "~"])
def test_a_score_that_is_no_name_breaks_its_entry_alone(tmp_path, score):
    path = write(tmp_path / "strategies.yaml", f"mine: {{score: {score}, selection: set_difference}}\n")
    strategies = load_strategies([path])
    assert set(strategies) == set(load_strategies())
    assert f"{path}: mine.score" in refusal(strategies, "mine")


@pytest.mark.trial(23)
def test_a_path_through_a_loop_of_links_is_no_folder(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = write(tmp_path / "models.yaml", "mine: {folder: loop/model}\nsound: {hub: a/b}\n")
    models, problems = load_registry([path])
    assert not problems
    with pytest.raises(ExciseError, match=r"models\.yaml: mine\.folder: no config\.json in"):
        load_model(models["mine"], models, device="cpu", home=tmp_path / "home")
    assert "purchase" in load_scenarios([tmp_path / "loop"])[0]
