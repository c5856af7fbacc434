"""The cache command lists what lies on disk, and removes only what no table needs or what is old, when told to."""

import hashlib
import json
import os
import time

import numpy as np
import polars as pl
import pytest

from excise.generation.completions import CACHE_SCHEMA, CompletionCache
from excise.interventions.heads import heads_mask
from pipelines import cache
from pipelines.cache import DAY, RECENT, entries, removable
from resources.artifacts import Artifacts
from resources.tables import TABLES
from resources.warehouse import Warehouse

PARAMETERS = json.dumps({"seed": 0, "temperature": 0.6}, sort_keys=True)
SETTINGS = hashlib.sha256(PARAMETERS.encode()).hexdigest()[:16]
MODEL, HEADS = "f" * 16, np.array([[False, True, False], [False, False, False]])
ANSWERS = pl.DataFrame({"prompt": ["a"], "sample": [0], "token_ids": [[5]], "finished": [True]}, schema=CACHE_SCHEMA)
PLACE = {"model": "tiny", "scenario": "lamp"}
OWN = {"asset": "pruning_masks"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EXCISE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def rows(table, *some):
    """Rows of a table, null where nothing is said."""
    schema = TABLES[table].schema
    return pl.DataFrame([dict.fromkeys(schema) | PLACE | each for each in some], schema=schema)


def fill(folder, table, *some, **keys):
    Warehouse(folder=str(folder)).replace_partition(table, rows(table, *some), PLACE | keys)


def drawn(folder, mask, model=MODEL, settings=SETTINGS):
    CompletionCache(folder / "cache" / "completions").add(f"{model}/{mask}/{settings}", ANSWERS)


def made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"12345")
    return path


def aged(folder, seconds, pattern="*"):
    """As if the files had been used last so many seconds ago."""
    for path in folder.rglob(pattern):
        if path.is_file() and not path.name.startswith("excise."):
            os.utime(path, (time.time() - seconds,) * 2)


def listed(folder):
    found = entries(Artifacts(folder=str(folder)), Warehouse(folder=str(folder)))
    return {(each.kind, each.name): each for each in found}


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_answers_are_needed_by_the_table_that_holds_them(folder):
    told = {"model_fingerprint": MODEL, "parameters": PARAMETERS}
    single = heads_mask(HEADS, "zero_output").fingerprint
    for mask in ("unpruned", "a" * 16, "b" * 16, single):
        drawn(folder, mask)
    drawn(folder, "unpruned", model="e" * 16)
    drawn(folder, "unpruned", settings="0" * 16)
    fill(folder, "completions", told)
    fill(folder, "pruned_completions", told | {"mask": "a" * 16})
    places = [(layer, head) for layer in range(2) for head in range(3)]
    fill(
        folder,
        "head_impacts",
        *(
            {"layer": layer, "head": head, "method": "regenerated" if HEADS[layer, head] else "reweighted"}
            for layer, head in places
        ),
    )
    found = entries(Artifacts(folder=str(folder)), Warehouse(folder=str(folder)))
    assert {(each.name, each.model, each.needed_by) for each in found} == {
        ("unpruned", "tiny", "completions"),
        ("a" * 16, "tiny", "pruned_completions"),
        ("b" * 16, "tiny", ""),
        (single, "tiny", "head_impacts"),
        ("unpruned", "e" * 16, ""),
        ("unpruned", "tiny", ""),
    }
    # A grid's points have no rows of their own: every mask of that model and those parameters counts as one.
    fill(folder, "grid_search", {})
    assert listed(folder)["completions", "b" * 16].needed_by == "grid_search"


def test_files_are_needed_by_the_table_that_names_them(folder):
    for name in ("named", "forgotten"):
        made(folder / "artifacts" / "attribution" / "wanda" / f"{name}.safetensors")
        made(folder / "artifacts" / "masks" / f"{name}.safetensors")
    made(folder / "artifacts" / "perplexity" / "1.parquet")
    made(folder / "artifacts" / "head_impacts" / "answers-1" / "0.1.safetensors")
    made(folder / "cache" / "scores" / "scorer" / "1.parquet")
    fill(folder, "attribution_files", {"path": "artifacts/attribution/wanda/named.safetensors"})
    fill(folder, "masks", {"path": "artifacts/masks/named.safetensors", **OWN}, **OWN)
    needed = {name: each.needed_by for name, each in listed(folder).items()}
    assert needed == {
        ("attribution", "wanda/named.safetensors"): "attribution_files",
        ("attribution", "wanda/forgotten.safetensors"): "",
        ("masks", "named.safetensors"): "masks",
        ("masks", "forgotten.safetensors"): "",
        ("perplexity", "1"): "",
        ("head_impacts", "answers-1"): "",
        ("scores", "scorer"): "",
    }
    assert {each.bytes for each in listed(folder).values()} == {5}
    fill(folder, "perplexity", {"mask": "unpruned"})
    fill(folder, "head_impacts", {"layer": 0, "head": 0, "method": "reweighted"})
    fill(folder, "completions", {"model_fingerprint": MODEL, "parameters": PARAMETERS, "prompt_value": 0.5})
    later = listed(folder)
    assert later["perplexity", "1"].needed_by == "perplexity"
    assert later["head_impacts", "answers-1"].needed_by == "head_impacts"
    assert later["scores", "scorer"].needed_by == "completions"


