"""Lists what the files of completed work take on disk, and removes those that are no longer needed: `make cache`.

Everything listed here is made again when it is asked for; removing it costs time, never results: the tables stay as
they are. A file is needed while a table refers to it. The modules that write a file say what names it:
`excise.generation.completions`, `excise.outcomes.scoring`, `excise.evaluation.perplexity`,
`excise.attribution.head_impacts`, `excise.attribution`, `excise.strategies.measured_path`.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl

from excise.errors import ExciseError
from excise.files.parts import PARTS
from excise.generation.completions import UNPRUNED, settings_key
from excise.generation.settings import enumeration_settings, sampling_settings, tree_settings
from excise.interventions.heads import heads_mask
from pipelines.terminal import DONE, INCOMPLETE, run
from resources.artifacts import Artifacts, data_folder
from resources.warehouse import Warehouse

RECENT = 3600.0
"""Seconds after its last use in which a file is never removed: a run may be about to put it into a table."""
SHOWN = 20
DAY = 86400.0
RESULTS = ("attribution", "masks", "paths")
"""Kinds whose files tables name one by one; later stages read them, so that age alone removes none of them."""


@dataclass(frozen=True)
class Entry:
    """Files that belong together: they are kept or removed as one.

    used_at: seconds since 1970, the last reading or writing, as exactly as the disk notes it. needed_by: the table that
    refers to it; empty for none.
    """

    kind: str
    name: str
    model: str
    paths: tuple[Path, ...]
    bytes: int
    used_at: float
    needed_by: str


def entries(artifacts: Artifacts, warehouse: Warehouse) -> list[Entry]:
    """All entries, the largest first; reads file names and sizes, and the tables.

    Scores, perplexities and head impacts are named by hashes of texts, so that a table cannot be traced to one of them:
    all of a kind are needed while its table has rows. The table `grid_search` names no masks: answers under any mask,
    with the model and parameters of a searched partition, are needed while it has rows.
    """
    root = artifacts.root
    tables = {
        name: warehouse.read(name)
        for name in (
            "completions",
            "pruned_completions",
            "attribution_files",
            "masks",
            "mask_paths",
            "head_impacts",
            "perplexity",
        )
    }
    searched = warehouse.read("grid_search").select("model", "scenario").unique()
    models = dict(tables["completions"].select("model_fingerprint", "model").unique().iter_rows())
    answers = _answers_needed(tables, searched)
    listed = []

    def add(kind: str, name: str, files: Iterable[Path], needed_by: str, model: str = "") -> None:
        entry = _entry(kind, name, model, files, needed_by)
        if entry is not None:
            listed.append(entry)

    for place in _folders(root / "cache" / "completions", 3):
        fingerprint, mask, settings = place.parts[-3:]
        needed = answers.get((fingerprint, mask, settings), answers.get((fingerprint, "", settings), ""))
        add("completions", mask, place.glob("*.parquet"), needed, models.get(fingerprint, fingerprint))
    judged = "completions" if tables["completions"]["prompt_value"].is_not_null().any() else ""
    for place in _folders(root / "cache" / "scores", 1):
        add("scores", place.name, place.glob("*.parquet"), judged)
    for file in (root / "artifacts" / "perplexity").glob("[!.]*.parquet"):
        add("perplexity", file.stem, [file], "" if tables["perplexity"].is_empty() else "perplexity")
    for place in _folders(root / "artifacts" / "head_impacts", 1):
        needed = "" if tables["head_impacts"].is_empty() else "head_impacts"
        add("head_impacts", place.name, place.glob("[!.]*.safetensors"), needed)
    for kind, table in (("attribution", "attribution_files"), ("masks", "masks"), ("paths", "mask_paths")):
        named = dict(tables[table].select("path", "model").unique("path").iter_rows())
        for file in (root / "artifacts" / kind).rglob("[!.]*.safetensors"):
            path = artifacts.relative(file)
            if file.parent.suffix == PARTS:
                add("unfinished", path, [file], "")
                continue
            name, needed = path.removeprefix(f"artifacts/{kind}/"), table if path in named else ""
            add(kind, name, [file], needed, named.get(path, ""))
    for folder in ("cache", "artifacts", "figures"):
        for pattern in (".*.partial", ".*.part"):
            for file in (root / folder).rglob(pattern):
                add("unfinished", file.relative_to(root).as_posix(), [file], "")
    return sorted(listed, key=lambda entry: (-entry.bytes, entry.kind, entry.name))


def removable(listed: Iterable[Entry], now: float, older_than: float | None = None) -> list[Entry]:
    """Entries that may be removed: those no table needs, and those not used for `older_than` seconds; none that was
    used within `RECENT` seconds."""
    chosen = []
    for entry in listed:
        idle = now - entry.used_at
        aged = older_than is not None and idle > older_than and entry.kind not in RESULTS
        if idle > RECENT and (not entry.needed_by or aged):
            chosen.append(entry)
    return chosen


def remove(chosen: Iterable[Entry], root: Path) -> None:
    """Delete the entries' files and the folders below `root` that are empty afterwards.

    Raises ExciseError where the disk refuses.
    """
    for entry in chosen:
        for path in entry.paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise ExciseError(f"{path}: cannot be removed ({error.strerror}); change its permissions") from error
            _remove_empty(path.parent, root)


def main(arguments: Sequence[str] | None = None) -> int:
    """List, or remove; the status is 0, 1 where a file cannot be read or removed, or 2 for a wrong option."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.cache",
        description="List what completed work takes on disk, and remove what is not needed.",
    )
    parser.add_argument("--all", action="store_true", help=f"list everything, not the largest {SHOWN} alone")
    parser.add_argument("--prune", action="store_true", help="remove what no table refers to any more")
    parser.add_argument(
        "--older-than",
        type=float,
        metavar="DAYS",
        help="with --prune, also answers, scores and losses that were not used for so many days",
    )
    parser.add_argument("--yes", action="store_true", help="with --prune, really remove it")
    options = parser.parse_args(arguments)
    if (options.older_than is not None or options.yes) and not options.prune:
        parser.error("--older-than and --yes go with --prune")
    if options.older_than is not None and not options.older_than >= 0:
        parser.error("--older-than: give a number of days, 0 or more")
    folder = data_folder()
    artifacts = Artifacts(folder=folder)
    try:
        listed = entries(artifacts, Warehouse(folder=folder))
        now = time.time()
        if not options.prune:
            print(listing(listed, now, None if options.all else SHOWN))
            return DONE
        chosen = removable(listed, now, None if options.older_than is None else options.older_than * DAY)
        print(listing(chosen, now, None if options.all else SHOWN))
        summary = f"{_counted(chosen)} of {_counted(listed)}"
        if not options.yes:
            print(f"\nNothing was removed. With --yes this goes: {summary}. It is made again when it is asked for.")
            return DONE
        remove(chosen, artifacts.root)
        print(f"\nRemoved {summary}.")
    except ExciseError as error:
        print(error, file=sys.stderr)
        return INCOMPLETE
    return DONE


