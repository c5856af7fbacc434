"""The device is lent to one at a time, with one model in memory per process."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from excise.errors import ExciseError
from excise.files.registry import Registry
from excise.models.specs import ModelSpec
from resources import gpu as gpu_module
from resources.gpu import GPUResource
from resources.watch import Stage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def registry(tiny_model):
    folders = {"one": tiny_model("llama"), "two": tiny_model("gpt2"), "gone": Path("/nowhere")}
    return Registry({key: ModelSpec(key=key, folder=folder) for key, folder in folders.items()}, noun="model")


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


@pytest.mark.parametrize("file", ["config.json", "template.jinja", "change.safetensors"])
def test_a_model_whose_files_have_changed_is_another_one(gpu, registry, tmp_path, file):
    """So is one whose base has changed."""
    folder = shutil.copytree(registry["one"].folder, tmp_path / "model")
    template = folder / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    factors, change = {"1.q.up": torch.ones(48, 1), "1.q.down": torch.ones(1, 48)}, tmp_path / "change.safetensors"
    save_file(factors, change)
    both = {
        "base": ModelSpec(key="base", folder=folder, chat_template=template),
        "child": ModelSpec(key="child", base="base", low_rank=change),
        "grandchild": ModelSpec(key="grandchild", base="child", low_rank=change),
    }
    with gpu.model("grandchild", both) as first:
        pass
    with gpu.model("grandchild", both) as again:
        assert again is first
    if file == "change.safetensors":
        save_file({name: 2 * factor for name, factor in factors.items()}, change)
    else:
        path = folder / file
        path.write_text(path.read_text() + "\n" if file == "config.json" else "Now {{ messages[0]['content'] }}")
    with gpu.model("grandchild", both) as changed:
        assert changed is not first
        assert changed.fingerprint != first.fingerprint


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
    ("key", "message"), [("three", "no model 'three'; there are one, two, gone"), ("gone", "/nowhere")]
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

    with gpu.model("one", registry, stage=Stage("a test", let_go)):
        process.wait(timeout=30)
    assert len(notices) == 1
    assert str(process.pid) in notices[0]
