"""RetinaNet and FCOS, torchvision's, on padded batches: classes and boxes at every place.

Heads, matching, losses and suppression are torchvision's; its resizing of pictures is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from kd.nn.detectors.contract import (
    Level,
    check_call,
    leveled,
    logits_at,
    objects_of,
    padded,
    pairs,
    wide,
)


@dataclass(frozen=True)
class Family:
    """What tells RetinaNet and FCOS apart.

    Attributes:
        name: For messages.
        maps: Our names of the heads' outputs, and torchvision's.
        losses: The same of the losses.
        unit: What the losses are means over, for `kd.tasks.base.Mean`.
        level_of: Boxes (M, 4) and strides to the level that is responsible for each.
        tells_counts: Whether the losses are told how many places each level has.
    """

    name: str
    maps: Mapping[str, str]
    losses: Mapping[str, str]
    unit: str
    level_of: Callable[[Tensor, Sequence[float]], Tensor]
    tells_counts: bool


def by_area(boxes: Tensor, sides: Sequence[float]) -> Tensor:
    """The level whose anchors' sides are nearest to the box's, by their ratio: (M,).

    Args:
        boxes: (M, 4).
        sides: Of the anchors of each level, the geometric mean.
    """
    own = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).log() / 2
    return (own[:, None] - own.new_tensor(sides).log()).abs().argmin(dim=1)


def by_reach(boxes: Tensor, sides: Sequence[float]) -> Tensor:
    """FCOS's level: the one before the first that reaches further than from middle to side: (M,).

    Tian et al., 2019, https://arxiv.org/abs/1904.01355: a level of stride s is for what reaches
    between 4 s and 8 s from a place to the box's furthest side; the first also for less, the last
    also for more.

    Args:
        boxes: (M, 4).
        sides: The strides.
    """
    reach = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1) / 2
    return (reach[:, None] >= 8 * reach.new_tensor(sides[:-1])).sum(dim=1)


RETINANET = Family(
    name="RetinaNet",
    maps={"class_maps": "cls_logits", "box_maps": "bbox_regression"},
    losses={"classes": "classification", "boxes": "bbox_regression"},
    unit="images",
    level_of=by_area,
    tells_counts=False,
)
FCOS = Family(
    name="FCOS",
    maps={"class_maps": "cls_logits", "box_maps": "bbox_regression", "centre_maps": "bbox_ctrness"},
    losses={
        "classes": "classification",
        "boxes": "bbox_regression",
        "centres": "bbox_ctrness",
    },
    unit="boxes",
    level_of=by_reach,
    tells_counts=True,
)


class OneStage(nn.Module):
    """RetinaNet or FCOS by the contract of `kd.nn.detectors.contract`.

    RetinaNet's losses are `loss.classes`, focal, and `loss.boxes`, absolute differences of deltas:
    each summed over an image, divided by its anchors on objects, 1 at least; the mean over images.
    FCOS's are `loss.classes`, focal, `loss.boxes`, 1 less the generalised IoU, and `loss.centres`,
    cross-entropy: each summed and divided by the places on objects of the whole batch, 1 at least;
    how many these are is known only with the boxes, so that their unit is the objects.

    Attributes:
        network: torchvision's.
        levels: Maps with their anchors; FCOS has none.
        loss_units: What each loss is a mean over, for `kd.tasks.base.Mean`.
    """

    def __init__(
        self,
        network: nn.Module,
        family: Family,
        levels: Sequence[Level],
        *,
        sides: Sequence[float],
        num_classes: int,
        top: int,
    ) -> None:
        super().__init__()
        self.network, self.family, self.levels = network, family, tuple(levels)
        self.sides, self.num_classes, self.top = tuple(sides), num_classes, top
        self.loss_units = dict.fromkeys(family.losses, family.unit)

    def forward(
        self,
        images: Tensor,
        sizes: Tensor | None = None,
        boxes: Tensor | None = None,
        labels: Tensor | None = None,
        image_of: Tensor | None = None,
        crowds: Tensor | None = None,
        crowd_of: Tensor | None = None,
        asked: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Find objects, see `kd.nn.detectors.contract`.

        Crowds are not read: what is found in one is wrong, as torchvision has it.

        Returns:
            Of each level `features.L` (N, D, h, w), `class_maps.L` (N, A*C, h, w), logits, and
            `box_maps.L` (N, 4 A, h, w), deltas of the anchors, of FCOS distances in strides; of
            FCOS also `centre_maps.L` (N, 1, h, w), logits. With boxes `object_logits` (M, C): the
            class logits at the place nearest to the box's middle, the mean over its anchors, of
            the level that `by_area` says, of FCOS `by_reach`. In evaluation with sizes `detections`
            (N, K, 6). In training the losses.
        """
        check_call(
            self.family.name, self.training, images, self.num_classes,
            sizes=sizes, boxes=boxes, labels=labels, image_of=image_of, asked=asked,
        )  # fmt: skip
        network: Any = self.network
        features = list(network.backbone(images).values())
        if sizes is None and boxes is None:
            return leveled(features=features)
        heads: dict[str, Tensor] = network.head(features)
        kinds = {ours: _as_maps(heads[name], features) for ours, name in self.family.maps.items()}
        output = leveled(features=features, **kinds)
        if boxes is not None and image_of is not None:
            chosen = self.family.level_of(boxes, self.sides)
            output["object_logits"] = logits_at(
                kinds["class_maps"], self.levels, chosen, boxes, image_of, self.num_classes
            )
        if sizes is None:
            return output
        heads = {name: wide(one) for name, one in heads.items()}
        anchors = network.anchor_generator(ImageList(images, pairs(sizes)), features)
        if not self.training:
            return output | {"detections": self._detections(heads, anchors, features, sizes)}
        assert boxes is not None and image_of is not None
        targets = objects_of(boxes, labels, image_of, len(images)).targets(first=0)
        told = ([one.shape[2:].numel() for one in features],) if self.family.tells_counts else ()
        losses = network.compute_loss(targets, heads, anchors, *told)
        return output | {f"loss.{ours}": losses[name] for ours, name in self.family.losses.items()}

    def _detections(
        self,
        heads: Mapping[str, Tensor],
        anchors: Sequence[Tensor],
        features: Sequence[Tensor],
        sizes: Tensor,
    ) -> Tensor:
        """The best boxes of each image, (N, K, 6)."""
        kinds = _kinds(anchors[0], features)
        counts = [kinds * one.shape[2:].numel() for one in features]
        found: list[dict[str, Tensor]] = self.network.postprocess_detections(  # type: ignore[operator]
            {name: list(one.split(counts, dim=1)) for name, one in heads.items()},
            [list(one.split(counts)) for one in anchors],
            pairs(sizes),
        )
        return padded(found, self.top)


def _kinds(rows: Tensor, features: Sequence[Tensor]) -> int:
    """Anchors at a place, from those of all levels, (P, ...)."""
    return len(rows) // sum(one.shape[2:].numel() for one in features)


def _as_maps(dense: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    """Torchvision's rows (N, P, K) of all levels to maps (N, A*K, h, w); nothing is copied."""
    kinds = _kinds(dense[0], features)
    grids = [one.shape[2:] for one in features]
    parts = dense.split([kinds * grid.numel() for grid in grids], dim=1)
    return [
        part.unflatten(1, (*grid, kinds)).flatten(3).permute(0, 3, 1, 2)
        for part, grid in zip(parts, grids, strict=True)
    ]