def listing(listed: Sequence[Entry], now: float, limit: int | None = SHOWN) -> str:
    """The entries as a table, at most the first `limit`, followed by their sums by kind."""
    header = ("kind", "model", "mask or file", "size", "last used", "needed by")
    shown = [
        (entry.kind, entry.model or "-", entry.name, _size(entry.bytes), _day(entry.used_at), entry.needed_by or "-")
        for entry in listed[:limit]
    ]
    lines = _aligned([header, *shown])
    if limit is not None and len(listed) > limit:
        lines.append(f"... and {len(listed) - limit} smaller ones (--all shows them)")
    sums = [("kind", "entries", "size", "no table needs", "not used for 30 days")]
    for kind in sorted({entry.kind for entry in listed}):
        of_kind = [entry for entry in listed if entry.kind == kind]
        idle = [entry for entry in of_kind if now - entry.used_at > 30 * DAY]
        free = [entry for entry in of_kind if not entry.needed_by]
        sums.append(
            (kind, str(len(of_kind)), *(_size(sum(entry.bytes for entry in part)) for part in (of_kind, free, idle)))
        )
    return "\n".join([*lines, "", *_aligned(sums)]) if listed else "There is nothing."


def _answers_needed(tables: dict[str, pl.DataFrame], searched: pl.DataFrame) -> dict[tuple[str, str, str], str]:
    """Addresses of answers (model, mask, parameters) and the table that refers to them; mask "" stands for any."""
    needed: dict[tuple[str, str, str], str] = {}
    partitions = tables["completions"].select("model", "scenario", "model_fingerprint", "parameters").unique()
    for fingerprint, parameters in (
        partitions.join(searched, on=["model", "scenario"]).select("model_fingerprint", "parameters").iter_rows()
    ):
        needed |= dict.fromkeys(((fingerprint, "", key) for key in _settings(parameters)), "grid_search")
    for (model, scenario), rows in tables["head_impacts"].group_by("model", "scenario"):
        matching = partitions.filter((pl.col("model") == model) & (pl.col("scenario") == scenario))
        for mask in _masks_of_single_heads(rows):
            for fingerprint, parameters in matching.select("model_fingerprint", "parameters").iter_rows():
                needed |= dict.fromkeys(((fingerprint, mask, key) for key in _settings(parameters)), "head_impacts")
    ranked = tables["attribution_files"].filter(pl.col("score") == "gap_gradient").select("model", "scenario").unique()
    for fingerprint, parameters in (
        partitions.join(ranked, on=["model", "scenario"]).select("model_fingerprint", "parameters").iter_rows()
    ):
        trees = _settings(enumeration_settings(parameters))
        needed |= dict.fromkeys(((fingerprint, UNPRUNED, key) for key in trees), "attribution_files")
    pruned = tables["pruned_completions"].select("model_fingerprint", "mask", "parameters").unique()
    for fingerprint, mask, parameters in pruned.iter_rows():
        needed |= dict.fromkeys(((fingerprint, mask, key) for key in _settings(parameters)), "pruned_completions")
    for fingerprint, parameters in partitions.select("model_fingerprint", "parameters").iter_rows():
        needed |= dict.fromkeys(((fingerprint, UNPRUNED, key) for key in _settings(parameters)), "completions")
    return needed


