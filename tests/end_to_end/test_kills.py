"""A run that is killed loses nothing and doubles nothing: what it gives in the end is what an undisturbed run gives.

Real processes are killed with SIGKILL, at random moments and at random file operations, again and again in one folder
until one gets through; every table is then compared bit for bit. The stages are in `interrupted`.
"""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
from safetensors.numpy import load_file

from tests.conftest import open_house
from tests.end_to_end.interrupted import tables

ROOT = Path(__file__).parents[2]
KILLS = {"completions": 12, "scored_text": 8, "attribution": 10, "impacts": 10, "warehouse": 6, "run": 4}
"""How often each stage is killed: 50 times in all."""
CHAIN = 4
"""So many kills hit one folder before a run is let through."""
PATIENCE = 1200


@dataclass
class Host:
    """The process that forks a child for every order."""

    process: subprocess.Popen
    folder: Path
    unread: bytes = b""

    def order(self, *orders: dict) -> None:
        self.process.stdin.write((json.dumps(orders) + "\n").encode())
        self.process.stdin.flush()

    def heard(self) -> dict:
        """The next thing the host or a child says."""
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self.unread:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"nothing was heard for {PATIENCE} s; {self.errors()}"
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            assert more, f"the host is gone; {self.errors()}"
            self.unread += more
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def errors(self) -> str:
        return (self.folder / "errors").read_text()[-3000:]


@pytest.fixture(scope="module")
def host(tmp_path_factory, tiny_model) -> Iterator[Host]:
    """The host beside a house with the scenario `lamp`, whose answers are drawn already."""
    folder = tmp_path_factory.mktemp("kills")
    open_house(folder / "house", tiny_model("llama", numeric=True))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    command = [sys.executable, "-m", "tests.end_to_end.interrupted", str(folder / "house")]
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
    made = Host(process, folder)
    try:
        assert made.heard() == {"ready": True}
        _finished(made, "answers", "before")
        yield made
    finally:
        process.stdin.close()
        process.wait(PATIENCE)


@pytest.fixture(scope="module")
def undisturbed(host) -> dict[str, tuple[dict[str, pl.DataFrame], float, int]]:
    """Per stage what it gives, the seconds it works and how often it writes; made when first asked for."""

    class Made(dict):
        def __missing__(self, stage: str):
            began, writes = _finished(host, stage, "undisturbed")
            self[stage] = (_result(host, stage, "undisturbed"), time.monotonic() - began, writes)
            return self[stage]

    return Made()


def _place(host: Host, stage: str, name: str) -> dict[str, str]:
    return {
        "stage": stage,
        "folder": str(host.folder / name / stage),
        "result": str(host.folder / "results" / name / stage),
    }


def _result(host: Host, stage: str, name: str) -> dict[str, pl.DataFrame]:
    folder = host.folder / "results" / name / stage
    return {file.stem: pl.read_parquet(file) for file in sorted(folder.glob("*.parquet"))}


def _finished(host: Host, stage: str, name: str) -> tuple[float, int]:
    """Let a stage through; when it began to work, and how often it wrote."""
    place = _place(host, stage, name)
    if Path(place["result"]).exists():
        return 0.0, 0
    host.order(place)
    assert "began" in host.heard(), host.errors()
    began = time.monotonic()
    done = host.heard()
    assert "done" in done, host.errors()
    assert host.heard() == {"ended": [0]}
    return began, done["writes"]


def _killed(host: Host, place: dict, delay: float | None) -> bool:
    """Run a stage and kill it `delay` seconds after it began (None: it kills itself); whether it died of that."""
    host.order(place)
    told = host.heard()
    if "began" in told and delay is not None:
        ready, _, _ = select.select([host.process.stdout], [], [], 0 if host.unread else delay)
        if not ready and not host.unread:
            os.kill(told["began"], signal.SIGKILL)
    while "ended" not in told:
        told = host.heard()
    (status,) = told["ended"]
    assert status in (0, -signal.SIGKILL), host.errors()
    return status != 0


def _whole(folder: Path) -> int:
    """Read every file that goes by its name, and count them; those that begin with a dot are unfinished."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
    for file in files:
        if file.suffix == ".parquet":
            pl.read_parquet(file)
        elif file.suffix == ".safetensors":
            load_file(file)
    return len(files)


def _same(found: dict[str, pl.DataFrame], wanted: dict[str, pl.DataFrame]) -> None:
    assert found.keys() == wanted.keys()
    for name, table in wanted.items():
        assert found[name].schema == table.schema
        assert found[name].equals(table), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", KILLS)
def test_a_stage_killed_again_and_again_gives_what_an_undisturbed_one_gives(host, undisturbed, stage):
    wanted, seconds, writes = undisturbed[stage]
    assert sum(table.height for table in wanted.values()) > 10
    moments = random.Random(stage)
    kills, tries, rounds, reach = 0, 0, 0, 1.0
    while kills < KILLS[stage]:
        place, hits = _place(host, stage, f"killed_{rounds}"), 0
        while hits < CHAIN and kills < KILLS[stage] and not Path(place["result"]).exists():
            tries += 1
            assert tries <= 10 * KILLS[stage], f"only {kills} of {tries} runs were still at work when they were killed"
            left = reach / (hits + 1)  # what earlier ones did is not done again
            # In turn: at a file operation, where a file is whole under no name yet, and at any moment.
            by_write = tries % 2 and writes
            own = place | ({"die_at": moments.randint(1, max(1, round(left * writes)))} if by_write else {})
            hit = _killed(host, own, None if by_write else moments.uniform(0, left * seconds))
            _whole(Path(place["folder"]))
            hits, kills, reach = hits + hit, kills + hit, reach if hit else 0.7 * reach
        _finished(host, stage, f"killed_{rounds}")
        _whole(Path(place["folder"]))
        _same(_result(host, stage, f"killed_{rounds}"), wanted)
        rounds += 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", KILLS)
def test_two_processes_at_once_do_not_disturb_each_other(host, undisturbed, stage):
    """On the same folder, for Dagster on the same partition, without knowing of each other."""
    wanted, _, _ = undisturbed[stage]
    orders = [
        _place(host, stage, "together") | {"result": str(host.folder / "results" / name / stage), "instance": name}
        for name in ("one", "other")
    ]
    host.order(*orders)
    while "ended" not in (told := host.heard()):
        pass
    assert told["ended"] == [0, 0], host.errors()
    _whole(Path(orders[0]["folder"]))
    if stage == "warehouse":  # either one may end in the middle of the other's rounds
        _same(tables(Path(orders[0]["folder"])), wanted)
        return
    for name in ("one", "other"):
        _same(_result(host, stage, name), wanted)
