"""torchvision's RetinaNet and FCOS on padded batches, without torchvision's resizing of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList

from kd.errors import UserError
from kd.nn.detectors.contract import (
    Detector,
    Inputs,
    Level,
    leveled,
    logits_at,
    padded,
    targets_of,
)
from kd.nn.detectors.pyramid import PyramidOptions, anchors_of, build_pyramid
from kd.nn.detectors.suppression import as_detections, clipped, decoded, suppress
from kd.nn.trunk_base import wide
from kd.nn.weights import load_detector
from kd.registry import with_options

OCTAVE = (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))  # default sides of the anchors, in strides


@dataclass(frozen=True, kw_only=True)
class OneStageOptions(PyramidOptions):
    """Options of `retinanet` and `fcos`.

    Attributes:
        levels: As in `PyramidOptions`; level 3 has a stride of 8. Images of 64 pixels need
            `[2, 3, 4, 5]`.
        candidates: Number of best boxes per level and image that enter suppression.
    """

    levels: Sequence[int] = (3, 4, 5, 6, 7)
    candidates: int = 1000


@dataclass(frozen=True, kw_only=True)
class RetinaNetOptions(OneStageOptions):
    """Options of `retinanet`.

    Attributes:
        scales: Sides of the anchors in strides. By default 4, 5.04 and 6.35, a third of an octave
            apart, or 4, 8 and 16 on a single map.
        ratios: Height divided by width of the anchors.
    """

    scales: Sequence[float] | None = None
    ratios: Sequence[float] = (0.5, 1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class FCOSOptions(OneStageOptions):
    """Options of `fcos`.

    Attributes:
        channels: A multiple of 32, at least 64, because the heads have group norms of 32 groups,
            and on a map of one cell a group needs more than one channel.
        radius: Distance from a box's centre, in strides, up to which cells are trained to predict
            the box.
        least_score: Detections of a lower score are dropped. In FCOS a score is the square root of
            class probability times centre-ness.
    """

    radius: float = 1.5
    least_score: float = 0.2
    overlap: float = 0.6


class OneStage(Detector):
    """RetinaNet or FCOS with the interface of `Detector`.

    Attributes:
        network: The torchvision detector.
        sides: A size for each level, by which `level_of` assigns boxes to levels.
        map_names: torchvision's name for each of the output names of this class.
        loss_names: torchvision's name for each of the loss names of this class.
        takes_cells: Whether torchvision's `compute_loss` needs the number of cells of each level.
    """

    map_names: ClassVar[Mapping[str, str]]
    loss_names: ClassVar[Mapping[str, str]]
    takes_cells: ClassVar[bool] = False
    network: Any

    def __init__(
        self,
        network: nn.Module,
        levels: Sequence[Level],
        sides: Sequence[float],
        options: OneStageOptions,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.network, self.levels, self.sides = network, tuple(levels), tuple(sides)
        self.num_classes, self.top = num_classes, options.top
        what = f"{self.title.lower()} on {options.trunk}"
        load_detector(self, options.file, num_classes=num_classes, what=what)

    @staticmethod
    def level_of(boxes: Tensor, sides: Sequence[float]) -> Tensor:
        """Find the pyramid level responsible for each of the boxes (M, 4); returns indices (M,)."""
        raise NotImplementedError

    def detect(self, given: Inputs) -> dict[str, Tensor]:
        """Compute feature maps, head outputs and, depending on the mode, losses or detections.

        Detections inside a crowd count as background, as in torchvision. Returns a dict of these
        outputs, where L numbers the levels from 0, finest first:

        - `features.L` (N, D, h, w);
        - `class_maps.L` (N, A*C, h, w), class logits;
        - `box_maps.L` (N, 4 A, h, w), anchor deltas, or for FCOS distances in strides;
        - `centre_maps.L` (N, 1, h, w), centre-ness logits, only for FCOS;
        - `object_logits` (M, C), if `given` has boxes: class logits of the cell nearest to each
          box's centre, on the level chosen by `level_of`, averaged over the anchors of the cell;
        - the losses, in training;
        - `detections` (N, K, 6), in evaluation if `given` has sizes.
        """
        images, sizes, boxes, labels, image_of, *_ = given
        network = self.network
        features = list(network.backbone(images).values())
        if sizes is None and boxes is None:
            return leveled(features=features)
        heads: dict[str, Tensor] = network.head(features)
        maps = {ours: _as_maps(heads[name], features) for ours, name in self.map_names.items()}
        output = leveled(features=features, **maps)
        if boxes is not None and image_of is not None:
            output["object_logits"] = logits_at(
                maps["class_maps"], self.levels, self.level_of(boxes, self.sides), boxes, image_of,
                self.num_classes,
            )  # fmt: skip
        if sizes is None:
            return output
        heads = {name: wide(one) for name, one in heads.items()}
        if self.exported:
            return output | {"detections": self._batched(images, sizes, heads, features)}
        listed = ImageList(images, [(height, width) for height, width in sizes.tolist()])
        anchors = network.anchor_generator(listed, features)
        if self.training:
            assert boxes is not None and labels is not None and image_of is not None
            targets = targets_of(boxes, labels, image_of, len(images))
            cells = [one.shape[2:].numel() for one in features]
            further = [cells] if self.takes_cells else []
            losses = network.compute_loss(targets, heads, anchors, *further)
            return output | {f"loss.{ours}": losses[name] for ours, name in self.loss_names.items()}
        counts = _anchor_counts(len(anchors[0]), features)
        found = network.postprocess_detections(
            {name: list(one.split(counts, dim=1)) for name, one in heads.items()},
            [list(one.split(counts)) for one in anchors],
            listed.image_sizes,
        )
        return output | {"detections": padded(found, self.top)}

    def scores(self, heads: Mapping[str, Tensor]) -> Tensor:
        """Compute class scores of each anchor, (N, P, C), from torchvision's head outputs."""
        return heads["cls_logits"].sigmoid()

    def _batched(
        self, images: Tensor, sizes: Tensor, heads: Mapping[str, Tensor], features: Sequence[Tensor]
    ) -> Tensor:
        """Compute the same `detections` as torchvision, without loops over images."""
        network, n = self.network, images.shape[0]
        frame = (images.shape[2], images.shape[3])
        [anchors] = network.anchor_generator(ImageList(images[:1], [frame]), list(features))
        scores, deltas = self.scores(heads), heads["bbox_regression"]
        counts = _anchor_counts(len(anchors), features)
        found = []
        parts = zip(
            scores.split(counts, 1), deltas.split(counts, 1), anchors.split(counts), strict=True
        )
        for own, shifts, squares in parts:
            best = own.flatten(1).topk(min(network.topk_candidates, own[0].numel()), dim=1)
            rows, labels = best.indices // self.num_classes, best.indices % self.num_classes
            chosen = shifts.gather(1, rows[..., None].expand(-1, -1, 4))
            boxes = decoded(network.box_coder, chosen, squares[rows])
            found.append((boxes, best.values, labels))
        boxes, values, labels = (torch.cat(one, dim=1) for one in zip(*found, strict=True))
        boxes = clipped(boxes, sizes)
        kept = suppress(
            boxes, values, labels, overlap=network.nms_thresh, least=network.score_thresh,
            top=self.top,
        )  # fmt: skip
        rows = as_detections(boxes, kept[0], labels, kept[1])
        return F.pad(rows, (0, 0, 0, self.top - rows.shape[1])).view(n, self.top, 6)


