"""Shared by the training tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Threads cost more than they save on models of this size, and far more on a busy machine.
    torch.set_num_threads(1)
