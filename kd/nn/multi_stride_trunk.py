"""Feature maps of a trunk at one or more strides, with a cache for frozen trunks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.freeze import freeze
from kd.nn.trunk import TorchvisionTrunk
from kd.nn.trunk_base import Trunk
from kd.nn.weights import weights_hash

log = logging.getLogger(__name__)

LIMIT_BYTES = 4 << 30  # largest total size of the maps that a process caches
_LARGEST = torch.finfo(torch.float16).max


@dataclass
class _Store:
    """Cached maps of a trunk: for each image's key, a float16 map (C, h, w) per level."""

    maps: dict[bytes, tuple[Tensor, ...]] = field(default_factory=dict)
    held: int = 0  # bytes
    full: bool = False

    def keep(self, key: bytes, levels: tuple[Tensor, ...]) -> None:
        """Cache the maps of an image, unless the total would exceed `LIMIT_BYTES`."""
        size = sum(level.numel() * level.element_size() for level in levels)
        if sum(store.held for store in _STORES.values()) + size <= LIMIT_BYTES:
            self.maps[key] = levels
            self.held += size
        elif not self.full:
            self.full = True
            log.info(
                "cached feature maps fill %.1f GiB: the maps of further images are recomputed",
                LIMIT_BYTES / 2**30,
            )


# Keyed by the hash of the trunk's weights and the number of levels, so that all variants and seeds
# of a comparison share the cached maps of the same frozen trunk.
_STORES: dict[tuple[str, int], _Store] = {}


@contextmanager
def nothing_remembered() -> Iterator[None]:
    """Leave the caches as they are: maps of a trial batch differ in the last bits from others."""
    before = {key: (dict(store.maps), store.held) for key, store in _STORES.items()}
    try:
        yield
    finally:
        for key, store in _STORES.items():
            store.maps, store.held = before.get(key, ({}, 0))


class LevelledTrunk(nn.Module):
    """A trunk that returns the maps of its last one or more strides, finest first.

    Attributes:
        level_channels: Channels of each map.
        level_strides: Pixels per cell of each map.
    """

    def __init__(self, trunk: Trunk, levels: int = 1) -> None:
        super().__init__()
        if not 1 <= levels <= len(trunk.level_strides):
            raise UserError(
                f"trunk {trunk.name}: levels must be in 1..{len(trunk.level_strides)}, got {levels}"
            )
        self.trunk, self.levels = trunk, levels
        self.level_channels = trunk.level_channels[-levels:]
        self.level_strides = trunk.level_strides[-levels:]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (N, 3, H, W) to one map (N, C, h, w) per level, finest first."""
        if self.levels == 1:
            return [self.trunk(images)]
        return self.trunk.forward_levels(images)[-self.levels :]


class RememberedTrunk(LevelledTrunk):
    """A frozen trunk that caches its output for each image in memory.

    The key of an image is a hash of its pixels, so the cache is useful without augmentation or with
    flips only. Trunks with equal weights share a cache. Layers inside the trunk must not be used by
    distillation terms, since they do not run for cached images, and images get no gradient.

    Raises:
        UserError: The trunk is not frozen.
    """

    def __init__(self, trunk: Trunk, levels: int = 1) -> None:
        super().__init__(trunk.eval(), levels)
        if any(parameter.requires_grad for parameter in trunk.parameters()):
            raise UserError(f"trunk {trunk.name}: remember needs frozen: all, but the trunk learns")
        self._key = ""
        self._keyed: list[tuple[int, int]] = []

    def train(self, mode: bool = True) -> RememberedTrunk:
        """Set the training mode, but leave the trunk in evaluation mode."""
        super().train(mode)
        self.trunk.eval()
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (N, 3, H, W) to one map (N, C, h, w) per level, finest first.

        The maps are float32, rounded to the precision of float16, in which they are cached.
        """
        with torch.autocast(images.device.type, enabled=False):
            store, keys = self._store(), image_keys(images)
            missing = {key: row for row, key in enumerate(keys) if key not in store.maps}
            fresh: dict[bytes, tuple[Tensor, ...]] = {}
            if missing or not keys:
                maps = self.trunk.forward_levels(images[list(missing.values())].float())
                levels = [
                    one.clamp(-_LARGEST, _LARGEST).half().cpu() for one in maps[-self.levels :]
                ]
                if not keys:
                    return [level.to(images.device).float() for level in levels]
                for number, key in enumerate(missing):
                    fresh[key] = tuple(level[number].clone() for level in levels)
                    store.keep(key, fresh[key])
            rows = [fresh[key] if key in fresh else store.maps[key] for key in keys]
            return [
                torch.stack(level).to(images.device).float() for level in zip(*rows, strict=True)
            ]

    def _store(self) -> _Store:
        """Return the store for the trunk's current weights, which may have changed in place."""
        tensors = chain(self.trunk.parameters(), self.trunk.buffers())
        keyed = [(id(tensor), tensor._version) for tensor in tensors]
        if keyed != self._keyed:
            # Some options, such as a stride, change the output but not the weights.
            self._key = weights_hash(self.trunk, f"{self.trunk.name} {self.trunk}")
            self._keyed = keyed
        return _STORES.setdefault((self._key, self.levels), _Store())


