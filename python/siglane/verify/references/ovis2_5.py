"""Ovis2.5: transformers' SigLIP blocks with Qwen2-VL's rotary positions, a torch head over the visual vocabulary and
Qwen3 (formats.md 3). There is no class in transformers to compare with.

Patches run in the reference's order, 2x2 blocks first, one picture at a time; stages are given in raster order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.models.siglip.modeling_siglip import SiglipAttention

from siglane.verify.references.adapter import tensors_of
from siglane.verify.references.decoder import CHATML, PLACE, Decoder, load_tokenizer, rendered
from siglane.verify.references.files import Raw, classes_in, processor_json, read_json, ready, unset
from siglane.verify.references.pixels import Processing
from siglane.verify.references.reference import ReferenceFamily, Seen, VisionLanguageReference
from siglane.verify.references.tapping import tapping
from siglane.verify.stages import Trace

IMAGE, VIDEO = "<image>", "<video>"
INDICATORS = 4  # the last rows of the table: image start and end, video start and end
MIN_PIXELS, MAX_PIXELS = 448 * 448, 1792 * 1792
VIT_FACTS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps",
)  # fmt: skip


class RotaryAttention(SiglipAttention):
    """Attention of one frame, queries and keys turned by row and column."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[no-untyped-call]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states `[1, N, hidden_size]`; position_embeddings: cos and sin, each `[N, head_dim]`."""
        q, k, v = (
            projection(hidden_states[0]).unflatten(-1, (self.num_heads, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if position_embeddings is not None:
            q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out_proj(attended[0].transpose(0, 1).flatten(1))[None], None


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture as patches in block order. pixels `[N, 3, P, P]`; rows, columns: of each patch; raster: where each
    patch of the raster order stands."""

    pixels: torch.Tensor
    grid: tuple[int, int]
    rows: torch.Tensor
    columns: torch.Tensor
    raster: torch.Tensor


class Ovis2_5(VisionLanguageReference):
    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, adapter: Path | None = None) -> None:
        root, tensors = read_json(folder / "config.json"), tensors_of(folder, adapter)
        self.raw: Raw = root["vit_config"]
        self.patch_size: int = self.raw.get("patch_size", 16)
        self.stride: int = self.raw.get("hidden_stride", 2)  # patches along a side of a merged block
        self.device, self.dtype = device, dtype
        config: Any = SiglipVisionConfig(**{name: self.raw[name] for name in VIT_FACTS if name in self.raw})
        config.vision_use_head = False
        self.tower: Any = unset(lambda: SiglipVisionModel(config))
        for layer in self.tower.encoder.layers:
            layer.self_attn = RotaryAttention(config)
        vit = tensors.under("visual_tokenizer.vit.vision_model.", "visual_tokenizer.vit.")
        ready(self.tower, vit, device, dtype)
        self.table = tensors["vte.weight"].to(device, dtype)
        merged = config.hidden_size * self.stride**2
        words = len(self.table) - INDICATORS
        self.head: Any = nn.Sequential(nn.Linear(merged, words, bias=False), nn.LayerNorm(words))
        ready(self.head, tensors.under("visual_tokenizer.head."), device, dtype)
        self.language = Decoder.load(
            root.get("text_config") or root["llm_config"], tensors.under("llm."), device, dtype
        )
        processor = processor_json(folder)
        self.processing = Processing.of(processor | {"size": 1}, 1, Image.Resampling.BILINEAR)
        self.least = processor.get("min_pixels", MIN_PIXELS)
        self.most = processor.get("max_pixels", MAX_PIXELS)
        self.folder, self.tokenizer = folder, load_tokenizer(folder)

    def see(self, pictures: Sequence[Image.Image | Sequence[Image.Image]]) -> Seen:
        """Several pictures in place of one are the frames of a video."""
        traces, images, atoms, grids = [], [], [], []
        for medium in pictures:
            shown, first = ([medium], 0) if isinstance(medium, Image.Image) else (medium, 2)
            frames = [self._frame(pixels) for pixels in self.prepared(shown)]
            encoded = [self._encoded(frame) for frame in frames]
            rows = torch.cat([self._visual_tokens(features) for _, features in encoded])
            start, end = self.table[-INDICATORS:][first : first + 2].split(1)
            traces += [trace for trace, _ in encoded]
            images.append([torch.cat((start, rows, end))])
            atoms.append(rows.cpu())
            grids.append(frames[0].grid)
        taps = {stage: torch.cat([trace[stage] for trace in traces]) for stage in traces[0]}
        return Seen({**taps, "projector": torch.cat(atoms)}, images, grids)

    def text(self, prompt: str, seen: Seen) -> str:
        images = [IMAGE + "\n"] * len(seen.images)  # the parts of a message are joined with line feeds
        return rendered(self.folder, self.tokenizer, images, prompt, CHATML)

    def ids(self, text: str, seen: Seen) -> list[int]:
        """Text is tokenised piece by piece; each picture's rows stand between the learned start and end."""
        waiting = iter(seen.blocks)
        ids: list[int] = []
        for part in re.split(f"({IMAGE}|{VIDEO})", text):
            if part in (IMAGE, VIDEO):
                ids += [PLACE] * len(next(waiting))
            elif part:
                ids += self.tokenizer(part, add_special_tokens=False).input_ids
        return ids

    def prepared(self, frames: Sequence[Image.Image]) -> list[torch.Tensor]:
        """f32 `[3, H, W]`, every frame at the size that suits the first."""
        factor = self.patch_size * self.stride
        height, width = smart_resize(frames[0].height, frames[0].width, factor, self.least, self.most)
        resized = [frame.resize((width, height), self.processing.resample) for frame in frames]
        return [self.processing.normalised(frame) for frame in resized]

    def _frame(self, pixels: torch.Tensor) -> Frame:
        p, s = self.patch_size, self.stride
        h, w = (side // p for side in pixels.shape[1:])
        blocks = pixels.reshape(3, h // s, s, p, w // s, s, p).permute(1, 4, 2, 5, 0, 3, 6)
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        rows, columns = (_in_blocks(index, s).flatten() for index in (row, column))
        raster = torch.empty(h * w, dtype=torch.int64)
        raster[rows * w + columns] = torch.arange(h * w)
        return Frame(blocks.reshape(h * w, 3, p, p), (h, w), rows, columns, raster)

    def _encoded(self, frame: Frame) -> tuple[Trace, torch.Tensor]:
        """The tower's stages in raster order, and its features in block order. No post_layernorm."""
        layers = self.tower.encoder.layers
        pixels = frame.pixels.to(self.device, self.dtype)
        patches = self.tower.embeddings.patch_embedding(pixels).flatten(1)
        x = patches + self._positions(frame) if self.raw.get("preserve_original_pe", True) else patches
        before = {"patch_embedding": patches, "positions": x}
        rotary = self._rotary(frame)
        with tapping({f"block.{number}": layer for number, layer in enumerate(layers)}) as taps:
            x = x[None]
            for layer in layers:
                x = layer(x, attention_mask=None, position_embeddings=rotary)
        trace = {"preprocessing": frame.pixels.flatten(1).to(self.dtype), **before, **taps, "features": x[0]}
        return {stage: rows.cpu()[frame.raster] for stage, rows in trace.items()}, x[0]

    def _positions(self, frame: Frame) -> torch.Tensor:
        """The learned table at the frame's grid: bicubic, without antialiasing, in block order."""
        table = self.tower.embeddings.position_embedding.weight
        side = round(len(table) ** 0.5)
        picture = table.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
        resized = F.interpolate(picture, size=frame.grid, mode="bicubic", align_corners=False)[0]
        return resized[:, frame.rows.to(table.device), frame.columns.to(table.device)].T.to(table.dtype)

    def _rotary(self, frame: Frame) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.raw.get("use_rope", True):
            return None
        half = self.tower.encoder.layers[0].self_attn.head_dim // 2
        frequencies = 1 / 10000 ** (torch.arange(0, half, 2).float() / half)
        angles = torch.cat([torch.outer(index.float(), frequencies) for index in (frame.rows, frame.columns)], dim=1)
        angles = torch.cat([angles, angles], dim=1).to(self.device)
        return angles.cos(), angles.sin()

    def _visual_tokens(self, features: torch.Tensor) -> torch.Tensor:
        """features `[N, hidden_size]` in block order -> expected rows of the table `[N / stride**2, width]`."""
        merged = features.reshape(-1, features.shape[1] * self.stride**2)
        chosen = self.head(merged).softmax(dim=-1, dtype=torch.float32).to(features.dtype)
        return F.pad(chosen, (0, INDICATORS)) @ self.table


def smart_resize(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Ovis' `smart_resize`: multiples of `factor`, the area between `least` and `most` pixels."""
    if height < factor or width < factor:
        if height < width:
            width, height = round(factor / height * width), factor
        else:
            height, width = round(factor / width * height), factor
    elif max(height, width) / min(height, width) > 200:
        if height > width:
            height = 200 * width
        else:
            width = 200 * height
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > most:
        shrink = (height * width / most) ** 0.5
        return int(height / shrink // factor) * factor, int(width / shrink // factor) * factor
    if high * wide < least:
        grow = (least / (height * width)) ** 0.5
        return -int(-height * grow // factor) * factor, -int(-width * grow // factor) * factor
    return high, wide


def _in_blocks(raster: torch.Tensor, side: int) -> torch.Tensor:
    """`[h, w]` -> `[h / side, w / side, side, side]`: the reference's order of patches."""
    h, w = raster.shape
    return raster.reshape(h // side, side, w // side, side).permute(0, 2, 1, 3)


def _matches(folder: Path) -> bool:
    root = read_json(folder / "config.json")
    named = "Ovis2_5" in classes_in(root)
    return named or (root.get("model_type") in ("ovis", "ovis2_5") and "vit_config" in root)


FAMILY = ReferenceFamily(name="ovis2_5", speaks=True, matches=_matches, load=Ovis2_5)
