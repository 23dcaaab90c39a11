"""Faster R-CNN, torchvision's, on padded batches: two stages, of which the second can be asked.

Ren et al., 2015, https://arxiv.org/abs/1506.01497; on a pyramid Lin et al., 2017,
https://arxiv.org/abs/1612.03144. Proposals, heads, losses, suppression are torchvision's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    ANSWERS,
    Level,
    check_call,
    leveled,
    objects_of,
    padded,
    pairs,
    shown_extents,
    wide,
)
from kd.nn.detectors.pyramid import Pyramid, anchors_of, build_pyramid
from kd.nn.detectors.weights import load_detector

CANONICAL_LEVEL = 4  # the level of a region of `canonical` pixels


class WidePredictor(FastRCNNPredictor):  # type: ignore[misc]
    """torchvision's last layers, their numbers in float32 whatever autocast says."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of regions (R, D) to class logits (R, K) and box deltas (R, 4 K)."""
        logits, deltas = super().forward(x)
        return wide(logits), wide(deltas)


def region_pool(pyramid: Pyramid, size: int, canonical: float) -> MultiScaleRoIAlign:
    """Pools from the trunk's own levels, and is told their scales.

    torchvision guesses them from the first batch's pictures without padding: of wide pictures in
    square frames it would take half of what they are, for good.
    """
    pool = MultiScaleRoIAlign([str(level) for level in range(pyramid.own)], size, sampling_ratio=2)
    strides = pyramid.strides[: pyramid.own]
    pool.scales = [1 / stride for stride in strides]
    first, last = (strides[place].bit_length() - 1 for place in (0, -1))
    pool.map_levels = LevelMapper(first, last, canonical, CANONICAL_LEVEL)
    return pool


def said_of(
    heads: Any,
    context: BoxContext | None,
    maps: Mapping[str, Tensor],
    boxes: list[Tensor],
    extents: Tensor | None,
) -> dict[str, Tensor]:
    """What the second stage says of each image's boxes, end to end.

    Args:
        heads: torchvision's.
        context: What reads their surroundings.
        maps: Of the pyramid, by name.
        boxes: (R, 4) of each image.
        extents: Width and height of each picture, (N, 2), for the context head.

    Returns:
        `object_logits` (R, C+1), with a context head both experts', and `object_deltas`
        (R, 4 (C+1)).
    """
    # The pool knows its scales; torchvision has use for sizes only to guess them.
    regions = heads.box_roi_pool(dict(maps), boxes, [])
    logits, deltas = heads.box_predictor(heads.box_head(regions))
    said = {"object_logits": logits, "object_deltas": deltas}
    if context is None or extents is None:
        return said
    counts = [len(own) for own in boxes]
    image_of = torch.arange(len(boxes)).repeat_interleave(torch.tensor(counts))
    image_of = image_of.to(extents.device, non_blocking=True)
    around = context(list(maps.values()), torch.cat(boxes), image_of, extents)
    return {**said, "object_logits": context.joined(logits, around)}


