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
    """item: read and laid out, its layout is settled; facts, decode: the pipeline's; speaks: whether there is a prompt.
    ImageError for a file that cannot be decoded."""
    medium, vision = pipeline.decode_whole(item), facts.vision
    seen = medium if decode.jpeg == "exact" else pipeline.decode(item)
    patches = to_patches(seen, item.layout, facts.preprocess, vision)
    item.layout = layout = patches.layout
    return View(
        name=name,
        model=model,
        frames=medium.frames if isinstance(medium, DecodedVideo) else (medium.rgb,),
        layout=layout,
        tiles=tuple(
            unpatchify(patches.pixels.numpy(), layout.grids, vision.patch_size, vision.patch_layout == "channel_first")
        ),
        vision=vision,
        speaks=speaks,
    )
