"""Settings of the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

# A tiny model on two shared cores runs faster on one thread, and so do two pytest workers.
torch.set_num_threads(1)

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real images beside the checkout; never part of the repository."""
    if not DATA.is_dir():
        pytest.skip(f"no real data beside the checkout ({DATA.name})")
    return DATA
