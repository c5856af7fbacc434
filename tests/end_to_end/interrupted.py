"""A process that does one stage of the work at a time in a child of its own, so that a test may kill it anywhere.

`python -m tests.end_to_end.interrupted HOUSE` imports everything once and then reads orders, one or more JSON objects
{"stage", "folder", "result", "die_at", "instance"} a line. Each is carried out by a fork, which keeps its work in
`folder`, writes its tables to `result` at the end, and says so on standard output; with `die_at` it kills itself at the
so-manyth file it opens for writing, renames or makes. The test that kills the stages here is `test_kills`.
"""

import hashlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from excise.attribution import SCORES, attribute
from excise.attribution.head_impacts import head_impacts
from excise.evaluation.perplexity import LossCache, text_windows
from excise.generation.completions import CompletionCache, complete
from excise.generation.sampling import SamplingParameters
from excise.interventions.heads import heads_mask
from excise.interventions.packed import Mask
from excise.models.loading import LoadedModel, load_model
from excise.models.specs import load_registry
from excise.outcomes import ToxicityOutcome
from excise.outcomes.scorers import load_scorer, load_scorer_registry
from excise.outcomes.scoring import ScoreCache
from excise.scenarios import expand, load_scenarios
from resources.tables import TABLES
from resources.warehouse import Warehouse

PARAMETERS = SamplingParameters(temperature=1.0, top_p=0.95, seed=3)
CONTINUED = ToxicityOutcome(max_new_tokens=4, max_prompt_tokens=200)
TEXT = "The market opens at noon. Bread, apples and old books are sold until the evening, whatever the weather. " * 3
ROUNDS = 6
"""How often the warehouse stage replaces each of its partitions."""
SETTINGS = {
    "samples": 4,
    "random_draws": 1,
    "relabellings": 1,
    "resamples": 40,
    "permutations": 40,
    "strategies": ["set_difference", "gap_gradient"],
}


class Work:
    """The model, the prompts and the folder a stage works on."""

    def __init__(self, house: Path, folder: Path, instance: Path) -> None:
        self.house, self.folder, self.instance = house, folder, instance
        scenarios, _ = load_scenarios([house / "scenarios"])
        self.scenario = scenarios["lamp"]
        self.prompts = expand(self.scenario)

    def model(self) -> LoadedModel:
        registry, _ = load_registry([self.house / "models.yaml"])
        return load_model(registry["tiny"], registry, device="cpu", home=self.house / "home")

    def answers(self, loaded: LoadedModel, samples: int = 6, **options) -> pl.DataFrame:
        options = {"outcome": self.scenario.outcome, "batch_prompts": 2} | options
        return complete(loaded, self.prompts, samples, PARAMETERS, **options)[0]


def answers(work: Work) -> dict[str, pl.DataFrame]:
    """The unpruned answers that other stages begin with; they are kept beside the house, not in the stage's folder."""
    return {"answers": _parsed(work, work.model())}


def completions(work: Work) -> dict[str, pl.DataFrame]:
    """Unpruned and under a mask of heads, batch by batch."""
    loaded, cache = work.model(), CompletionCache(work.folder / "completions")
    return {
        str(number): work.answers(loaded, intervention=mask, cache=cache)
        for number, mask in enumerate([None, _mask(loaded)])
    }


def scored_text(work: Work) -> dict[str, pl.DataFrame]:
    """Continuations with their scores, and the losses of a text under masks."""
    scorer = load_scorer("negative-wording", load_scorer_registry()[0])
    loaded = work.model()
    rows = work.answers(
        loaded,
        outcome=CONTINUED,
        scorer=scorer,
        scores=ScoreCache(work.folder / "scores"),
        cache=CompletionCache(work.folder / "completions"),
    )
    losses = LossCache(work.folder / "losses")
    windows = text_windows(loaded, TEXT, limit_tokens=60)
    masks = [None, *(_mask(loaded, head) for head in range(3))]
    kept = [losses.window_losses(loaded, windows, mask) for mask in masks]
    return {"rows": rows, "losses": pl.DataFrame({str(number): each for number, each in enumerate(kept)})}


def attribution(work: Work) -> dict[str, pl.DataFrame]:
    """Every score of every variation, as files."""
    from safetensors.numpy import load_file

    loaded = work.model()
    files = attribute(
        loaded,
        work.prompts,
        _parsed(work, loaded),
        comparison=work.scenario.comparison,
        outcome=work.scenario.outcome,
        scores=SCORES,
        permutations=2,
        seed=0,
        folder=work.folder / "attribution",
    )
    rows = [
        (file.variation, file.score, file.path.name, key, hashlib.sha256(tensor.tobytes()).hexdigest())
        for file in files
        for key, tensor in sorted(load_file(file.path).items())
    ]
    return {"files": pl.DataFrame(rows, schema=["variation", "score", "file", "tensor", "hash"], orient="row")}


def impacts(work: Work) -> dict[str, pl.DataFrame]:
    """The impact of every head on a gap and on the perplexity of a text."""
    loaded = work.model()
    rows = head_impacts(
        loaded,
        work.prompts,
        _parsed(work, loaded),
        disparity="smd",
        groups=["white", "black"],
        parameters=PARAMETERS,
        windows=text_windows(loaded, TEXT, limit_tokens=60),
        method="reweight",
        resamples=50,
        folder=work.folder / "head_impacts",
    )
    return {"impacts": rows}


