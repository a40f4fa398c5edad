"""nanoVLM, every release: transformers' SigLIP tower and Llama under its tensors, its image path and prompt written
from huggingface/nanoVLM's sources (formats.md 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from siglane.verify.references.adapter import tensors_of
from siglane.verify.references.decoder import CHATML, PLACE, Decoder, load_tokenizer
from siglane.verify.references.files import Raw, Tensors, read_json, ready
from siglane.verify.references.reference import ReferenceFamily, Seen, VisionLanguageReference
from siglane.verify.references.tower import SiglipTower

TOKENIZER = "HuggingFaceTB/SmolLM2-360M-Instruct"
LLAMA = {  # transformers' LlamaConfig -> nanoVLM's VLMConfig
    "hidden_size": "lm_hidden_dim", "intermediate_size": "lm_inter_dim", "num_hidden_layers": "lm_n_blocks",
    "num_attention_heads": "lm_n_heads", "num_key_value_heads": "lm_n_kv_heads",
}  # fmt: skip
SIGLIP = {
    "hidden_size": "vit_hidden_dim", "intermediate_size": "vit_inter_dim", "num_hidden_layers": "vit_n_blocks",
    "num_attention_heads": "vit_n_heads", "image_size": "vit_img_size", "patch_size": "vit_patch_size",
}  # fmt: skip


class NanoVlm(VisionLanguageReference):
    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, adapter: Path | None = None) -> None:
        self.raw, tensors = read_json(folder / "config.json"), tensors_of(folder, adapter)
        self.device, self.dtype = device, dtype
        self.tower = SiglipTower(_tower_json(self.raw), _tower_tensors(self.raw, tensors), device, dtype)
        self.language = Decoder.load(_llama_json(self.raw), _llama_tensors(self.raw, tensors), device, dtype)
        projection = tensors["MP.proj.weight"]
        self.projector = nn.Linear(projection.shape[1], projection.shape[0], bias=False)
        ready(self.projector, tensors.under("MP.proj."), device, dtype)
        self.extra: dict[str, str] = self.raw.get("vlm_extra_tokens") or {}
        named = Path(self.raw.get("lm_tokenizer", TOKENIZER))
        own = folder if (folder / "tokenizer.json").is_file() else named
        self.tokenizer = load_tokenizer(own, *self.extra.values())
        self.tiled = "r1c1" in self.extra or "max_img_size" in self.raw

    def see(self, pictures: Sequence[Image.Image]) -> Seen:
        """The image tokens of a prompt are written out: one for each row."""
        cut = [self._tiles(picture) for picture in pictures]
        taps = self.tower.run(torch.cat([tiles for tiles, _ in cut]))
        taps["features"] = taps.pop("post_layernorm")
        features = taps["features"].unflatten(0, (-1, self.tower.grid**2)).to(self.device, self.dtype)
        rows = self.projector(self._shuffled(features)).cpu()
        taps["projector"] = rows.flatten(0, 1)
        images = [list(tiles) for tiles in rows.split([len(tiles) for tiles, _ in cut])]
        return Seen(taps, images, [grid for _, grid in cut])

    def text(self, prompt: str, seen: Seen) -> str:
        image = self.extra.get("image_token")
        images = self._image_strings(seen.grids, image, len(seen.blocks[0])) if image and seen.images else ""
        template = self.raw.get("lm_chat_template") or (CHATML if self.tiled else None)
        if template is None:
            return f"{images}Question: {prompt} Answer:"
        turns = [{"role": "user", "content": images + prompt}]
        text: str = self.tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return text

    def ids(self, text: str, seen: Seen) -> list[int]:
        """Release 0.1 has no image token and puts all rows in front."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        if "image_token" not in self.extra:
            return [PLACE] * sum(map(len, seen.blocks)) + ids
        image_id = self.tokenizer.convert_tokens_to_ids(self.extra["image_token"])
        return [PLACE if token == image_id else token for token in ids]

    def _tiles(self, picture: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """`[tiles, 3, side, side]` on the scale 0..1, the whole picture first where there is a token for it, and rows
        and columns of the tiles."""
        side = self.raw["vit_img_size"]
        if not self.tiled:
            return _tensor(picture.resize((side, side), Image.Resampling.BILINEAR))[None], (1, 1)
        width, height = self._enlarged(*picture.size, side)
        whole = _tensor(picture.resize((width, height), Image.Resampling.BICUBIC))
        rows, columns = height // side, width // side
        tiles = whole.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
        if "global_image_token" in self.extra and (rows, columns) != (1, 1):
            small = F.interpolate(whole[None], (side, side), mode="bilinear", align_corners=False, antialias=True)
            tiles = torch.cat((small, tiles))
        return tiles, (rows, columns)

    def _enlarged(self, width: int, height: int, side: int) -> tuple[int, int]:
        """DynamicResize: both sides multiples of a tile's, the longer one at most max_img_size."""
        longest = self.raw.get("max_img_size", side)
        if self.raw.get("resize_to_max_side_len", False):
            target = longest
        else:
            target = min(longest, math.ceil(max(width, height) / side) * side)
        scale = target / max(width, height)
        across = max(side, math.ceil(min(width, height) * scale / side) * side)
        return (target, across) if width >= height else (across, target)

    def _shuffled(self, features: torch.Tensor) -> torch.Tensor:
        """`[tiles, N, c]` -> `[tiles, N / factor**2, c * factor**2]`, channels in the order (row, column, channel)."""
        factor = self.raw.get("mp_pixel_shuffle_factor", 4 if "global_image_token" in self.extra else 2)
        n = self.tower.grid // factor
        blocks = features.unflatten(1, (n, factor, n, factor)).permute(0, 1, 3, 2, 4, 5)
        return blocks.flatten(3).flatten(1, 2)

    def _image_strings(self, grids: Sequence[tuple[int, int]], image: str, length: int) -> str:
        """`get_image_string`."""
        text, rows = "", image * length
        for number, (down, across) in enumerate(grids):
            text += f"<image: {number}>" if len(grids) > 1 and self.tiled else ""
            if "global_image_token" in self.extra:
                text += self.extra["global_image_token"] + rows
                if (down, across) == (1, 1):
                    continue
            text += "".join(
                self.extra.get(f"r{row + 1}c{column + 1}", "") + rows for row in range(down) for column in range(across)
            )
        return text


def _tensor(picture: Image.Image) -> torch.Tensor:
    """torchvision's ToTensor: f32 `[3, H, W]`, 0..1. There is no other normalisation."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def _tower_json(raw: Raw) -> Raw:
    facts = {ours: raw[theirs] for ours, theirs in SIGLIP.items() if theirs in raw}
    return {"intermediate_size": 4 * raw["vit_hidden_dim"], **facts, "layer_norm_eps": raw.get("vit_ln_eps", 1e-6)}


def _tower_tensors(raw: Raw, tensors: Tensors) -> Tensors:
    """Under transformers' names; the fused projection cut into q, k and v."""
    width = raw["vit_hidden_dim"]
    names = {
        "embeddings.patch_embedding.weight": "patch_embedding.conv.weight",
        "embeddings.patch_embedding.bias": "patch_embedding.conv.bias",
        "post_layernorm.weight": "layer_norm.weight",
        "post_layernorm.bias": "layer_norm.bias",
    }
    places = {
        "layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    cut = {}
    vit = tensors.under("vision_encoder.")
    for block in range(raw["vit_n_blocks"]):
        for leaf in ("weight", "bias"):
            names |= {f"encoder.layers.{block}.{to}.{leaf}": f"blocks.{block}.{at}.{leaf}" for to, at in places.items()}
            fused = vit.reader(f"blocks.{block}.attn.qkv_proj.{leaf}")
            for number, part in enumerate("qkv"):
                start = number * width
                cut[f"encoder.layers.{block}.self_attn.{part}_proj.{leaf}"] = lambda fused=fused, start=start: fused()[
                    start : start + width
                ]
    position = vit.reader("patch_embedding.position_embedding")
    named = vit.renamed(names).readers
    return Tensors({**named, **cut, "embeddings.position_embedding.weight": lambda: position()[0]})


def _llama_json(raw: Raw) -> Raw:
    return {
        "model_type": "llama",
        **{ours: raw[theirs] for ours, theirs in LLAMA.items()},
        "vocab_size": raw.get("lm_vocab_size", 49152 + len(raw.get("vlm_extra_tokens") or {})),
        "max_position_embeddings": raw.get("lm_max_position_embeddings", 8192),
        "rms_norm_eps": raw.get("lm_rms_eps", 1e-5),
        "rope_theta": float(raw.get("lm_re_base", 100000)),
        "tie_word_embeddings": raw.get("lm_tie_weights", True),
    }


def _llama_tensors(raw: Raw, tensors: Tensors) -> Tensors:
    """Under transformers' names; a tied table may be stored under either of its two."""
    held = tensors.under("decoder.")
    places = {
        "input_layernorm": "norm1", "post_attention_layernorm": "norm2", "self_attn.q_proj": "attn.q_proj",
        "self_attn.k_proj": "attn.k_proj", "self_attn.v_proj": "attn.v_proj", "self_attn.o_proj": "attn.out_proj",
        "mlp.gate_proj": "mlp.gate_proj", "mlp.up_proj": "mlp.up_proj", "mlp.down_proj": "mlp.down_proj",
    }  # fmt: skip
    table, head = "token_embedding.weight", "head.weight"
    names = {
        "model.norm.weight": "norm.weight",
        "model.embed_tokens.weight": table if table in held else head,
        "lm_head.weight": head if head in held else table,
    }
    for block in range(raw["lm_n_blocks"]):
        names |= {f"model.layers.{block}.{to}.weight": f"blocks.{block}.{at}.weight" for to, at in places.items()}
    return held.renamed(names)


def _matches(folder: Path) -> bool:
    root = read_json(folder / "config.json")
    named = root.get("architectures") or root.get("model_type")
    return not named and "vit_hidden_dim" in root and "lm_hidden_dim" in root


FAMILY = ReferenceFamily(name="nanovlm", speaks=True, matches=_matches, load=NanoVlm)
