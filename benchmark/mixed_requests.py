"""Mixed pictures from many clients: does the engine's encoder keep the speed of one offline packed batch?

python benchmark/mixed_requests.py [--clients 16] [--layers 9]

A SigLIP-so400m-shaped tower (width 1152, native resolution, random weights; `--layers` blocks of its 27) in front of a
small language model. Every client sends a request with one picture of its own size; the engine packs whatever waits.
Beside it, in the same run and alternating with it, the same pictures are encoded offline, packed to the same number of
patches per forward. Prints patches per second of both and their ratio, the bar being 0.9, and writes
benchmark/results/mixed_requests.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from machine import description, gemm_rate, onednn_rate

from siglane.config.images import ImageFacts
from siglane.config.language import LanguageConfig
from siglane.config.preprocess import PreprocessConfig
from siglane.config.projector import LinearLayer, NormLayer, ProjectorConfig, VocabularyConfig
from siglane.config.vision import VisionConfig
from siglane.config.vlm import VlmConfig
from siglane.engine.engine import Engine
from siglane.families.model import VisionLanguageModel
from siglane.nn.cpu.optimise import optimise
from siglane.settings.engine import EngineConfig
from siglane.tiling.navit import NativeResolution
from siglane.types import Grid, ImagePatches, ImageSpan, Prompt, Request, SamplingParams, Size, digest_of

BAR = 0.9
GRIDS = ((16, 16), (8, 12), (24, 40), (10, 14), (6, 20), (12, 12), (30, 30), (8, 8))
RESULT = Path(__file__).parent / "results" / "mixed_requests.json"
IMAGE_ID = 500
WORDS = 1024


def model_config(layers: int) -> VlmConfig:
    vision = VisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=layers, num_attention_heads=16, num_channels=3,
        patch_size=16, position_grid=Grid(32, 32), hidden_act="gelu_tanh", layer_norm_eps=1e-6,
        patch_layout="channel_first", position_resize="bicubic", rope_theta=10000.0, depth=layers,
        post_norm=False, use_head=False,
    )  # fmt: skip
    language = LanguageConfig.from_hf(
        {
            "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512,
            "max_position_embeddings": 4096, "tie_word_embeddings": True,
        }
    )  # fmt: skip
    projector = ProjectorConfig(
        merge="blocks", factor=2, column_major=False,
        layers=(LinearLayer("head.0", 4 * 1152, WORDS, bias=False), NormLayer("head.1", WORDS, 1e-5)),
        input_size=1152, output_size=256, vocabulary=VocabularyConfig("vte", WORDS, 4),
    )  # fmt: skip
    rule = NativeResolution(factor=32, min_pixels=32 * 32, max_pixels=None, resample="bilinear")
    half = (0.5, 0.5, 0.5)
    images = ImageFacts(
        vision=vision,
        projector=projector,
        preprocess=PreprocessConfig(rule=rule, mean=half, std=half, rescale=1 / 255),
        newline=False,
        video=None,
    )
    return VlmConfig(
        family="benchmark", images=images, language=language, image_token="<image>", image_token_id=IMAGE_ID,
        eos_token_ids=(511,), thinking=None, sampling={},
    )  # fmt: skip


def build_model(config: VlmConfig) -> VisionLanguageModel:
    torch.manual_seed(0)
    model = VisionLanguageModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    optimise(model)  # as for every engine (`siglane/engine/process/load.py`)
    return model.eval().requires_grad_(False)


def pictures(config: VlmConfig, clients: int, round_: int) -> list[ImagePatches]:
    """One for each client, all different, new ones every round so that no cache knows them."""
    generator = torch.Generator().manual_seed(1000 + round_)
    found = []
    for client in range(clients):
        h, w = GRIDS[client % len(GRIDS)]
        (layout,) = config.images.layouts([Size(w * 16, h * 16)])
        pixels = torch.randint(0, 256, (layout.patches, 768), dtype=torch.uint8, generator=generator)
        found.append(ImagePatches(pixels, layout, digest_of(b"bench", f"{round_} {client}".encode())))
    return found


def request(name: str, image: ImagePatches) -> Request:
    ids = (1, *(IMAGE_ID,) * image.layout.rows, 2, 3)
    prompt = Prompt(ids, (ImageSpan(1, 1 + image.layout.rows, 0),), (image.layout,), (0,))
    return Request(name, prompt, SamplingParams(), 1, images=(image,))


class TimedEncoder:
    """Adds up the seconds and patches of `runner.encode`."""

    def __init__(self, engine: Engine) -> None:
        self.seconds, self.patches = 0.0, 0
        self._encode = engine.runner.encode
        engine.runner.encode = self  # type: ignore[method-assign,assignment]

    def __call__(self, images: Sequence[ImagePatches]) -> list[torch.Tensor]:
        begin = time.perf_counter()
        found = self._encode(list(images))
        self.seconds += time.perf_counter() - begin
        self.patches += sum(image.layout.patches for image in images)
        return list(found)


def in_engine(model: VisionLanguageModel, images: Sequence[ImagePatches], max_batch_patches: int) -> float:
    """Patches per second of the encoder while the engine answers one request per picture."""
    config = EngineConfig(device="cpu", dtype="float32", max_batch_patches=max_batch_patches, kv_tokens=1 << 14)
    engine = Engine(model, config, (511,))
    timed = TimedEncoder(engine)
    for number, image in enumerate(images):
        engine.add(request(f"client-{number}", image))
    while engine.has_work:
        for delta in engine.step():
            if delta.finished is not None and delta.finished.error is not None:
                raise delta.finished.error
    return timed.patches / timed.seconds


@torch.inference_mode()
def offline(model: VisionLanguageModel, images: Sequence[ImagePatches], max_batch_patches: int) -> float:
    """The same pictures, packed greedily in order into forwards of at most `max_batch_patches` patches."""
    groups: list[list[ImagePatches]] = [[]]
    for image in images:
        if groups[-1] and sum(one.layout.patches for one in (*groups[-1], image)) > max_batch_patches:
            groups.append([])
        groups[-1].append(image)
    begin = time.perf_counter()
    for group in groups:
        model.vision(group)
    return sum(image.layout.patches for image in images) / (time.perf_counter() - begin)


def main() -> int:
    parser = argparse.ArgumentParser(description="Encoder throughput of the engine under mixed requests.")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--layers", type=int, default=9, help="blocks of the tower (so400m has 27)")
    parser.add_argument("--max-batch-patches", type=int, default=1024, help="patches per packed forward")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    config = model_config(options.layers)
    model = build_model(config)
    engine, packed = [], []
    for round_ in range(options.repeats + 1):
        images = pictures(config, options.clients, round_)
        one, other = (
            in_engine(model, images, options.max_batch_patches), offline(model, images, options.max_batch_patches)
        )  # fmt: skip
        if round_:  # the first round warms up
            engine.append(one)
            packed.append(other)
    ratio = statistics.median(one / other for one, other in zip(engine, packed, strict=True))
    result = {
        "command": f"benchmark/mixed_requests.py --clients {options.clients} --layers {options.layers} "
        f"--max-batch-patches {options.max_batch_patches} --repeats {options.repeats}",
        "machine": description(),
        "torch_gflops": round(gemm_rate() / 1e9),
        "siglane_gflops": round(onednn_rate() / 1e9),
        "engine_patches_per_second": round(statistics.median(engine), 1),
        "offline_patches_per_second": round(statistics.median(packed), 1),
        "ratio": round(ratio, 3),
        "bar": BAR,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0 if ratio >= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
