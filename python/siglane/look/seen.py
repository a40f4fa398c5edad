"""From a picture of a request to what is drawn of it."""

from __future__ import annotations

from siglane.config.images import ImageFacts
from siglane.config.preprocess import DecodeConfig
from siglane.families.pipeline import MediaPipeline
from siglane.image.patchify import to_patches
from siglane.look.view import View, unpatchify
from siglane.media.item import MediaItem
from siglane.types import DecodedVideo


def view_of(
    item: MediaItem,
    pipeline: MediaPipeline,
    facts: ImageFacts,
    decode: DecodeConfig,
    *,
    name: str,
    model: str,
    speaks: bool,
) -> View:
    """item: read and laid out; facts, decode: the pipeline's; speaks: whether there is a prompt. ImageError for a file
    that cannot be decoded."""
    medium, layout, vision = pipeline.decode_whole(item), item.layout, facts.vision
    seen = medium if decode.jpeg == "exact" else pipeline.decode(item)
    pixels = to_patches(seen, layout, facts.preprocess, vision).pixels.numpy()
    return View(
        name=name,
        model=model,
        frames=medium.frames if isinstance(medium, DecodedVideo) else (medium.rgb,),
        layout=layout,
        tiles=tuple(unpatchify(pixels, layout.grids, vision.patch_size, vision.patch_layout == "channel_first")),
        vision=vision,
        speaks=speaks,
    )
