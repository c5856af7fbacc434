"""A command as `make` starts it, on the files of a test's house: `python -m tests.pipelines.house_command demo ...`.

HOUSE names the folder with scenarios/ and models.yaml; locks lie there, too.
"""

import dataclasses
import os
import runpy
import sys
import tempfile
from pathlib import Path

from resources.settings import PRESETS, Preset

HOUSE = Path(os.environ["HOUSE"])
tempfile.tempdir = str(HOUSE)
PRESETS[Preset.quick] = dataclasses.replace(
    PRESETS[Preset.quick], samples=4, random_draws=1, relabellings=0, resamples=40, permutations=40
)

import pipelines.definitions as definitions  # noqa: E402 - the settings come first

definitions.SCENARIO_FOLDERS = [HOUSE / "scenarios"]
definitions.MODEL_FILES = [HOUSE / "models.yaml"]
definitions.STRATEGY_FILES = [HOUSE / "strategies.yaml"]
command = sys.argv.pop(1)
runpy.run_module(f"pipelines.{command}", run_name="__main__", alter_sys=True)
