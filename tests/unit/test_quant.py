"""8-bit layers against integer arithmetic, and quantised towers against float32."""

from __future__ import annotations

import copy
import ctypes
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from siglane.config.vision import VisionConfig
from siglane.errors import ConfigError, UserError
from siglane.families.model import load_vision
from siglane.nn.act import activate
from siglane.nn.attention import Segments
from siglane.nn.cpu import int8 as quant
from siglane.nn.cpu import int8_packing
from siglane.nn.cpu.between import Between
from siglane.nn.cpu.codes import Codes, row_codes
from siglane.nn.cpu.int8 import Int8Linear
from siglane.nn.cpu.jit.entrance import between, compiles
from siglane.nn.cpu.memory import return_freed
from siglane.nn.cpu.onednn import is_exact
from siglane.nn.cuda.low_bits import low_bit_linear
from siglane.nn.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from siglane.nn.parallel import TensorParallel
from siglane.nn.quantise import quantise
from siglane.types import Activation, DecodedImage, Grid, PackedPatches
from siglane.vision.tower import SiglipVisionModel
from siglane.weights.hub import open_checkpoint

DEMOS = Path(__file__).parents[2] / "python" / "siglane" / "demo"


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_integers(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same product written down naively, float64 and int64, one row and one output at a time."""
    result = np.zeros((len(x), len(weight)))
    for column, row in enumerate(weight.double().numpy()):
        scale = np.abs(row).max() / 127 or 1.0
        codes = np.rint(row / scale).astype(np.int64)
        for number, values in enumerate(x.double().numpy()):
            low, high = min(values.min(), 0.0), max(values.max(), 0.0)
            step = (high - low) / 254 or 1.0
            zero = int(np.rint(-low / step))
            result[number, column] = step * scale * int(((np.rint(values / step).astype(np.int64)) * codes).sum())
            assert 0 <= (np.rint(values / step) + zero).min() <= (np.rint(values / step) + zero).max() <= 255
    return torch.from_numpy(result).float() + (0 if bias is None else bias)


@torch.no_grad()
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 48, 96), (7, 31, 33), (3, 588, 5), (33, 64, 16)])
def test_a_layer_is_integer_arithmetic(shape: tuple[int, int, int], with_bias: bool) -> None:
    rows, inputs, outputs = shape
    x, weight = drawn(rows, inputs), drawn(outputs, inputs, seed=1)
    bias = drawn(outputs, seed=2) if with_bias else None
    expected = by_integers(x, weight, bias)
    difference = (Int8Linear(weight, bias)(x) - expected).abs().max()
    assert difference <= 1e-4 * max(1.0, float(expected.abs().max()))  # a value on the border of two codes may differ


@torch.no_grad()
def test_more_rows_than_one_product_takes() -> None:
    rows = 2 * quant.ROWS + 3
    x, weight, bias = drawn(rows, 40), drawn(24, 40, seed=1), drawn(24, seed=2)
    layer = Int8Linear(weight, bias)
    y = layer(x)
    assert torch.allclose(y, by_integers(x, weight, bias), atol=2e-3)
    assert torch.equal(layer(x.unflatten(0, (1, rows))), y[None])
    alone = torch.cat([layer(row) for row in x.split(1)])
    assert (alone - y).abs().max() <= 1e-5  # a row never depends on its neighbours
    assert layer(x[:0]).shape == (0, 24)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e20])
def test_codes_are_the_nearest_ones(factor: float) -> None:
    x = drawn(50, 300) * factor
    x[0], x[1], x[2], x[3, 5] = 0, x[1].abs(), -x[2].abs(), 1000 * factor
    rows = row_codes(x)
    assert rows.codes.dtype == torch.uint8
    zero = (-rows.shift / rows.scale).round()
    assert ((rows.codes - zero) * rows.scale - x).abs().max(dim=1).values.le(0.5001 * rows.scale[:, 0]).all()
    assert torch.equal((rows.codes[0] - zero[0]) * rows.scale[0], torch.zeros(300))


@torch.no_grad()
def test_zero_rows_zero_outputs_and_undefined_values() -> None:
    x, weight, bias = drawn(6, 64), drawn(8, 64, seed=1), drawn(8, seed=2)
    weight[3] = 0
    layer = Int8Linear(weight, bias)
    clean = layer(x)
    assert torch.equal(clean[:, 3], bias[3].expand(6))
    x[0] = 0
    assert torch.allclose(layer(x)[0], bias)
    x[1, 2], x[2, 2], x[3, 2] = torch.nan, torch.inf, -torch.inf
    y = layer(x)
    assert not y[1:4].isfinite().any()
    assert torch.allclose(y[4:], clean[4:], atol=1e-5)


@torch.no_grad()
def test_a_huge_outlier_spoils_only_its_own_row() -> None:
    x, weight = drawn(8, 256), drawn(64, 256, seed=1)
    x[2, 17] = 300.0
    error = F.linear(x, weight) - Int8Linear(weight, None)(x)
    relative = error.norm(dim=1) / F.linear(x, weight).norm(dim=1)
    assert relative[torch.arange(8) != 2].max() < 0.015
    assert relative[2] < 0.05


def ranks(size: int) -> list[TensorParallel]:
    return [TensorParallel(rank, size, lambda x: x, lambda x: x) for rank in range(size)]


def filled(layer: nn.Module, seed: int) -> nn.Module:
    """A whole layer's weights by their parts, cut as a checkpoint's are."""
    for name, parameter in layer.named_parameters():
        for number, part in enumerate(layer.parts(name)):
            if isinstance(layer, RowParallelLinear):
                rows, columns = layer.output_size, layer.input_size
            else:
                rows, columns = layer.part_size(part), layer.input_size
            shape = (rows, columns) if parameter.ndim == 2 else (rows,)
            layer.load_part(name, part, drawn(*shape, seed=seed + number + 10 * parameter.ndim))
    return layer


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def quantised(layer: nn.Module) -> nn.Module:
    return quantise(Holder(layer), "8bit", "cpu").layer


@torch.no_grad()
def test_shards_make_up_the_whole() -> None:
    x, single = drawn(9, 32), TensorParallel.single()

    def column(tp: TensorParallel) -> nn.Module:
        return filled(ColumnParallelLinear(32, {"a": 8, "b": 12}, bias=True, tp=tp), 1)

    def row(tp: TensorParallel) -> nn.Module:
        return filled(RowParallelLinear(32, 16, bias=True, tp=tp), 2)

    def qkv(tp: TensorParallel) -> nn.Module:
        return filled(QKVParallelLinear(32, 4, 4, 8, bias=True, tp=tp), 3)

    near = {"atol": 0.35, "rtol": 0.0}  # of sums of 32 products of normal values
    assert torch.allclose(quantised(column(single))(x), column(single)(x), **near)
    assert torch.allclose(quantised(row(single))(x), row(single)(x), **near)
    for tp in ranks(2):
        assert torch.allclose(quantised(column(tp))(x), column(tp)(x), **near)
        for ours, theirs in zip(quantised(qkv(tp))(x), qkv(tp)(x), strict=True):
            assert ours.shape == theirs.shape == (9, 2, 8)
            assert torch.allclose(ours, theirs, **near)
        part = x.narrow(1, 16 * tp.rank, 16)
        assert torch.allclose(quantised(row(tp))(part), row(tp)(part), **near)
    bias = row(single).bias
    parts = [quantised(row(tp))(x.narrow(1, 16 * tp.rank, 16)) - bias for tp in ranks(2)]
    assert torch.allclose(sum(parts) + bias, row(single)(x), **near)  # the bias is added once


def tower(seed: int = 0, **changes: object) -> SiglipVisionModel:
    config = VisionConfig(
        hidden_size=64, intermediate_size=172, num_hidden_layers=3, num_attention_heads=4, num_channels=3,
        patch_size=14, position_grid=Grid(16, 16), hidden_act="gelu_tanh", layer_norm_eps=1e-6,
        patch_layout="channel_last", position_resize="bilinear_antialias", rope_theta=None, depth=3,
        post_norm=True, use_head=True,
    )  # fmt: skip
    model = SiglipVisionModel(replace(config, **changes))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, centre, 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5, generator)
    return model.eval().requires_grad_(False)


def packed(*grids: Grid, seed: int = 5) -> PackedPatches:
    return PackedPatches(drawn(sum(grid.area for grid in grids), 3 * 14**2, seed=seed), grids)


@torch.no_grad()
@pytest.mark.parametrize("outliers", [0, 2])
def test_embeddings_of_a_tower(outliers: int) -> None:
    """outliers: channels that every norm makes sixty times as large and the weights behind it as small, as trained
    towers have a few."""
    models = [tower(), tower()]
    for block in (block for model in models for block in model.blocks):
        for norm, layer in ((block.norm1, block.attention.qkv), (block.norm2, block.mlp.fc1)):
            norm.weight[:outliers] *= 60
            norm.bias[:outliers] *= 60
            layer.weight[:, :outliers] /= 60
    exact, ours = models[0], quantise(models[1], "8bit", "cpu")
    batch = packed(Grid(16, 16), Grid(3, 21), Grid(1, 1))
    features, quantised_features = exact(batch), ours(batch)
    assert F.cosine_similarity(quantised_features, features).min() > 0.999
    pooled = exact.pool(features, batch.grids)
    assert F.cosine_similarity(ours.pool(quantised_features, batch.grids), pooled).min() > 0.9995
    alone = ours(PackedPatches(batch.pixels[256:319], (Grid(3, 21),)))
    assert F.cosine_similarity(alone, quantised_features[256:319]).min() > 0.99999


@torch.no_grad()
@pytest.mark.parametrize("name", ["model", "native"])
def test_towers_of_the_shipped_models(name: str) -> None:
    checkpoint = open_checkpoint(DEMOS / name)
    (exact, processor), (ours, _) = (load_vision(checkpoint, device="cpu", dtype=torch.float32) for _ in range(2))
    quantise(ours, "8bit", "cpu")
    pictures = [np.array(Image.open(DEMOS / "pictures" / file).convert("RGB")) for file in ("cafe.png", "hello.png")]
    images = [DecodedImage.from_rgb(picture) for picture in pictures]
    layouts = processor.layouts([image.size for image in images])
    patches = [processor.patches(image, layout) for image, layout in zip(images, layouts, strict=True)]
    for found, expected in zip(ours.encode(patches), exact.encode(patches), strict=True):
        similarity = F.cosine_similarity(found.projector_input, expected.projector_input, dim=-1)
        assert similarity.mean() > 0.9995
        assert similarity.min() > 0.999
        assert F.cosine_similarity(found.rows, expected.rows, dim=-1).min() > 0.999


def resident_bytes() -> int:
    return_freed()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def held_layer(side: int) -> Holder:
    layer = ColumnParallelLinear(side, {"": side}, bias=True, tp=TensorParallel.single())
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return Holder(layer)


def test_a_quarter_of_the_memory() -> None:
    quantise(held_layer(128), "8bit", "cpu")  # the compiler stays in memory, whichever test is the first to need it
    side = 4096  # a matrix that the allocator gives back to the system when it is freed
    before = resident_bytes()
    holder = held_layer(side)
    whole = resident_bytes() - before
    quantise(holder, "8bit", "cpu")
    left = resident_bytes() - before
    assert holder.layer.linear.nbytes < 0.26 * 4 * side * side
    assert whole > 3.9 * side * side
    assert left < 0.4 * whole  # the quarter, and what the allocator keeps; with the float32 matrix it would be 1.25


def test_what_is_quantised_stays_as_it_is() -> None:
    model = tower()
    state = model.state_dict()
    quantise(model, "8bit", "cpu")
    with pytest.raises(ConfigError, match="nothing to quantise"):
        quantise(model, "8bit", "cpu")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="an 8-bit layer cannot be loaded into"):
        model.load_state_dict({}, strict=False)
    with pytest.raises(ValueError, match="an 8-bit layer cannot be saved"):
        model.state_dict()
    for change in (lambda layer: layer.bfloat16(), lambda layer: layer.to("meta")):
        with pytest.raises(ValueError, match="cannot be moved or cast"):
            change(model.blocks[0].attention.qkv)
    for keep in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="cannot be copied"):
            keep(model)
    assert model.float().eval().cpu() is model


def test_gradients_are_refused() -> None:
    layer, x = Int8Linear(drawn(4, 8), None), drawn(2, 8).requires_grad_()
    with pytest.raises(ValueError, match="has no gradient"):
        layer(x)
    assert layer(x.detach()).shape == (2, 4)
    assert not list(layer.parameters())


def test_what_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siglane.nn.quantise.has_packed_products", lambda: False)
    with pytest.raises(ConfigError, match="nothing to quantise"):
        quantise(nn.Linear(4, 4), "8bit", "cpu")
    with pytest.raises(UserError, match=r"'4bit': torch has no 4-bit products for this processor .*; use '8bit'"):
        quantise(tower(), "4bit", "cpu")
    monkeypatch.setattr("siglane.nn.quantise.has_integer_products", lambda: False)
    for kind in ("8bit", "4bit"):
        with pytest.raises(
            UserError,
            match=r"no exact 8-bit products \(VNNI, AMX, or AVX2 on Linux\); use the original model in floats",
        ):
            quantise(tower(), kind, "cpu")


@pytest.mark.slow  # a process is started
def test_sums_that_overflow_are_not_used() -> None:
    """oneDNN limited to AVX2 adds neighbouring products up in 16 bits, which is wrong without a word: compiled loops
    take its place, and where there are none 8 bits are refused."""
    code = """
import torch
from siglane.errors import UserError
from siglane.nn.linear import ColumnParallelLinear
from siglane.nn.parallel import TensorParallel
from siglane.nn.quantise import quantise
layer = ColumnParallelLinear(64, {"": 8}, bias=False, tp=TensorParallel.single())
layer.weight.data.fill_(127)
try:
    made = quantise(torch.nn.Sequential(layer), "8bit", "cpu")
    with torch.no_grad():
        print("sums:", made(torch.full((3, 64), 255.0)).unique().tolist())
except UserError as error:
    print(error)
"""
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ("sums: [2072640.0]" if compiles() else "8-bit products") in done.stdout


@torch.no_grad()
@pytest.mark.parametrize(("bits", "furthest"), [(8, 0.01), (4, 0.12)])
@pytest.mark.parametrize("shape", [(96, 128), (7, 65), (3, 1)])
def test_weights_of_a_gpu_by_its_form_in_torch(bits: int, furthest: float, shape: tuple[int, int]) -> None:
    """The form that stands in where Triton's is not right. Rows of zeros stay zeros, odd widths are whole."""
    x, weight, bias = (one.bfloat16() for one in (drawn(5, shape[1]), drawn(*shape, seed=1), drawn(shape[0], seed=2)))
    weight[0] = 0
    layer = low_bit_linear(bits, torch.device("cpu"))(weight, bias)
    expected = F.linear(x, weight, bias)
    assert (layer(x) - expected).norm() / expected.norm() < furthest
    assert torch.equal(layer(x)[:, 0], expected[:, 0])
    assert layer(x[None]).shape == (1, 5, shape[0])
    assert layer.codes.nbytes <= (shape[1] + 63) * shape[0] * bits // 8


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (3, 588), (64, 64), (100, 30), (896, 320), (5000, 70)])
def test_codes_are_packed_as_onednn_packs_them(shape: tuple[int, int]) -> None:
    """The first weight of a shape by oneDNN, the next by ourselves, of any place in memory."""
    if not is_exact():
        pytest.skip("oneDNN's products are not exact here")
    drawn_codes = [torch.randint(-127, 128, shape, dtype=torch.int8) for _ in range(2)]
    first, _ = int8_packing.pack_codes(drawn_codes[0])
    codes = torch.cat((torch.zeros(1, dtype=torch.int8), drawn_codes[1].flatten()))[1:].view(shape)
    assert int8_packing._known[shape] is first, "oneDNN keeps weights in another order here"
    (ours, ordered), theirs = int8_packing.pack_codes(codes), torch.ops.onednn.qlinear_prepack(codes, None)
    assert ordered
    assert bytes_of(ours) == bytes_of(theirs)
    assert torch.equal(int8_packing.sums(ours, *shape), codes.sum(1, dtype=torch.int32))
    assert int8_packing.holds(ours, codes)
    assert not int8_packing.holds(ours, drawn_codes[0]) or torch.equal(codes, drawn_codes[0])


