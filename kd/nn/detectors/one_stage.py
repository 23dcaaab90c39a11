"""RetinaNet and FCOS, torchvision's, on padded batches: classes and boxes at every place.

Heads, matching, losses and suppression are torchvision's; its resizing of pictures is not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList

from kd.errors import UserError, at_least
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
from kd.nn.detectors.pyramid import anchors_of, build_pyramid
from kd.nn.detectors.weights import load_detector


@dataclass(frozen=True)
class Family:
    """What tells RetinaNet and FCOS apart.

    Attributes:
        name: For messages.
        maps: Our names of the heads' outputs, and torchvision's.
        losses: The same of the losses.
        unit: What the losses are means over, for `kd.problems.base.Mean`.
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
        loss_units: What each loss is a mean over, for `kd.problems.base.Mean`.
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


OCTAVE = (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))  # sides of the anchors, in strides


def retinanet(
    num_classes: int,
    *,
    trunk: str = "resnet50",
    weights: str | None = None,
    width: float = 1.0,
    until: str | None = None,
    frozen: str | None = None,
    batch_norm_frozen: bool = False,
    levels: Sequence[int] = (3, 4, 5, 6, 7),
    channels: int = 256,
    scales: Sequence[float] | None = None,
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
    candidates: int = 1000,
    least_score: float = 0.05,
    overlap: float = 0.5,
    top: int = 100,
    file: str | None = None,
) -> OneStage:
    """RetinaNet on any torchvision trunk; torchvision's `retinanet_resnet50_fpn` by default.

    Args:
        num_classes: C.
        trunk: Name of the torchvision classifier: resnet18, resnet50, mobilenet_v2, ...
        weights: Of the trunk: "imagenet", a file, or random ones.
        width: Share of the trunk's channels, for a smaller one from random weights.
        until: Path of the trunk's last step that is kept.
        frozen: "all", or the path of the last step of the trunk that does not learn.
        batch_norm_frozen: Keep all the trunk's batch norms at their stored statistics.
        levels: Of the pyramid, 3 of stride 8; pictures of 64 pixels want `[2, 3, 4, 5]`; `[4]` is a
            single map of stride 16.
        channels: Of every map that the heads read, and of their four layers.
        scales: Sides of the anchors in strides; a third of an octave from 4 on by default, and on a
            single map 4, 8 and 16.
        ratios: Height by width of the anchors.
        candidates: Best boxes of a level and image before suppression.
        least_score: Detections below are left out.
        overlap: IoU above which the worse of two detections of a class is suppressed.
        top: Detections of an image, K.
        file: Weights of the whole network, a run's or torchvision's; those of the trunk alone are
            then left aside.

    Raises:
        UserError: An option out of range, a trunk that cannot be built or lacks a level, or a file
            that does not fit.
    """
    what = "retinanet"
    at_least(what, num_classes=(num_classes, 1), candidates=(candidates, 1), top=(top, 1))
    pyramid = build_pyramid(
        what, trunk=trunk, weights=weights if file is None else None, width=width, until=until,
        frozen=frozen, batch_norm_frozen=batch_norm_frozen, levels=levels, channels=channels,
    )  # fmt: skip
    if scales is None:
        scales = OCTAVE if len(levels) > 1 else (4.0, 8.0, 16.0)
    anchors = anchors_of(what, pyramid.strides, scales=scales, ratios=ratios)
    network = detection.RetinaNet(
        pyramid, num_classes, anchor_generator=anchors, score_thresh=least_score,
        nms_thresh=overlap, detections_per_img=top, topk_candidates=candidates,
    )  # fmt: skip
    known = anchors.levels()
    sides = [  # of a square one in the middle of them
        math.prod(across * down for across, down in level.sides) ** (0.5 / len(level.sides))
        for level in known
    ]
    model = OneStage(network, RETINANET, known, sides=sides, num_classes=num_classes, top=top)
    load_detector(model, file, num_classes=num_classes, what=f"{what} on {trunk}")
    return model


def fcos(
    num_classes: int,
    *,
    trunk: str = "resnet50",
    weights: str | None = None,
    width: float = 1.0,
    until: str | None = None,
    frozen: str | None = None,
    batch_norm_frozen: bool = False,
    levels: Sequence[int] = (3, 4, 5, 6, 7),
    channels: int = 256,
    radius: float = 1.5,
    candidates: int = 1000,
    least_score: float = 0.2,
    overlap: float = 0.6,
    top: int = 100,
    file: str | None = None,
) -> OneStage:
    """FCOS on any torchvision trunk; torchvision's `fcos_resnet50_fpn` by default.

    Args:
        num_classes: C.
        trunk: Name of the torchvision classifier: resnet18, resnet50, mobilenet_v2, ...
        weights: Of the trunk: "imagenet", a file, or random ones.
        width: Share of the trunk's channels, for a smaller one from random weights.
        until: Path of the trunk's last step that is kept.
        frozen: "all", or the path of the last step of the trunk that does not learn.
        batch_norm_frozen: Keep all the trunk's batch norms at their stored statistics.
        levels: Of the pyramid, 3 of stride 8; pictures of 64 pixels want `[2, 3, 4, 5]`; `[4]` is a
            single map of stride 16.
        channels: Of every map that the heads read, and of their four layers; 64, 96 and so on, for
            these normalise 32 groups, and a group needs more than one channel on a map of one
            place.
        radius: Places so far from a box's middle learn it, in strides.
        candidates: Best boxes of a level and image before suppression.
        least_score: Detections below are left out; a score is the root of class times centre.
        overlap: IoU above which the worse of two detections of a class is suppressed.
        top: Detections of an image, K.
        file: Weights of the whole network, a run's or torchvision's; those of the trunk alone are
            then left aside.

    Raises:
        UserError: An option out of range, a trunk that cannot be built or lacks a level, or a file
            that does not fit.
    """
    what = "fcos"
    at_least(what, num_classes=(num_classes, 1), candidates=(candidates, 1), top=(top, 1))
    if channels < 64 or channels % 32 or radius <= 0:
        raise UserError(
            f"{what}: channels must be 64 or a higher multiple of 32 and radius above 0, got "
            f"{channels} and {radius:g}"
        )
    pyramid = build_pyramid(
        what, trunk=trunk, weights=weights if file is None else None, width=width, until=until,
        frozen=frozen, batch_norm_frozen=batch_norm_frozen, levels=levels, channels=channels,
    )  # fmt: skip
    # One square of the stride's side at each place: its middle is where FCOS measures from.
    places = anchors_of(what, pyramid.strides, scales=(1.0,), ratios=(1.0,))
    network = detection.FCOS(
        pyramid, num_classes, anchor_generator=places, center_sampling_radius=radius,
        score_thresh=least_score, nms_thresh=overlap, detections_per_img=top,
        topk_candidates=candidates,
    )  # fmt: skip
    known = [Level(stride, (), 0.0) for stride in pyramid.strides]
    model = OneStage(network, FCOS, known, sides=pyramid.strides, num_classes=num_classes, top=top)
    load_detector(model, file, num_classes=num_classes, what=f"{what} on {trunk}")
    return model
