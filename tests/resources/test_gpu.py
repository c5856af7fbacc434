"""The device is lent to one at a time, with one model in memory per process."""

import subprocess
import sys
from pathlib import Path

import pytest

from excise.errors import ExciseError
from excise.models import ModelSpec
from resources import gpu as gpu_module
from resources.gpu import GPUResource

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def registry(tiny_model):
    return {
        "one": ModelSpec(key="one", folder=tiny_model("llama")),
        "two": ModelSpec(key="two", folder=tiny_model("gpt2")),
        "gone": ModelSpec(key="gone", folder=Path("/nowhere")),
    }


@pytest.fixture
def gpu(tmp_path):
    return GPUResource(folder=str(tmp_path / "data"), device="cpu", lock_folder=str(tmp_path))


def test_a_model_is_loaded_once_and_gives_way_to_the_next(gpu, registry):
    with gpu.model("one", registry) as first:
        pass
    with gpu.model("one", registry) as again:
        assert again is first
    with gpu.model("two", registry) as other:
        assert other.key == "two"
        assert gpu_module._in_memory[1] is other
    with gpu.model("one", registry) as reloaded:
        assert reloaded is not first
        assert reloaded.fingerprint == first.fingerprint


def test_another_precision_is_another_model(gpu, registry, tmp_path):
    halved = GPUResource(folder=gpu.folder, device="cpu", dtype="bfloat16", lock_folder=str(tmp_path))
    with gpu.model("one", registry) as full:
        pass
    with halved.model("one", registry) as half:
        assert half.fingerprint != full.fingerprint
        assert halved.report(half)["dtype"] == "bfloat16"


def test_the_report_names_device_precision_and_memory(gpu, registry):
    with gpu.model("one", registry) as loaded:
        report = gpu.report(loaded)
    assert (report["device"], report["dtype"]) == ("cpu", "float32")
    assert 50 < report["peak_memory_mb"] < 100_000


@pytest.mark.parametrize(
    ("key", "message"), [("three", "no model 'three'; there are gone, one, two"), ("gone", "/nowhere")]
)
def test_a_model_that_cannot_be_had_is_named(gpu, registry, key, message):
    with pytest.raises(ExciseError, match=message), gpu.model(key, registry):
        pytest.fail("there is no such model")


def test_a_device_that_is_not_there_is_named(tmp_path, registry):
    gpu = GPUResource(folder=str(tmp_path), device="cuda:7", lock_folder=str(tmp_path))
    import torch

    if torch.cuda.device_count() > 7:
        pytest.skip("this machine has that device")
    with pytest.raises(ExciseError, match="cuda:7"), gpu.model("one", registry):
        pytest.fail("there is no such device")


def test_two_processes_queue_for_the_device(gpu, registry, tmp_path):
    code = """
import sys
from pathlib import Path
from resources.locks import file_lock
with file_lock(next(Path(sys.argv[1]).glob("excise-*-cpu.lock")), what="the device"):
    print("held", flush=True)
    sys.stdin.readline()
"""
    with gpu.model("one", registry):
        pass
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    notices = []

    def let_go(notice):
        notices.append(notice)
        process.stdin.close()

    with gpu.model("one", registry, waiting=let_go):
        process.wait(timeout=30)
    assert len(notices) == 1
    assert str(process.pid) in notices[0]
