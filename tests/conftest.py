"""Fixtures of the whole suite."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Two cores are shared, and results must not depend on the number of threads."""
    torch.set_num_threads(1)
