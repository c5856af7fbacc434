"""What packages offer by name: each name is there, and importing the package alone loads nothing heavy."""

import importlib
import subprocess
import sys

import pytest

ROOMS = ("excise", "excise.generation", "excise.models", "excise.evaluation")


@pytest.mark.parametrize("room", ROOMS)
def test_every_offered_name_is_there(room):
    package = importlib.import_module(room)
    assert package.__all__
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_importing_a_room_loads_neither_torch_nor_polars():
    program = f"import {', '.join(ROOMS)}, sys; print(sorted({{'torch', 'polars', 'scipy'}} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
