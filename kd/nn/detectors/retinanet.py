"""RetinaNet, torchvision's, on any trunk.

Lin et al., 2017, https://arxiv.org/abs/1708.02002.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchvision.models import detection

from kd.errors import at_least
from kd.nn.detectors.files import load_detector
from kd.nn.detectors.one_stage import RETINANET, OneStage
from kd.nn.detectors.pyramid import anchors_of, build_pyramid

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
