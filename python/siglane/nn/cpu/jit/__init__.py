"""Loops that LLVM compiles as a model is loaded (`llvmlite`, of the extra `cpu`): one call where torch takes ten."""
