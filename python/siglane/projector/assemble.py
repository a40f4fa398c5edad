"""Rows of tiles into rows of an image, and what happens to tiles before they are projected (`types.Assembly`).

Functions of one image each; the layout says what to do, so no family is named here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from siglane.types import AnyRes, Grid, ImageLayout, MergedFirst, MergedScales, Newline, Pooling


def projector_input(features: torch.Tensor, layout: ImageLayout) -> torch.Tensor:
    """Tower features `[layout.patches, hidden_size]` -> what the projector sees, `[patches, channels]`."""
    if isinstance(layout.assembly, MergedFirst):
        return _pooled(features, layout.grids, layout.projected[0], "bilinear")
    if not isinstance(layout.assembly, MergedScales):
        return features
    if not layout.assembly.sides:
        return features.repeat(1, layout.assembly.repeats)
    return merge_scales(features, layout, layout.assembly.sides)


def assemble(rows: torch.Tensor, layout: ImageLayout, newline: torch.Tensor | None) -> torch.Tensor:
    """Projector rows of the tiles, as many as `layout.projected` says, -> `[layout.image_tokens, output_size]`.

    newline: the learned row `[output_size]` of families that have one. RuntimeError when the count is not the
    layout's; nothing is ever cut or filled up.
    """
    grids = layout.projected
    match layout.assembly:
        case MergedScales() if layout.arrangement.area > 1:
            rows = tile_map(rows, layout.arrangement, grids[0]).flatten(0, 1)
        case AnyRes() as anyres:
            rows = _anyres(rows, grids, layout.arrangement, anyres, _required(newline))
        case Newline(pooled, pooling, place):
            rows = _pooled(rows, grids, pooled, pooling) if pooled else rows
            if place != "nowhere":
                length = {"end": len(rows), "tile": len(rows) // len(grids), "row": (pooled or grids[0]).w}[place]
                rows = _ended(rows.unflatten(0, (-1, length)), _required(newline))
        case MergedFirst(kept=bytes(kept)):
            rows = rows[torch.frombuffer(bytearray(kept), dtype=torch.bool).to(rows.device)]
    if rows.shape[0] != layout.image_tokens:
        raise RuntimeError(f"the projector gave {rows.shape[0]} rows, the layout says {layout.image_tokens}")
    return rows


def merge_scales(features: torch.Tensor, layout: ImageLayout, sides: Sequence[int]) -> torch.Tensor:
    """dynamic_s2: the tiles of all scales `[patches, c]` -> tiles of the last scale `[tiles * h * w, scales * c]`.

    Every scale's tiles are stitched into one map, brought to the last scale's size by area interpolation in float32,
    joined on the channel axis from small to large and cut into tiles again (VILA llava_arch.py
    `merge_features_for_dynamic_s2`).
    """
    last, grid = layout.arrangement, layout.tiles[0].grid
    arrangements = [*(Grid(side, side) for side in sides), last]
    groups = torch.split(features, [arrangement.area * grid.area for arrangement in arrangements])
    size = (last.h * grid.h, last.w * grid.w)
    maps = [
        F.interpolate(tile_map(rows, arrangement, grid).permute(2, 0, 1)[None].float(), size=size, mode="area")
        for rows, arrangement in zip(groups, arrangements, strict=True)
    ]
    merged = torch.cat(maps, dim=1)[0].permute(1, 2, 0).to(features.dtype)
    tiles = merged.unflatten(1, (last.w, grid.w)).unflatten(0, (last.h, grid.h))
    return tiles.transpose(1, 2).flatten(0, 3)


def tile_map(rows: torch.Tensor, arrangement: Grid, grid: Grid) -> torch.Tensor:
    """`[tiles * h * w, c]`, tile after tile -> one map `[rows of tiles * h, columns of tiles * w, c]`."""
    tiles = rows.unflatten(0, (*arrangement, *grid))
    return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _anyres(
    rows: torch.Tensor, grids: Sequence[Grid], arrangement: Grid, anyres: AnyRes, newline: torch.Tensor
) -> torch.Tensor:
    """The whole image's rows, then the map of the tiles without its padding, a newline behind each of its rows
    (transformers `LlavaOnevisionModel.pack_image_features`)."""
    base, tiles = rows[: grids[0].area], rows[grids[0].area :]
    left, top, right, bottom = anyres.crop
    picture = tile_map(tiles, arrangement, grids[1])[top:bottom, left:right]
    if anyres.resized is not None:
        channels_first = picture.permute(2, 0, 1)[None]
        resized = F.interpolate(channels_first, size=anyres.resized, mode="bilinear", align_corners=False)
        picture = resized[0].permute(1, 2, 0)
    return torch.cat((base, _ended(picture, newline)))


def _ended(lines: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """`[N, L, c]` -> `[N * (L + 1), c]`, the newline behind each line."""
    ends = newline.to(lines.dtype).expand(lines.shape[0], 1, -1)
    return torch.cat((lines, ends), dim=1).flatten(0, 1)


def _pooled(rows: torch.Tensor, grids: Sequence[Grid], target: Grid, pooling: Pooling) -> torch.Tensor:
    """Each tile's map brought to `target` rows; all tiles have one grid."""
    maps = rows.unflatten(0, (len(grids), *grids[0])).permute(0, 3, 1, 2)
    match pooling:
        case "bilinear":
            pooled = F.interpolate(maps, size=target, mode="bilinear", align_corners=False)
        case "average":
            pooled = F.avg_pool2d(maps, 2)
        case "max":
            pooled = F.max_pool2d(maps, 2)
    return pooled.permute(0, 2, 3, 1).flatten(0, 2)


def _required(newline: torch.Tensor | None) -> torch.Tensor:
    if newline is None:
        raise ValueError("the layout ends rows with a newline, the model has none")
    return newline
