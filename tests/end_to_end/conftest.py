"""End-to-end tests run the default model, which is worth every core that other workers leave."""

import pytest

from tests.conftest import THREADS


# For every file anew: pytest ends a fixture of a folder that is no package only with the session.
@pytest.fixture(scope="module", autouse=True)
def every_core(one_thread) -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)
