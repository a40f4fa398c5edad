"""What hosts and siglane's own engine are all asked: tiny checkpoints of every family, and prompts with pictures.

A random model forgets its picture over many equal rows and then repeats one word. Scaled as here, attention chooses few
rows and logits lie far apart, so answers tell pictures apart and rounding does not change them.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_nvila_checkpoint
from idefics3_checkpoint import write_idefics3_checkpoint
from llava_onevision_checkpoint import write_llava_onevision_checkpoint, write_relative
from llava_qwen_checkpoint import write_llava_qwen_checkpoint
from nanovlm_checkpoint import write_nanovlm_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint, write_ovis2_6_checkpoint
from parity_kit import picture
from PIL import Image
from safetensors.torch import load_file, save_file
from video_llama_3_checkpoint import write_video_llama_3_checkpoint

from siglane.llm import LLM, Generation
from siglane.types import SamplingParams

TOKENS = 64
MARGIN = 1e-3  # of the best token over the next one, in logits: far above what two attentions differ by
FEWEST_WORDS = 10  # different tokens of one answer
QWEN = {"embed_tokens": 4.0, "layers.0.self_attn.q_proj": 2.0, "lm_head": 4.0}


@dataclass(frozen=True, slots=True)
class Picture:
    """width, height: pixels; seed: of what it shows; max_tiles: a budget that its request names."""

    width: int
    height: int
    seed: int = 0
    max_tiles: int | None = None

    @property
    def url(self) -> str:
        return data_url(picture(self.width, self.height, self.seed))


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture that a test drew by itself."""

    image: Image.Image

    @property
    def url(self) -> str:
        return data_url(self.image)


@dataclass(frozen=True, slots=True)
class VideoSize:
    """A video of `frames` pictures, all of them shown."""

    width: int
    height: int
    frames: int
    seed: int = 0

    @property
    def url(self) -> str:
        file = io.BytesIO()
        first, *others = (picture(self.width, self.height, self.seed + number) for number in range(self.frames))
        first.save(file, "GIF", save_all=True, append_images=others, duration=100, loop=0)
        return f"data:image/gif;base64,{base64.b64encode(file.getvalue()).decode()}"


