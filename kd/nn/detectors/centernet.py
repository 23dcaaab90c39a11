"""CenterNet on any trunk: a detector that finds objects as the centres of their boxes.

Zhou et al., 2019, https://arxiv.org/abs/1904.07850. Each class has a heat map with peaks at the
centres of objects. Two other maps predict width and height of the box, and the offset of the box's
centre within the cell.
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
    """Decode CenterNet's maps to boxes, one for each of the K highest peaks.

    A peak is a cell with the largest score in the 3x3 cells around it, which replaces non-maximum
    suppression. Every cell of a plateau is a peak, as in the published code. Peaks with equal
    scores are ordered by class, row and column. Cells with NaN and their neighbours are not peaks.

    Args:
        output: `heatmap` (N, C, h, w), logits; `size` and `offset` (N, 2, h, w), in cells.
        top: Number of detections per image, K.
        sizes: Height and width of the images without padding, (N, 2), to which boxes are clipped.

    Returns:
        (N, K, 6), best first: xyxy box in pixels, score in 0..1, label. Boxes without area are left
        out, and unused rows are 0.
    """
    heat = output["heatmap"]
    classes, height, width = heat.shape[1:]
    peaks = heat == F.max_pool2d(heat, 3, stride=1, padding=1)
    logits = heat.float().masked_fill(~peaks, -math.inf).flatten(1)
    best, place = logits.topk(min(top, classes * height * width), dim=1)  # (N, K) both
    if not torch.compiler.is_exporting():  # order equal scores
        place, order = place.sort(dim=1)
        best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
        place = place.gather(1, order)
    cell = place % (height * width)
    # Both (N, K, 2), horizontal first. In float32, because half precision cannot resolve 0.1 pixels
    # at 512.
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
    if torch.compiler.is_exporting():  # ONNX has no stable sort
        order = rows[..., 4].topk(rows.shape[1], dim=1).indices
    else:
        order = rows[..., 4].argsort(dim=1, descending=True, stable=True)
    rows = rows.gather(1, order[..., None].expand_as(rows))
    return F.pad(rows, (0, 0, 0, top - rows.shape[1]))


HEAT_BIAS = -2.19  # initial bias of the heat map, a probability of 0.1 in every cell


def bilinear_(convolution: nn.ConvTranspose2d) -> nn.ConvTranspose2d:
    """Initialise a 4x4 transposed convolution of stride 2 to bilinear up-sampling, in place."""
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    with torch.no_grad():
        convolution.weight.zero_()
        for channel in range(min(convolution.in_channels, convolution.out_channels)):
            convolution.weight[channel, channel] = line[:, None] * line
    return convolution


class Finer(nn.Sequential):
    """Up-sampling by 2: a 3x3 and a transposed convolution, each with batch norm and ReLU.

    The 3x3 convolution replaces the paper's deformable one, which few runtimes support.
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
    """Build a head: a 3x3 convolution, ReLU, and a 1x1 convolution with initial bias `start`.

    If `start` is None, the last layer is initialised with bias 0 and weights close to 0.
    """
    last = nn.Conv2d(hidden, outputs, 1)
    if start is None:
        nn.init.normal_(last.weight, std=1e-3)
    assert last.bias is not None
    nn.init.constant_(last.bias, start or 0.0)
    return nn.Sequential(nn.Conv2d(inputs, hidden, 3, padding=1), nn.ReLU(inplace=True), last)


class Fitted(nn.Module):
    """Crop or resize up-sampled features to the grid of the image.

    Halving an odd side rounds up, so up-sampled maps can be one row or column too large. Maps can
    also be too small, if the trunk's unpadded stem loses a border.
    """

    def forward(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map (N, D, H, W) to (N, D, *grid)."""
        return resized(maps[..., : grid[0], : grid[1]], grid)


class CenterNet(Detector):
    """Trunk, up-sampling to a stride of 4, and three heads for heat map, size and offset.

    Attributes:
        stride: Pixels per cell of every output.
        channels: Channels of `features.0`, the input of the heads.
    """

    title = "CenterNet"
    levels = (Level(STRIDE),)
    # The loss of the heat map is divided by the number of peaks. This is nearly the number of
    # boxes, because only objects of the same class in the same cell share a peak.
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
        """Compute features, head outputs and, depending on the mode, losses or detections.

        All maps have ceil(H/4) x ceil(W/4) cells. Cells in crowds have no loss. Returns a dict of
        these outputs:

        - `features.0` (N, D, h, w), the input of the heads;
        - `class_maps.0` (N, C, h, w), logits that the centre of an object is in the cell;
        - `box_maps.0` (N, 4, h, w), in cells: width and height of the box, and the offset of the
          box's centre to the right and down from the upper left corner of the cell;
        - `object_logits` (M, C), if `given` has boxes: class logits of the cell at each box's
          centre;
        - `loss.heatmap`, in training: loss of the heat map divided by the number of peaks;
        - `loss.size` and `loss.offset`, in training: means over the objects;
        - `detections` (N, K, 6), in evaluation if `given` has sizes.
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
                labels = F.pad(labels, (0, len(crowds)), value=-1)  # because the class is unknown
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
        """Compute the features, and the maps `heatmap`, `size` and `offset` of the heads."""
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
        widths: Channels after each up-sampling step. A trunk of stride 32 uses all of the three
            default values, a trunk of stride 16 the last two, and so on.
        hidden: Channels of the hidden layer of each head.
        top: Number of detections per image, K.
    """

    widths: Sequence[int] = (256, 128, 64)
    hidden: int = 64
    top: int = 100


@with_options(CenterNetOptions)
def centernet(num_classes: int, options: CenterNetOptions) -> CenterNet:
    """Build CenterNet on a trunk whose stride is 4 times a power of two."""
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
