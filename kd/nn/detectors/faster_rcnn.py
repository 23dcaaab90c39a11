"""torchvision's Faster R-CNN on padded batches, with a second stage that also accepts given boxes.

Ren et al., 2015, https://arxiv.org/abs/1506.01497; with a feature pyramid: Lin et al., 2017,
https://arxiv.org/abs/1612.03144.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper, MultiScaleRoIAlign

from kd.errors import UserError
from kd.nn.detectors.context_head import BoxContext
from kd.nn.detectors.contract import (
    SECOND_STAGE,
    Detector,
    Inputs,
    Level,
    leveled,
    order_by_image,
    padded,
    targets_of,
)
from kd.nn.detectors.pyramid import Pyramid, PyramidOptions, anchors_of, build_pyramid
from kd.nn.detectors.suppression import as_detections, clipped, decoded, suppress
from kd.nn.regions import image_extents, log_prior
from kd.nn.trunk_base import wide
from kd.nn.weights import load_detector
from kd.registry import with_options

CANONICAL_LEVEL = 4  # pyramid level from which regions of the side `canonical` are pooled


class WidePredictor(FastRCNNPredictor):  # type: ignore[misc]
    """Last layers of the second stage, with float32 outputs even under autocast."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map region features (R, D) to class logits (R, K) and box deltas (R, 4 K)."""
        logits, deltas = super().forward(x)
        return wide(logits), wide(deltas)


def region_pool(pyramid: Pyramid, size: int, canonical: float) -> MultiScaleRoIAlign:
    """Build RoIAlign to a `size` x `size` grid on the pyramid levels that come from the trunk.

    The scales are set explicitly, because torchvision infers them from the unpadded size of the
    first images, which is wrong for padded images. Regions with a side of `canonical` pixels are
    pooled from `CANONICAL_LEVEL`.
    """
    pool = MultiScaleRoIAlign([str(level) for level in range(pyramid.own)], size, sampling_ratio=2)
    strides = pyramid.strides[: pyramid.own]
    pool.scales = [1 / stride for stride in strides]
    first, last = (strides[place].bit_length() - 1 for place in (0, -1))
    pool.map_levels = LevelMapper(first, last, canonical, CANONICAL_LEVEL)
    return pool


