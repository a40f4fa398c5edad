"""siglane's side of the comparison: the same request, its own taps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from siglane.families.model import VisionLanguageModel, load_model, load_vision
from siglane.families.processor import ImageProcessor, Processor, load_processor
from siglane.families.registry import is_vision_only
from siglane.families.splice import image_rows, splice
from siglane.families.stack import VisionEncoderModel
from siglane.families.two_tower import LoadedTwoTower, load_two_tower
from siglane.lm.attention import Past, SegmentAttention
from siglane.lm.qwen import QwenModel
from siglane.nn.cpu.optimise import optimise
from siglane.nn.quantise import Bits, quantise
from siglane.types import DecodedImage, ImagePart, ImagePatches, Message
from siglane.verify.references.tapping import tapping
from siglane.verify.stages import LOGIT_ROWS, TOKENS, Trace
from siglane.weights.hub import Checkpoint

TAPPED_AS = {"projected": "projector"}  # a tap is named after what it holds, a stage after what computed it


class SiglaneRunner:
    """One checkpoint as siglane runs it. with_texts: a SigLIP's text tower too; quantization: as of `load_model`.
    ConfigError, WeightError or UserError as the loaders'."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        with_texts: bool = False,
        quantization: Bits | None = None,
    ) -> None:
        self.device = device
        self.encoder: VisionEncoderModel | None
        self.processor: ImageProcessor
        self.model: VisionLanguageModel | None = None
        self.prompts: Processor | None = None
        self.two_tower: LoadedTwoTower | None = None
        if with_texts:
            self.two_tower = load_two_tower(checkpoint, device=device, dtype=dtype, quantization=quantization)
            self.encoder, self.processor = self.two_tower.model.vision, self.two_tower.images
            optimise(self.two_tower.model)
        elif is_vision_only(checkpoint):
            encoder, self.processor = load_vision(checkpoint, device=device, dtype=dtype, head=True)
            assert isinstance(encoder, VisionEncoderModel)
            self.encoder = encoder
            if quantization is not None:
                quantise(encoder, quantization, device)
            optimise(encoder)
        else:
            self.prompts = self.processor = load_processor(checkpoint)
            self.model = load_model(
                checkpoint, self.prompts.config, device=device, dtype=dtype, quantization=quantization
            )
            self.encoder = None if self.model.vision is None else self.model.vision.encoder
            optimise(self.model)

    def patches(self, images: Sequence[DecodedImage]) -> list[ImagePatches]:
        """Of one request that holds all of them."""
        layouts = self.processor.layouts([image.size for image in images])
        return [self.processor.patches(image, layout) for image, layout in zip(images, layouts, strict=True)]

    @torch.no_grad()
    def see(self, images: Sequence[ImagePatches]) -> Trace:
        """The stages up to the language model, all images in one packed call."""
        return self._seen(images)[0]

    @torch.no_grad()
    def run(self, images: Sequence[ImagePatches], prompt: str, steps: int) -> Trace:
        """All stages of the request that asks `prompt` about `images`."""
        trace, rows = self._seen(images)
        if self.model is None or self.prompts is None or rows is None:
            return trace
        parts: list[str | ImagePart] = [ImagePart(number) for number in range(len(images))]
        asked = self.prompts.prompt([Message("user", (*parts, prompt))], [image.layout for image in images])
        ordered, spans = asked.in_order(rows), image_rows(asked)
        embeds = self.model.language.embed(torch.tensor(asked.token_ids, device=self.device))
        embeds = splice(embeds, spans, [ordered[span.image] for span in spans])
        return {**trace, **self._answered(self.model.language, embeds, steps)}

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Trace:
        """The stages of the text tower; none without one."""
        if self.two_tower is None:
            return {}
        model, ids = self.two_tower.model, self.two_tower.texts.ids(texts)
        layers = {f"text.block.{number}": block for number, block in enumerate(model.text.blocks)}
        with tapping({"text.embedding": model.text.token_embedding, **layers}) as taps:
            pooled = model.text(ids.to(self.device)).cpu()
        numbers = {f"calibration.{n}": one.cpu().reshape(1, 1) for n, one in enumerate(model.calibration)}
        return {"text.ids": ids, **taps, "text.pooled": pooled, **numbers}

    def _seen(self, images: Sequence[ImagePatches]) -> tuple[Trace, tuple[torch.Tensor, ...] | None]:
        """The stages, and what stands in the prompt for each image."""
        if self.encoder is None:  # a language model alone
            return {}, ()
        taps: Trace = {}
        packed = self.encoder.pack(images)
        rows = None
        if self.model is not None:
            rows = self.model.see(images, taps).split()
        else:
            features = torch.cat(self.encoder.features(images, taps))
            if self.encoder.tower.head is not None:
                taps["pooled"] = self.encoder.tower.pool(features, packed.grids)
        stages = {TAPPED_AS.get(name, name): tensor.cpu() for name, tensor in taps.items()}
        return {"preprocessing": packed.pixels.cpu(), **stages}, rows

    def _answered(self, language: QwenModel, embeds: torch.Tensor, steps: int) -> Trace:
        taps: Trace = {"spliced": embeds.clone()}
        length, past = embeds.shape[0], Past()
        positions = torch.arange(length + steps, device=self.device)
        hidden = language(embeds, positions[:length], SegmentAttention([length], past=past), taps)
        taps["logits"] = logits = language.logits(hidden[-LOGIT_ROWS:])
        if steps:
            chosen = [int(logits[-1].argmax())]
            for position in positions[length : length + steps - 1]:
                last = language.embed(torch.tensor(chosen[-1:], device=self.device))
                hidden = language(last, position[None], SegmentAttention([1], past=past))
                chosen.append(int(language.logits(hidden)[-1].argmax()))
            taps[TOKENS] = torch.tensor(chosen)
        return {name: tensor.cpu() for name, tensor in taps.items()}
