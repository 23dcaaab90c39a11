"""Stored outputs of a teacher as part of a sample, moved as its image was moved.

A stored map belongs to the whole image in its square frame, whatever scale the image is read
at. What an augmentation did to the image is done to the map: each place of the new map is read,
bilinearly, where the image's place came from. Whether the teacher itself would give that for the
moved image is another matter: `kd.teacher_cache.equivariance` measures it.
"""

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
FINER = 1.5  # times as fine as the result are maps that are scaled down before they are read


class CachedField:
    """One output of one teacher, by annotation id.

    Args:
        store: Where it lies, in the field `values`; with `indices` where only the largest were
            kept; and both again after `mirrored_` where the mirrored image was shown too.
        name: What the sample calls it, after `stored.`.
        channels: Of the output where only the largest of them are stored.
        stride: Pixels of a crop to a place of the map that it gets.
    """

    def __init__(self, store: Store, name: str, *, channels: int = 0, stride: int = STRIDE) -> None:
        self.store, self.name, self.channels, self.stride = store, name, channels, stride

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one object's output."""
        stored = self.store.fields["values"].shape
        return (self.channels, *stored[1:]) if "indices" in self.store.fields else stored

    def whole(self) -> Tensor:
        """The output for all objects, in the order of the store's ids."""
        values = torch.from_numpy(self.store.column("values"))
        if "indices" not in self.store.fields:
            return values
        return expand(values, torch.from_numpy(self.store.column("indices")), self.channels)

    def __call__(
        self, object_ids: NDArray[np.int64], plan: Plan, size: tuple[int, int], frame: int
    ) -> Tensor:
        """The output for the hidden objects of a sample, (K, C, ...).

        Args:
            object_ids: (K,); or the ids of whatever else was stored.
            plan: What was done to the image.
            size: Height and width of the image before, at any scale.
            frame: Side of the square frame, pixels.
        """
        side = ""
        if plan.flip and f"{MIRRORED}values" in self.store.fields:
            side, plan = MIRRORED, plan.of_mirrored(size)
        values = self._read(object_ids, side)
        if values.ndim == 4 and not (plan.is_identity and max(size) == frame):
            values = move_maps(values, plan, size, frame)
        return values

    def cropped(
        self, image: int, crop: Crop, size: tuple[int, int], frame: tuple[int, int]
    ) -> Tensor:
        """The output for a crop of an image, (1, C, h, w) on a grid of its frame.

        Args:
            image: Id of the image.
            crop: What was cut out of it.
            size: Height and width of the image.
            frame: Those of the crop.
        """
        side = ""
        if crop.flip and f"{MIRRORED}values" in self.store.fields:
            side, crop = MIRRORED, crop.of_mirrored(size)
        values = self._read(np.array([image]), side)
        if values.ndim != 4:
            return values
        grid = (-(-frame[0] // self.stride), -(-frame[1] // self.stride))
        return resampled(values, crop.sources(), size, frame, grid)

    def _read(self, ids: NDArray[np.int64], side: str) -> Tensor:
        names = [name for name in self.store.fields if name.startswith(MIRRORED) is bool(side)]
        records = self.store.read(ids, names)
        values = torch.from_numpy(records[f"{side}values"])
        if f"{side}indices" in records:
            values = expand(values, torch.from_numpy(records[f"{side}indices"]), self.channels)
        return values


def move_maps(maps: Tensor, plan: Plan, size: tuple[int, int], frame: int) -> Tensor:
    """Do to maps over a frame what a plan did to the image in it.

    Args:
        maps: (K, C, h, w) over the frame of the whole image.
        plan: What was done.
        size: Height and width of the image before; its long side is that of the maps' frame.
        frame: Side of the result's frame, pixels.

    Returns:
        (K, C, h, w), of the same type; what comes in from outside the frame repeats its edge.
    """
    before, square = (max(size), max(size)), (frame, frame)
    return resampled(maps, plan.sources(size), before, square, (maps.shape[2], maps.shape[3]))


def resampled(
    maps: Tensor,
    sources: NDArray[np.float64],
    size: tuple[int, int],
    frame: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    """Read maps over an image at the places that another frame's places come from.

    Args:
        maps: (K, C, h, w) over the image.
        sources: (2, 3): takes (x, y, 1) in pixels of the frame to (x, y) in those of the image.
        size: Height and width of the image.
        frame: Those of the frame.
        grid: Places of the result over the frame.

    Returns:
        (K, C, *grid), of the same type; what comes from outside the image repeats its edge. Where
        the result is coarser than the maps its places are means of theirs, as where a network's
        features are scaled down.
    """
    steps = np.linalg.norm(sources[:, 1::-1], axis=0) * frame / grid  # of the image, down, right
    maps = _coarser(maps, steps * maps.shape[2:] / size)
    down = (torch.arange(grid[0], dtype=torch.float64) + 0.5) * (frame[0] / grid[0])
    right = (torch.arange(grid[1], dtype=torch.float64) + 0.5) * (frame[1] / grid[1])
    y, x = torch.meshgrid(down, right, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)], dim=-1)  # (h, w, 3)
    came_from = places @ torch.from_numpy(sources).T
    whole = torch.tensor([size[1], size[0]], dtype=torch.float64)
    shares = (came_from / whole * 2 - 1).float()[None].expand(len(maps), -1, -1, -1)
    moved = F.grid_sample(
        maps.float(), shares, mode="bilinear", padding_mode="border", align_corners=False
    )
    return moved.to(maps.dtype)


def _coarser(maps: Tensor, factors: NDArray[np.float64]) -> Tensor:
    """Maps scaled down by so much along each side where that is a lot; else themselves."""
    shape = [
        round(side / factor) if factor > FINER else side
        for side, factor in zip(maps.shape[2:], factors.tolist(), strict=True)
    ]
    if shape == list(maps.shape[2:]):
        return maps
    scaled = F.interpolate(
        maps.float(), shape, mode="bilinear", align_corners=False, antialias=True
    )
    return scaled.to(maps.dtype)


def top_k_log_probs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the most likely classes, for storage.

    Args:
        logits: (K, C, ...), or log-probabilities.
        count: Classes that are kept, below C.

    Returns:
        Values and indices, (K, count, ...) each; uint8 or int16 indices.
    """
    values, indices = logits.float().log_softmax(dim=1).topk(count, dim=1)
    return values, indices.to(torch.uint8 if logits.shape[1] <= 256 else torch.int16)


def expand(values: Tensor, indices: Tensor, channels: int) -> Tensor:
    """Undo `top_k_log_probs`: the rest of the probability is shared evenly by the other classes.

    Returns:
        Log-probabilities (K, channels, ...), of the values' type.
    """
    wide = values.float()
    rest = (1 - wide.exp().sum(dim=1, keepdim=True)).clamp(min=1e-6)
    others = (rest / (channels - values.shape[1])).log()
    whole = others.expand(-1, channels, *(-1,) * (values.ndim - 2)).clone()
    whole.scatter_(1, indices.long(), wide)
    return whole.to(values.dtype)
