"""A file of tensors is whole or not there, and what keeps it from being written is said."""

import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
from safetensors import SafetensorError

from excise.errors import ExciseError
from excise.files.tensors import save_tensors


def test_a_file_is_written_with_its_folders_and_what_it_says_of_itself(tmp_path):
    path = tmp_path / "new" / "file.safetensors"
    save_tensors(path, {"a": np.arange(6).reshape(2, 3).T}, {"what": "numbers"})
    assert safetensors.numpy.load_file(path)["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"what": "numbers"}
    assert os.listdir(path.parent) == ["file.safetensors"]


def test_a_folder_that_another_process_removes_is_made_again(tmp_path, monkeypatch):
    """Whoever finishes first clears the parts, in the middle of another's writing, too."""
    path, write, left = tmp_path / "parts" / "file.safetensors", safetensors.numpy.save_file, [2]

    def after_a_removal(*given, **named):
        if left[0]:
            left[0] -= 1
            shutil.rmtree(path.parent)
        write(*given, **named)

    monkeypatch.setattr(safetensors.numpy, "save_file", after_a_removal)
    save_tensors(path, {"a": np.zeros(3)})
    assert left == [0]
    assert os.listdir(path.parent) == ["file.safetensors"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(ExciseError, match=r"file\.safetensors: cannot be written .*No space left.*; free space"):
        save_tensors(tmp_path / "file.safetensors", {"a": np.zeros(3)})
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(ExciseError, match="cannot be written"):
        save_tensors(tmp_path / "taken" / "file.safetensors", {"a": np.zeros(3)})
