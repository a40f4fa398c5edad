"""Compiled functions one after another, without Python between them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from siglane.nn.cpu.jit.code import Code, Compiled, Module
from siglane.nn.cpu.jit.processor import Processor, this_processor
from siglane.nn.cpu.jit.types import ADDRESS, COUNT, I64, POINTER, VOID

ARGUMENTS = 9  # of the longest function; all are addresses and counts
CALLED = ir.FunctionType(VOID, [I64] * ARGUMENTS)
Function = Callable[..., None]  # of `Compiled`


class Call(NamedTuple):
    """arguments: addresses and counts, by name where they are told when the program runs."""

    function: Function
    arguments: tuple[int | str, ...]


class Program:
    """Calls in order. What their addresses lead to is the caller's to keep."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._run, self._owner = _runner(this_processor())
        self._calls = calls  # which keep their functions
        self._numbers = np.zeros((len(calls), 1 + ARGUMENTS), np.int64)
        places: dict[str, list[int]] = {}
        for row, (function, arguments) in enumerate(calls):
            self._numbers[row, 0] = _address(function)
            for column, argument in enumerate(arguments, 1):
                if isinstance(argument, str):
                    places.setdefault(argument, []).append(row * (1 + ARGUMENTS) + column)
                else:
                    self._numbers[row, column] = argument
        self._flat = self._numbers.reshape(-1)
        self._places = {name: np.array(found) for name, found in places.items()}

    def __call__(self, **told: int) -> None:
        """told: every argument that calls have by name."""
        for name, places in self._places.items():
            self._flat[places] = told[name]
        self._run(self._numbers.ctypes.data, len(self._calls))


def _address(function: Any) -> int:
    found = ctypes.cast(function, ADDRESS).value
    assert found is not None
    return found


def program_module(processor: Processor) -> Module:
    """`run`: calls i64 `[count, 1 + ARGUMENTS]`, a function and what it is given; count. A function reads as many
    arguments as it has: on x86-64 whoever calls clears the others away."""
    module = Module("program", processor)
    code, made = Code.begin(module, "run", VOID, POINTER, I64)
    calls, count = made.args
    with code.count(I64(0), count) as number:
        line = code.at(calls, code.mul(number, I64(1 + ARGUMENTS)), I64)
        function = code.load(line, typ=POINTER)
        function.type = CALLED.as_pointer()  # llvmlite asks a callee what it takes
        code.call(function, [code.get(line, I64(1 + place), I64) for place in range(ARGUMENTS)])
    code.ret_void()
    return module


@functools.cache
def _runner(processor: Processor) -> tuple[Function, Compiled]:
    owner = Compiled(program_module(processor))
    return owner.function("run", ADDRESS, COUNT), owner
