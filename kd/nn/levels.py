"""A trunk's maps at one or more strides; a frozen trunk may remember what it said."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.freeze import freeze, freeze_batch_norm
from kd.nn.trunk import Trunk, build_trunk

Store = dict[int, tuple[Tensor, ...]]

# One store for each trunk's weights, so that the arms and seeds of a comparison share it.
_STORES: dict[tuple[str, int], Store] = {}
_LIMIT_BYTES = 4 << 30


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

    Pays where pictures come again unchanged: no augmentation, or only flips. The key is a sum of
    64-bit products, exact in any order; two pictures share one by chance once in 2^64.

    Args:
        trunk: In evaluation mode for good; all its parameters must be frozen.
        levels: How many of its strides to give, coarsest last.
    """

    def __init__(self, trunk: Trunk, levels: int = 1) -> None:
        super().__init__(trunk.eval(), levels)
        assert not any(parameter.requires_grad for parameter in trunk.parameters())
        self._store: Store | None = None
        self._held = 0

    def train(self, mode: bool = True) -> RememberedTrunk:
        """The trunk itself stays in evaluation mode."""
        super().train(mode)
        self.trunk.eval()
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """As `LevelledTrunk`; the maps pass through float16, seen before or not."""
        if self._store is None:
            self._store = _STORES.setdefault((weights_key(self.trunk), self.levels), {})
        store, found = self._store, []
        keys = picture_keys(images)
        missing = [place for place, key in enumerate(keys) if key not in store]
        if missing:
            fresh = self.trunk.forward_levels(images[missing])[-self.levels :]
            for number, place in enumerate(missing):
                kept = tuple(level[number].to(torch.float16).cpu() for level in fresh)
                if self._held < _LIMIT_BYTES:
                    store[keys[place]] = kept
                    self._held += sum(level.numel() * 2 for level in kept)
                found.append((place, kept))
        here = dict(found)
        rows = [here[place] if place in here else store[key] for place, key in enumerate(keys)]
        return [
            torch.stack([row[level] for row in rows]).to(images.device).float()
            for level in range(self.levels)
        ]


def picture_keys(images: Tensor) -> list[int]:
    """A 64-bit number for each picture's content and size."""
    bits = images.contiguous().view(torch.int32).flatten(1).long()
    # Odd multipliers that differ from place to place, made by a counter: nothing to store.
    places = torch.arange(bits.shape[1], device=bits.device)
    factors = (places * -7046029254386353131) ^ (places * 0x2545F491 + images.shape[-1])
    sums: list[int] = ((bits + 1) * (factors | 1)).sum(dim=1).tolist()
    return sums


def weights_key(trunk: nn.Module) -> str:
    """A hash of a trunk's weights and kind."""
    digest = hashlib.sha256(type(trunk).__name__.encode())
    for name, tensor in sorted(trunk.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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
        remember: Keep outputs in memory; needs `frozen: all` and `batch_norm_frozen`.

    Raises:
        UserError: A trunk that cannot be built, or `remember` for one that learns.
    """
    trunk = build_trunk(name, weights=weights, stride=stride)
    if frozen is not None:
        freeze(trunk, None if frozen == "all" else frozen)
    if batch_norm_frozen:
        freeze_batch_norm(trunk)
    if not remember:
        return LevelledTrunk(trunk, levels)
    if frozen != "all":
        raise UserError(f"trunk {name}: remember needs frozen: all, it is {frozen!r}")
    return RememberedTrunk(trunk, levels)