def test_unfinished_files_are_nobody_s(folder):
    made(folder / "cache" / "completions" / MODEL / "unpruned" / SETTINGS / ".1.partial")
    made(folder / "artifacts" / "masks" / ".1.safetensors.2.part")
    made(folder / "artifacts" / "attribution" / "wanda" / "1.parts" / "norms.begun.safetensors")
    assert {each.kind for each in listed(folder).values()} == {"unfinished"}
    assert len(listed(folder)) == 3


def test_what_may_go_is_unneeded_or_old_and_never_just_used(folder):
    drawn(folder, "unpruned")
    drawn(folder, "a" * 16)
    made(folder / "artifacts" / "masks" / "named.safetensors")
    fill(folder, "completions", {"model_fingerprint": MODEL, "parameters": PARAMETERS})
    fill(folder, "masks", {"path": "artifacts/masks/named.safetensors", **OWN}, **OWN)
    now = time.time()

    def names(idle, older_than=None):
        aged(folder, idle)
        return {each.name for each in removable(listed(folder).values(), now, older_than)}

    assert names(RECENT / 2) == names(RECENT / 2, 0.0) == set()
    assert names(2 * RECENT) == {"a" * 16}
    assert names(9 * DAY, 10 * DAY) == {"a" * 16}
    # Stages read the masks that tables name: they stay, however old.
    assert names(11 * DAY, 10 * DAY) == {"a" * 16, "unpruned"}


def test_nothing_goes_without_yes_and_with_it_only_what_was_said(folder, capsys):
    drawn(folder, "unpruned")
    drawn(folder, "a" * 16)
    fill(folder, "completions", {"model_fingerprint": MODEL, "parameters": PARAMETERS})
    aged(folder, 2 * DAY)
    before = files(folder)
    assert cache.main([]) == 0
    assert "a" * 16 in capsys.readouterr().out
    assert cache.main(["--prune"]) == 0
    told = capsys.readouterr().out
    assert "Nothing was removed. With --yes this goes: 1 entry, " in told
    assert "unpruned" not in told
    assert files(folder) == before
    assert cache.main(["--prune", "--yes"]) == 0
    assert "Removed 1 entry" in capsys.readouterr().out
    gone = sorted(set(before) - set(files(folder)))
    assert len(gone) == 1
    assert f"/{'a' * 16}/" in gone[0]
    assert not (folder / "cache" / "completions" / MODEL / ("a" * 16)).exists()
    assert CompletionCache(folder / "cache" / "completions").read(f"{MODEL}/unpruned/{SETTINGS}").equals(ANSWERS)
    aged(folder, 2 * DAY)  # they have just been read
    assert cache.main(["--prune", "--older-than", "1", "--yes"]) == 0
    assert files(folder) == ["excise.duckdb", "excise.lock"]
    capsys.readouterr()
    assert cache.main(["--prune", "--yes"]) == 0
    assert "There is nothing." in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--yes"], ["--older-than", "3"], ["--prune", "--older-than", "-1"]])
def test_what_makes_no_sense_is_said(folder, arguments, capsys):
    with pytest.raises(SystemExit):
        cache.main(arguments)
    assert "--older-than" in capsys.readouterr().err


def test_a_folder_without_results_is_empty_and_stays_so(folder, capsys):
    assert cache.main([]) == 0
    assert capsys.readouterr().out == "There is nothing.\n"
    assert not folder.exists()


def test_of_many_entries_the_largest_are_shown(folder, capsys):
    for number in range(cache.SHOWN + 2):
        made(folder / "artifacts" / "masks" / f"{number:016d}.safetensors")
    (folder / "artifacts" / "masks" / f"{7:016d}.safetensors").write_bytes(bytes(2048))
    cache.main([])
    shown = capsys.readouterr().out
    assert shown.splitlines()[1].split()[:4] == ["masks", "-", f"{7:016d}.safetensors", "2.0"]
    assert "... and 2 smaller ones" in shown
    cache.main(["--all"])
    assert capsys.readouterr().out.count(".safetensors") == cache.SHOWN + 2


@pytest.mark.slow
def test_an_audit_needs_all_it_made_and_makes_what_was_removed_again(audited, copied, monkeypatch, capsys):
    """After a real run nothing is superfluous; without its answers a rerun gives the same metrics."""
    (original, _), house = audited, copied
    monkeypatch.setenv("EXCISE_DATA", str(house.data))
    found = listed(house.data).values()
    assert {each.kind for each in found} == {"attribution", "completions", "masks", "paths"}
    assert {each.model for each in found} == {"tiny"}
    assert all(each.needed_by for each in found)
    aged(house.data, 2 * DAY)
    assert cache.main(["--prune", "--yes"]) == 0
    assert "There is nothing." in capsys.readouterr().out
    assert cache.main(["--prune", "--older-than", "1", "--yes"]) == 0
    assert {each.kind for each in listed(house.data).values()} == {"attribution", "masks", "paths"}
    again = house.run("audit_scenario", "tiny|lamp")
    assert again.success
    assert sum(each.kind == "completions" for each in listed(house.data).values()) == sum(
        each.kind == "completions" for each in found
    )
    metrics = [each.warehouse.read("metrics").sort(pl.all(), nulls_last=True) for each in (original, house)]
    assert metrics[0].equals(metrics[1])
