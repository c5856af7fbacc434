"""The page of results, from a terminal: both papers on models whose bias is known, as docs/results.md.

It runs `pipelines.paper` on the three planted models, `pipelines.heads` on the default model and on the one with known
heads, and writes what the warehouse then holds; a rerun reuses what is there. The tables are the work of
`excise.reporting.results` and `excise.reporting.head_results`, the share of the planted change under a mask
that of `excise.evaluation.localisation`.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from assets.partitions import Catalogue, read_catalogue
from excise.errors import ExciseError
from excise.files.registry import unknown
from excise.interventions.controls import RandomControl
from excise.interventions.heads import HEAD_ROLES
from excise.interventions.kinds import recalled
from excise.models.specs import ModelSpec
from pipelines import heads, paper, reweighting
from pipelines.definitions import MODEL_FILES, ROOT, SCENARIO_FOLDERS, SCORER_FILES, STRATEGY_FILES, build_definitions
from pipelines.terminal import CHECKS_FAILED, DONE, INCOMPLETE, MISUSED, STATUSES, run
from pipelines.verdict import add_fail_on
from resources.artifacts import Artifacts
from resources.warehouse import Warehouse

OTHERS = "activities,services,finance"
ALL = f"purchase,{OTHERS}"
SETTINGS = ("held_out=true", "subjects_per_group=16", "samples=16", "random_draws=1", "inlier_floor=0.95")
# Scenarios that only lend their masks need no controls.
LENDING = ("--scenarios", OTHERS, "--evaluate", "none", "--set", "random_draws=0", "--set", "relabellings=0")
# SNIP's files are as large as the model, twice, for every variation: one scenario of one model will do.
SNIP = "strategies=set_difference,gap_gradient,attention_heads,snip"
CALLS: dict[str, list[tuple[str, ...]]] = {
    "planted-general": [
        # All rows of the transfer matrix for our strategy; then every strategy in purchases.
        ("--scenarios", ALL, "--evaluate", OTHERS, "--set", "strategies=gap_gradient", "--set", "per_source=true"),
        LENDING,
        ("--scenarios", "purchase", "--set", "per_source=true", "--grid", "purchase"),
        ("--scenarios", "purchase", "--set", "per_source=true", "--set", SNIP),
    ],
    "planted-specific": [LENDING, ("--scenarios", "purchase")],
    "planted-neutral": [LENDING, ("--scenarios", "purchase")],
}
"""Models, and what `pipelines.paper` is asked for, in turn."""
ORIGIN = (
    f"Made by `make results`: preset quick (three variations of each scenario) with {', '.join(SETTINGS)}. Masks come "
    "from one half of the names, every figure from the other half. What it means is in [findings.md](findings.md)."
)
BUDGET = "perplexity_budget=0.1"
HEAD_CALLS: dict[str, list[tuple[str, ...]]] = {
    "smollm2-135m-instruct": [("--scenarios", "gender", "--set", BUDGET)],
    # Four of its 270 heads were changed, so a small share is tried as well.
    "planted-heads": [("--scenarios", "nationality", "--set", BUDGET, "--set", "alphas=0.02,0.04,0.1,0.2")],
}
"""Models, and what `pipelines.heads` is asked for."""
MASKS_AT_ONCE = 16
"""Masks in memory while the planted change is multiplied out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and write the page; the status is one of `pipelines.terminal.STATUSES`.

    An existing page stays as it is where something could not be computed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.results",
        description="Audit models with a known bias and write docs/results.md.",
        epilog=STATUSES,
    )
    parser.add_argument("--models", default=",".join(CALLS), help="planted models, comma between them")
    parser.add_argument("--heads", default=",".join(HEAD_CALLS), help="models of the second paper, comma between them")
    parser.add_argument("--render", action="store_true", help="write the page from what the warehouse holds")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md", help="the page")
    add_fail_on(parser)
    options = parser.parse_args(arguments)
    models, of_heads = (
        [key.strip() for key in keys.split(",") if key.strip()] for keys in (options.models, options.heads)
    )
    for chosen, known in ((models, CALLS), (of_heads, HEAD_CALLS)):
        for key in chosen:
            if key not in known:
                print(unknown("model of this page", key, known), file=sys.stderr)
                return MISUSED
    counted = ["--fail-on", options.fail_on] if options.fail_on else []
    catalogue = read_catalogue(SCENARIO_FOLDERS, MODEL_FILES, STRATEGY_FILES, SCORER_FILES)
    status = DONE if options.render else _run(models, of_heads, counted, catalogue)
    if status == INCOMPLETE:
        print(f"{options.out} stays as it is; --render writes what there is.", file=sys.stderr)
        return status
    definitions = build_definitions(catalogue=catalogue)
    warehouse, artifacts = definitions.resources["warehouse"], definitions.resources["artifacts"]
    page = render(warehouse, artifacts, models, catalogue.models)
    page = page.replace("\n\n", f"\n\n{ORIGIN}\n\n", 1)
    page = f"{page}\n{render_heads(warehouse, of_heads)}"
    try:
        options.out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ExciseError(f"--out {options.out}: cannot be written ({error.strerror})") from error
    print(f"wrote {options.out}", file=sys.stderr)
    return status


