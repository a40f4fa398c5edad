"""The nouns every floor shares: images, layouts, prompts, requests, answers. All frozen, checked when built."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

DIGEST_BYTES = 32

Activation = Literal["gelu_tanh", "gelu_erf", "quick_gelu", "silu"]
Role = Literal["system", "user", "assistant"]
AttentionBackend = Literal["sdpa", "torch_varlen", "flash_attn", "flashinfer"]
BackendChoice = Literal["auto", "sdpa", "torch_varlen", "flash_attn", "flashinfer"]
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
Detail = Literal["auto", "low", "high", "original"]


class Grid(NamedTuple):
    """A rectangle of patches: `h` rows of `w`."""

    h: int
    w: int

    @property
    def area(self) -> int:
        return self.h * self.w


class Size(NamedTuple):
    """Pixels, width first as Pillow has it."""

    width: int
    height: int


class Clip(NamedTuple):
    """A video as a request brings it: the pixels of its first frame and how many frames the model is shown."""

    size: Size
    frames: int


Medium = Size | Clip


class Box(NamedTuple):
    """Pixels, half-open, in Pillow's order."""

    left: int
    top: int
    right: int
    bottom: int


def digest_of(*parts: bytes) -> bytes:
    """SHA-256 over `parts`, each framed by its length so that no two lists of parts collide. 32 bytes."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """An upright RGB picture. rgb: u8 `[H, W, 3]`, contiguous; digest: 32 bytes over pixels and shape."""

    rgb: npt.NDArray[np.uint8]
    digest: bytes

    def __post_init__(self) -> None:
        if self.rgb.dtype != np.uint8 or self.rgb.ndim != 3 or self.rgb.shape[2] != 3:
            raise ValueError(f"rgb must be u8 [H, W, 3], got {self.rgb.dtype} {self.rgb.shape}")
        _check_digest(self.digest)

    @classmethod
    def from_rgb(cls, rgb: npt.NDArray[np.uint8]) -> DecodedImage:
        rgb = np.ascontiguousarray(rgb)
        shape = f"{rgb.shape[0]}x{rgb.shape[1]}".encode()
        return cls(rgb, digest_of(b"siglane.rgb", shape, rgb.tobytes()))

    @property
    def size(self) -> Size:
        return Size(self.rgb.shape[1], self.rgb.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class DecodedClip:
    """The frames of a video that the model is shown, in order. frames: u8 `[H, W, 3]` each; digest: 32 bytes over all
    pixels and their shapes. The layout is the first frame's; others may have their own size, see `render_tiles`."""

    frames: tuple[npt.NDArray[np.uint8], ...]
    digest: bytes

    def __post_init__(self) -> None:
        if not self.frames:
            raise ValueError("a clip has at least one frame")
        if any(frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 for frame in self.frames):
            raise ValueError("the frames of a clip must be u8 [H, W, 3]")
        _check_digest(self.digest)

    @classmethod
    def of(cls, frames: Sequence[DecodedImage]) -> DecodedClip:
        return cls(tuple(frame.rgb for frame in frames), digest_of(b"siglane.clip", *(f.digest for f in frames)))

    @property
    def size(self) -> Clip:
        height, width = self.frames[0].shape[:2]
        return Clip(Size(width, height), len(self.frames))


@dataclass(frozen=True, slots=True)
class Resize:
    """The picture at `size`. in_float: as a float32 tensor with antialiasing, the way torchvision resizes tensors,
    instead of Pillow's 8-bit filter."""

    size: Size
    resample: Resample
    in_float: bool = False


@dataclass(frozen=True, slots=True)
class Pad:
    """The picture on a canvas of `size`, its upper left corner at `left`, `top`, surrounded by the colour `fill`."""

    size: Size
    left: int
    top: int
    fill: tuple[int, int, int]


Step = Resize | Pad


@dataclass(frozen=True, slots=True)
class Tile:
    """One crop the tower sees: frame number `frame` (0 of a still picture) drawn by `steps`, cut at `box`, split into
    `grid` patches."""

    steps: tuple[Step, ...]
    box: Box
    grid: Grid
    frame: int = 0

    @property
    def canvas(self) -> Size:
        """Size of what the box is cut from."""
        return self.steps[-1].size


@dataclass(frozen=True, slots=True)
class Features:
    """`rows` consecutive projector rows stand here in the prompt."""

    rows: int