def warehouse(work: Work) -> dict[str, pl.DataFrame]:
    """Partitions read and replaced over and over: whoever reads, first of all what a killed one left, meets all rows
    of one round."""
    store = Warehouse(folder=str(work.folder))
    for number in range(ROUNDS):
        for scenario in ("lamp", "bench"):
            new = _numbered(work, scenario, number)
            there = store.read("prompts", scenario=scenario)
            if there.height not in (0, new.height) or there["subject"].n_unique() > 1:
                raise AssertionError(f"{there.height} rows of {there['subject'].unique().to_list()} in one partition")
            store.replace_partition("prompts", new, {"scenario": scenario})
    return tables(work.folder)


def run(work: Work) -> dict[str, pl.DataFrame]:
    """The whole chain through Dagster, after tidying up behind a killed run, as every command does."""
    import dagster as dg

    from pipelines.definitions import build_definitions
    from pipelines.runs import end_abandoned, execute
    from resources.gpu import GPUResource

    data = work.folder / "data"
    work.instance.mkdir(exist_ok=True)
    definitions = build_definitions(
        data_folder=data,
        scenario_folders=[work.house / "scenarios"],
        model_files=[work.house / "models.yaml"],
        strategy_files=[],
        scorer_files=[],
        resource_overrides={"gpu": GPUResource(folder=str(data), device="cpu", lock_folder=str(work.folder))},
    )
    quiet = {"telemetry": {"enabled": False}}
    with dg.DagsterInstance.local_temp(str(work.instance), overrides=quiet) as instance:
        instance.event_log_storage.set_concurrency_slots("gpu", 1)
        end_abandoned(instance)
        result = execute(definitions, instance, "audit_scenario", "tiny|lamp", SETTINGS)
        if not result.success:
            failed = [event.step_failure_data for event in result.get_step_failure_events()]
            raise AssertionError("\n".join(each.error.to_string() for each in failed))
    return tables(data)


STAGES: dict[str, Callable[[Work], dict[str, pl.DataFrame]]] = {
    each.__name__: each for each in (answers, completions, scored_text, attribution, impacts, warehouse, run)
}


def tables(folder: Path) -> dict[str, pl.DataFrame]:
    """All tables of a warehouse in one order, without what differs between any two runs.

    That is the time at which rows were made, and the hash of files of safetensors, whose metadata come in random order:
    the stage `attribution` compares their tensors.
    """
    store = Warehouse(folder=str(folder))
    found = {}
    for name, table in TABLES.items():
        kept = [column.name for column in table.columns if column.type != "TIMESTAMP" and column.name != "sha256"]
        found[name] = store.read(name).select(kept).sort(kept, nulls_last=True)
    return found


def _mask(loaded: LoadedModel, head: int = 0) -> Mask:
    chosen = np.zeros((loaded.topology.layers, loaded.topology.heads), dtype=bool)
    chosen[1, head] = True
    return heads_mask(chosen, "zero_output")


def _parsed(work: Work, loaded: LoadedModel) -> pl.DataFrame:
    return work.answers(loaded, cache=CompletionCache(work.house / "answers"))


def _numbered(work: Work, scenario: str, number: int) -> pl.DataFrame:
    """The prompts many times over, all rows marked with the number of a round."""
    many = pl.concat([work.prompts] * 50)
    return many.with_columns(scenario=pl.lit(scenario), subject=pl.lit(f"round {number}")).select(
        pl.col(name).cast(kind) for name, kind in TABLES["prompts"].schema.items()
    )


def _die_at(place: int | None) -> Callable[[], int]:
    """Count what is opened for writing, renamed or made from now on, and die at the given number; the count so far."""
    seen = 0

    def watch(event: str, given: tuple) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(given[1], str) and given[1][:1] in ("w", "x", "a")
        if writes or event in ("os.rename", "os.mkdir", "os.remove"):
            seen += 1
            if seen == place:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return lambda: seen


def _obey(house: Path, order: dict) -> None:
    """Carry out one order; what is said goes to standard output, a line each."""
    folder = Path(order["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    work = Work(house, folder, folder / order.get("instance", "instance"))
    count = _die_at(order.get("die_at"))
    _say(began=os.getpid())
    found = STAGES[order["stage"]](work)
    writes = count()
    unfinished = Path(order["result"] + ".part")
    unfinished.mkdir(parents=True, exist_ok=True)
    for name, table in found.items():
        table.write_parquet(unfinished / f"{name}.parquet")
    unfinished.rename(order["result"])
    _say(done=os.getpid(), writes=writes)


def _say(**told: object) -> None:
    os.write(1, (json.dumps(told) + "\n").encode())


def main() -> int:
    """Obey until standard input ends."""
    # So that no child has to import it.
    import great_expectations  # noqa: F401
    import seaborn  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pipelines.definitions  # noqa: F401

    torch.set_num_threads(1)
    house = Path(sys.argv[1])
    _say(ready=True)
    for line in sys.stdin:
        children = []
        for order in json.loads(line):
            if child := os.fork():
                children.append(child)
                continue
            status = 1
            try:
                _obey(house, order)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        _say(ended=[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    return 0


if __name__ == "__main__":
    sys.exit(main())