def _run(models: Sequence[str], of_heads: Sequence[str], counted: Sequence[str], catalogue: Catalogue) -> int:
    """Audit the models; the worst of the commands' statuses."""
    statuses = []
    options = [part for setting in SETTINGS for part in ("--set", setting)]
    for model in models:
        for call in CALLS[model]:
            statuses.append(paper.main(["--model", model, "--preset", "quick", *options, *call, *counted], catalogue))
    for model in of_heads:
        for call in HEAD_CALLS[model]:
            statuses.append(heads.main(["--model", model, *call, *counted], catalogue))
    if of_heads and set(statuses) <= {DONE, CHECKS_FAILED}:
        statuses.append(reweighting.main(["--model", of_heads[0]], catalogue))
    if set(statuses) <= {DONE}:
        return DONE
    return CHECKS_FAILED if set(statuses) <= {DONE, CHECKS_FAILED} else INCOMPLETE


def render(warehouse: Warehouse, artifacts: Artifacts, models: Sequence[str], specs: Mapping[str, ModelSpec]) -> str:
    """The page about the results of `models` in the warehouse."""
    from excise.reporting.results import results_markdown
    from excise.reporting.results.frames import ResultFrames

    frames = {
        name: warehouse.read(name, model=models)
        for name in ("metrics", "masks", "transfer_matrix", "grid_search", "mask_overlap", "thresholds")
    }
    shares = pl.concat(localisation(frames["masks"], artifacts, specs[model]) for model in models)
    metrics, masks, transfer, grid, overlap, thresholds = frames.values()
    return results_markdown(ResultFrames(metrics, masks, transfer, grid, shares, overlap, thresholds))


def render_heads(warehouse: Warehouse, models: Sequence[str]) -> str:
    """The part of the page about heads and toxicity."""
    from excise.planted.heads import PLANT
    from excise.reporting.head_results import heads_markdown

    tables = ("metrics", "head_impacts", "reweighting", "bias_correlation", "thresholds")
    frames = {name: warehouse.read(name, model=models) for name in tables}
    axes = frames["metrics"].filter(pl.col("metric") == "toxicity_bias").select("model", "scenario").unique()
    metrics = frames["metrics"].join(axes, on=["model", "scenario"], how="semi")
    impacts = frames["head_impacts"].join(axes, on=["model", "scenario"], how="semi")
    return heads_markdown(
        metrics,
        impacts,
        frames["reweighting"],
        frames["bias_correlation"],
        frames["thresholds"],
        planted={"planted-heads": PLANT.heads},
    )


def localisation(masks: pl.DataFrame, artifacts: Artifacts, spec: ModelSpec) -> pl.DataFrame:
    """One row per mask of a planted model's purchase scenario: how much of the planted gap lies under it."""
    from excise.evaluation.localisation import EnergyShare, energy_shares

    columns = ["strategy", "level", "matched_to", "draw", "variation", "mask"]
    keys = ["strategy", "level", "matched_to"]
    names = [field.name for field in dataclasses.fields(EnergyShare)]
    schema = dict.fromkeys(("model", *keys), pl.String) | dict.fromkeys(names, pl.Float64)
    rows_of_model = masks.filter(
        (pl.col("model") == spec.key) & (pl.col("scenario") == "purchase") & ~pl.col("level").str.contains("/")
    )
    # The change of a model without a gap is no gap: there is nothing to locate.
    if rows_of_model.is_empty() or spec.low_rank is None or spec.key == "planted-neutral":
        return pl.DataFrame(schema=schema)
    heads = rows_of_model.filter(pl.col("role").is_in(list(HEAD_ROLES.values())))
    shape = _heads_of(heads["size"].max(), spec) if heads.height else {}
    distinct = rows_of_model.select("mask", "path", "control_seed").unique("mask").sort("mask").rows()
    shares: dict[str, dict[str, float]] = {}
    for start in range(0, len(distinct), MASKS_AT_ONCE):
        together = []
        for mask, path, seed in distinct[start : start + MASKS_AT_ONCE]:
            known = recalled(artifacts.locate(path, made_by="pruning_masks"), seed, mask)
            together.append(known.mask if isinstance(known, RandomControl) else known)
        energies = energy_shares(spec.low_rank, together, **shape)
        shares |= {mask.fingerprint: dataclasses.asdict(share) for mask, share in zip(together, energies, strict=True)}
    rows = [
        {"model": spec.key, **{name: row[name] for name in keys}, **shares[row["mask"]]}
        for row in rows_of_model.select(columns).unique().sort(columns, nulls_last=True).iter_rows(named=True)
    ]
    return pl.DataFrame(rows, schema=schema)


def _heads_of(heads: int, spec: ModelSpec) -> dict[str, int]:
    """Number and size of the heads, from the columns of the output projections that were changed."""
    from safetensors import safe_open

    with safe_open(spec.low_rank, framework="numpy") as file:
        outputs = [name for name in file.keys() if name.endswith(".o.down")]  # noqa: SIM118 - not a mapping
        width = file.get_slice(outputs[0]).get_shape()[1]
    return {"heads": heads, "head_dim": width // heads}


if __name__ == "__main__":
    run(main)