def bytes_of(packed: torch.Tensor) -> bytes:
    return ctypes.string_at(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))


@pytest.mark.parametrize("shape", [(1, 1), (3, 588), (100, 30), (5000, 70)])
def test_codes_are_packed_without_onednn(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same order, in a tensor of bytes."""
    monkeypatch.setattr(int8_packing, "is_exact", lambda: False)
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    packed, ordered = int8_packing.pack_codes(codes)
    assert ordered
    assert packed.dtype == torch.uint8
    assert torch.equal(int8_packing.unpack_codes(packed, *shape), codes)
    assert torch.equal(int8_packing.sums(packed, *shape), codes.sum(1, dtype=torch.int32))
    assert int8_packing.holds(packed, codes)
    assert int8_packing.blocks(packed, *shape).count_nonzero() == codes.count_nonzero()  # what is filled up is zero


def test_an_order_that_is_not_known_is_left_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_packing, "holds", lambda packed, codes: False)
    weight = drawn(70, 130)
    for _ in range(2):
        layer = Int8Linear(weight, None)
        assert torch.equal(layer.stored.codes, quant.int8_codes(weight).codes)
    assert (70, 130) not in int8_packing._known


def rows_of_all_sizes() -> torch.Tensor:
    """What a LayerNorm sees: usual rows, tokens with one huge value, rows of a constant, of two values, of nothing."""
    x = drawn(200, 256)
    x[3:40:5, 7] = 50.0
    x[60, 9], x[61, 10] = 1e4, -1e-4
    x[70], x[71] = 2.5, 0.0
    x[72] = torch.tensor([1.0, -1.0]).repeat(128)
    return x


PASSES = {"torch": Between, "compiled": between}


@pytest.fixture(params=PASSES)
def passes(request: pytest.FixtureRequest) -> Between:
    """What stands between two products here, with and without compiled loops."""
    made: Between | None = PASSES[request.param]()
    if made is None:
        pytest.skip("needs llvmlite and AVX2")
    return made


def values_of(rows: Codes) -> torch.Tensor:
    return rows.codes.float() * rows.scale + rows.shift


def assert_codes_of(rows: Codes, expected: torch.Tensor) -> None:
    """They are the nearest ones, and each row has all of them."""
    assert ((values_of(rows) - expected).abs() <= 0.51 * rows.scale + 1e-6).all()
    span = expected.amax(1).clamp_min(0) - expected.amin(1).clamp_max(0)
    assert torch.allclose(rows.scale[:, 0] * 254, span, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_codes_of_a_norm_are_its_rows(passes: Between) -> None:
    gain = drawn(250, seed=3).mul(0.2).add(1)
    x = rows_of_all_sizes()[:, :250].contiguous()
    assert_codes_of(passes.normed(x, gain, 1e-6), F.layer_norm(x, (250,), gain, None, 1e-6))
    far = x + 100  # a mean that is larger than what lies about it
    exact = F.layer_norm(far.double(), (250,), gain.double(), None, 1e-2).float()
    assert_codes_of(passes.normed(far, gain, 1e-2), exact)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_rows(passes: Between, dtype: torch.dtype) -> None:
    x = rows_of_all_sizes().to(dtype)
    assert_codes_of(passes.coded(x), x.float())


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf", "quick_gelu", "silu"])
def test_what_a_product_gives(passes: Between, activation: Activation) -> None:
    x, weight, bias, residual = rows_of_all_sizes(), drawn(70, 256), drawn(70, seed=1), drawn(200, 70, seed=2)
    layer = Int8Linear(weight, bias)
    rows, expected = passes.coded(x), layer(x)

    def sums() -> torch.Tensor:
        return layer.sums_of(rows)

    near = {"rtol": 1e-5, "atol": 1e-5 * float(expected.abs().max())}
    exact, half = (
        passes.finished(sums(), rows, layer.corrections, torch.empty(200, 70, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert torch.allclose(exact, expected, **near)
    assert torch.equal(half, exact.bfloat16())
    found = passes.added(sums(), rows, layer.corrections, residual, residual.clone())
    assert torch.allclose(found, residual + expected, **near)
    small = layer.corrections / 50  # where an activation bends
    shrunk = Codes(rows.codes, rows.marks / 50)
    made = passes.activated(sums(), shrunk, torch.stack((small[0] * 50, small[1])), activation)
    assert_codes_of(made, activate(expected / 50, activation))


@torch.no_grad()
def test_undefined_rows_stay_so_and_alone(passes: Between) -> None:
    x, gain = drawn(6, 96), torch.ones(96)
    layer = Int8Linear(drawn(32, 96, seed=1), drawn(32, seed=2))
    for undefined in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        spoilt = x.clone()
        spoilt[2, 5] = undefined
        for encode in (passes.coded, lambda rows: passes.normed(rows, gain, 1e-6)):
            clean, rows = encode(x), encode(spoilt)
            found, expected = (
                passes.finished(layer.sums_of(some), some, layer.corrections, torch.empty(6, 32))
                for some in (rows, clean)
            )
            assert not found[2].isfinite().any()
            others = torch.arange(6) != 2
            assert torch.equal(found[others], expected[others])
            activated = passes.activated(layer.sums_of(rows), rows, layer.corrections, "gelu_tanh")
            assert not values_of(activated)[2].isfinite().any()


@torch.no_grad()
def test_rows_of_a_block_do_not_know_their_neighbours() -> None:
    """To the last bit, beside rows that take other steps."""
    torch.manual_seed(0)
    ours = quantise(tower(), "8bit", "cpu")
    block, x = ours.blocks[0], drawn(300, 64)
    x[100:200:7, 3] = 40.0
    together = block(x, Segments.of([64, 200, 36], x.device), "sdpa")
    for start, length in ((0, 64), (64, 200), (264, 36)):
        some = x[start : start + length]
        assert torch.equal(block(some, Segments.of([length], x.device), "sdpa"), together[start : start + length])


@torch.no_grad()
@pytest.mark.parametrize("tamed", [True, False])
def test_a_stream_with_outlier_channels(tamed: bool) -> None:
    """A few channels of the stream are fifty times as large as the others, in all rows or, as trained towers have it,
    with norms that make them small again."""
    models = [tower(), tower()]
    for block in (block for model in models for block in model.blocks):
        for layer in (block.attention.out_proj, block.mlp.fc2):
            layer.weight[:3] *= 50
        if tamed:
            for norm in (block.norm1, block.norm2):
                norm.weight[:3] /= 50
    batch = packed(Grid(16, 16), Grid(3, 21))
    exact, ours = (model(batch) for model in (models[0], quantise(models[1], "8bit", "cpu")))
    assert F.cosine_similarity(ours, exact).mean() > (0.999 if tamed else 0.99)


def test_a_block_with_codes_has_no_gradient() -> None:
    block = quantise(tower(), "8bit", "cpu").blocks[0]
    with pytest.raises(ValueError, match="has no gradient"):
        block(drawn(2, 64).requires_grad_(), Segments.of([2], torch.device("cpu")), "sdpa")
