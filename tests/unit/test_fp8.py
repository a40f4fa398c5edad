"""Layers of 8-bit floats, whose products torch computes on CPUs too, from 2.13 on: the same codes, the same scales."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from siglane.config.vision import VisionConfig
from siglane.errors import ConfigError, EngineError, UserError
from siglane.families import quantise as families_quantise
from siglane.families.model import load_model
from siglane.families.processor import load_processor
from siglane.nn.cuda import fp8
from siglane.nn.cuda.fp8 import FURTHEST, LARGEST, FloatLinear, Fp8Layers, Fp8Linear, fp8_layers, rows_in_torch
from siglane.nn.linear import ColumnParallelLinear
from siglane.nn.parallel import TensorParallel
from siglane.nn.quantise import LAYERS, Bits, quantise, quantised
from siglane.types import Grid, PackedPatches
from siglane.vision.tower import SiglipVisionModel
from siglane.weights.hub import open_checkpoint

CPU = torch.device("cpu")


def has_products() -> bool:
    try:
        Fp8Linear(rows_in_torch, torch.ones(16, 16), None)(torch.ones(2, 16))
    except RuntimeError:
        return False
    return True


pytestmark = [
    pytest.mark.skipif(not has_products(), reason="this torch has no fp8 products by rows on CPUs; 2.13 has"),
    pytest.mark.usefixtures("_without_gradients"),
]


@pytest.fixture
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To the nearest number of four bits, the first of them 1, of those that 448 and fourteen halvings of it bound."""
    scale = x.abs().amax(-1, keepdim=True) / LARGEST
    steps = torch.exp2((x / scale).abs().clamp_min(2.0**-6).log2().floor() - 3)
    return (x / scale / steps).round() * steps * scale


def times(coded: float, plain: float) -> Callable[[Callable[[], object], torch.device], float]:
    """A clock that says so of each layer in turn."""
    said = [coded, plain]

    def clock(run: Callable[[], object], device: torch.device) -> float:
        run()
        said.append(said[0])
        return said.pop(0)

    return clock


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e20])
def test_codes_are_the_nearest_ones(factor: float) -> None:
    x = drawn(40, 70) * factor
    x[0], x[1, 5] = 0, 1000 * factor
    codes, scales = rows_in_torch(x, 80)
    assert (codes.dtype, scales.dtype, codes.shape, scales.shape) == (
        torch.float8_e4m3fn,
        torch.float32,
        (40, 80),
        (40, 1),
    )
    assert torch.equal(codes[1:].float().abs().amax(1), torch.full((39,), LARGEST))
    assert torch.equal(codes[:, 70:].float(), torch.zeros(40, 10))
    assert torch.equal(codes[0].float(), torch.zeros(80))
    torch.testing.assert_close(codes[1:, :70].float() * scales[1:], rounded(x[1:]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 16, 16), (5, 70, 100), (33, 588, 24), (7, 1, 3)])
def test_a_layer_is_a_product_of_rounded_numbers(
    shape: tuple[int, int, int], with_bias: bool, dtype: torch.dtype
) -> None:
    """Rows and outputs of many sizes, so that a scale in the wrong place is a number in the wrong place."""
    rows, inputs, outputs = shape
    x = (drawn(rows, inputs) * torch.logspace(-2, 2, rows)[:, None]).to(dtype)
    weight = (drawn(outputs, inputs, seed=1) * torch.logspace(-1, 1, outputs)[:, None]).to(dtype)
    bias = drawn(outputs, seed=2).to(dtype) if with_bias else None
    layer = Fp8Linear(rows_in_torch, weight, bias)
    expected = rounded(x.float()) @ rounded(weight.float()).T + (0 if bias is None else bias.bfloat16().float())
    found = layer(x)
    assert (found.dtype, found.shape) == (dtype, (rows, outputs))
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(layer(x[None, None])[0, 0], found)
    assert layer.codes.nbytes <= (inputs + 15) * (outputs + 15)


def test_what_a_row_holds_harms_no_other() -> None:
    x, weight, bias = drawn(6, 64), drawn(32, 64, seed=1), drawn(32, seed=2)
    weight[3] = 0
    layer = Fp8Linear(rows_in_torch, weight, bias)
    clean = layer(x)
    assert torch.equal(clean[:, 3], bias[3].bfloat16().float().expand(6))
    x[0], x[1, 2], x[2, 2], x[3, 2] = 0, torch.nan, torch.inf, 1e30
    found = layer(x)
    assert torch.equal(found[0], bias.bfloat16().float())
    assert not found[1:3].isfinite().any()
    assert torch.equal(found[4:], clean[4:])


@pytest.mark.parametrize("power", [1, 3])
def test_rounding_costs_what_the_trial_allows(power: int) -> None:
    """Of plain numbers, and of some that are far larger than most."""
    x, weight = drawn(500, 1152) ** power, drawn(300, 1152, seed=1) ** power
    found, exact = Fp8Linear(rows_in_torch, weight, None)(x), F.linear(x, weight)
    assert 0.03 < float((found - exact).norm() / exact.norm()) < 0.9 * FURTHEST


