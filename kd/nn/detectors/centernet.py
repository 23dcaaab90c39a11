"""CenterNet on any trunk: objects as the centres of their boxes.

Zhou et al., 2019, https://arxiv.org/abs/1904.07850. A heat map for each class peaks at objects'
centres; other maps hold the box's sides and the centre's offset within its cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError, at_least
from kd.losses.centernet import center_targets, centernet_losses
from kd.nn.detectors.contract import Detector, Inputs, Level, logits_at
from kd.nn.trunk import FreezableOptions
from kd.nn.trunk_base import Trunk, resized
from kd.nn.weights import load_network
from kd.registry import with_options

STRIDE = 4  # pixels per cell


class Found(NamedTuple):
    """The K best places of each image, best first.

    Attributes:
        boxes: (N, K, 4), xyxy pixels.
        scores: (N, K), in 0..1; 0 if an image has fewer peaks than K.
        labels: (N, K) int64, 0..C-1.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def detections(self, top: int) -> Tensor:
        """As tensor (N, `top`, 6) of boxes with an area, rows of zeros for missing ones."""
        good = (self.scores > 0) & ((self.boxes[..., 2:] - self.boxes[..., :2]) > 0).all(dim=-1)
        rows = torch.cat([self.boxes, self.scores[..., None], self.labels[..., None]], dim=-1)
        rows = rows.float().masked_fill(~good[..., None], 0.0)
        order = rows[..., 4].argsort(dim=1, descending=True, stable=True)
        rows = rows.gather(1, order[..., None].expand_as(rows))[:, :top]
        return F.pad(rows, (0, 0, 0, top - rows.shape[1]))

    def by_image(self, least: float = 0.0) -> list[dict[str, Tensor]]:
        """`boxes` (k, 4), `scores` and `labels` (k,) of each image: with an area, above `least`."""
        sides = self.boxes[..., 2:] - self.boxes[..., :2]
        good = (self.scores > least) & (sides > 0).all(dim=-1)
        return [
            {name: values[image][rows] for name, values in self._asdict().items()}
            for image, rows in enumerate(good)
        ]


