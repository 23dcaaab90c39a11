"""torchvision's Faster R-CNN on padded batches; its second stage can be applied to given boxes.

Ren et al., 2015, https://arxiv.org/abs/1506.01497; with a feature pyramid Lin et al., 2017,
https://arxiv.org/abs/1612.03144. Proposals, heads, losses and suppression are torchvision's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops.poolers import LevelMapper, MultiScaleRoIAlign

from kd.errors import UserError, at_least
from kd.nn.detectors.context_head import BoxContext, box_context
from kd.nn.detectors.contract import (
    SECOND_STAGE,
    Detector,
    Inputs,
    Level,
    known_extents,
    leveled,
    objects_of,
    padded,
    pairs,
    wide,
)
from kd.nn.detectors.pyramid import Pyramid, PyramidOptions, anchors_of, build_pyramid
from kd.nn.detectors.weights import load_detector
from kd.registry import with_options

CANONICAL_LEVEL = 4  # the level that regions of `canonical` pixels are pooled from


class WidePredictor(FastRCNNPredictor):  # type: ignore[misc]
    """torchvision's last layers with outputs in float32, also under autocast."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of regions (R, D) to class logits (R, K) and box deltas (R, 4 K)."""
        logits, deltas = super().forward(x)
        return wide(logits), wide(deltas)


def region_pool(pyramid: Pyramid, size: int, canonical: float) -> MultiScaleRoIAlign:
    """RoIAlign on the trunk's own levels at fixed scales.

    torchvision infers the scales once, from the first batch's images without padding: for wide
    images in square frames they would be half of the true ones.
    """
    pool = MultiScaleRoIAlign([str(level) for level in range(pyramid.own)], size, sampling_ratio=2)
    strides = pyramid.strides[: pyramid.own]
    pool.scales = [1 / stride for stride in strides]
    first, last = (strides[place].bit_length() - 1 for place in (0, -1))
    pool.map_levels = LevelMapper(first, last, canonical, CANONICAL_LEVEL)
    return pool


class Dense(NamedTuple):
    """Outputs of the proposal network for a batch, with their anchors."""

    images: ImageList
    logits: Tensor  # (N * P, 1)
    deltas: Tensor  # (N * P, 4)
    anchors: list[Tensor]
    counts: list[int]  # anchors of each level


