"""Before any test: tiny models are fastest on one thread, above all where several test runs share a machine, and no
option comes from the environment of whoever runs the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
for _name in [name for name in os.environ if name.startswith("SIGLANE_")]:
    del os.environ[_name]


@pytest.fixture(scope="session")
def nvila_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An NVILA-Lite checkpoint that many tests read and none writes to."""
    from checkpoints import write_nvila_checkpoint  # transformers' models, which not every test needs

    folder = tmp_path_factory.mktemp("nvila") / "tiny"
    write_nvila_checkpoint(folder)
    return folder