Case = tuple[str | Picture | Drawn | VideoSize, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """write: a checkpoint of a seed into a folder; seeds: two whose answers discriminate; large_seed: one that does
    with `large_heads`; larger: what is multiplied, by the end of a tensor's name; video: whether it reads videos."""

    write: Callable[[Path, int], object]
    seeds: tuple[int, int]
    large_seed: int
    larger: Mapping[str, float] = field(default_factory=lambda: QWEN)
    video: bool = True


# as in published folders: classes that a host would look for, some of which only their authors' code has
CLASSES_NAMED = {
    "config.json": {"auto_map": {"AutoConfig": "configuration_other.OtherConfig"}},
    "processor_config.json": {
        "processor_class": "OtherProcessor", "auto_map": {"AutoProcessor": "processing_other.OtherProcessor"},
    },
    "preprocessor_config.json": {"processor_class": "OtherProcessor"},
    "tokenizer_config.json": {
        "processor_class": "LlavaOnevisionProcessor", "image_processor_type": "LlavaOnevisionImageProcessor",
        "feature_extractor_type": "SiglipFeatureExtractor",
        "auto_map": {
            "AutoProcessor": "processing_other.OtherProcessor", "AutoTokenizer": ["tokenization_other.Other", None],
        },
    },
}  # fmt: skip


FAMILIES = {
    "nvila": Family(
        lambda folder, seed: write_nvila_checkpoint(folder, layout="hf", lite=False, seed=seed),
        seeds=(1, 5),
        large_seed=0,
    ),
    "vila": Family(
        lambda folder, seed: write_nvila_checkpoint(folder, layout="folders", lite=True, seed=seed),
        seeds=(0, 5),
        large_seed=4,
    ),
    "llava_onevision": Family(
        lambda folder, seed: write_llava_onevision_checkpoint(folder, tied=False, seed=seed), seeds=(5, 0), large_seed=0
    ),
    "ovis2_5": Family(
        lambda folder, seed: write_ovis2_5_checkpoint(folder, seed=seed),
        seeds=(1, 2),
        large_seed=0,
        larger={"embed_tokens": 4.0, "q_norm": 3.0, "lm_head": 4.0, "visual_tokenizer.head.1": 6.0, "vte": 4.0},
    ),
    "nanovlm": Family(
        lambda folder, seed: write_nanovlm_checkpoint(folder, names="untied", seed=seed),
        seeds=(1, 4),
        large_seed=1,
        larger={"token_embedding": 4.0, "decoder.blocks.0.attn.q_proj": 2.0, "decoder.head": 4.0},
        video=False,
    ),
    "bee": Family(
        lambda folder, seed: write_relative(folder, "bee", seed=seed),
        seeds=(0, 1),
        large_seed=1,
        larger={"embed_tokens": 4.0, "layers.0.self_attn.q_norm": 3.0, "lm_head": 4.0},
        video=False,
    ),
    "r_4b": Family(
        lambda folder, seed: write_relative(folder, "r_4b", tied=False, seed=seed),
        seeds=(5, 6),
        large_seed=1,
        larger={"embed_tokens": 4.0, "layers.0.self_attn.q_norm": 3.0, "lm_head": 4.0},
        video=False,
    ),
    "llava_qwen": Family(
        lambda folder, seed: write_llava_qwen_checkpoint(folder, tied=False, tower="beside", seed=seed),
        seeds=(0, 1),
        large_seed=0,
    ),
    "ovis2_6": Family(
        lambda folder, seed: write_ovis2_6_checkpoint(folder, moe=True, seed=seed),
        seeds=(0, 3),
        large_seed=1,
        larger={"embed_tokens": 4.0, "q_norm": 3.0, "lm_head": 4.0, "visual_tokenizer.head.1": 6.0, "vte": 4.0},
    ),
    "smolvlm2": Family(
        # ten frames a second, as the cases' videos have: all of them are shown
        lambda folder, seed: write_idefics3_checkpoint(
            folder, seed=seed, processor={"video_sampling": {"fps": 10, "max_frames": 6}}
        ),
        seeds=(11, 9),
        large_seed=1,
        larger={"embed_tokens": 4.0, "text_model.layers.0.self_attn.q_proj": 2.0, "lm_head": 4.0},
    ),
    "video_llama_3": Family(
        lambda folder, seed: write_video_llama_3_checkpoint(folder, seed=seed, videos={"fps": 10}),
        seeds=(23, 22),
        large_seed=4,
    ),
    "videollama3_qwen2": Family(
        lambda folder, seed: write_video_llama_3_checkpoint(folder, "authors", seed=seed, videos={"fps": 10}),
        seeds=(8, 1),
        large_seed=7,
    ),
}


QUESTION = "Describe the picture."
CASES: Mapping[str, Case] = {
    "text": ("You are a helpful assistant. What is in the image?",),
    "picture": (Picture(90, 60, 1), "\n", QUESTION),
    "another picture": (Picture(90, 60, 2), "\n", QUESTION),
    "large": (Picture(200, 130, 3), QUESTION),
    "two with nothing between": (Picture(60, 60, 4), Picture(60, 60, 5), QUESTION),
    "three of mixed sizes": ("The image ", Picture(64, 48, 6), " or ", Picture(17, 300, 7), QUESTION,
                             Picture(1, 1, 8), "?"),
    "one pixel": (Picture(1, 1, 9), QUESTION),
    "narrow": (Picture(17, 300, 10), QUESTION),
    "picture last": (QUESTION, Picture(77, 50, 11)),
}  # fmt: skip
VIDEO: Mapping[str, Case] = {
    "video": (VideoSize(64, 48, 3, 20), "\n", QUESTION),
    "another video": (VideoSize(64, 48, 2, 30), "\n", QUESTION),
}


def cases_of(family: str) -> Mapping[str, Case]:
    return {**CASES, **(VIDEO if FAMILIES[family].video else {})}


def write_checkpoint(name: str, folder: Path, seed: int | None = None) -> None:
    """seed: the first of the family's by default."""
    family = FAMILIES[name]
    folder.mkdir(parents=True)
    family.write(folder, family.seeds[0] if seed is None else seed)
    enlarge(folder, family.larger)
    if not (processor := folder / "processor_config.json").exists():
        processor.write_text("{}")
    for name, stated in CLASSES_NAMED.items():
        for file in folder.rglob(name):
            file.write_text(json.dumps(json.loads(file.read_text()) | stated))


def enlarge(folder: Path, larger: Mapping[str, float]) -> None:
    for file in folder.rglob("*.safetensors"):
        rewrite(file, lambda state: {key: value * _factor(key, larger) for key, value in state.items()})


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """The tensors of a file, changed."""
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def _factor(name: str, larger: Mapping[str, float]) -> float:
    return math.prod(by for end, by in larger.items() if name.endswith(f"{end}.weight"))


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def ask_siglane(folder: Path, cases: Sequence[Case], tokens: int = TOKENS) -> list[Generation]:
    """The answers of siglane's own engine, through its public door, one after the other."""
    llm = LLM(folder, device="cpu", dtype="float32", kv_tokens=16384)
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=2)
    return [answer for case in cases for answer in llm.chat(conversation(case), sampling)]


def conversation(case: Case) -> list[dict[str, Any]]:
    """One user's turn, as OpenAI's clients write it."""
    return [{"role": "user", "content": [_part(part) for part in case]}]


def _part(part: str | Picture | Drawn | VideoSize) -> dict[str, Any]:
    match part:
        case str():
            return {"type": "text", "text": part}
        case VideoSize():
            return {"type": "video_url", "video_url": {"url": part.url}}
        case Picture(max_tiles=int(most)):
            return {"type": "image_url", "image_url": {"url": part.url, "max_tiles": most}}
    return {"type": "image_url", "image_url": {"url": part.url}}


def check_that_answers_discriminate(answers: Sequence[Generation]) -> None:
    """No two are the same, none is one word over and over, and rounding would change none."""
    said = [answer.output_token_ids for answer in answers]
    assert len(set(said)) == len(said)
    words = [len(set(tokens)) for tokens in said]
    assert min(words) >= min(FEWEST_WORDS, len(said[0]) // 4), words
    margins = [margin(answer) for answer in answers]
    assert min(margins) > MARGIN, margins


def margin(answer: Generation) -> float:
    """The least by which a chosen token was ahead of the next one, in logits."""
    return min(chosen.top[0][1] - chosen.top[1][1] for chosen in answer.logprobs)
