"""CenterNet on any torchvision trunk: objects as the middle points of their boxes.

Zhou et al., 2019, https://arxiv.org/abs/1904.07850. One map a class peaks where an object's middle
is; two numbers there are its box's sides, two the middle's place within its cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError, at_least
from kd.losses.centernet import center_targets, centernet_losses
from kd.nn.detectors.contract import Level, check_call, logits_at
from kd.nn.freeze import freeze_parts
from kd.nn.trunk import build_trunk
from kd.nn.trunk_base import Trunk
from kd.nn.weights import load_network

STRIDE = 4  # pixels a cell of all maps


class Found(NamedTuple):
    """The best places of each picture, the best first; K rows each, whatever they are worth.

    Attributes:
        boxes: (N, K, 4), xyxy pixels.
        scores: (N, K), in 0..1; 0 where a picture has fewer peaks than K.
        labels: (N, K) int64, 0..C-1.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def detections(self, top: int) -> Tensor:
        """What all detectors give, (N, `top`, 6): boxes with an area, zeros for missing ones."""
        good = (self.scores > 0) & ((self.boxes[..., 2:] - self.boxes[..., :2]) > 0).all(dim=-1)
        rows = torch.cat([self.boxes, self.scores[..., None], self.labels[..., None]], dim=-1)
        rows = rows.float().masked_fill(~good[..., None], 0.0)
        order = rows[..., 4].argsort(dim=1, descending=True, stable=True)
        rows = rows.gather(1, order[..., None].expand_as(rows))[:, :top]
        return F.pad(rows, (0, 0, 0, top - rows.shape[1]))

    def by_image(self, least: float = 0.0) -> list[dict[str, Tensor]]:
        """`boxes` (k, 4), `scores` (k,), `labels` (k,) of each picture.

        Only boxes with an area, of a score above `least`.
        """
        sides = self.boxes[..., 2:] - self.boxes[..., :2]
        kept = (self.scores > least) & (sides > 0).all(dim=-1)
        return [
            {
                "boxes": self.boxes[image][rows],
                "scores": self.scores[image][rows],
                "labels": self.labels[image][rows],
            }
            for image, rows in enumerate(kept)
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

    That takes the place of suppressing what overlaps. Every cell of a plateau is a peak, as
    published. Of equal scores the lower class, then the upper, then the left cell comes first;
    which ones are left out, where more are equal than fit, is not said. NaN is no peak, and neither
    are its neighbours.

    Args:
        output: `heatmap` (N, C, h, w), logits; `size` and `offset` (N, 2, h, w), in cells.
        stride: Pixels a cell.
        top: Most places that are read of a picture, K.
        sizes: Height and width of the pictures inside their padding, (N, 2); boxes are clipped to
            them.

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
    # (N, K, 2) both, across first; float32, for half precision has no tenth of a pixel at 512.
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


HEAT_BIAS = -2.19  # a probability of 0.1 at every place to begin with
_KERNEL = 4  # side of the transposed convolutions


def bilinear_(convolution: nn.ConvTranspose2d) -> nn.ConvTranspose2d:
    """Make a transposed convolution double the grid bilinearly, each channel for itself.

    A transposed convolution of stride 2, side 4 and padding 1; the weights between channels are 0
    and learn from there.
    """
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    with torch.no_grad():
        convolution.weight.zero_()
        for channel in range(min(convolution.in_channels, convolution.out_channels)):
            convolution.weight[channel, channel] = line[:, None] * line
    return convolution


class Finer(nn.Sequential):
    """To half the stride: a 3x3 convolution to `outputs` channels, a transposed one, bilinear.

    Batch norm and ReLU after each. Where this has a plain 3x3 convolution, the paper's residual
    networks have a deformable one, an operator that few runtimes know.
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
    """A 3x3 convolution, ReLU, and a 1x1 convolution to numbers for each place.

    Args:
        inputs: Channels.
        hidden: Channels in between.
        outputs: Numbers.
        start: What the numbers are to begin with, give or take; 0, very nearly, without it.
    """
    last = nn.Conv2d(hidden, outputs, 1)
    if start is None:
        nn.init.normal_(last.weight, std=1e-3)
    assert last.bias is not None
    nn.init.constant_(last.bias, start or 0.0)
    return nn.Sequential(nn.Conv2d(inputs, hidden, 3, padding=1), nn.ReLU(inplace=True), last)


class Fitted(nn.Module):
    """Without the rows and columns that odd sides got on the way down and up.

    A trunk whose stem has no padding gives too few instead; they are stretched over the picture.
    """

    def forward(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps (N, D, H, W) to (N, D, *grid)."""
        maps = maps[..., : grid[0], : grid[1]]
        if maps.shape[2:] == torch.Size(grid):
            return maps
        return F.interpolate(maps, grid, mode="bilinear", align_corners=False)


class CenterNet(nn.Module):
    """A trunk, steps up to a stride of 4, and three heads.

    Attributes:
        stride: Pixels a cell of every output.
        channels: Of the features.
        levels: Its one map, without anchors.
        loss_units: What each loss is a mean over, for `kd.problems.base.Mean`.
    """

    levels = (Level(STRIDE),)
    # The heat map's is divided by the cells that are peaks: objects of a class in one cell share.
    loss_units = dict.fromkeys(("heatmap", "size", "offset"), "boxes")

    def __init__(
        self,
        trunk: Trunk,
        num_classes: int,
        *,
        widths: Sequence[int],
        hidden: int,
        top: int = 100,
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
        """Find objects, see `kd.nn.detectors.contract`; maps have ceil(H/4) x ceil(W/4) cells.

        What is found in crowds, of whatever class, is not blamed.

        Returns:
            `features.0` (N, D, h, w), what the heads read; `class_maps.0` (N, C, h, w), logits of
            an object's middle being in the cell; `box_maps.0` (N, 4, h, w), width and height of its
            box, and how far right of and below the cell's corner the middle is, all in cells. With
            boxes `object_logits` (M, C), those of the cell that each one's middle is in. In
            training the losses of `kd.losses.centernet`: `loss.heatmap`, divided by the cells with
            a middle, `loss.size` and `loss.offset`, means over the objects. In evaluation with
            sizes `detections` (N, K, 6).
        """
        check_call(
            "CenterNet", self.training, images, self.num_classes,
            sizes=sizes, boxes=boxes, labels=labels, image_of=image_of, asked=asked,
        )  # fmt: skip
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
                labels = F.pad(labels, (0, len(crowds)), value=-1)  # whatever class
            output |= self._losses(maps, boxes, labels, image_of, ignored)
        elif sizes is not None:
            found = decode_centers(maps, top=self.top, sizes=sizes)
            output["detections"] = found.detections(self.top)
        return output

    def _losses(
        self,
        maps: dict[str, Tensor],
        boxes: Tensor,
        labels: Tensor,
        image_of: Tensor,
        ignored: Tensor | None,
    ) -> dict[str, Tensor]:
        images, _, height, width = maps["heatmap"].shape
        targets = center_targets(
            boxes, labels, image_of, images, self.num_classes, (height, width), self.stride,
            ignored=ignored,
        )  # fmt: skip
        losses = centernet_losses(maps, targets)
        return {f"loss.{name}": value for name, value in losses.items()}

    def _maps(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features, and the three heads' maps by their names in the losses."""
        grid = (-(-images.shape[2] // self.stride), -(-images.shape[3] // self.stride))
        features = self.fitted(self.up(self.trunk(images)), grid)
        return features, {
            "heatmap": self.heatmap(features),
            "size": self.size(features),
            "offset": self.offset(features),
        }


def centernet(
    num_classes: int,
    *,
    trunk: str = "resnet18",
    weights: str | None = None,
    width: float = 1.0,
    until: str | None = None,
    frozen: str | None = None,
    batch_norm_frozen: bool = False,
    widths: Sequence[int] = (256, 128, 64),
    hidden: int = 64,
    top: int = 100,
    file: str | None = None,
) -> CenterNet:
    """CenterNet on any torchvision trunk.

    Args:
        num_classes: C.
        trunk: Name of the torchvision classifier: resnet18 (14 M parameters with the heads), ...
        weights: Of the trunk: "imagenet", a file, or random ones.
        width: Share of the trunk's channels, for a smaller one from random weights.
        until: Path of the trunk's last step that is kept.
        frozen: "all", or the path of the last step of the trunk that does not learn.
        batch_norm_frozen: Keep all the trunk's batch norms at their stored statistics.
        widths: Channels after each step up; a trunk of stride 32 takes three, one of stride 16 the
            last two of them, and so on.
        hidden: Channels within each head.
        top: Detections of an image, K.
        file: Weights of the whole network, see `kd.nn.weights.load_network`; those of the trunk
            alone are then left aside.

    Raises:
        UserError: An option out of range, a trunk that cannot be built or whose stride is not 4
            times a power of two, or a file that does not fit.
    """
    at_least("centernet", num_classes=(num_classes, 1), hidden=(hidden, 1), top=(top, 1))
    if not widths or min(widths) < 1:
        raise UserError(f"centernet: widths must be 1 or more each, got {list(widths)}")
    seen = build_trunk(trunk, weights=weights if file is None else None, width=width, until=until)
    steps = round(math.log2(seen.stride / STRIDE))
    if not 1 <= steps <= len(widths) or STRIDE << steps != seen.stride:
        raise UserError(
            f"centernet: {trunk} has a stride of {seen.stride}, and {len(widths)} steps up reach "
            f"{STRIDE} from {', '.join(str(STRIDE << n) for n in range(1, len(widths) + 1))} only; "
            "name another trunk, or more widths"
        )
    freeze_parts(seen, frozen, batch_norm_frozen)
    network = CenterNet(seen, num_classes, widths=tuple(widths)[-steps:], hidden=hidden, top=top)
    load_network(network, file, what=f"centernet on {trunk}")
    return network