def image_keys(images: Tensor) -> list[bytes]:
    """Hash the pixels and size of each image."""
    images = images.detach().float().cpu().contiguous()
    size = f"{tuple(images.shape[1:])}".encode()
    contents = (size + one.numpy().tobytes() for one in images)
    return [hashlib.blake2b(content, digest_size=16).digest() for content in contents]


def levelled(
    trunk: Trunk,
    *,
    levels: int = 1,
    frozen: str | None = None,
    batch_norm_frozen: bool = False,
    remember: bool = False,
) -> LevelledTrunk:
    """Freeze a trunk in place and wrap it to return the maps of its last `levels` strides.

    `frozen` is "all" or the path of the last step to freeze. `remember` caches the outputs in
    memory and needs `frozen` to be "all".
    """
    freeze(trunk, frozen, batch_norm_frozen)
    return RememberedTrunk(trunk, levels) if remember else LevelledTrunk(trunk, levels)


class StepPool(nn.Module):
    """Max pooling of 2 x 2 windows with stride 1, padded at the right and at the bottom."""

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, C, h, w) to the same shape."""
        return F.max_pool2d(F.pad(maps, (0, 1, 0, 1), value=-torch.inf), 2, stride=1)


class JoinedStages(nn.Module):
    """A trunk that returns the maps of its last three stages, resized to one grid and concatenated.

    The grid is that of the last, coarsest stage.

    Attributes:
        channels: Channels of the concatenated map.
        stride: Pixels per cell of the concatenated map.

    Raises:
        UserError: The trunk has fewer than three stages.
    """

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk, self.stride = trunk, trunk.stride
        found = trunk.stages()
        if isinstance(trunk, TorchvisionTrunk) and trunk.name.startswith("vgg"):
            # MSI-Net reads the stages of VGG after their poolings, i.e. at the first step of the
            # next stride.
            found = trunk.stages(first=True)
            for name, step in list(trunk.get_submodule("features").named_children()):
                if isinstance(step, nn.Identity):  # a pooling dropped to keep the stride
                    setattr(trunk.features, name, StepPool())
        if len(found) < 3:
            raise UserError(f"{trunk.name} has {len(found)} stages, but 3 are needed")
        self.paths = tuple(path for path, _ in found[-3:])
        self.channels = sum(channels for _, channels in found[-3:])

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to (N, channels, H/stride, W/stride).

        The maps of finer stages are reduced to this grid by average pooling.
        """
        maps = self.trunk.forward_at(images, self.paths)
        grid = (maps[-1].shape[2], maps[-1].shape[3])
        same = [one if one.shape[2:] == grid else F.adaptive_avg_pool2d(one, grid) for one in maps]
        return torch.cat(same, dim=1)