def region_losses(
    said: Mapping[str, Tensor], labels: Sequence[Tensor], offsets: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Of the sampled regions, as torchvision has them: labels 0 for the background."""
    logits, deltas = said["object_logits"], said["object_deltas"]
    classes, boxes = fastrcnn_loss(logits, deltas, list(labels), list(offsets))
    return {"loss.classes": classes, "loss.boxes": boxes}


def regions_found(
    heads: Any,
    said: Mapping[str, Tensor],
    proposals: list[Tensor],
    sizes: list[tuple[int, int]],
) -> list[dict[str, Tensor]]:
    """Boxes, scores and labels of each image, the best first, as torchvision's own would be."""
    logits, deltas = said["object_logits"], said["object_deltas"]
    found = heads.postprocess_detections(logits, deltas, proposals, sizes)
    kinds = ("boxes", "scores", "labels")
    return [dict(zip(kinds, one, strict=True)) for one in zip(*found, strict=True)]


class Dense(NamedTuple):
    """What the proposal network says of a batch: torchvision's lists of levels, and its anchors."""

    images: ImageList
    logits: Tensor  # (N * P, 1)
    deltas: Tensor  # (N * P, 4)
    anchors: list[Tensor]
    counts: list[int]  # anchors of each level


def dense_of(
    rpn: Any,
    images: Tensor,
    sizes: Tensor,
    features: list[Tensor],
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
) -> Dense:
    """The head's maps end to end, beside the anchors that they are about.

    Args:
        rpn: torchvision's.
        images: (N, 3, H, W).
        sizes: Height and width of the pictures in them, (N, 2).
        features: Maps of the pyramid.
        logits: (N, A, h, w) of each level.
        deltas: (N, 4 A, h, w) of each level.
    """
    listed = ImageList(images, pairs(sizes))
    flat_logits, flat_deltas = concat_box_prediction_layers(
        [wide(one) for one in logits], [wide(one) for one in deltas]
    )
    anchors = rpn.anchor_generator(listed, features)
    return Dense(listed, flat_logits, flat_deltas, anchors, [one[0].numel() for one in logits])


def proposals_of(rpn: Any, dense: Dense) -> list[Tensor]:
    """Regions of each image, (R, 4); no gradient goes through them."""
    decoded = rpn.box_coder.decode(dense.deltas.detach(), dense.anchors)
    decoded = decoded.view(len(dense.anchors), -1, 4)
    sizes, counts = dense.images.image_sizes, dense.counts
    kept: list[Tensor] = rpn.filter_proposals(decoded, dense.logits, sizes, counts)[0]
    return kept


def proposal_losses(rpn: Any, dense: Dense, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of the anchors that torchvision samples: `loss.objectness` and `loss.proposal_boxes`."""
    labels, matched = rpn.assign_targets_to_anchors(dense.anchors, targets)
    offsets = rpn.box_coder.encode(matched, dense.anchors)
    objectness, boxes = rpn.compute_loss(dense.logits, dense.deltas, labels, offsets)
    return {"loss.objectness": objectness, "loss.proposal_boxes": boxes}


class FasterRCNN(nn.Module):
    """Faster R-CNN by the contract of `kd.nn.detectors.contract`.

    Attributes:
        network: torchvision's.
        levels: Maps with their anchors.
        context: What reads the surroundings of regions, or None.
        loss_units: What each loss is a mean over, for `kd.problems.base.Mean`.
    """

    # torchvision divides by the anchors and regions that it samples, of the batch together: as
    # many an image as long as it has them, so that these are means over images.
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
            Of each level `features.L` (N, D, h, w); `class_maps.L` (N, A, h, w), logits of there
            being any object, and `box_maps.L` (N, 4 A, h, w), deltas: the proposal network's.
            With asked boxes `object_logits` (M, C+1), background first, and `object_deltas`
            (M, 4 (C+1)), what the second stage says of them. With boxes, of a network with a
            context head, `context` (M, C), what the surroundings of those alone say. In training
            `loss.objectness`, a cross-entropy, the mean over the sampled anchors;
            `loss.proposal_boxes`, smooth L1 over those on objects, divided by all that are sampled;
            `loss.classes` and `loss.boxes`, the same of the sampled regions. In evaluation with
            sizes `detections` (N, K, 6).
        """
        check_call(
            "Faster R-CNN", self.training, images, self.num_classes,
            sizes=sizes, boxes=boxes, labels=labels, image_of=image_of, asked=asked,
        )  # fmt: skip
        maps: dict[str, Tensor] = self.network.get_submodule("backbone")(images)
        features = list(maps.values())
        if sizes is None and boxes is None:
            return leveled(features=features)
        logits, deltas = self._rpn.head(features)
        output = leveled(features=features, class_maps=logits, box_maps=deltas)
        extents = None if self.context is None else shown_extents(images, sizes)
        if boxes is not None and image_of is not None:
            output |= self._said(maps, boxes, image_of, asked, extents)
        if sizes is None:
            return output
        dense = dense_of(self._rpn, images, sizes, features, logits, deltas)
        if self.training:
            assert boxes is not None and image_of is not None
            targets = objects_of(boxes, labels, image_of, len(images)).targets(first=1)
            return output | self._losses(maps, dense, targets, extents)
        proposals = proposals_of(self._rpn, dense)
        said = self._second(maps, proposals, extents)
        found = regions_found(self._roi_heads, said, proposals, dense.images.image_sizes)
        return output | {"detections": padded(found, self.top, first=1)}

    @property
    def _rpn(self) -> Any:
        return self.network.rpn

    @property
    def _roi_heads(self) -> Any:
        return self.network.roi_heads

    def _second(
        self, maps: Mapping[str, Tensor], boxes: list[Tensor], extents: Tensor | None
    ) -> dict[str, Tensor]:
        return said_of(self._roi_heads, self.context, maps, boxes, extents)

    def _said(
        self,
        maps: Mapping[str, Tensor],
        boxes: Tensor,
        image_of: Tensor,
        asked: Tensor | None,
        extents: Tensor | None,
    ) -> dict[str, Tensor]:
        """Rows in the batch's order: of asked boxes the second stage's, of true ones context's."""
        rows: dict[str, Tensor] = {}
        if asked is not None:
            objects = objects_of(asked, None, image_of, len(next(iter(maps.values()))))
            said = self._second(maps, list(objects.boxes), extents)
            rows = {name: objects.in_batch_order(said[name]) for name in ANSWERS}
        if self.context is not None and extents is not None:
            rows["context"] = self.context(list(maps.values()), boxes, image_of, extents)
        return rows

    def _losses(
        self,
        maps: Mapping[str, Tensor],
        dense: Dense,
        targets: list[dict[str, Tensor]],
        extents: Tensor | None,
    ) -> dict[str, Tensor]:
        """Of both stages; their samples are drawn in torchvision's order."""
        proposals = proposals_of(self._rpn, dense)
        first = proposal_losses(self._rpn, dense, targets)
        regions, _, kinds, offsets = self._roi_heads.select_training_samples(proposals, targets)
        return first | region_losses(self._second(maps, regions, extents), kinds, offsets)


def fasterrcnn(
    num_classes: int,
    *,
    trunk: str = "resnet50",
    weights: str | None = None,
    width: float = 1.0,
    until: str | None = None,
    frozen: str | None = None,
    batch_norm_frozen: bool = False,
    levels: Sequence[int] = (2, 3, 4, 5, 6),
    channels: int = 256,
    scales: Sequence[float] | None = None,
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
    canonical: float = 224.0,
    region_size: int = 7,
    hidden: int = 1024,
    candidates: Sequence[int] = (2000, 1000),
    proposals: Sequence[int] = (2000, 1000),
    min_side: float = 1e-3,
    sampled_anchors: int = 256,
    sampled_regions: int = 512,
    least_score: float = 0.05,
    overlap: float = 0.5,
    top: int = 100,
    context: bool = False,
    context_hidden: int = 128,
    context_margin: float = 1.0,
    strength: float = 0.5,
    prior: Sequence[float] | None = None,
    file: str | None = None,
) -> FasterRCNN:
    """Faster R-CNN on any torchvision trunk; torchvision's `fasterrcnn_resnet50_fpn` by default.

    Its numbers are for pictures of 800 pixels. For pictures of 64 to 128, a smaller `canonical`,
    scales of 2 to 4, and a tenth of the proposals, sampled regions and hidden features do.

    Args:
        num_classes: C, without the background.
        trunk: Name of the torchvision classifier: resnet18, resnet50, mobilenet_v2, ...
        weights: Of the trunk: "imagenet", a file, or random ones.
        width: Share of the trunk's channels, for a smaller one from random weights.
        until: Path of the trunk's last step that is kept.
        frozen: "all", or the path of the last step of the trunk that does not learn.
        batch_norm_frozen: Keep all the trunk's batch norms at their stored statistics.
        levels: Of the pyramid, 2 of stride 4; `[4]` is a single map of stride 16, the last of the
            trunk at that stride through two convolutions, of which regions are pooled too.
        channels: Of every map that the heads read.
        scales: Sides of the anchors in strides; 8 by default, and on a single map 8, 16 and 32.
        ratios: Height by width of the anchors.
        canonical: Side of the regions that are pooled from level 4, pixels; those of half the side
            from level 3, and so on.
        region_size: Side of the grid that a region is pooled to.
        hidden: Features of a region.
        candidates: Best anchors of a level and image before suppression, in training and in
            evaluation; small maps have fewer.
        proposals: Most regions of an image after it, the same.
        min_side: Proposals with a shorter side are left out, pixels.
        sampled_anchors: Anchors of an image that the proposal network learns from.
        sampled_regions: Regions of an image that the second stage learns from.
        least_score: Detections below are left out.
        overlap: IoU above which the worse of two detections of a class is suppressed.
        top: Detections of an image, K.
        context: Whether there is a head for what is around a region, see `BoxContext`.
        context_hidden: Width of its layer.
        context_margin: Thickness of the ring that it reads, as a share of the region's sides.
        strength: Weight of what it says to begin with; it is learned.
        prior: Share of each class among the objects, for the context head.
        file: Weights of the whole network, a run's or torchvision's; those of the trunk alone are
            then left aside.

    Raises:
        UserError: An option out of range, a trunk that cannot be built or lacks a level, or a file
            that does not fit.
    """
    what = "fasterrcnn"
    at_least(
        what, num_classes=(num_classes, 1), region_size=(region_size, 1), hidden=(hidden, 1),
        canonical=(canonical, 1), sampled_anchors=(sampled_anchors, 2),
        sampled_regions=(sampled_regions, 2), top=(top, 1), min_side=(min_side, 0),
    )  # fmt: skip
    for name, counts in (("candidates", candidates), ("proposals", proposals)):
        if len(counts) != 2 or min(counts) < 1:
            raise UserError(f"{what}: {name} must be two numbers above 0, got {list(counts)}")
    pyramid = build_pyramid(
        what, trunk=trunk, weights=weights if file is None else None, width=width, until=until,
        frozen=frozen, batch_norm_frozen=batch_norm_frozen, levels=levels, channels=channels,
    )  # fmt: skip
    if scales is None:
        scales = (8.0,) if len(levels) > 1 else (8.0, 16.0, 32.0)
    anchors = anchors_of(what, pyramid.strides, scales=scales, ratios=ratios)
    network = detection.FasterRCNN(
        pyramid,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=candidates[0],
        rpn_pre_nms_top_n_test=candidates[1],
        rpn_post_nms_top_n_train=proposals[0],
        rpn_post_nms_top_n_test=proposals[1],
        rpn_batch_size_per_image=sampled_anchors,
        box_roi_pool=region_pool(pyramid, region_size, canonical),
        box_head=TwoMLPHead(channels * region_size**2, hidden),
        box_predictor=WidePredictor(hidden, num_classes + 1),
        box_score_thresh=least_score,
        box_nms_thresh=overlap,
        box_detections_per_img=top,
        box_batch_size_per_image=sampled_regions,
    )
    network.rpn.min_size = min_side
    around = None
    if context:  # last, so that a network of one seed without it starts from the same weights
        around = box_context(
            what, channels=channels, strides=pyramid.strides[: pyramid.own],
            num_classes=num_classes, prior=prior, hidden=context_hidden, margin=context_margin,
            strength=strength,
        )  # fmt: skip
    model = FasterRCNN(network, anchors.levels(), num_classes=num_classes, top=top, context=around)
    load_detector(model, file, num_classes=num_classes, what=f"{what} on {trunk}")
    return model