class TestTrial:
    @pytest.fixture(autouse=True)
    def _few_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fp8, "ROWS", 64)

    @pytest.mark.parametrize(("coded", "kind"), [(0.6, Fp8Linear), (1.0, FloatLinear), (1.2, FloatLinear)])
    def test_what_is_no_faster_is_not_taken(
        self, coded: float, kind: type[nn.Module], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Once for each shape; the log says why."""
        with caplog.at_level(logging.INFO, "siglane"):
            make = fp8_layers(CPU, times(coded, 1.0))
            layers = [make(drawn(48, 32, seed=seed).bfloat16(), drawn(48).bfloat16()) for seed in range(3)]
            other = make(drawn(32, 48).bfloat16(), None)
        assert [type(layer) for layer in (*layers, other)] == [kind] * 4
        assert caplog.text.count("fp8 products with weights of [48, 32] are 0.0") == 1
        assert f"take {coded:.2f} times as long as those in torch.bfloat16: " in caplog.text
        refused = 0 if kind is Fp8Linear else 2
        assert caplog.text.count("not used here") == 1 + refused  # Triton's rows are not, either
        x, weight, bias = drawn(5, 32).bfloat16(), drawn(48, 32).bfloat16(), drawn(48).bfloat16()
        expected = F.linear(x, weight, bias)
        assert float((layers[0](x) - expected).norm() / expected.norm()) < FURTHEST

    def test_rows_that_lie_are_found(self) -> None:
        """Another row's scales, and codes that are cut off."""

        def shifted(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
            codes, scales = rows_in_torch(x, width)
            return codes, scales.roll(1, 0).contiguous()

        def cut(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
            return rows_in_torch(x.clamp(-1, 1), width)

        for rows in (shifted, cut):
            assert isinstance(Fp8Layers(rows, times(0.5, 1.0))(drawn(48, 32), None), FloatLinear)
        assert isinstance(Fp8Layers(rows_in_torch, times(0.5, 1.0))(drawn(48, 32), None), Fp8Linear)

    def test_where_torch_has_no_such_products_it_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(*args: object, **named: object) -> torch.Tensor:
            raise RuntimeError("not on this device")

        monkeypatch.setattr(torch, "_scaled_mm", absent)
        with pytest.raises(
            EngineError, match=r"^rows of fp8 products: no kernel .*torch: RuntimeError: not on this device"
        ):
            fp8_layers(CPU)


def layer() -> nn.Module:
    return nn.Sequential(ColumnParallelLinear(32, {"": 48}, bias=False, tp=TensorParallel.single()))


def test_it_is_refused_by_name_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"quantization 'fp8': CPUs have no products of 8-bit floats; use '8bit'"):
        quantise(layer(), "fp8", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(UserError, match=r"'fp8': a GPU of compute capability 8\.9 or newer .*; use '8bit'") as caught:
        quantise(layer(), "fp8", "cuda:0")
    assert caught.value.param == "quantization"
    with pytest.raises(ConfigError, match=r"use none, 8bit, 4bit, fp8$"):
        quantise(layer(), "fp9", CPU)  # type: ignore[arg-type]


def test_a_chat_model_computes_what_it_sees_in_fp8_and_reads_its_words_as_with_8_bits(
    nvila_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(nvila_folder)
    model = load_model(checkpoint, load_processor(checkpoint).config, device=CPU, dtype=torch.float32)
    asked: list[tuple[nn.Module, Bits]] = []
    monkeypatch.setattr(families_quantise, "quantise", lambda part, kind, device: asked.append((part, kind)))
    cuda = torch.device("cuda", 0)
    for kind in ("fp8", "4bit"):
        made = families_quantise.Quantiser(kind, model.vision, model.language, cuda, torch.float32, torch.float32)
        made.finish()
    parts = model.language, model.vision
    assert asked == [*zip(parts, ("8bit", "fp8"), strict=True), *zip(parts, ("4bit", "4bit"), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "mean"), [(4, 0.998), (27, 0.9955)])
def test_a_tower_of_so400ms_width_is_near_its_floats(depth: int, mean: float) -> None:
    """Random weights; of real ones this says nothing but the order."""
    grid = Grid(8, 8)
    config = VisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=depth, num_attention_heads=16, num_channels=3,
        patch_size=14, position_grid=Grid(0, 0), hidden_act="gelu_tanh", layer_norm_eps=1e-6,
        patch_layout="channel_first", position_resize="never", rope_theta=None, depth=depth, post_norm=True,
        use_head=False,
    )  # fmt: skip
    torch.manual_seed(0)
    tower = SiglipVisionModel(config).eval().requires_grad_(False)
    for name, parameter in tower.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    packed = PackedPatches(drawn(grid.area, config.patch_dim), (grid,))
    exact = tower(packed)
    for parent in [*tower.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, LAYERS):
                setattr(parent, name, quantised(child, lambda *of: Fp8Linear(rows_in_torch, *of)))
    cosines = F.cosine_similarity(tower(packed), exact, dim=-1)
    assert mean < float(cosines.mean()) < 0.9995
    assert float(cosines.min()) > mean - 0.002


def test_torchs_product_is_still_the_one_that_is_called() -> None:
    """Its operands in this order, its options by these names."""
    names = [argument.name for argument in torch.ops.aten._scaled_mm.default._schema.arguments]
    assert names[:5] == ["self", "mat2", "scale_a", "scale_b", "bias"]
    assert {"out_dtype", "use_fast_accum"} < set(names[5:])


def test_layers_can_be_copied() -> None:
    made = Fp8Linear(rows_in_torch, drawn(48, 32), drawn(48))
    x = drawn(3, 32)
    assert torch.equal(copy.deepcopy(made)(x), made(x))