def _masks_of_single_heads(rows: pl.DataFrame) -> list[str]:
    """Fingerprints of the masks under which answers were drawn anew, of a partition of `head_impacts`."""
    shape = (rows["layer"].max() + 1, rows["head"].max() + 1)
    masks = []
    for place in rows.filter(pl.col("method") == "regenerated").select("layer", "head").iter_rows():
        chosen = np.zeros(shape, dtype=bool)
        chosen[place] = True
        masks.append(heads_mask(chosen, "zero_output").fingerprint)
    return masks


def _settings(parameters: str) -> list[str]:
    """The cache's names of the parameters; of enumerated answers of their trees and of what was sampled instead."""
    if '"answers": "exact"' not in parameters:
        return [settings_key(parameters)]
    return [settings_key(tree_settings(parameters)), settings_key(sampling_settings(parameters))]


def _folders(root: Path, depth: int) -> list[Path]:
    return sorted(path for path in root.glob("/".join("*" * depth)) if path.is_dir())


def _entry(kind: str, name: str, model: str, files: Iterable[Path], needed_by: str) -> Entry | None:
    paths, size, used_at = [], 0, 0.0
    for path in sorted(files):
        try:
            status = path.stat()
        except FileNotFoundError:  # its writer has just given it its name
            continue
        paths.append(path)
        size += status.st_size
        used_at = max(used_at, status.st_mtime, status.st_atime)
    return Entry(kind, name, model, tuple(paths), size, used_at, needed_by) if paths else None


def _remove_empty(folder: Path, root: Path) -> None:
    while folder != root and folder.is_relative_to(root):
        try:
            folder.rmdir()
        except OSError:  # something is left in it, or somebody just made something
            return
        folder = folder.parent


def _counted(several: Sequence[Entry]) -> str:
    count = len(several)
    return f"{count} {'entry' if count == 1 else 'entries'}, {_size(sum(entry.bytes for entry in several))}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("units end with GiB")


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    run(main)
