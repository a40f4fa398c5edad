"""A plugin of pytest (`-p avx2`, before torch is imported): this processor as one that has AVX2 and no more."""

from __future__ import annotations

import os

from llvmlite import binding

os.environ |= {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
MISSING = ("avx512", "avxvnni", "avxifma", "avxneconvert", "avx10", "amx")  # how LLVM's names begin of what is newer

features = binding.get_host_cpu_features()
for name in features:
    features[name] &= not name.startswith(MISSING)
binding.get_host_cpu_features = lambda: features
binding.get_host_cpu_name = lambda: "haswell"
