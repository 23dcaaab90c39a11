"""torchvision's RetinaNet and FCOS on padded batches: classes and boxes at every place.

Heads, matching, losses and suppression are torchvision's; its resizing of images is not used.
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
    Detector,
    Inputs,
    Level,
    leveled,
    logits_at,
    objects_of,
    padded,
    pairs,
    wide,
)
from kd.nn.detectors.pyramid import Pyramid, PyramidOptions, anchors_of, build_pyramid
from kd.nn.detectors.weights import load_detector
from kd.registry import with_options


@dataclass(frozen=True)
class Family:
    """Differences between RetinaNet and FCOS.

    Attributes:
        name: For messages.
        maps: Our names of the heads' outputs to torchvision's.
        losses: The same for the losses.
        unit: What the losses are means over, for `kd.problems.base.Mean`.
        level_of: Maps boxes (M, 4) and sides of the levels to the level responsible for each.
        needs_counts: Whether `compute_loss` takes the number of places of each level.
    """

    name: str
    maps: Mapping[str, str]
    losses: Mapping[str, str]
    unit: str
    level_of: Callable[[Tensor, Sequence[float]], Tensor]
    needs_counts: bool


def by_area(boxes: Tensor, sides: Sequence[float]) -> Tensor:
    """The level (M,) whose anchors are nearest in side, by ratio, to boxes (M, 4).

    Sides are the geometric mean of each level's anchors.
    """
    own = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).log() / 2
    return (own[:, None] - own.new_tensor(sides).log()).abs().argmin(dim=1)


def by_reach(boxes: Tensor, sides: Sequence[float]) -> Tensor:
    """FCOS's level (M,) of boxes (M, 4): half their longer side against the levels' strides.

    Tian et al., 2019, https://arxiv.org/abs/1904.01355: a level of stride s is for boxes that reach
    between 4 s and 8 s from a place; the first also for smaller, the last also for larger ones.
    """
    reach = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1) / 2
    return (reach[:, None] >= 8 * reach.new_tensor(sides[:-1])).sum(dim=1)


RETINANET = Family(
    name="RetinaNet",
    maps={"class_maps": "cls_logits", "box_maps": "bbox_regression"},
    losses={"classes": "classification", "boxes": "bbox_regression"},
    unit="images",
    level_of=by_area,
    needs_counts=False,
)
FCOS = Family(
    name="FCOS",
    maps={"class_maps": "cls_logits", "box_maps": "bbox_regression", "centre_maps": "bbox_ctrness"},
    losses={"classes": "classification", "boxes": "bbox_regression", "centres": "bbox_ctrness"},
    unit="boxes",
    level_of=by_reach,
    needs_counts=True,
)


class OneStage(Detector):
    """RetinaNet or FCOS with the interface of `Detector`.

    RetinaNet's losses are `loss.classes`, focal, and `loss.boxes`, absolute differences of deltas,
    each summed over an image and divided by its anchors on objects, at least 1; the mean over
    images. FCOS's are `loss.classes`, focal, `loss.boxes`, 1 - generalised IoU, and `loss.centres`,
    cross-entropy, each summed and divided by the places on objects of the whole batch, at least 1;
    their unit is the boxes.

    Attributes:
        network: torchvision's.
        sides: Sizes of the levels for `Family.level_of`.
    """

    def __init__(
        self,
        network: nn.Module,
        family: Family,
        levels: Sequence[Level],
        sides: Sequence[float],
        num_classes: int,
        top: int,
    ) -> None:
        super().__init__()
        self.network, self.family, self.levels = network, family, tuple(levels)
        self.sides, self.num_classes, self.top = tuple(sides), num_classes, top
        self.title = family.name
        self.loss_units = dict.fromkeys(family.losses, family.unit)

    def detect(self, given: Inputs) -> dict[str, Tensor]:
        """Find objects; crowds are not read: detections in them count as wrong, as in torchvision.

        Returns:
            For each level `features.L` (N, D, h, w), `class_maps.L` (N, A*C, h, w), logits, and
            `box_maps.L` (N, 4 A, h, w), deltas of the anchors, for FCOS distances in strides; for
            FCOS also `centre_maps.L` (N, 1, h, w), logits. With boxes `object_logits` (M, C): the
            class logits at the place nearest to the box's centre, the mean over its anchors, on
            the level of `by_area`, for FCOS `by_reach`. In training the losses, in evaluation with
            sizes `detections` (N, K, 6).
        """
        images, sizes, boxes, labels, image_of, *_ = given
        network: Any = self.network
        features = list(network.backbone(images).values())
        if sizes is None and boxes is None:
            return leveled(features=features)
        heads: dict[str, Tensor] = network.head(features)
        maps = {ours: _as_maps(heads[name], features) for ours, name in self.family.maps.items()}
        output = leveled(features=features, **maps)
        if boxes is not None and image_of is not None:
            chosen = self.family.level_of(boxes, self.sides)
            output["object_logits"] = logits_at(
                maps["class_maps"], self.levels, chosen, boxes, image_of, self.num_classes
            )
        if sizes is None:
            return output
        heads = {name: wide(one) for name, one in heads.items()}
        anchors = network.anchor_generator(ImageList(images, pairs(sizes)), features)
        if not self.training:
            return output | {"detections": self._detections(heads, anchors, features, sizes)}
        assert boxes is not None and image_of is not None
        targets = objects_of(boxes, labels, image_of, len(images)).targets(first=0)
        counts = ([one.shape[2:].numel() for one in features],) if self.family.needs_counts else ()
        losses = network.compute_loss(targets, heads, anchors, *counts)
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
    """Anchors per place, from those of all levels, (P, ...)."""
    return len(rows) // sum(one.shape[2:].numel() for one in features)


def _as_maps(dense: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    """Views of torchvision's rows (N, P, K) of all levels as maps (N, A*K, h, w)."""
    kinds = _kinds(dense[0], features)
    grids = [one.shape[2:] for one in features]
    parts = dense.split([kinds * grid.numel() for grid in grids], dim=1)
    return [
        part.unflatten(1, (*grid, kinds)).flatten(3).permute(0, 3, 1, 2)
        for part, grid in zip(parts, grids, strict=True)
    ]