class RetinaNet(OneStage):
    """torchvision's RetinaNet.

    The losses are `loss.classes` (focal loss) and `loss.boxes` (L1 loss of box deltas). Each is
    summed over an image, divided by the number of anchors matched to objects in that image (at
    least 1), and averaged over the images.
    """

    title = "RetinaNet"
    map_names: ClassVar = {"class_maps": "cls_logits", "box_maps": "bbox_regression"}
    loss_names: ClassVar = {"classes": "classification", "boxes": "bbox_regression"}
    loss_units = dict.fromkeys(loss_names, "images")

    @staticmethod
    def level_of(boxes: Tensor, sides: Sequence[float]) -> Tensor:
        """Find the level whose anchors are nearest in size to each of the boxes (M, 4), shape (M,).

        The size of a box is the square root of its area, and sizes are compared by their ratio.
        `sides` is the geometric mean of the anchor sides on each level.
        """
        own = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).log() / 2
        return (own[:, None] - own.new_tensor(sides).log()).abs().argmin(dim=1)


class FCOS(OneStage):
    """torchvision's FCOS.

    The losses are `loss.classes` (focal loss), `loss.boxes` (1 - generalised IoU) and
    `loss.centres` (cross-entropy of centre-ness). Each is summed over the batch and divided by the
    number of cells matched to objects (at least 1). A mean over batches weights each batch by its
    number of boxes.
    """

    title = "FCOS"
    map_names: ClassVar = {**RetinaNet.map_names, "centre_maps": "bbox_ctrness"}
    loss_names: ClassVar = {**RetinaNet.loss_names, "centres": "bbox_ctrness"}
    loss_units = dict.fromkeys(loss_names, "boxes")
    takes_cells = True

    def scores(self, heads: Mapping[str, Tensor]) -> Tensor:
        """Compute the square root of class probability times centre-ness, (N, P, C)."""
        return (heads["cls_logits"].sigmoid() * heads["bbox_ctrness"].sigmoid()).sqrt()

    @staticmethod
    def level_of(boxes: Tensor, sides: Sequence[float]) -> Tensor:
        """Find the level (M,) for each of the boxes (M, 4) by half the length of its longer side.

        A level of stride s is responsible for half sides between 4 s and 8 s (Tian et al., 2019,
        https://arxiv.org/abs/1904.01355). The first level also covers smaller boxes, the last level
        larger ones. `sides` are the strides of the levels.
        """
        reach = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1) / 2
        return (reach[:, None] >= 8 * reach.new_tensor(sides[:-1])).sum(dim=1)


