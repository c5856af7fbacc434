"""Files are described relative to the data folder, and their loss is named."""

import hashlib

import pytest

from excise.errors import ExciseError
from resources.artifacts import Artifacts


@pytest.fixture
def artifacts(tmp_path):
    return Artifacts(folder=str(tmp_path / "data"))


def test_a_file_is_described_and_found_again(artifacts):
    path = artifacts.tensors("masks") / "abc.safetensors"
    path.write_bytes(b"bits")
    stored = artifacts.describe(path)
    assert stored.path == "artifacts/masks/abc.safetensors"
    assert stored.bytes == 4
    assert stored.sha256 == hashlib.sha256(b"bits").hexdigest()
    assert artifacts.locate(stored.path, made_by="pruning_masks").read_bytes() == b"bits"


def test_a_moved_data_folder_keeps_its_files(artifacts, tmp_path):
    path = artifacts.tensors("masks") / "abc"
    path.write_bytes(b"bits")
    stored = artifacts.describe(path)
    artifacts.root.rename(tmp_path / "moved")
    assert Artifacts(folder=str(tmp_path / "moved")).locate(stored.path, made_by="masks").read_bytes() == b"bits"


def test_a_lost_file_names_the_asset_to_rerun(artifacts):
    with pytest.raises(ExciseError, match=r"abc: the file is gone; materialize pruning_masks"):
        artifacts.locate("artifacts/masks/abc", made_by="pruning_masks")


@pytest.mark.parametrize("part", ["..", "a/b", "", ".hidden"])
def test_no_path_leads_out_of_the_folder(artifacts, part):
    with pytest.raises(ExciseError, match="cannot name a folder"):
        artifacts.tensors("masks", part)


def test_a_file_outside_the_folder_is_refused(artifacts, tmp_path):
    (tmp_path / "elsewhere").write_text("")
    with pytest.raises(ExciseError, match="outside the data folder"):
        artifacts.describe(tmp_path / "elsewhere")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExciseError, match=r"cannot be written .* EXCISE_DATA"):
        _ = Artifacts(folder=str(tmp_path / "file")).models
