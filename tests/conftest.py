"""Fixtures of the whole suite."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from dreamsr_cli.training.networks import Networks

# Behind a shell's & SIGINT is ignored, also in the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Libraries of networks take seconds to import: only the fixtures that need them do.


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Two cores are shared, and results must not depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_networks() -> Networks:
    """Networks of our own kind at tiny size, float32, every part with an effect; yours to change."""
    import tiny_models

    return tiny_models.networks()


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved bundle of our own kind at tiny size; shared, so read only."""
    import tiny_models

    from dreamsr_cli.training.run_bundle import export

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    made = tiny_models.networks()
    export(made, None, folder, made.config)
    return folder


@pytest.fixture(scope="session")
def tiny_flux_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved bundle whose parts are FLUX's classes at tiny size; shared, so read only."""
    import tiny_models

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bundles") / "tiny-flux"
    folder.mkdir()
    return tiny_models.save_flux_bundle(folder)