def _anchor_counts(rows: int, features: Sequence[Tensor]) -> list[int]:
    """Compute the number of anchors on each level from `rows`, the number on all levels."""
    cells = [one.shape[2:].numel() for one in features]
    return [rows // sum(cells) * count for count in cells]


def _as_maps(dense: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    """Split dense outputs (N, P, K) of P anchors into one map (N, A*K, h, w) per feature level."""
    parts = dense.split(_anchor_counts(dense.shape[1], features), dim=1)
    return [
        part.unflatten(1, (*one.shape[2:], -1)).flatten(3).permute(0, 3, 1, 2)
        for part, one in zip(parts, features, strict=True)
    ]


@with_options(RetinaNetOptions)
def retinanet(num_classes: int, options: RetinaNetOptions) -> RetinaNet:
    """Build RetinaNet on any trunk; torchvision's `retinanet_resnet50_fpn` by default."""
    pyramid = build_pyramid("retinanet", num_classes, options, candidates=(options.candidates, 1))
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
    sides = [  # geometric mean of the anchors' sides
        math.prod(across * down for across, down in level.sides) ** (0.5 / len(level.sides))
        for level in levels
    ]
    return RetinaNet(network, levels, sides, options, num_classes)


@with_options(FCOSOptions)
def fcos(num_classes: int, options: FCOSOptions) -> FCOS:
    """Build FCOS on any trunk; torchvision's `fcos_resnet50_fpn` by default."""
    channels, radius = options.channels, options.radius
    if channels < 64 or channels % 32 or radius <= 0:
        raise UserError(
            "fcos: channels must be 64 or a higher multiple of 32 and radius above 0, got "
            f"{channels} and {radius:g}"
        )
    pyramid = build_pyramid("fcos", num_classes, options, candidates=(options.candidates, 1))
    # torchvision's FCOS has one square anchor of the stride's side in each cell. It predicts the
    # distances from the centre of the square to the sides of the box.
    squares = anchors_of("fcos", pyramid.strides, scales=(1.0,), ratios=(1.0,))
    network = detection.FCOS(
        pyramid, num_classes, anchor_generator=squares, center_sampling_radius=radius,
        score_thresh=options.least_score, nms_thresh=options.overlap,
        detections_per_img=options.top, topk_candidates=options.candidates,
    )  # fmt: skip
    levels = [Level(stride, (), 0.0) for stride in pyramid.strides]
    return FCOS(network, levels, pyramid.strides, options, num_classes)
