"""What `serving.py` measures siglane's server against, and a job that either is given."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from serving_model import ROWS
from transformers import AutoTokenizer, Qwen2ForCausalLM, SiglipImageProcessorPil, SiglipVisionModel


@dataclass(frozen=True)
class Job:
    """One request: a PNG, a question behind it or in front, the number of tokens to generate."""

    png: bytes
    question: str
    tokens: int
    question_first: bool = False

    def content(self) -> list[dict[str, Any]]:
        """Of an OpenAI message."""
        url = f"data:image/png;base64,{base64.b64encode(self.png).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.question}]
        return parts[::-1] if self.question_first else parts


class TransformersLoop:
    """transformers' modules composed into the same model; one `generate` call per request, as one would write it."""

    def __init__(self, folder: Path) -> None:
        self.tower = SiglipVisionModel.from_pretrained(folder / "vision_tower").eval()
        self.language = Qwen2ForCausalLM.from_pretrained(folder / "llm").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
        self.processor = SiglipImageProcessorPil.from_pretrained(folder / "vision_tower")
        self.weights = load_file(folder / "mm_projector" / "model.safetensors")

    @torch.inference_mode()
    def answer(self, job: Job) -> str:
        image = Image.open(io.BytesIO(job.png)).convert("RGB")
        pixels = self.processor(image, return_tensors="pt")["pixel_values"]
        features = self.tower(pixels, output_hidden_states=True).hidden_states[-1]
        rows = self.project(features)
        table = self.language.get_input_embeddings()
        before = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n"
        after = f"{job.question}<|im_end|>\n<|im_start|>assistant\n"
        newline = self.ids("\n")
        embeds = torch.cat([table(self.ids(before)), rows, table(newline), table(self.ids(after))], dim=1)
        output = self.language.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=job.tokens,
            min_new_tokens=job.tokens,
            do_sample=False,
        )
        text = self.tokenizer.decode(output[0], skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def ids(self, text: str) -> torch.Tensor:
        return torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]])

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """VILA's mlp_downsample: 2x2 patches side by side, LayerNorm, Linear, GELU, Linear."""
        blocks = features.view(1, 12, 2, 12, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(1, ROWS, -1)
        w = self.weights
        normed = torch.nn.functional.layer_norm(blocks, blocks.shape[-1:], w["layers.1.weight"], w["layers.1.bias"])
        hidden = torch.nn.functional.gelu(torch.nn.functional.linear(normed, w["layers.2.weight"], w["layers.2.bias"]))
        return torch.nn.functional.linear(hidden, w["layers.4.weight"], w["layers.4.bias"])
