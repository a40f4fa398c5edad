"""Before any test: tiny models are fastest on one thread, above all where several test runs share a machine, and no
option comes from the environment of whoever runs the tests."""

from __future__ import annotations

import os

import torch

torch.set_num_threads(1)
for _name in [name for name in os.environ if name.startswith("SIGLANE_")]:
    del os.environ[_name]