class FasterRCNN(Detector):
    """Faster R-CNN with the interface of `Detector`.

    Attributes:
        network: torchvision's.
        context: Head for the surroundings of regions, or None.
    """

    title = "Faster R-CNN"
    # torchvision divides by the sampled anchors and regions of the batch, equally many for each
    # image that has enough of them, so these are means over images.
    loss_units = dict.fromkeys(("objectness", "proposal_boxes", "classes", "boxes"), "images")

    def __init__(
        self,
        network: nn.Module,
        levels: Sequence[Level],
        *,
        num_classes: int,
        top: int,
        context: BoxContext | None = None,
    ) -> None:
        super().__init__()
        self.network, self.levels = network, tuple(levels)
        self.num_classes, self.top = num_classes, top
        self.context = context

    def detect(self, given: Inputs) -> dict[str, Tensor]:
        """Find objects; crowds are not read: detections in them count as wrong, as in torchvision.

        Returns:
            For each level `features.L` (N, D, h, w), and of the proposal network `class_maps.L`
            (N, A, h, w), objectness logits, and `box_maps.L` (N, 4 A, h, w), deltas. If near boxes
            are given, the second stage's `object_logits` (M, C+1), background first, and
            `object_deltas` (M, 4 (C+1)). With boxes and a context head `context` (M, C), its
            logits. In training `loss.objectness`, the mean cross-entropy of the sampled anchors;
            `loss.proposal_boxes`, smooth L1 of those on objects, divided by all sampled;
            `loss.classes` and `loss.boxes`, the same for the sampled regions. In evaluation with
            sizes `detections` (N, K, 6).
        """
        images, sizes, boxes, labels, image_of, *_, near_boxes = given
        maps: dict[str, Tensor] = self.network.get_submodule("backbone")(images)
        features = list(maps.values())
        if sizes is None and boxes is None:
            return leveled(features=features)
        logits, deltas = self._rpn.head(features)
        output = leveled(features=features, class_maps=logits, box_maps=deltas)
        extents = None if self.context is None else known_extents(images, sizes)
        if near_boxes is not None and image_of is not None:
            objects = objects_of(near_boxes, None, image_of, len(images))
            found = self._second_stage(maps, list(objects.boxes), extents)
            output |= {name: objects.in_batch_order(found[name]) for name in SECOND_STAGE}
        if self.context and extents is not None and boxes is not None and image_of is not None:
            output["context"] = self.context(features, boxes, image_of, extents)
        if sizes is None:
            return output
        dense = self._dense(images, sizes, features, logits, deltas)
        proposals = self._proposals(dense)
        if self.training:
            assert boxes is not None and image_of is not None
            targets = objects_of(boxes, labels, image_of, len(images)).targets(first=1)
            return output | self._losses(maps, dense, proposals, targets, extents)
        found = self._second_stage(maps, proposals, extents)
        detections = self._roi_heads.postprocess_detections(
            found["object_logits"], found["object_deltas"], proposals, dense.images.image_sizes
        )
        names = ("boxes", "scores", "labels")
        by_image = [dict(zip(names, one, strict=True)) for one in zip(*detections, strict=True)]
        return output | {"detections": padded(by_image, self.top, first=1)}

    @property
    def _rpn(self) -> Any:
        return self.network.rpn

    @property
    def _roi_heads(self) -> Any:
        return self.network.roi_heads

    def _dense(
        self,
        images: Tensor,
        sizes: Tensor,
        features: list[Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
    ) -> Dense:
        listed = ImageList(images, pairs(sizes))
        flat_logits, flat_deltas = concat_box_prediction_layers(
            [wide(one) for one in logits], [wide(one) for one in deltas]
        )
        anchors = self._rpn.anchor_generator(listed, features)
        return Dense(listed, flat_logits, flat_deltas, anchors, [one[0].numel() for one in logits])

    def _proposals(self, dense: Dense) -> list[Tensor]:
        """Regions of each image, (R, 4), without a gradient."""
        decoded = self._rpn.box_coder.decode(dense.deltas.detach(), dense.anchors)
        decoded = decoded.view(len(dense.anchors), -1, 4)
        sizes, counts = dense.images.image_sizes, dense.counts
        proposals: list[Tensor]
        proposals, _ = self._rpn.filter_proposals(decoded, dense.logits, sizes, counts)
        return proposals

    def _second_stage(
        self, maps: Mapping[str, Tensor], boxes: list[Tensor], extents: Tensor | None
    ) -> dict[str, Tensor]:
        """Logits, joined with the context head's, and deltas of each image's boxes, end to end."""
        heads = self._roi_heads
        # The pool knows its scales; torchvision uses image sizes only to infer them.
        regions = heads.box_roi_pool(dict(maps), boxes, [])
        logits, deltas = heads.box_predictor(heads.box_head(regions))
        if self.context is not None and extents is not None:
            counts = torch.tensor([len(own) for own in boxes])
            image_of = torch.arange(len(boxes)).repeat_interleave(counts)
            image_of = image_of.to(extents.device, non_blocking=True)
            around = self.context(list(maps.values()), torch.cat(boxes), image_of, extents)
            logits = self.context.joined(logits, around)
        return {"object_logits": logits, "object_deltas": deltas}

    def _losses(
        self,
        maps: Mapping[str, Tensor],
        dense: Dense,
        proposals: list[Tensor],
        targets: list[dict[str, Tensor]],
        extents: Tensor | None,
    ) -> dict[str, Tensor]:
        """Losses of both stages; samples are drawn in torchvision's order."""
        rpn = self._rpn
        labels, matched = rpn.assign_targets_to_anchors(dense.anchors, targets)
        offsets = rpn.box_coder.encode(matched, dense.anchors)
        objectness, shifts = rpn.compute_loss(dense.logits, dense.deltas, labels, offsets)
        regions, _, labels, offsets = self._roi_heads.select_training_samples(proposals, targets)
        found = self._second_stage(maps, regions, extents)
        logits, deltas = (found[name] for name in SECOND_STAGE)
        classes, boxes = fastrcnn_loss(logits, deltas, list(labels), list(offsets))
        return {
            "loss.objectness": objectness,
            "loss.proposal_boxes": shifts,
            "loss.classes": classes,
            "loss.boxes": boxes,
        }


@dataclass(frozen=True, kw_only=True)
class FasterRCNNOptions(PyramidOptions):
    """Options of `fasterrcnn`.

    The defaults are for images of 800 pixels. For images of 64 to 128 pixels use a smaller
    `canonical`, scales of 2 to 4, and a tenth of the proposals, sampled regions and hidden width.

    Attributes:
        levels: 2 has a stride of 4. A single level is pooled from, too.
        scales: Sides of the anchors in strides; 8 by default, on a single map 8, 16 and 32.
        ratios: Height by width of the anchors.
        canonical: Side of the regions pooled from level 4, pixels; half the side is level 3, ...
        region_size: Side of the grid that a region is pooled to.
        hidden: Features of a region.
        candidates: Best anchors per level and image before suppression, in training and evaluation.
        proposals: Most regions per image after suppression, likewise.
        min_side: Shorter proposals are dropped, pixels.
        sampled_anchors: Anchors per image that the proposal network learns from.
        sampled_regions: Regions per image that the second stage learns from.
        context: Whether there is a head for a region's surroundings, see `BoxContext`.
        context_hidden: Width of its hidden layer.
        context_margin: Thickness of the ring that it reads, as a fraction of the region's sides.
        strength: Initial weight of its evidence; it is learned.
        prior: Frequency of each class among the objects, for the context head.
    """

    levels: Sequence[int] = (2, 3, 4, 5, 6)
    scales: Sequence[float] | None = None
    ratios: Sequence[float] = (0.5, 1.0, 2.0)
    canonical: float = 224.0
    region_size: int = 7
    hidden: int = 1024
    candidates: Sequence[int] = (2000, 1000)
    proposals: Sequence[int] = (2000, 1000)
    min_side: float = 1e-3
    sampled_anchors: int = 256
    sampled_regions: int = 512
    context: bool = False
    context_hidden: int = 128
    context_margin: float = 1.0
    strength: float = 0.5
    prior: Sequence[float] | None = None


@with_options(FasterRCNNOptions)
def fasterrcnn(num_classes: int, options: FasterRCNNOptions) -> FasterRCNN:
    """Faster R-CNN on any trunk; torchvision's `fasterrcnn_resnet50_fpn` by default.

    Raises:
        UserError: An option out of range, a trunk that cannot be built or lacks a level, or a file
            that does not fit.
    """
    what = "fasterrcnn"
    at_least(
        what, num_classes=(num_classes, 1), region_size=(options.region_size, 1),
        hidden=(options.hidden, 1), canonical=(options.canonical, 1),
        sampled_anchors=(options.sampled_anchors, 2), sampled_regions=(options.sampled_regions, 2),
        top=(options.top, 1), min_side=(options.min_side, 0),
    )  # fmt: skip
    for name, counts in (("candidates", options.candidates), ("proposals", options.proposals)):
        if len(counts) != 2 or min(counts) < 1:
            raise UserError(f"{what}: {name} must be two numbers above 0, got {list(counts)}")
    pyramid = build_pyramid(what, options)
    scales = options.scales
    if scales is None:
        scales = (8.0,) if len(options.levels) > 1 else (8.0, 16.0, 32.0)
    anchors = anchors_of(what, pyramid.strides, scales=scales, ratios=options.ratios)
    network = detection.FasterRCNN(
        pyramid,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=options.candidates[0],
        rpn_pre_nms_top_n_test=options.candidates[1],
        rpn_post_nms_top_n_train=options.proposals[0],
        rpn_post_nms_top_n_test=options.proposals[1],
        rpn_batch_size_per_image=options.sampled_anchors,
        box_roi_pool=region_pool(pyramid, options.region_size, options.canonical),
        box_head=TwoMLPHead(options.channels * options.region_size**2, options.hidden),
        box_predictor=WidePredictor(options.hidden, num_classes + 1),
        box_score_thresh=options.least_score,
        box_nms_thresh=options.overlap,
        box_detections_per_img=options.top,
        box_batch_size_per_image=options.sampled_regions,
    )
    network.rpn.min_size = options.min_side
    context = None
    if options.context:  # last, so that the weights drawn before are the same without it
        context = box_context(
            what, channels=options.channels, strides=pyramid.strides[: pyramid.own],
            num_classes=num_classes, prior=options.prior, hidden=options.context_hidden,
            margin=options.context_margin, strength=options.strength,
        )  # fmt: skip
    model = FasterRCNN(
        network, anchors.levels(), num_classes=num_classes, top=options.top, context=context
    )
    load_detector(model, options.file, num_classes=num_classes, what=f"{what} on {options.trunk}")
    return model
