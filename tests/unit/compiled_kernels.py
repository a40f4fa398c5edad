"""Compiles every Triton kernel for several GPUs, none of which has to be there. A line of JSON each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from siglane.nn.cuda import best_token as choosing
from siglane.nn.cuda import coded_product as coded
from siglane.nn.cuda import experts as mixing
from siglane.nn.cuda import fixed_product as fixed
from siglane.nn.cuda import fp8_rows as narrowing
from siglane.nn.cuda import mask as masking
from siglane.nn.cuda import paged_decode as decode
from siglane.nn.cuda import pointwise

HEAD_DIMS = (72, 128)
FP8 = 89  # the first that has 8-bit floats
QUICK = re.compile(r"\b\w+\.approx\b")  # instructions that round as they like


def sources(architecture: int, dtype: str, head_dim: int) -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Each kernel with the types of its arguments and its constants."""
    rows, stride = f"*{dtype}", "i32"
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "PARTS": decode.PARTS}
    sizes |= {"LEAST": decode.LEAST, "BLOCK": decode.BLOCK}
    parts = {"parts": "*fp32", "peaks": "*fp32", "sums": "*fp32"}
    yield (
        decode.attend_part,
        {"q": rows, "keys": rows, "values": rows, "table": "*i32", "rows": "*i64", "lengths": "*i64", **parts}
        | {"scale": "fp32", "q_stride": stride, "table_stride": stride, "kv_heads": "i32"},
        sizes | {"GROUP": 7, "BLOCK_G": 16, "PAGE_SIZE": 16},
    )
    yield decode.join_parts, {**parts, "lengths": "*i64", "out": rows, "heads": "i32"}, sizes
    norm = {"x": rows, "weight": rows, "out": rows, "eps": "fp32", "stride": stride, "within": "i32"}
    for in_float32 in (True, False):
        yield pointwise.norm_row, norm, {"SIZE": 1536, "BLOCK": 2048, "IN_FLOAT32": in_float32}
    turned = {"x": rows, "cos": rows, "sin": rows, "q_gains": rows, "k_gains": rows, "out": rows, "stride": stride}
    turned |= {"heads": "i32", "q_heads": "i32", "eps": "fp32"}
    halves = {"HALF": head_dim // 2, "BLOCK": triton.next_power_of_2(head_dim // 2), "HEADS": pointwise.HEADS}
    for normed in (True, False):
        yield pointwise.turn_heads, turned, halves | {"NORMED": normed}
    yield pointwise.gate_row, {"gate_up": rows, "out": rows, "size": "i32"}, {"BLOCK": pointwise.COLUMNS}
    kept = {"k": rows, "v": rows, "keys": rows, "values": rows, "slots": "*i64"}
    strides = {"k_stride": stride, "v_stride": stride}
    yield pointwise.store_token, kept | strides, {"SIZE": 2 * head_dim, "BLOCK": 256}
    chosen = {"scores": "*fp32", "peaks": "*fp32", "temperatures": "*fp32", "keys": "*i64"}
    chosen |= {"values": "*fp32", "token_ids": "*i64", "size": "i32"}
    yield choosing.best_of_block, chosen, {"BLOCK": choosing.BLOCK}
    masked = {"scores": "*fp32", "masks": "*i32", "rows": "*i64", "size": "i32", "words": "i32"}
    yield masking.mask_block, masked, {"BLOCK": masking.BLOCK}
    routed = {"logits": rows, "weights": rows, "chosen": "*i64", "experts": "i32"}
    yield mixing.route_token, routed, {"TOP": 8, "NORMALISED": True, "BLOCK": 128, "SLOTS": 8}
    mixed = {"x": rows, "weight": rows, "chosen": "*i64", "scales": rows, "out": rows, "pairs": "i32", "columns": "i32"}
    blocks = {"ROWS": mixing.ROWS, "BLOCK_N": mixing.BLOCK_N, "BLOCK_K": mixing.BLOCK_K}
    for four, block_m, block_n in ((True, 16, coded.FEW_N), (False, 64, coded.BLOCK_N)):
        numbers = rows if four else "*fp32"
        product = {"x": rows, "codes": "*u8" if four else "*i8", "scales": numbers, "lows": numbers, "bias": rows}
        product |= {"out": rows, "rows": "i32", "columns": "i32", "stride": stride}
        shape = {"K": 1536, "BLOCK_M": block_m, "BLOCK_N": block_n, "GROUP": coded.GROUP}
        yield coded.multiply_codes, product, shape | {"FOUR": four, "BIASED": True}
    placed = {"x": rows, "weight": rows, "order": "*i64", "starts": "*i64", "scales": rows, "out": rows}
    ordered = {"K": 768, "SHARED": 8, "SCALED": True, "COUNT": 128, "EXPERTS": 128}
    yield mixing.sorted_product, placed | {"columns": "i32"}, blocks | ordered | {"ROWS": mixing.MANY_ROWS}
    plain = {"x": rows, "weight": rows, "bias": rows, "out": rows, "rows": "i32", "columns": "i32", "stride": stride}
    tiles = {"BLOCK_M": fixed.BLOCK_M, "BLOCK_N": fixed.BLOCK_N, "BLOCK_K": fixed.BLOCK_K}
    yield fixed.multiply_fixed, plain, tiles | {"K": 1536, "BIASED": True}
    if architecture >= FP8:
        narrowed = {"x": rows, "codes": "*fp8e4nv", "scales": "*fp32", "stride": stride, "size": "i32", "width": "i32"}
        yield narrowing.code_row, narrowed, {"BLOCK": 8192}
    yield mixing.expert_product, mixed, blocks | {"K": 768, "SHARED": 1, "SCALED": True, "PAIRS": 512}


def main() -> None:
    for architecture in (80, 90, 100):
        for dtype in ("fp32", "fp16", "bf16"):
            for head_dim in HEAD_DIMS if dtype == "bf16" else HEAD_DIMS[1:]:
                for kernel, arguments, constants in sources(architecture, dtype, head_dim):
                    signature = arguments | dict.fromkeys(constants, "constexpr")
                    target = GPUTarget("cuda", architecture, 32)
                    code = triton.compile(ASTSource(kernel, signature, constants), target=target)
                    facts = {"architecture": architecture, "dtype": dtype, "head_dim": head_dim}
                    facts |= {"kernel": kernel.__name__, "bytes": len(code.asm["cubin"])}
                    facts |= {"shared_memory": code.metadata.shared, "tensor_cores": "mma" in code.asm["ptx"]}
                    facts |= {"quick": sorted(set(QUICK.findall(code.asm["ptx"])))}
                    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
