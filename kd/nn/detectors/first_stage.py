"""Faster R-CNN's first stage between its head's maps and the regions of the second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from kd.nn.detectors.contract import pairs, wide


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
