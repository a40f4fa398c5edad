"""Compiled loops for processors that this machine need not have: what they compile to."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest

pytest.importorskip("llvmlite")

from llvmlite import binding

from siglane.nn.cpu.jit.between import between_module
from siglane.nn.cpu.jit.code import Module
from siglane.nn.cpu.jit.coded import coded_module
from siglane.nn.cpu.jit.heads import heads_module
from siglane.nn.cpu.jit.processor import Processor, dot_of
from siglane.nn.cpu.jit.program import program_module
from siglane.nn.cpu.jit.rows import CODED, FOURS, KINDS, Kind, rows_module
from siglane.nn.cpu.jit.segments import segments_module

TRIPLE = "x86_64-unknown-linux-gnu"
PROCESSORS = {  # by LLVM's names
    "icelake-server": Processor("avx512"),
    "znver4": Processor("avx512", bfloat16=True),
    "sapphirerapids": Processor("avx512", tiles=True, bfloat16=True),
    "alderlake": Processor("avxvnni"),
    "znver3": Processor("avx2"),
    "haswell": Processor("avx2"),
}
PRODUCTS = {"avx512": r"vpdpbusd\s.*%zmm", "avxvnni": r"vpdpbusd\s.*%ymm", "avx2": r"vpmaddwd\s.*%ymm"}
OUTSIDE = {"GOMP_parallel", "memset", "memcpy", "memmove"}  # what every process with torch has


def assembly(module: Module, name: str) -> str:
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(TRIPLE).create_target_machine(cpu=name, opt=1)
    parsed = binding.parse_assembly(str(module))
    parsed.triple, parsed.data_layout = TRIPLE, str(machine.target_data)
    parsed.verify()
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=1))
    passes.getModulePassManager().run(parsed, passes)
    return str(machine.emit_assembly(parsed))


def assert_runs_on(written: str, processor: Processor) -> None:
    """It calls nothing that is not there and has registers that the processor has."""
    defined = set(re.findall(r"^\"?([\w.]+)\"?:", written, re.MULTILINE))
    called = set(re.findall(r"(?:callq|jmp)\s+\"?([A-Za-z_][\w.]*)", written))
    assert called <= defined | OUTSIDE
    assert processor.dot == "avx512" or "%zmm" not in written


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_block_multiplies_as_the_processor_does(name: str) -> None:
    processor = PROCESSORS[name]
    written = assembly(coded_module("gelu_tanh", processor), name)
    assert_runs_on(written, processor)
    assert re.search(PRODUCTS[processor.dot], written)
    assert ("tdpbusd" in written) == processor.tiles
    assert ("vcvtneps2bf16" in written) == processor.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("kinds", [KINDS, CODED, FOURS], ids=lambda kinds: kinds[0].name)
def test_rows_multiply_as_the_processor_does(kinds: tuple[Kind, ...], name: str) -> None:
    processor = PROCESSORS[name]
    written = assembly(rows_module(kinds, processor), name)
    assert_runs_on(written, processor)
    product = PRODUCTS[processor.dot]
    if kinds is FOURS:
        product = r"vdpbf16ps\s.*%zmm" if processor.bfloat16 else r"vfmadd\d+ps\s"
    assert re.search(product, written)
    assert ("tdpbusd" in written) == (processor.tiles and kinds is not FOURS)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("make", [partial(heads_module, 64), between_module], ids=["heads", "between"])
def test_passes_between_products(make: Callable[[Processor], Module], name: str) -> None:
    written = assembly(make(PROCESSORS[name]), name)
    assert_runs_on(written, PROCESSORS[name])
    assert re.search(r"vfn?madd\d+[ps]s\s", written)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
def test_calls_one_after_another(name: str) -> None:
    written = assembly(program_module(PROCESSORS[name]), name)
    assert_runs_on(written, PROCESSORS[name])
    assert re.search(r"callq\s+\*", written)


@pytest.mark.slow
def test_attention_in_bfloat16() -> None:
    processor = PROCESSORS["znver4"]
    written = assembly(segments_module(72, processor), "znver4")
    assert_runs_on(written, processor)
    assert re.search(r"vdpbf16ps\s.*%zmm", written)


@pytest.mark.parametrize(
    ("features", "dot"),
    [
        ({"avx2", "fma", "avxvnni", "avx512vnni"}, "avx512"),
        ({"avx2", "fma", "f16c", "avxvnni"}, "avxvnni"),
        ({"avx2", "fma", "f16c"}, "avx2"),
        ({"avx2"}, None),
        ({"neon"}, None),
    ],
)
def test_the_best_product_of_a_processor(features: set[str], dot: str | None) -> None:
    assert dot_of(dict.fromkeys(features, True)) == dot
