"""Models of random weights for the stages of `gpu_report.py`, engines over them, and requests of ids."""

from __future__ import annotations

from dataclasses import replace

import torch
from gpu_place import Place
from step import BASE

from siglane.config.images import ImageFacts
from siglane.config.language import LanguageConfig
from siglane.config.preprocess import PreprocessConfig
from siglane.config.projector import ActivationLayer, LinearLayer, ProjectorConfig
from siglane.config.vision import VisionConfig
from siglane.config.vlm import VlmConfig
from siglane.engine.engine import Engine
from siglane.families.model import VisionLanguageModel
from siglane.nn.cpu.optimise import optimise
from siglane.nn.cuda.optimise import optimise_on_cuda
from siglane.settings.engine import EngineConfig
from siglane.tiling.squash import Squash
from siglane.types import Grid, ImagePatches, ImageSpan, Prompt, Request, SamplingParams, Size, digest_of

QWEN_1_5B = replace(
    BASE, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, head_dim=128
)
QWEN_7B = replace(
    BASE, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, head_dim=128, vocab_size=152_064, tie_embeddings=False,
)  # fmt: skip
TINY = replace(
    BASE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=32, vocab_size=512
)
SO400M = VisionConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, num_channels=3,
    patch_size=14, position_grid=Grid(27, 27), hidden_act="gelu_tanh", layer_norm_eps=1e-6,
    patch_layout="channel_first", position_resize="never", rope_theta=None, depth=27, post_norm=True, use_head=False,
)  # fmt: skip


TINY_TOWER = replace(SO400M, depth=1, num_hidden_layers=1, hidden_size=144, intermediate_size=96, num_attention_heads=2)


def eyes(vision: VisionConfig, width: int, columns: int) -> ImageFacts:
    """A tower for pictures of so many columns and rows of patches, four to a row of a language model of `width`."""
    vision = replace(vision, position_resize="bicubic")
    merged, side = 4 * vision.hidden_size, vision.patch_size
    first, last = LinearLayer("0", merged, width, bias=True), LinearLayer("2", width, width, bias=True)
    projector = ProjectorConfig(
        merge="blocks",
        factor=2,
        column_major=False,
        layers=(first, ActivationLayer("gelu_erf"), last),
        input_size=vision.hidden_size,
        output_size=width,
    )
    rule = Squash(tile=Size(columns * side, columns * side), resample="bicubic")
    half = (0.5, 0.5, 0.5)
    preprocess = PreprocessConfig(rule=rule, mean=half, std=half, rescale=1 / 255)
    return ImageFacts(vision=vision, projector=projector, preprocess=preprocess, newline=False, video=None)


@torch.no_grad()
def random_model(language: LanguageConfig, place: Place, images: ImageFacts | None = None) -> VisionLanguageModel:
    config = VlmConfig(
        family="causal_lm", images=images, language=language, image_token="", image_token_id=-1, eos_token_ids=(),
        thinking=None, sampling={},
    )  # fmt: skip
    torch.manual_seed(0)
    with place.defaults():
        model = VisionLanguageModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def tuned(model: VisionLanguageModel, batch_invariant: bool = False) -> VisionLanguageModel:
    optimise(model)
    optimise_on_cuda(model.language, batch_invariant)
    return model


def engine_of(model: VisionLanguageModel, rows: int, length: int, batch_invariant: bool = False) -> Engine:
    device, tokens = str(model.language.norm.weight.device), rows * (length + 64)
    config = EngineConfig(device=device, kv_tokens=tokens, max_running=rows, batch_invariant=batch_invariant)
    return Engine(model, config, ())


def request(number: int, length: int, answer: int, vocabulary: int, temperature: float = 0.0) -> Request:
    prompt = Prompt(tuple((7 * place + 13 * number) % vocabulary for place in range(length)))
    return Request(str(number), prompt, SamplingParams(ignore_eos=True, temperature=temperature, seed=number), answer)


def answers_of(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    for one in requests:
        engine.add(one)
    found: dict[str, list[int]] = {one.request_id: [] for one in requests}
    while engine.has_work:
        for delta in engine.step():
            if delta.token_id is not None:
                found[delta.request_id].append(delta.token_id)
            if delta.finished is not None and delta.finished.reason == "error":
                raise RuntimeError(f"request {delta.request_id} ended with an error: {delta.finished}")
    return found


def picture(facts: ImageFacts, number: int) -> ImagePatches:
    (layout,) = facts.layouts([Size(640, 480)])
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (layout.patches, facts.vision.patch_dim), dtype=torch.uint8, generator=generator)
    return ImagePatches(pixels, layout, digest_of(b"gpu report", str(number).encode()))


def question(number: int, image: ImagePatches, words: int, answer: int, vocabulary: int) -> Request:
    """The image, then so many tokens of text."""
    text = [(7 * place + 13 * number) % vocabulary for place in range(words)]
    prompt = Prompt(
        (1, *(0,) * image.layout.rows, *text), (ImageSpan(1, 1 + image.layout.rows, 0),), (image.layout,), (0,)
    )
    return Request(str(number), prompt, SamplingParams(ignore_eos=True), answer, images=(image,))