OCTAVE = (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))  # sides of the anchors, in strides


@dataclass(frozen=True, kw_only=True)
class OneStageOptions(PyramidOptions):
    """Options of `retinanet` and `fcos`.

    Attributes:
        levels: 3 has a stride of 8; images of 64 pixels need `[2, 3, 4, 5]`.
        candidates: Best boxes per level and image before suppression.
    """

    levels: Sequence[int] = (3, 4, 5, 6, 7)
    candidates: int = 1000


@dataclass(frozen=True, kw_only=True)
class RetinaNetOptions(OneStageOptions):
    """Options of `retinanet`.

    Attributes:
        scales: Sides of the anchors in strides; a third of an octave apart from 4 on by default, on
            a single map 4, 8 and 16.
        ratios: Height by width of the anchors.
    """

    scales: Sequence[float] | None = None
    ratios: Sequence[float] = (0.5, 1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class FCOSOptions(OneStageOptions):
    """Options of `fcos`.

    Attributes:
        channels: A multiple of 32 from 64 on: the heads normalise 32 groups, and a group needs more
            than one channel on a map of one place.
        radius: Places up to this far from a box's centre learn it, in strides.
        least_score: A score is the square root of class times centre-ness.
    """

    radius: float = 1.5
    least_score: float = 0.2
    overlap: float = 0.6


@with_options(RetinaNetOptions)
def retinanet(num_classes: int, options: RetinaNetOptions) -> OneStage:
    """RetinaNet on any trunk; torchvision's `retinanet_resnet50_fpn` by default.

    Raises:
        UserError: An option out of range, a trunk that cannot be built or lacks a level, or a file
            that does not fit.
    """
    pyramid = _checked_pyramid("retinanet", num_classes, options)
    scales = options.scales
    if scales is None:
        scales = OCTAVE if len(options.levels) > 1 else (4.0, 8.0, 16.0)
    anchors = anchors_of("retinanet", pyramid.strides, scales=scales, ratios=options.ratios)
    network = detection.RetinaNet(
        pyramid, num_classes, anchor_generator=anchors, score_thresh=options.least_score,
        nms_thresh=options.overlap, detections_per_img=options.top,
        topk_candidates=options.candidates,
    )  # fmt: skip
    levels = anchors.levels()
    sides = [  # of the square that is their geometric mean
        math.prod(across * down for across, down in level.sides) ** (0.5 / len(level.sides))
        for level in levels
    ]
    return _finished(OneStage(network, RETINANET, levels, sides, num_classes, options.top), options)


@with_options(FCOSOptions)
def fcos(num_classes: int, options: FCOSOptions) -> OneStage:
    """FCOS on any trunk; torchvision's `fcos_resnet50_fpn` by default.

    Raises:
        UserError: As `retinanet`.
    """
    channels, radius = options.channels, options.radius
    if channels < 64 or channels % 32 or radius <= 0:
        raise UserError(
            "fcos: channels must be 64 or a higher multiple of 32 and radius above 0, got "
            f"{channels} and {radius:g}"
        )
    pyramid = _checked_pyramid("fcos", num_classes, options)
    # One square of the stride's side at each place: FCOS measures from its centre.
    places = anchors_of("fcos", pyramid.strides, scales=(1.0,), ratios=(1.0,))
    network = detection.FCOS(
        pyramid, num_classes, anchor_generator=places, center_sampling_radius=radius,
        score_thresh=options.least_score, nms_thresh=options.overlap,
        detections_per_img=options.top, topk_candidates=options.candidates,
    )  # fmt: skip
    levels = [Level(stride, (), 0.0) for stride in pyramid.strides]
    model = OneStage(network, FCOS, levels, pyramid.strides, num_classes, options.top)
    return _finished(model, options)


def _checked_pyramid(what: str, num_classes: int, options: OneStageOptions) -> Pyramid:
    at_least(
        what, num_classes=(num_classes, 1), candidates=(options.candidates, 1), top=(options.top, 1)
    )
    return build_pyramid(what, options)


def _finished(model: OneStage, options: OneStageOptions) -> OneStage:
    what = f"{model.family.name.lower()} on {options.trunk}"
    load_detector(model, options.file, num_classes=model.num_classes, what=what)
    return model