class FasterRCNN(Detector):
    """Faster R-CNN with the interface of `Detector`.

    Attributes:
        network: The torchvision detector.
        context: Head that predicts classes from the surroundings of regions, or None.
    """

    network: Any
    title = "Faster R-CNN"
    # torchvision divides by the number of sampled anchors or regions. This number is the same for
    # each image that has enough of them, so the losses are means over images.
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
        """Compute feature maps, proposal maps and, depending on the inputs, losses or detections.

        Detections inside a crowd count as background, as in torchvision. Returns a dict of these
        outputs, where L numbers the levels from 0, finest first:

        - `features.L` (N, D, h, w);
        - `class_maps.L` (N, A, h, w), objectness logits of the proposal network;
        - `box_maps.L` (N, 4 A, h, w), box deltas of the proposal network;
        - `object_logits` (M, C+1), background first, and `object_deltas` (M, 4 (C+1)), if `given`
          has near boxes: the second stage's outputs for these boxes;
        - `context` (M, C), logits of the context head, if there is one and `given` has boxes;
        - `loss.objectness`, in training: mean cross-entropy of the sampled anchors;
        - `loss.proposal_boxes`, in training: smooth L1 loss of the sampled anchors on objects,
          divided by the number of all sampled anchors;
        - `loss.classes` and `loss.boxes`, in training: the same two losses for the sampled regions;
        - `detections` (N, K, 6), in evaluation if `given` has sizes.
        """
        images, sizes, boxes, labels, image_of, *_, near_boxes = given
        maps: dict[str, Tensor] = self.network.backbone(images)
        features = list(maps.values())
        if sizes is None and boxes is None:
            return leveled(features=features)
        logits, deltas = self.network.rpn.head(features)
        output = leveled(features=features, class_maps=logits, box_maps=deltas)
        extents = None
        if self.context is not None:  # needs width and height of the images without padding
            extents = image_extents(images, (0.0,) * 3) if sizes is None else sizes.flip(1)
        if near_boxes is not None and image_of is not None:
            order, counts = order_by_image(image_of, len(images))
            near = self._second_stage(maps, list(near_boxes[order].split(counts)), extents)
            output |= {name: near[name][order.argsort()] for name in SECOND_STAGE}
        if self.context and extents is not None and boxes is not None and image_of is not None:
            output["context"] = self.context(features, boxes, image_of, extents)
        if sizes is None:
            return output
        if self.exported:
            return output | self._batched(maps, sizes, logits, deltas, images)
        targets = None
        if self.training:
            assert boxes is not None and labels is not None and image_of is not None
            targets = targets_of(boxes, labels, image_of, len(images), first=1)
        listed = ImageList(images, [(height, width) for height, width in sizes.tolist()])
        proposals, losses = self._first_stage(listed, features, logits, deltas, targets)
        heads = self.network.roi_heads
        if targets is not None:
            regions, _, classes, offsets = heads.select_training_samples(proposals, targets)
            found = self._second_stage(maps, regions, extents)
            second = fastrcnn_loss(*(found[name] for name in SECOND_STAGE), classes, offsets)
            losses |= dict(zip(("loss.classes", "loss.boxes"), second, strict=True))
            return output | losses
        found = self._second_stage(maps, proposals, extents)
        detections = heads.postprocess_detections(
            *(found[name] for name in SECOND_STAGE), proposals, listed.image_sizes
        )
        names = ("boxes", "scores", "labels")
        by_image = [dict(zip(names, one, strict=True)) for one in zip(*detections, strict=True)]
        return output | {"detections": padded(by_image, self.top, first=1)}

    def _first_stage(
        self,
        images: ImageList,
        features: list[Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        targets: list[dict[str, Tensor]] | None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Compute the proposals (R, 4) of each image, without gradient, and the proposal losses.

        The losses are an empty dict if `targets` is None.
        """
        rpn = self.network.rpn
        anchors = rpn.anchor_generator(images, features)
        counts = [one[0].numel() for one in logits]  # anchors of each level
        flat_logits, flat_deltas = concat_box_prediction_layers(
            [wide(one) for one in logits], [wide(one) for one in deltas]
        )  # (N * P, 1) and (N * P, 4)
        boxes = rpn.box_coder.decode(flat_deltas.detach(), anchors).view(len(anchors), -1, 4)
        proposals, _ = rpn.filter_proposals(boxes, flat_logits, images.image_sizes, counts)
        if targets is None:
            return proposals, {}
        labels, matched = rpn.assign_targets_to_anchors(anchors, targets)
        offsets = rpn.box_coder.encode(matched, anchors)
        losses = rpn.compute_loss(flat_logits, flat_deltas, labels, offsets)
        names = ("loss.objectness", "loss.proposal_boxes")
        return proposals, dict(zip(names, losses, strict=True))

    def _second_stage(
        self, maps: Mapping[str, Tensor], boxes: list[Tensor], extents: Tensor | None
    ) -> dict[str, Tensor]:
        """Compute the `SECOND_STAGE` outputs for the boxes of each image, concatenated over images.

        A context head, if there is one, adjusts the class logits.
        """
        heads = self.network.roi_heads
        # No image sizes, because torchvision needs them only to infer the scales, which are set.
        regions = heads.box_roi_pool(dict(maps), boxes, [])
        logits, deltas = heads.box_predictor(heads.box_head(regions))
        if self.context is not None and extents is not None:
            counts = torch.tensor([len(own) for own in boxes])
            image_of = torch.arange(len(boxes)).repeat_interleave(counts)
            image_of = image_of.to(extents.device, non_blocking=True)
            around = self.context(list(maps.values()), torch.cat(boxes), image_of, extents)
            logits = self.context.joined(logits, around)
        return dict(zip(SECOND_STAGE, (logits, deltas), strict=True))

    def _batched(
        self, maps: Mapping[str, Tensor], sizes: Tensor, logits: Sequence[Tensor],
        deltas: Sequence[Tensor], images: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Compute the same `detections` as torchvision, without loops over images."""
        heads, n = self.network.roi_heads, images.shape[0]
        proposals, missing = self._batched_proposals(maps, sizes, logits, deltas, images)
        count = proposals.shape[1]
        flat = proposals.reshape(-1, 4)
        image_of = torch.arange(n, device=flat.device)[:, None].expand(n, count).flatten()
        regions = self._pooled(maps, flat, image_of)
        classes, offsets = heads.box_predictor(heads.box_head(regions))
        if self.context is not None:
            features = list(maps.values())
            around = self.context(features, flat, image_of, sizes.flip(1))
            classes = self.context.joined(classes, around)
        scores = classes.softmax(dim=1)[:, 1:].reshape(n, count, -1)
        scores = scores.masked_fill(missing[..., None], -1.0).flatten(1)
        boxes = torch.as_tensor(heads.box_coder.decode_single(offsets, flat))
        boxes = boxes.view(n, count, -1, 4)[:, :, 1:].reshape(n, -1, 4)
        boxes = clipped(boxes, sizes)
        narrow = ((boxes[..., 2:] - boxes[..., :2]) < 1e-2).any(dim=2)
        labels = torch.arange(self.num_classes, device=boxes.device).repeat(count)
        labels = labels[None].expand(n, -1)
        kept = suppress(
            boxes, scores.masked_fill(narrow, -1.0), labels, overlap=heads.nms_thresh,
            least=heads.score_thresh, top=self.top,
        )  # fmt: skip
        rows = as_detections(boxes, kept[0], labels, kept[1])
        return {"detections": nn.functional.pad(rows, (0, 0, 0, self.top - rows.shape[1]))}

    def _batched_proposals(
        self, maps: Mapping[str, Tensor], sizes: Tensor, logits: Sequence[Tensor],
        deltas: Sequence[Tensor], images: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Compute the proposals (N, R, 4) and a mask (N, R) that is True in padding rows."""
        rpn, frame = self.network.rpn, (images.shape[2], images.shape[3])
        [anchors] = rpn.anchor_generator(ImageList(images[:1], [frame]), list(maps.values()))
        counts = [one.shape[1] * one.shape[2] * one.shape[3] for one in logits]
        found = []
        for level, (own, shifts, squares) in enumerate(
            zip(logits, deltas, anchors.split(counts), strict=True)
        ):
            flat = wide(own).permute(0, 2, 3, 1).flatten(1)
            best = flat.topk(min(rpn.pre_nms_top_n(), flat.shape[1]), dim=1)
            listed = wide(shifts).unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            chosen = listed.gather(1, best.indices[..., None].expand(-1, -1, 4))
            boxes = decoded(rpn.box_coder, chosen, squares[best.indices])
            found.append((boxes, best.values.sigmoid(), torch.full_like(best.indices, level)))
        boxes, scores, groups = (torch.cat(one, dim=1) for one in zip(*found, strict=True))
        boxes = clipped(boxes, sizes)
        narrow = ((boxes[..., 2:] - boxes[..., :2]) < rpn.min_size).any(dim=2)
        values, rows = suppress(
            boxes, scores.masked_fill(narrow, -1.0), groups, overlap=rpn.nms_thresh, least=-0.5,
            top=rpn.post_nms_top_n(),
        )  # fmt: skip
        return boxes.gather(1, rows[..., None].expand(-1, -1, 4)), values < 0

    def _pooled(self, maps: Mapping[str, Tensor], boxes: Tensor, image_of: Tensor) -> Tensor:
        """Pool each region from the pyramid level that fits its size, as `box_roi_pool` does."""
        pool = self.network.roi_heads.box_roi_pool
        levels = pool.map_levels([boxes])
        rois = torch.cat([image_of[:, None].to(boxes.dtype), boxes], dim=1)
        parts = []
        for number, name in enumerate(pool.featmap_names):
            pooled = roi_align(
                wide(maps[name]), rois, pool.output_size, pool.scales[number], pool.sampling_ratio
            )
            parts.append(pooled * (levels == number).to(pooled.dtype)[:, None, None, None])
        return torch.stack(parts).sum(dim=0)


@dataclass(frozen=True, kw_only=True)
class FasterRCNNOptions(PyramidOptions):
    """Options of `fasterrcnn`.

    The defaults are for images of 800 pixels. For images of 64 to 128 pixels use a smaller
    `canonical`, scales of 2 to 4, and about a tenth of `proposals`, `sampled_regions` and `hidden`.

    Attributes:
        levels: As in `PyramidOptions`; level 2 has a stride of 4.
        scales: Sides of the anchors in strides; by default 8, or 8, 16 and 32 on a single map.
        ratios: Height divided by width of the anchors.
        canonical: Side in pixels of the regions pooled from level 4. Regions of half this side are
            pooled from level 3, and so on.
        region_size: Side of the grid to which a region is pooled.
        hidden: Number of features of a region.
        candidates: Largest number of anchors per level and image before suppression: two values,
            for training and evaluation.
        proposals: Largest number of regions per image after suppression: two values, for training
            and evaluation.
        min_side: Proposals with a side shorter than this are dropped, pixels.
        sampled_anchors: Number of anchors per image on which the proposal network is trained.
        sampled_regions: Number of regions per image on which the second stage is trained.
        context: Whether there is a context head, which predicts the class of a region from its
            surroundings, see `BoxContext`.
        context_hidden: Width of the hidden layer of the context head.
        context_margin: Thickness of the ring around a region in the context head, as a fraction of
            the region's width and height.
        strength: Initial weight of the context head in the class logits; it is learned.
        prior: Frequency of each class among the objects, for the context head; uniform by default.
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
    """Build Faster R-CNN on any trunk; torchvision's `fasterrcnn_resnet50_fpn` by default."""
    what = "fasterrcnn"
    for name, counts in (("candidates", options.candidates), ("proposals", options.proposals)):
        if len(counts) != 2 or min(counts) < 1:
            raise UserError(f"{what}: {name} must be two numbers above 0, got {list(counts)}")
    pyramid = build_pyramid(
        what, num_classes, options, region_size=(options.region_size, 1),
        hidden=(options.hidden, 1), canonical=(options.canonical, 1),
        sampled_anchors=(options.sampled_anchors, 2), sampled_regions=(options.sampled_regions, 2),
        min_side=(options.min_side, 0),
    )  # fmt: skip
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
    # The context head is built last, so that with the same seed all other weights are the same as
    # without a context head.
    if options.context:
        hidden, margin = options.context_hidden, options.context_margin
        if hidden < 1 or margin <= 0:
            raise UserError(
                f"{what}: context_hidden must be 1 or more and context_margin above 0, got "
                f"{hidden} and {margin}"
            )
        context = BoxContext(
            options.channels, pyramid.strides[: pyramid.own],
            log_prior(what, num_classes, options.prior),
            hidden=hidden, margin=margin, strength=options.strength,
        )  # fmt: skip
    model = FasterRCNN(
        network, anchors.levels(), num_classes=num_classes, top=options.top, context=context
    )
    load_detector(model, options.file, num_classes=num_classes, what=f"{what} on {options.trunk}")
    return model
