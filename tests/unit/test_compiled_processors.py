"""What loops become on processors that need not be there: each has its instruction, and calls nothing unknown."""

from __future__ import annotations

import re
from functools import cache

import pytest

pytest.importorskip("llvmlite")

from llvmlite import binding

from siglane.nn.cpu.jit.between import between_module
from siglane.nn.cpu.jit.code import Module
from siglane.nn.cpu.jit.coded import coded_module
from siglane.nn.cpu.jit.heads import heads_module
from siglane.nn.cpu.jit.processor import DOTS, Dot, Processor, dot_of
from siglane.nn.cpu.jit.rows import CODED, FOURS, KINDS, rows_module

CPUS: dict[str, Processor] = {
    "cascadelake": Processor("avx512"),
    "znver4": Processor("avx512", bfloat16=True),
    "sapphirerapids": Processor("avx512", tiles=True, bfloat16=True),
    "alderlake": Processor("avxvnni"),
    "haswell": Processor("avx2"),
    "znver3": Processor("avx2"),
}
HOT: dict[Dot, str] = {"avx512": r"vpdpbusd\t.*%zmm", "avxvnni": r"vpdpbusd\t.*%ymm", "avx2": r"vpmaddwd\t.*%ymm"}


@cache
def assembly(cpu: str, module: str) -> str:
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple("x86_64-unknown-linux-gnu")
    machine = target.create_target_machine(cpu=cpu, opt=3)
    parsed = binding.parse_assembly(module)
    parsed.triple, parsed.data_layout = machine.triple, str(machine.target_data)
    parsed.verify()
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    made: str = machine.emit_assembly(parsed)
    return made


def unknown_calls(module: Module, text: str) -> set[str]:
    """Functions that are called and that neither the module, OpenMP nor the C library has."""
    called = {
        name.strip('"').removesuffix("@PLT") for name in re.findall(r"\t(?:call|jmp)q?\t\"?([A-Za-z_][\w.@]*)", text)
    }
    return called - set(module.globals) - {"GOMP_parallel", "memset", "memcpy", "memmove"}


@pytest.mark.slow
@pytest.mark.parametrize("cpu", CPUS)
def test_products_of_bytes(cpu: str) -> None:
    processor = CPUS[cpu]
    for kinds in (KINDS, CODED):
        module = rows_module(kinds, processor)
        text = assembly(cpu, str(module))
        assert re.search(HOT[processor.dot], text)
        assert not unknown_calls(module, text)
    assert ("tdpbusd" in text) == processor.tiles


@pytest.mark.slow
@pytest.mark.parametrize("cpu", CPUS)
def test_products_of_four_bits(cpu: str) -> None:
    module = rows_module(FOURS, CPUS[cpu])
    text = assembly(cpu, str(module))
    assert re.search("vdpbf16ps" if CPUS[cpu].bfloat16 else r"vfmadd\w+ps", text)
    assert not unknown_calls(module, text)


@pytest.mark.slow
@pytest.mark.parametrize("cpu", CPUS)
def test_a_block_of_a_tower(cpu: str) -> None:
    processor = CPUS[cpu]
    module = coded_module("gelu_tanh", processor)
    text = assembly(cpu, str(module))
    assert re.search(HOT[processor.dot], text)
    assert not unknown_calls(module, text)
    assert ("tdpbusd" in text) == processor.tiles
    assert ("vcvtneps2bf16" in text) == processor.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("cpu", CPUS)
def test_passes_between_products(cpu: str) -> None:
    for module in (heads_module(64, CPUS[cpu]), between_module(CPUS[cpu])):
        text = assembly(cpu, str(module))
        assert re.search(r"vfn?madd\w+[ps]s", text)
        assert not unknown_calls(module, text)


def test_the_best_of_what_a_processor_has() -> None:
    everything = dict.fromkeys((name for needed in DOTS.values() for name in needed), True)
    assert dot_of(everything) == "avx512"
    assert dot_of(everything | {"avx512vnni": False}) == "avxvnni"
    assert dot_of({"avx2": True, "fma": True}) == "avx2"
    assert dot_of({"avx2": True}) is None