@torch.no_grad()
def decode_centers(
    output: Mapping[str, Tensor],
    *,
    stride: int = STRIDE,
    top: int = 100,
    sizes: Tensor | None = None,
) -> Found:
    """Read boxes off the maps: a cell is a peak if it equals the largest of the 3x3 around it.

    This replaces suppression of overlapping boxes. Every cell of a plateau is a peak, as published.
    Equal scores are ordered by class, then row, then column; which of them are dropped if they do
    not all fit is undefined. NaN is no peak, and neither are its neighbours.

    Args:
        output: `heatmap` (N, C, h, w), logits; `size` and `offset` (N, 2, h, w), in cells.
        stride: Pixels per cell.
        top: Most peaks per image, K.
        sizes: Height and width of the images without padding, (N, 2), which boxes are clipped to.

    Raises:
        UserError: `top` is below 1, or shapes that do not fit.
    """
    heat = output["heatmap"]
    _check_maps(output, top)
    classes, height, width = heat.shape[1:]
    peaks = heat == F.max_pool2d(heat, 3, stride=1, padding=1)
    logits = heat.float().masked_fill(~peaks, -math.inf).flatten(1)
    best, place = logits.topk(min(top, classes * height * width), dim=1)  # (N, K) both
    place, order = place.sort(dim=1)
    best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    place = place.gather(1, order)
    cell = place % (height * width)
    # (N, K, 2) both, across first; float32, since half precision cannot resolve 0.1 pixels at 512.
    sides, within = (
        output[name].float().flatten(2).transpose(1, 2).gather(1, cell[..., None].expand(-1, -1, 2))
        for name in ("size", "offset")
    )
    middles = torch.stack([cell % width, cell // width], dim=-1) + within
    half = sides.clamp(min=0.0) / 2
    boxes = torch.cat([middles - half, middles + half], dim=-1) * stride
    if sizes is not None:
        limits = sizes.to(boxes)[:, None, [1, 0, 1, 0]]
        boxes = boxes.clamp(min=0.0).minimum(limits)
    return Found(boxes, best.sigmoid(), place // (height * width))


def _check_maps(output: Mapping[str, Tensor], top: int) -> None:
    at_least("decode_centers", top=(top, 1))
    heat = output["heatmap"]
    if heat.ndim != 4:
        raise UserError(f"decode_centers: heatmap must be (N, C, h, w), got {tuple(heat.shape)}")
    expected = (len(heat), 2, *heat.shape[2:])
    for name in ("size", "offset"):
        if tuple(output[name].shape) != expected:
            raise UserError(
                f"decode_centers: {name} must be {expected}, got {tuple(output[name].shape)}"
            )


HEAT_BIAS = -2.19  # an initial probability of 0.1 at every place
_KERNEL = 4  # side of the transposed convolutions


def bilinear_(convolution: nn.ConvTranspose2d) -> nn.ConvTranspose2d:
    """Initialise a transposed convolution (stride 2, side 4, padding 1) to bilinear up-sampling."""
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    with torch.no_grad():
        convolution.weight.zero_()
        for channel in range(min(convolution.in_channels, convolution.out_channels)):
            convolution.weight[channel, channel] = line[:, None] * line
    return convolution


class Finer(nn.Sequential):
    """Double the grid: a 3x3 convolution and a transposed one, each with batch norm and ReLU.

    The paper's residual networks use a deformable 3x3 convolution, which few runtimes support.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            bilinear_(nn.ConvTranspose2d(outputs, outputs, _KERNEL, 2, padding=1, bias=False)),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


def head(inputs: int, hidden: int, outputs: int, *, start: float | None = None) -> nn.Sequential:
    """A 3x3 convolution, ReLU, and a 1x1 convolution whose bias is `start`, by default 0.

    Without `start` the last weights are almost 0, too.
    """
    last = nn.Conv2d(hidden, outputs, 1)
    if start is None:
        nn.init.normal_(last.weight, std=1e-3)
    assert last.bias is not None
    nn.init.constant_(last.bias, start or 0.0)
    return nn.Sequential(nn.Conv2d(inputs, hidden, 3, padding=1), nn.ReLU(inplace=True), last)


class Fitted(nn.Module):
    """Crop what odd sides add on the way down and up; stretch what unpadded stems lose.

    A module, so that its output can be tapped.
    """

    def forward(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps (N, D, H, W) to (N, D, *grid)."""
        return resized(maps[..., : grid[0], : grid[1]], grid)


class CenterNet(Detector):
    """A trunk, up-sampling to a stride of 4, and three heads.

    Attributes:
        stride: Pixels per cell of every output.
        channels: Of the features.
    """

    title = "CenterNet"
    levels = (Level(STRIDE),)
    # The heat map's loss is divided by the peaks: objects of a class in one cell share a peak.
    loss_units = dict.fromkeys(("heatmap", "size", "offset"), "boxes")

    def __init__(
        self, trunk: Trunk, num_classes: int, *, widths: Sequence[int], hidden: int, top: int = 100
    ) -> None:
        super().__init__()
        self.trunk, self.stride, self.channels = trunk, STRIDE, widths[-1]
        self.num_classes, self.top = num_classes, top
        self.up = nn.Sequential(
            *(
                Finer(inputs, outputs)
                for inputs, outputs in zip((trunk.channels, *widths), widths, strict=False)
            )
        )
        self.fitted = Fitted()
        self.heatmap = head(self.channels, hidden, num_classes, start=HEAT_BIAS)
        self.size = head(self.channels, hidden, 2)
        self.offset = head(self.channels, hidden, 2)

    def detect(self, given: Inputs) -> dict[str, Tensor]:
        """Find objects on maps of ceil(H/4) x ceil(W/4) cells; detections in crowds do not count.

        Returns:
            `features.0` (N, D, h, w), the heads' input; `class_maps.0` (N, C, h, w), logits of an
            object's centre being in the cell; `box_maps.0` (N, 4, h, w), width and height of its
            box, and the centre's offset right of and below the cell's corner, all in cells. With
            boxes `object_logits` (M, C), those of the cell that each box's centre is in. In
            training the losses of `kd.losses.centernet`: `loss.heatmap`, divided by the cells with
            a centre, `loss.size` and `loss.offset`, means over the objects. In evaluation with
            sizes `detections` (N, K, 6).
        """
        images, sizes, boxes, labels, image_of, crowds, crowd_of, _ = given
        features, maps = self._maps(images)
        output = {
            "features.0": features,
            "class_maps.0": maps["heatmap"],
            "box_maps.0": torch.cat([maps["size"], maps["offset"]], dim=1),
        }
        if boxes is not None and image_of is not None:
            heat, only = [maps["heatmap"]], torch.zeros_like(image_of)
            rows = logits_at(heat, self.levels, only, boxes, image_of, self.num_classes)
            output["object_logits"] = rows
        if self.training:
            assert boxes is not None and labels is not None and image_of is not None
            ignored = None
            if crowds is not None and crowd_of is not None and len(crowds):
                ignored = torch.arange(len(boxes) + len(crowds), device=boxes.device) >= len(boxes)
                boxes, image_of = torch.cat([boxes, crowds]), torch.cat([image_of, crowd_of])
                labels = F.pad(labels, (0, len(crowds)), value=-1)  # any class
            targets = center_targets(
                boxes, labels, image_of, len(images), self.num_classes,
                (maps["heatmap"].shape[2], maps["heatmap"].shape[3]), self.stride, ignored=ignored,
            )  # fmt: skip
            losses = centernet_losses(maps, targets)
            output |= {f"loss.{name}": value for name, value in losses.items()}
        elif sizes is not None:
            found = decode_centers(maps, top=self.top, sizes=sizes)
            output["detections"] = found.detections(self.top)
        return output

    def _maps(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features, and the three heads' maps by their names in the losses."""
        grid = (-(-images.shape[2] // self.stride), -(-images.shape[3] // self.stride))
        features = self.fitted(self.up(self.trunk(images)), grid)
        return features, {
            "heatmap": self.heatmap(features),
            "size": self.size(features),
            "offset": self.offset(features),
        }


@dataclass(frozen=True, kw_only=True)
class CenterNetOptions(FreezableOptions):
    """Options of `centernet`.

    Attributes:
        widths: Channels after each up-sampling step; a trunk of stride 32 takes three, one of
            stride 16 the last two, and so on.
        hidden: Channels within each head.
        top: Detections per image, K.
    """

    widths: Sequence[int] = (256, 128, 64)
    hidden: int = 64
    top: int = 100


@with_options(CenterNetOptions)
def centernet(num_classes: int, options: CenterNetOptions) -> CenterNet:
    """CenterNet on any trunk; 14 M parameters on resnet18.

    Raises:
        UserError: An option out of range, a trunk that cannot be built or whose stride is not 4
            times a power of two, or a file that does not fit.
    """
    widths, hidden, top = options.widths, options.hidden, options.top
    at_least("centernet", num_classes=(num_classes, 1), hidden=(hidden, 1), top=(top, 1))
    if not widths or min(widths) < 1:
        raise UserError(f"centernet: widths must be 1 or more each, got {list(widths)}")
    trunk = options.build()
    steps = round(math.log2(trunk.stride / STRIDE))
    if not 1 <= steps <= len(widths) or STRIDE << steps != trunk.stride:
        raise UserError(
            f"centernet: {options.trunk} has a stride of {trunk.stride}, and {len(widths)} steps "
            f"up reach {STRIDE} from "
            f"{', '.join(str(STRIDE << n) for n in range(1, len(widths) + 1))} only; choose "
            "another trunk, or more widths"
        )
    options.freeze(trunk)
    network = CenterNet(trunk, num_classes, widths=tuple(widths)[-steps:], hidden=hidden, top=top)
    load_network(network, options.file, what=f"centernet on {options.trunk}")
    return network