@dataclass(frozen=True, slots=True)
class Indicator:
    """One learned row of the visual vocabulary stands here: number `index` of its last rows (Ovis' start and end)."""

    index: int


@dataclass(frozen=True, slots=True)
class Token:
    """An added token of the tokenizer stands here (nanoVLM's `<row_1_col_1>`)."""

    text: str


@dataclass(frozen=True, slots=True)
class Marker:
    """Text between an image's features. An `isolated` marker is tokenised alone, any other joins its neighbours' text.

    VILA's newline after each block of features is isolated: the reference adds the *embedding* of token 198, so it
    must not fuse with a following newline into one token (formats.md trap 12).
    """

    text: str
    isolated: bool


Piece = Features | Indicator | Token | Marker


@dataclass(frozen=True, slots=True)
class MergedScales:
    """dynamic_s2: the first tiles show the whole image in squares of `sides` tiles, smallest first, the others form
    `arrangement`; the maps of all scales are joined on the channel axis. No sides: one scale, its channels repeated
    `repeats` times."""

    sides: tuple[int, ...]
    repeats: int


@dataclass(frozen=True, slots=True)
class AnyRes:
    """LLaVA-OneVision: after the first tile (the whole image) the others form one map of projector rows. `crop` cuts
    the padding off, `resized` brings a map that is too large to fewer rows, and every row of the map ends with the
    learned newline."""

    crop: Box
    resized: Grid | None


@dataclass(frozen=True, slots=True)
class Newline:
    """LLaVA-OneVision: the rows of all tiles, each tile's map first brought to `pooled` when that is given, then the
    learned newline once."""

    pooled: Grid | None


Assembly = MergedScales | AnyRes | Newline


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """How one image or video becomes tiles, patches and prompt rows; computed from its size alone (`config/layout`).

    source: size of the upright image or of the first frame; tiles in the order the tower sees them; pieces in prompt
    order; arrangement: rows and columns of the tile map; assembly: how projector rows of the tiles become the
    image's, None when they simply follow each other; frames: how many of a video, 0 for a still picture.
    """

    source: Size
    tiles: tuple[Tile, ...]
    pieces: tuple[Piece, ...]
    arrangement: Grid
    assembly: Assembly | None = None
    frames: int = 0

    @property
    def image_tokens(self) -> int:
        """Rows the projector gives for this image."""
        return sum(piece.rows for piece in self.pieces if isinstance(piece, Features))

    @property
    def rows(self) -> int:
        """Prompt positions that are filled from the image: its features and indicators."""
        return self.image_tokens + sum(isinstance(piece, Indicator) for piece in self.pieces)

    @property
    def grids(self) -> tuple[Grid, ...]:
        return tuple(tile.grid for tile in self.tiles)

    @property
    def patches(self) -> int:
        return sum(tile.grid.area for tile in self.tiles)


@dataclass(frozen=True, slots=True, eq=False)
class ImagePatches:
    """One image cut into patches, on the host, not yet normalised.

    pixels: `[layout.patches, patch_dim]`, u8 or f32, both on the scale 0..255; patches of all tiles in order;
    digest: 32 bytes over the image's digest and every option that changes pixels or layout.
    """

    pixels: torch.Tensor
    layout: ImageLayout
    digest: bytes

    def __post_init__(self) -> None:
        if self.pixels.ndim != 2 or self.pixels.shape[0] != self.layout.patches or not self.pixels.is_contiguous():
            raise ValueError(f"pixels must be [{self.layout.patches}, patch_dim], got {tuple(self.pixels.shape)}")
        _check_digest(self.digest)

    def __reduce__(self) -> tuple[object, ...]:
        """Crosses process boundaries as plain bytes; torch's own pickling would share memory by file descriptor."""
        return (_patches_of, (self.pixels.numpy(), self.layout, self.digest))


def _patches_of(pixels: npt.NDArray[Any], layout: ImageLayout, digest: bytes) -> ImagePatches:
    import torch

    return ImagePatches(torch.from_numpy(pixels), layout, digest)


@dataclass(frozen=True, slots=True, eq=False)
class PackedPatches:
    """Patches of many images in one tensor, ready for the tower.

    pixels: `[N, patch_dim]`, normalised, on the device; grids: one per tile, on the host; `sum(h * w) == N`.
    """

    pixels: torch.Tensor
    grids: tuple[Grid, ...]

    def __post_init__(self) -> None:
        patches = sum(grid.area for grid in self.grids)
        if self.pixels.ndim != 2 or self.pixels.shape[0] != patches:
            raise ValueError(f"grids hold {patches} patches, pixels are {tuple(self.pixels.shape)}")


