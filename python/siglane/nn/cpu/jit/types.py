"""Types of what loops read and write, for LLVM and for who calls them."""

from __future__ import annotations

import ctypes

from llvmlite import ir

ADDRESS, COUNT = ctypes.c_void_p, ctypes.c_int64
BYTE, I32, I64, HALF, FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
VOID, POINTER = ir.VoidType(), ir.PointerType()
LANES = 16  # 32-bit numbers of one register
