"""CenterNet on any trunk: objects as the centres of their boxes.

Zhou et al., 2019, https://arxiv.org/abs/1904.07850. A heat map for each class peaks at objects'
centres; other maps hold the box's sides and the centre's offset within its cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@torch.no_grad()
def decode_centers(
    output: Mapping[str, Tensor], *, top: int = 100, sizes: Tensor | None = None
) -> Tensor:
    """Read boxes off the maps: a cell is a peak if it equals the largest of the 3x3 around it.

    This replaces suppression of overlapping boxes. Every cell of a plateau is a peak, as published.
    Equal scores are ordered by class, then row, then column; which of them are dropped if they do
    not all fit is undefined. NaN is no peak, and neither are its neighbours.

    Args:
        output: `heatmap` (N, C, h, w), logits; `size` and `offset` (N, 2, h, w), in cells.
        top: Detections per image, K.
        sizes: Height and width of the images without padding, (N, 2), which boxes are clipped to.

    Returns:
        (N, K, 6), best first: xyxy box in pixels, score in 0..1, label. Boxes without an area are
        left out; missing detections are rows of zeros.
    """
    heat = output["heatmap"]
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
    boxes = torch.cat([middles - half, middles + half], dim=-1) * STRIDE
    if sizes is not None:
        limits = sizes.to(boxes)[:, None, [1, 0, 1, 0]]
        boxes = boxes.clamp(min=0.0).minimum(limits)
    scores, labels = best.sigmoid(), place // (height * width)
    found = (scores > 0) & (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
    rows = torch.cat([boxes, scores[..., None], labels[..., None]], dim=-1)
    rows = rows.masked_fill(~found[..., None], 0.0)
    order = rows[..., 4].argsort(dim=1, descending=True, stable=True)
    rows = rows.gather(1, order[..., None].expand_as(rows))
    return F.pad(rows, (0, 0, 0, top - rows.shape[1]))


HEAT_BIAS = -2.19  # an initial probability of 0.1 in every cell


def bilinear_(convolution: nn.ConvTranspose2d) -> nn.ConvTranspose2d:
    """Initialise a transposed convolution (stride 2, side 4, padding 1) to bilinear up-sampling."""
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    with torch.no_grad():
        convolution.weight.zero_()
        for channel in range(min(convolution.in_channels, convolution.out_channels)):
            convolution.weight[channel, channel] = line[:, None] * line
    return convolution


class Finer(nn.Sequential):
    """Up-sampling by 2: a 3x3 convolution and a transposed one, each with batch norm and ReLU.

    The paper's residual networks use a deformable 3x3 convolution, which few runtimes support.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            bilinear_(nn.ConvTranspose2d(outputs, outputs, 4, 2, padding=1, bias=False)),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


def head(inputs: int, hidden: int, outputs: int, *, start: float | None = None) -> nn.Sequential:
    """A 3x3 convolution, ReLU, and a 1x1 convolution with an initial bias of `start`.

    Without `start`, initial bias and weights of the last layer are 0 and almost 0.
    """
    last = nn.Conv2d(hidden, outputs, 1)
    if start is None:
        nn.init.normal_(last.weight, std=1e-3)
    assert last.bias is not None
    nn.init.constant_(last.bias, start or 0.0)
    return nn.Sequential(nn.Conv2d(inputs, hidden, 3, padding=1), nn.ReLU(inplace=True), last)


class Fitted(nn.Module):
    """Crop or resize up-sampled features to the image's grid; a module, so that it can be tapped.

    Halving and doubling an odd side adds a row or column, which is cropped; maps of trunks whose
    unpadded stem loses a border are too small and are resized.
    """

    def forward(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps (N, D, H, W) to (N, D, *grid)."""
        return resized(maps[..., : grid[0], : grid[1]], grid)


class CenterNet(Detector):
    """A trunk, up-sampling to a stride of 4, and three heads.

    Attributes:
        stride: Pixels per cell of every output.
        channels: Channels of `features.0`, which the heads read.
    """

    title = "CenterNet"
    levels = (Level(STRIDE),)
    # The heat map's loss is divided by the number of peaks, nearly that of the boxes: only objects
    # of one class in one cell share a peak.
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
        """Find objects on maps of ceil(H/4) x ceil(W/4) cells; cells in crowds have no loss.

        Returns:
            `features.0` (N, D, h, w), the heads' input; `class_maps.0` (N, C, h, w), logits of an
            object's centre being in the cell; `box_maps.0` (N, 4, h, w), width and height of the
            object's box, and the centre's offset right of and below the cell's upper left corner,
            all in cells. With boxes also `object_logits` (M, C), the class logits of the cell that
            holds each box's centre. In training also the losses of `kd.losses.centernet`:
            `loss.heatmap`, divided by the number of peaks, `loss.size` and `loss.offset`, means
            over the objects. In evaluation with sizes also `detections` (N, K, 6).
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
            output["detections"] = decode_centers(maps, top=self.top, sizes=sizes)
        return output

    def _maps(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features, and the three heads' maps under their names in `centernet_losses`."""
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
            f"centernet: {options.trunk} has a stride of {trunk.stride}, but {len(widths)} "
            f"up-sampling steps reach a stride of {STRIDE} only from "
            f"{', '.join(str(STRIDE << n) for n in range(1, len(widths) + 1))}; choose another "
            "trunk or more widths"
        )
    options.freeze(trunk)
    network = CenterNet(trunk, num_classes, widths=tuple(widths)[-steps:], hidden=hidden, top=top)
    load_network(network, options.file, what=f"centernet on {options.trunk}")
    return network
