"""What loops are written in: LLVM's instructions with Python around them, and how they become functions."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir
from llvmlite.utils import get_library_name

from siglane.nn.cpu.jit.processor import Processor
from siglane.nn.cpu.jit.types import ADDRESS, COUNT, FLOAT, I32, I64, POINTER, VOID
from siglane.nn.cpu.memory import return_freed, return_pages_of

AS_THE_PROCESSOR_ROUNDS = 4
EVERY_ONE = 1.5 * 2**23  # adding it rounds to whole numbers, which then are the lowest bits
MANTISSA_BITS, EXPONENT = 23, 127  # of a float, and its exponent's of 1
EXP2 = tuple(math.log(2) ** power / math.factorial(power) for power in range(7))  # between -0.5 and 0.5
NATIVE: dict[str, Any] = {str(POINTER): ADDRESS, str(I64): COUNT, str(FLOAT): ctypes.c_float}


class Module(ir.Module):  # type: ignore[misc]
    """Functions for a processor."""

    def __init__(self, name: str, processor: Processor) -> None:
        super().__init__(name)
        self.processor = processor


class Code(ir.IRBuilder):  # type: ignore[misc]
    """Instructions of one function. Places are i64, addresses are untyped."""

    @classmethod
    def begin(cls, module: Module, name: str, result: ir.Type, *arguments: ir.Type) -> tuple[Code, Any]:
        """The instructions of a new function, and the function."""
        made = ir.Function(module, ir.FunctionType(result, arguments), name)
        return cls(made.append_basic_block()), made

    @contextmanager
    def count(self, first: ir.Value, last: ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """`for place in range(first, last, step)`."""
        before, head, body, after = self.block, *(self.append_basic_block() for _ in range(3))
        self.branch(head)
        self.position_at_end(head)
        place = self.phi(I64)
        place.add_incoming(first, before)
        self.cbranch(self.icmp_signed("<", place, last), body, after)
        self.position_at_end(body)
        yield place
        place.add_incoming(self.add(place, I64(step)), self.block)
        self.branch(head)
        self.position_at_end(after)

    @contextmanager
    def taken(self, next_one: ir.Value, count: ir.Value) -> Iterator[ir.Value]:
        """Places below `count`, each for one thread alone. next_one: address of an i64 that all threads share, 0 at
        first."""
        take, body, after = (self.append_basic_block() for _ in range(3))
        self.branch(take)
        self.position_at_end(take)
        place = self.atomic_rmw("add", next_one, I64(1), "monotonic")
        self.cbranch(self.icmp_signed("<", place, count), body, after)
        self.position_at_end(body)
        yield place
        self.branch(take)
        self.position_at_end(after)

    def variable(self, first: ir.Value) -> ir.Value:
        """The address of a value that changes; LLVM keeps it in a register."""
        with self.goto_entry_block():
            slot = self.alloca(first.type)
        slot.type = POINTER
        self.store(first, slot)
        return slot

    def room(self, kind: ir.Type, count: int) -> ir.Value:
        """The address of `count` values on the stack, for all of the function."""
        with self.goto_entry_block():
            slot = self.alloca(kind, I64(count))
        slot.align, slot.type = 64, POINTER
        return slot

    def at(self, address: ir.Value, place: ir.Value, kind: ir.Type) -> ir.Value:
        return self.gep(address, [place], source_etype=kind)

    def get(self, address: ir.Value, place: ir.Value, kind: ir.Type, align: int | None = None) -> ir.Value:
        return self.load(self.at(address, place, kind), typ=kind, align=align)

    def put(self, value: ir.Value, address: ir.Value, place: ir.Value, align: int | None = None) -> None:
        self.store(value, self.at(address, place, value.type), align=align)

    def total(self, values: ir.Value) -> ir.Value:
        """The sum of a vector, in any order."""
        add = self.declared(f"llvm.vector.reduce.fadd.{_suffix(values.type)}", FLOAT, FLOAT, values.type)
        return self.call(add, [FLOAT(0), values], fastmath=("reassoc",))

    def least(self, one: ir.Value, other: ir.Value) -> ir.Value:
        return self.select(self.icmp_signed("<", one, other), one, other)

    def most(self, one: ir.Value, other: ir.Value) -> ir.Value:
        return self.select(self.icmp_signed(">", one, other), one, other)

    def greater(self, one: ir.Value, other: ir.Value) -> ir.Value:
        """Of floats; `other` where one of them is undefined."""
        return self.select(self.fcmp_ordered(">", one, other), one, other)

    def intrinsic(self, name: str, kind: ir.Type, *values: ir.Value) -> ir.Value:
        """One that maps values of `kind` to the same."""
        return self.call(self.declared(f"{name}.{_suffix(kind)}", kind, *[kind] * len(values)), values)

    def declared(self, name: str, result: ir.Type, *arguments: ir.Type) -> ir.Function:
        """A function that LLVM or the process has."""
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(result, arguments), name)

    def prefetch(self, address: ir.Value) -> None:
        """Into the nearest cache, to be read soon."""
        self.call(self.declared("llvm.prefetch.p0", VOID, POINTER, *[I32] * 3), [address, I32(0), I32(3), I32(1)])

    def spread(self, value: ir.Value, lanes: int) -> ir.Value:
        """A vector that has `value` everywhere."""
        kind = ir.VectorType(value.type, lanes)
        one = self.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        return self.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def _suffix(kind: ir.Type) -> str:
    """What an intrinsic's name ends with: `f32`, `v16f32`."""
    return f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"


