"""Read cached teacher outputs for a sample, and augment feature maps like the sample's image."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kd.storage.store import Store
from kd.transforms.augment import Plan
from kd.transforms.crops import Crop

PREFIX = "stored."
STRIDE = 8
MIRRORED = "mirrored_"
_DOWNSCALE_FROM = 1.5  # downscaling by a larger factor than this is antialiased


class CachedField:
    """A cached teacher output, looked up by annotation or image id.

    Args:
        store: Store with the field `values`, and `indices` if only the top k channels are stored.
            Fields with the prefix `mirrored_` have the outputs for mirrored images.
        name: The output's key in a sample is `stored.NAME`.
        channels: Number of channels of the teacher's output; needed if only the top k are stored.
        stride: Pixels of a crop per cell of its feature map.
    """

    def __init__(self, store: Store, name: str, *, channels: int = 0, stride: int = STRIDE) -> None:
        self.store, self.name, self.channels, self.stride = store, name, channels, stride

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output for one object or image."""
        stored = self.store.fields["values"].shape
        return (self.channels, *stored[1:]) if "indices" in self.store.fields else stored

    def whole(self) -> Tensor:
        """Read the outputs for all objects, in ascending order of their ids: (M, *shape)."""
        values = torch.from_numpy(self.store.column("values"))
        if "indices" not in self.store.fields:
            return values
        return expand(values, torch.from_numpy(self.store.column("indices")), self.channels)

    def __call__(
        self, object_ids: NDArray[np.int64], plan: Plan, size: tuple[int, int], frame: int
    ) -> Tensor:
        """Read the outputs for hidden objects, (K, *shape); augment feature maps like the image.

        Stored feature maps cover the image padded to a square. `object_ids` (K,) are annotation
        ids. `size` is the (height, width) of the image before augmentation, at any scale. `frame`
        is the side of the augmented square image in pixels.
        """
        prefix = ""
        if plan.flip and f"{MIRRORED}values" in self.store.fields:
            prefix, plan = MIRRORED, plan.of_mirrored(size)
        values = self._read(object_ids, prefix)
        if values.ndim == 4 and not (plan.is_identity and max(size) == frame):
            # The maps cover a square whose side is the image's long side.
            before, grid = (max(size), max(size)), (values.shape[2], values.shape[3])
            values = resample(values, plan.sources(size), before, (frame, frame), grid)
        return values

    def cropped(
        self, image: int, crop: Crop, size: tuple[int, int], frame: tuple[int, int]
    ) -> Tensor:
        """Read the output for the image with id `image`; crop a feature map like the image.

        `size` and `frame` are the (height, width) of the image and the crop in pixels. Returns a
        feature map (1, C, h, w) with one cell per `stride` pixels of the crop, or (1, *shape) for
        other outputs.
        """
        prefix = ""
        if crop.flip and f"{MIRRORED}values" in self.store.fields:
            prefix, crop = MIRRORED, crop.of_mirrored(size)
        values = self._read(np.array([image]), prefix)
        if values.ndim != 4:
            return values
        grid = (-(-frame[0] // self.stride), -(-frame[1] // self.stride))
        return resample(values, crop.sources(), size, frame, grid)

    def _read(self, ids: NDArray[np.int64], prefix: str) -> Tensor:
        names = [name for name in self.store.fields if name.startswith(MIRRORED) is bool(prefix)]
        records = self.store.read(ids, names)
        values = torch.from_numpy(records[f"{prefix}values"])
        if f"{prefix}indices" in records:
            values = expand(values, torch.from_numpy(records[f"{prefix}indices"]), self.channels)
        return values


def resample(
    maps: Tensor,
    sources: NDArray[np.float64],
    size: tuple[int, int],
    frame: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    """Resample feature maps (K, C, h, w) of an image to the grid of a transformed image.

    Cells outside the image repeat its edge; downscaling is antialiased. `sources` is the (2, 3)
    affine map from (x, y, 1) in pixels of the transformed image to (x, y) in pixels of the image.
    `size` and `frame` are the (height, width) of the image and the transformed image. `grid` is the
    (height, width) of the result, (K, C, *grid).
    """
    steps = (
        np.linalg.norm(sources[:, 1::-1], axis=0) * frame / grid
    )  # pixels per cell, down and right
    maps = _downscale(maps, steps * maps.shape[2:] / size)
    down = (torch.arange(grid[0], dtype=torch.float64) + 0.5) * (frame[0] / grid[0])
    right = (torch.arange(grid[1], dtype=torch.float64) + 0.5) * (frame[1] / grid[1])
    y, x = torch.meshgrid(down, right, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)], dim=-1)  # (h, w, 3)
    source_points = places @ torch.from_numpy(sources).T
    whole = torch.tensor([size[1], size[0]], dtype=torch.float64)
    coordinates = (source_points / whole * 2 - 1).float()[None].expand(len(maps), -1, -1, -1)
    moved = F.grid_sample(
        maps.float(), coordinates, mode="bilinear", padding_mode="border", align_corners=False
    )
    return moved.to(maps.dtype)


def _downscale(maps: Tensor, factors: NDArray[np.float64]) -> Tensor:
    """Scale height and width down by those of `factors` that are above `_DOWNSCALE_FROM`."""
    shape = [
        round(side / factor) if factor > _DOWNSCALE_FROM else side
        for side, factor in zip(maps.shape[2:], factors.tolist(), strict=True)
    ]
    if shape == list(maps.shape[2:]):
        return maps
    scaled = F.interpolate(
        maps.float(), shape, mode="bilinear", align_corners=False, antialias=True
    )
    return scaled.to(maps.dtype)


def top_k_log_probs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and indices (uint8 or int16) of the `count` most likely classes.

    `logits` are (K, C, ...); both results are (K, count, ...).
    """
    values, indices = logits.float().log_softmax(dim=1).topk(count, dim=1)
    return values, indices.to(torch.uint8 if logits.shape[1] <= 256 else torch.int16)


def expand(values: Tensor, indices: Tensor, channels: int) -> Tensor:
    """Undo `top_k_log_probs`: (K, channels, ...) log-probabilities in the dtype of `values`.

    The probability that was not stored is spread evenly over the other classes.
    """
    values32 = values.float()
    rest = (1 - values32.exp().sum(dim=1, keepdim=True)).clamp(min=1e-6)
    others = (rest / (channels - values.shape[1])).log()
    whole = others.expand(-1, channels, *(-1,) * (values.ndim - 2)).clone()
    whole.scatter_(1, indices.long(), values32)
    return whole.to(values.dtype)
