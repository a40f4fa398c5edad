"""Prints which torch and transformers are imported, and fails unless they are the ones that pip installed."""

from importlib.metadata import version

import torch
import transformers

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
for module in (torch, transformers):
    # torch's own version names its build (+cpu, +cu128), which a registry's metadata may leave out
    assert module.__version__.split("+")[0] == version(module.__name__).split("+")[0], module.__file__
