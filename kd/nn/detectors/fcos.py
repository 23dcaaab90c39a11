"""FCOS, torchvision's, on any trunk.

Tian et al., 2019, https://arxiv.org/abs/1904.01355, with their improvements of 2020.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchvision.models import detection

from kd.errors import UserError, at_least
from kd.nn.detectors.contract import Level
from kd.nn.detectors.files import load_detector
from kd.nn.detectors.one_stage import FCOS, OneStage
from kd.nn.detectors.pyramid import anchors_of, build_pyramid


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