@dataclass(frozen=True, slots=True, eq=False)
class ImageTokens:
    """Projector output. embeds: `[T, hidden_size]`; lengths: rows of each image, `sum(lengths) == T`."""

    embeds: torch.Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.embeds.ndim != 2 or self.embeds.shape[0] != sum(self.lengths):
            raise ValueError(f"lengths add up to {sum(self.lengths)}, embeds are {tuple(self.embeds.shape)}")

    def split(self) -> tuple[torch.Tensor, ...]:
        return self.embeds.split(list(self.lengths))


class ImageSpan(NamedTuple):
    """Prompt positions `start..stop` (half-open) filled by rows of image number `image`."""

    start: int
    stop: int
    image: int


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What the language model reads.

    token_ids: with the model's image token at every placeholder; spans: ascending, not overlapping; the spans of one
    image together hold exactly its layout's `rows`, in order; images: in order of first appearance.
    """

    token_ids: tuple[int, ...]
    spans: tuple[ImageSpan, ...] = ()
    images: tuple[ImagePatches, ...] = ()

    def __post_init__(self) -> None:
        rows = [0] * len(self.images)
        position = 0
        for span in self.spans:
            if not position <= span.start < span.stop <= len(self.token_ids):
                raise ValueError(f"{span} overlaps its predecessor or leaves the prompt of {len(self.token_ids)} ids")
            if not 0 <= span.image < len(rows):
                raise ValueError(f"{span} belongs to no image of {len(rows)}")
            position = span.stop
            rows[span.image] += span.stop - span.start
        expected = [image.layout.rows for image in self.images]
        if rows != expected:
            raise ValueError(f"spans hold {rows} rows, the layouts say {expected}")

    @property
    def image_tokens(self) -> int:
        return sum(image.layout.image_tokens for image in self.images)

    def cache_ids(self) -> tuple[int, ...]:
        """Token ids, every placeholder replaced by a negative number that holds its image's full digest.

        Two prompts share a prefix of cache ids only when they share its text and its images bit for bit; the row
        inside the image is given by the prefix itself.
        """
        ids = list(self.token_ids)
        for start, stop, image in self.spans:
            identity = -1 - int.from_bytes(self.images[image].digest, "little")
            ids[start:stop] = [identity] * (stop - start)
        return tuple(ids)


@dataclass(frozen=True, slots=True)
class ImagePart:
    """Image number `image` of the request stands here in a message."""

    image: int


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat; its parts in the order the user gave them."""

    role: Role
    parts: tuple[str | ImagePart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. The defaults are greedy. Field names and meanings follow the OpenAI and vLLM APIs.

    logprobs: number of alternatives to report per token (0: only the chosen one), None for no log-probabilities.
    seed: makes a sampled request reproducible whatever runs beside it; None draws one.
    thinking_budget: tokens a reasoning model may think before it is made to answer, None for no limit.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    n: int = 1
    thinking_budget: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One generation. `request_id` is unique in its engine; sampling.n is 1 here (n > 1 is n requests).

    max_tokens: resolved, at least 1 and within the context; cache_salt separates tenants in the caches.
    """

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    max_tokens: int
    cache_salt: str = ""


FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logs. top: (token id, log-probability) from likely to unlikely."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one request, known when it ends: waiting for a slot, encoding its images, prefill, decode."""

    queue: float = 0.0
    encode: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one engine step adds to one request.

    finish_reason is None while it runs; on "error", `error` says why; matched_stop: the stop token id that ended it.
    cached_tokens: prompt rows taken from the prefix cache; encoded_images: images whose features were computed.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: int | None = None
    error: Exception | None = None
    cached_tokens: int = 0
    encoded_images: int = 0
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token accounting of one answer (OpenAI `usage`).

    image_tokens + text_tokens == prompt_tokens; reasoning_tokens: those of the completion that are its thinking, the
    two tags and forced ids among them.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    image_tokens: int
    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.reasoning_tokens <= self.completion_tokens:
            raise ValueError(f"{self.reasoning_tokens} reasoning tokens in a completion of {self.completion_tokens}")

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def text_tokens(self) -> int:
        return self.prompt_tokens - self.image_tokens


def _check_digest(digest: bytes) -> None:
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"a digest has {DIGEST_BYTES} bytes, got {len(digest)}")
