"""A trunk's maps at one or more strides, with a cache for frozen trunks."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.freeze import freeze_parts
from kd.nn.trunk import TorchvisionTrunk, build_trunk
from kd.nn.trunk_base import Trunk
from kd.nn.weights import weights_hash

log = logging.getLogger(__name__)

LIMIT_BYTES = 4 << 30  # of all maps cached by a process
_LARGEST = torch.finfo(torch.float16).max


@dataclass
class _Store:
    """A trunk's cached maps: float16 (C, h, w) of each level by the image's key."""

    maps: dict[bytes, tuple[Tensor, ...]] = field(default_factory=dict)
    held: int = 0  # bytes
    full: bool = False

    def keep(self, key: bytes, levels: tuple[Tensor, ...]) -> None:
        """Cache an image's maps up to the limit."""
        size = sum(level.numel() * level.element_size() for level in levels)
        if sum(store.held for store in _STORES.values()) + size <= LIMIT_BYTES:
            self.maps[key] = levels
            self.held += size
        elif not self.full:
            self.full = True
            log.info("cached maps fill %.1f GiB: others are computed", LIMIT_BYTES / 2**30)


# One store for each trunk's weights, so that the variants and seeds of a comparison share it.
_STORES: dict[tuple[str, int], _Store] = {}


class LevelledTrunk(nn.Module):
    """A trunk that gives its last maps at one or more strides, finest first.

    Attributes:
        level_channels: Of each map.
        level_strides: Pixels per place of each map.
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
        """Images (N, 3, H, W) to maps (N, C, h, w), one a level, finest first."""
        if self.levels == 1:
            return [self.trunk(images)]
        return self.trunk.forward_levels(images)[-self.levels :]


class RememberedTrunk(LevelledTrunk):
    """A frozen trunk whose outputs are cached in memory by the image's content.

    Useful without augmentation, or with flips only. Trunks of equal weights share their cache.
    Layers inside cannot be tapped, since they seldom run, and images get no gradient.

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
        """Set the mode, but not the trunk's, which stays in evaluation."""
        super().train(mode)
        self.trunk.eval()
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """As `LevelledTrunk`, in float32; all maps are rounded to float16."""
        with torch.autocast(images.device.type, enabled=False):
            return self._maps(images)

    def _maps(self, images: Tensor) -> list[Tensor]:
        store, keys = self._store(), image_keys(images)
        missing = {key: place for place, key in enumerate(keys) if key not in store.maps}
        fresh: dict[bytes, tuple[Tensor, ...]] = {}
        if missing or not keys:
            levels = self._computed(images[list(missing.values())])
            if not keys:
                return [level.to(images.device).float() for level in levels]
            for number, key in enumerate(missing):
                fresh[key] = tuple(level[number].clone() for level in levels)
                store.keep(key, fresh[key])
        rows = [fresh[key] if key in fresh else store.maps[key] for key in keys]
        return [torch.stack(level).to(images.device).float() for level in zip(*rows, strict=True)]

    def _computed(self, images: Tensor) -> list[Tensor]:
        """The trunk's maps in float16, on the CPU."""
        levels = self.trunk.forward_levels(images.float())[-self.levels :]
        return [level.clamp(-_LARGEST, _LARGEST).half().cpu() for level in levels]

    def _store(self) -> _Store:
        """The store for the current weights, which loading or averaging change in place."""
        tensors = chain(self.trunk.parameters(), self.trunk.buffers())
        keyed = [(id(tensor), tensor._version) for tensor in tensors]
        if keyed != self._keyed:
            # Some options, such as a stride, do not show in the weights.
            self._key = weights_hash(self.trunk, f"{self.trunk.name} {self.trunk}")
            self._keyed = keyed
        return _STORES.setdefault((self._key, self.levels), _Store())


def image_keys(images: Tensor) -> list[bytes]:
    """A hash of each image's content and size; 1/50 of a small trunk's time on a CPU."""
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
    """Freeze a trunk and return its last maps.

    Args:
        trunk: The trunk, changed in place.
        levels: Number of strides.
        frozen: "all", or the path of the last step that does not learn.
        batch_norm_frozen: Whether all batch norms keep their stored statistics.
        remember: Whether outputs are cached in memory; needs `frozen: all`.
    """
    freeze_parts(trunk, frozen, batch_norm_frozen)
    return RememberedTrunk(trunk, levels) if remember else LevelledTrunk(trunk, levels)


COUNT = 3


class StepPool(nn.Module):
    """Max pooling of 2 x 2 windows with stride 1, padded at the right and at the bottom."""

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, h, w) to the same."""
        return F.max_pool2d(F.pad(maps, (0, 1, 0, 1), value=-torch.inf), 2, stride=1)


class JoinedStages(nn.Module):
    """A trunk with the concatenated maps of its last three stages.

    Attributes:
        channels: Of the concatenated map.
        stride: Pixels per place of it.
    """

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk, self.stride = trunk, trunk.stride
        if isinstance(trunk, TorchvisionTrunk) and trunk.name.startswith("vgg"):
            # VGG's stages end in the pooling that begins the next grid.
            found = trunk.stages(first=True)[-COUNT:]
        else:
            found = trunk.stages()[-COUNT:]
        if len(found) < COUNT:
            raise UserError(f"{trunk.name} has {len(found)} grids, but {COUNT} are needed")
        self.paths = tuple(path for path, _ in found)
        self.channels = sum(channels for _, channels in found)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to (N, channels, H/stride, W/stride); finer stages are averaged."""
        maps = self.trunk.forward_at(images, self.paths)
        height, width = maps[-1].shape[2:]
        same = [
            one if one.shape[2:] == (height, width) else F.adaptive_avg_pool2d(one, (height, width))
            for one in maps
        ]
        return torch.cat(same, dim=1)


def joined_stages(
    name: str, *, weights: str | None = None, stride: int = 8, until: str | None = None
) -> JoinedStages:
    """The last three stages of a trunk; arguments as for `build_trunk`.

    Steps after a removed stride are dilated; VGG's poolings get stride 1.

    Raises:
        UserError: Errors of `build_trunk`, or a trunk with fewer than three grids.
    """
    if not name.startswith("vgg"):
        trunk = build_trunk(name, weights=weights, stride=stride, dilate=True, until=until)
        return JoinedStages(trunk)
    trunk = build_trunk(name, weights=weights, until=until)
    assert isinstance(trunk, TorchvisionTrunk)
    if stride not in trunk.level_strides:
        known = ", ".join(map(str, trunk.level_strides))
        raise UserError(f"{name}: stride must be one of {known}, got {stride}")
    _keep_pools(trunk, stride)
    return JoinedStages(trunk)


def _keep_pools(trunk: TorchvisionTrunk, stride: int) -> None:
    """Give VGG's poolings beyond a stride stride 1, and dilate the convolutions after them."""
    dilation = 1
    for (path, step), own in list(zip(trunk.steps(), trunk.step_strides, strict=True)):
        if isinstance(step, nn.MaxPool2d) and own > stride:
            parent, _, child = path.rpartition(".")
            setattr(trunk.get_submodule(parent), child, StepPool())
            dilation *= 2
        elif isinstance(step, nn.Conv2d):
            step.dilation = step.padding = (dilation, dilation)
    trunk.measure()
