"""A trunk's maps at one or more strides; a frozen trunk may remember what it said."""

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

LIMIT_BYTES = 4 << 30  # of all that a process remembers
_LARGEST = torch.finfo(torch.float16).max


@dataclass
class _Store:
    """What one trunk said: float16 maps (C, h, w) of each level by the picture's key."""

    maps: dict[bytes, tuple[Tensor, ...]] = field(default_factory=dict)
    held: int = 0  # bytes
    full: bool = False

    def keep(self, key: bytes, levels: tuple[Tensor, ...]) -> None:
        """Remember a picture's maps, unless the process holds too much already."""
        size = sum(level.numel() * level.element_size() for level in levels)
        if sum(store.held for store in _STORES.values()) + size <= LIMIT_BYTES:
            self.maps[key] = levels
            self.held += size
        elif not self.full:
            self.full = True
            log.info("remembered maps fill %.1f GiB: others are computed", LIMIT_BYTES / 2**30)


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
    """A trunk that does not learn, with its outputs kept in memory by the picture's content.

    Pays where pictures come again unchanged: no augmentation, or only flips. Trunks of equal
    weights share what they remember. Nothing inside can be tapped, since it seldom runs, and no
    gradient reaches the pictures.

    Args:
        trunk: In evaluation mode for good; all its parameters must be frozen.
        levels: How many of its strides to give, coarsest last.

    Raises:
        UserError: The trunk learns.
    """

    def __init__(self, trunk: Trunk, levels: int = 1) -> None:
        super().__init__(trunk.eval(), levels)
        if any(parameter.requires_grad for parameter in trunk.parameters()):
            raise UserError(f"trunk {trunk.name}: remember needs frozen: all, but the trunk learns")
        self._key = ""
        self._keyed: list[tuple[int, int]] = []

    def train(self, mode: bool = True) -> RememberedTrunk:
        """The trunk itself stays in evaluation mode."""
        super().train(mode)
        self.trunk.eval()
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """As `LevelledTrunk`, in float32; the maps pass through float16, seen before or not."""
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
        """The store of the weights as they are now: loading or averaging changes them in place."""
        tensors = chain(self.trunk.parameters(), self.trunk.buffers())
        keyed = [(id(tensor), tensor._version) for tensor in tensors]
        if keyed != self._keyed:
            # A trunk's layers have options that no weight shows: a kept stride is one.
            self._key = weights_hash(self.trunk, f"{self.trunk.name} {self.trunk}")
            self._keyed = keyed
        return _STORES.setdefault((self._key, self.levels), _Store())


def image_keys(images: Tensor) -> list[bytes]:
    """A hash of each picture's content and size; a fiftieth of a small trunk's time, on a CPU."""
    pictures = images.detach().float().cpu().contiguous()
    size = f"{tuple(pictures.shape[1:])}".encode()
    contents = (size + one.numpy().tobytes() for one in pictures)
    return [hashlib.blake2b(content, digest_size=16).digest() for content in contents]


def build_levels(
    name: str,
    *,
    levels: int = 1,
    weights: str | None = None,
    stride: int | None = None,
    frozen: str | None = None,
    batch_norm_frozen: bool = False,
    remember: bool = False,
) -> LevelledTrunk:
    """A torchvision trunk with its last maps, frozen as far as asked.

    Args:
        name: Of the torchvision classifier.
        levels: How many strides to give.
        weights: "imagenet", a file of torchvision weights, or random ones where not given.
        stride: Keep the trunk's output at this stride at most.
        frozen: "all", or the path of the last step that does not learn.
        batch_norm_frozen: Keep all batch norms at their stored statistics.
        remember: Keep outputs in memory; needs `frozen: all`.

    Raises:
        UserError: A trunk that cannot be built, or `remember` for one that learns.
    """
    return levelled(
        build_trunk(name, weights=weights, stride=stride),
        levels=levels,
        frozen=frozen,
        batch_norm_frozen=batch_norm_frozen,
        remember=remember,
    )


def levelled(
    trunk: Trunk,
    *,
    levels: int = 1,
    frozen: str | None = None,
    batch_norm_frozen: bool = False,
    remember: bool = False,
) -> LevelledTrunk:
    """A trunk that is there already with its last maps; the other arguments are `build_levels`'."""
    freeze_parts(trunk, frozen, batch_norm_frozen)
    return RememberedTrunk(trunk, levels) if remember else LevelledTrunk(trunk, levels)


COUNT = 3


class StepPool(nn.Module):
    """Max pooling of 2 x 2 windows, one place apart: the map keeps its size.

    The windows at the right and at the bottom reach over the edge, where there is nothing.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, h, w) to the same."""
        return F.max_pool2d(F.pad(maps, (0, 1, 0, 1), value=-torch.inf), 2, stride=1)


class JoinedStages(nn.Module):
    """A trunk and the joined output of its last three stages.

    Attributes:
        trunk: Steps under torchvision's names.
        channels: Of the joined map.
        stride: Of the same, pixels a place.
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
            raise UserError(f"{trunk.name} has {len(found)} grids, where {COUNT} are joined")
        self.paths = tuple(path for path, _ in found)
        self.channels = sum(channels for _, channels in found)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to (N, channels, H/stride, W/stride).

        A stage on a finer grid, where the stride is 16, is brought to the last one's by means.
        """
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
    """The last three stages of a torchvision classifier.

    Args:
        name: As in `build_trunk`; transformers with one grid will not do.
        weights: None, "imagenet" or a file, see there.
        stride: Pixels a place. Later steps are dilated; the poolings of a VGG stay, one place
            apart.
        until: Path of the last step that is kept.

    Raises:
        UserError: What `build_trunk` raises, or a trunk with fewer than three grids.
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
    """Poolings of a VGG beyond a stride take steps of 1; convolutions after them are dilated."""
    dilation = 1
    for (path, step), own in list(zip(trunk.steps(), trunk.step_strides, strict=True)):
        if isinstance(step, nn.MaxPool2d) and own > stride:
            parent, _, child = path.rpartition(".")
            setattr(trunk.get_submodule(parent), child, StepPool())
            dilation *= 2
        elif isinstance(step, nn.Conv2d):
            step.dilation = step.padding = (dilation, dilation)
    trunk.measure()