def call_one(code: Code, functions: dict[int, ir.Function], rows: ir.Value, arguments: list[ir.Value]) -> None:
    """The function for `rows` of them, or the one for the most."""
    after = code.append_basic_block()
    fork = code.switch(code.least(rows, I64(max(functions))), after)
    for count, function in functions.items():
        case = code.append_basic_block()
        fork.add_case(I64(count), case)
        code.position_at_end(case)
        code.call(function, arguments)
        code.branch(after)
    code.position_at_end(after)


class Struct:
    """Named values that lie together. native: the same for ctypes."""

    def __init__(self, **kinds: ir.Type) -> None:
        self.names, self.kind = tuple(kinds), ir.LiteralStructType(kinds.values())
        fields = [(name, NATIVE[str(kind)]) for name, kind in kinds.items()]
        self.native = type("Native", (ctypes.Structure,), {"_fields_": fields})

    def address(self, code: Code, struct: ir.Value, name: str) -> ir.Value:
        return code.gep(struct, [I32(0), I32(self.names.index(name))], source_etype=self.kind)

    def get(self, code: Code, struct: ir.Value, name: str) -> ir.Value:
        return code.load(self.address(code, struct, name), typ=self.kind.elements[self.names.index(name)])

    def put(self, code: Code, value: ir.Value, struct: ir.Value, name: str) -> None:
        code.store(value, self.address(code, struct, name))


def in_threads(code: Code, work: ir.Function, call: ir.Value, threads: ir.Value) -> None:
    """`work(call)` in so many of OpenMP's threads, torch's own, the caller's among them."""
    parallel = code.declared("GOMP_parallel", VOID, POINTER, POINTER, I32, I32)
    with code.if_else(code.icmp_signed(">", threads, I64(1))) as (several, one):
        with several:
            code.call(parallel, [work, call, code.trunc(threads, I32), I32(0)])
        with one:
            code.call(work, [call])


def everywhere(kind: ir.Type, value: float) -> ir.Constant:
    """A constant; of a vector, in all lanes."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def exp2(code: Code, x: ir.Value, series: tuple[float, ...] = EXP2) -> ir.Value:
    """2^x within 2e-7 of it, of a register of float32, between 2^-126 and 2^126: the whole part goes into a float's
    exponent, the rest into a series. What is undefined stays so. series: EXP2 or its beginning."""
    kind = x.type
    for bound, beyond in ((126, ">"), (-126, "<")):
        limit = everywhere(kind, bound)
        x = code.select(code.fcmp_ordered(beyond, x, limit), limit, x)
    if code.module.processor.dot != "avx512":
        return _scaled(code, x, series)
    whole = code.intrinsic("llvm.rint", kind, x)
    value = _series(code, code.fsub(x, whole), series)
    scale = code.declared("llvm.x86.avx512.mask.scalef.ps.512", kind, *[kind] * 3, ir.IntType(16), I32)
    return code.call(scale, [value, whole, value, ir.IntType(16)(-1), I32(AS_THE_PROCESSOR_ROUNDS)])


def _scaled(code: Code, x: ir.Value, series: tuple[float, ...]) -> ir.Value:
    """The same where no instruction scales by a power: the lowest bits of the whole part are an exponent's."""
    kind, numbers = x.type, ir.VectorType(I32, x.type.count)
    offset = everywhere(kind, EVERY_ONE + EXPONENT)
    whole = code.fadd(x, offset)
    value = _series(code, code.fsub(x, code.fsub(whole, offset)), series)
    power = code.shl(code.bitcast(whole, numbers), everywhere(numbers, MANTISSA_BITS))
    return code.fmul(value, code.bitcast(power, kind))


def _series(code: Code, rest: ir.Value, series: tuple[float, ...]) -> ir.Value:
    value = everywhere(rest.type, series[-1])
    for factor in reversed(series[:-1]):
        value = code.intrinsic("llvm.fma", rest.type, value, rest, everywhere(rest.type, factor))
    return value


class Compiled:
    """Functions of a module in machine code, which lives as long as this does."""

    def __init__(self, module: ir.Module) -> None:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        binding.add_symbol("GOMP_parallel", ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ADDRESS).value)
        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
        )
        parsed = binding.parse_assembly(str(module))
        parsed.triple, parsed.data_layout = machine.triple, str(machine.target_data)
        parsed.verify()
        tuning = binding.create_pipeline_tuning_options(speed_level=3)
        tuning.loop_vectorization, tuning.loop_unrolling = True, False  # which takes longer than it saves
        passes = binding.create_pass_builder(machine, tuning)
        passes.getModulePassManager().run(parsed, passes)
        self._engine = binding.create_mcjit_compiler(parsed, machine)
        self._engine.finalize_object()
        del passes, tuning
        return_pages_of(get_library_name())  # 70 MB of LLVM itself
        return_freed()

    def function(self, name: str, *arguments: Any) -> Callable[..., None]:
        """arguments: their ctypes."""
        made: Callable[..., None] = ctypes.CFUNCTYPE(None, *arguments)(self._engine.get_function_address(name))
        return made
