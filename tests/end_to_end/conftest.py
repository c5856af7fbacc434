"""End-to-end tests run the default model, which is worth every core there is."""

import os

import pytest


@pytest.fixture(scope="package", autouse=True)
def every_core(one_thread) -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)
