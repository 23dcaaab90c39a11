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
from kd.nn.trunk import Trunk, build_trunk
from kd.nn.weights import load_network

STRIDE = 4  # pixels a cell of all maps
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


class CenterNet(nn.Module):
    """A trunk, steps up to a stride of 4, and three heads.

    Attributes:
        stride: Pixels a cell of every output.
        channels: Of `features`.
    """

    def __init__(
        self, trunk: Trunk, num_classes: int, *, widths: Sequence[int], hidden: int
    ) -> None:
        super().__init__()
        self.trunk, self.stride, self.channels = trunk, STRIDE, widths[-1]
        self.up = nn.Sequential(
            *(
                Finer(inputs, outputs)
                for inputs, outputs in zip((trunk.channels, *widths), widths, strict=False)
            )
        )
        self.heatmap = head(self.channels, hidden, num_classes, start=HEAT_BIAS)
        self.size = head(self.channels, hidden, 2)
        self.offset = head(self.channels, hidden, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (N, 3, H, W) to maps of ceil(H/4) x ceil(W/4) cells.

        Returns:
            `heatmap` (N, C, h, w), logits of an object's middle being in the cell; `size`
            (N, 2, h, w), width and height of its box in cells; `offset` (N, 2, h, w), how far right
            of and below the cell's corner the middle is, in cells; `features` (N, D, h, w), what
            the heads read. The same in training and evaluation.
        """
        grid = (-(-images.shape[2] // self.stride), -(-images.shape[3] // self.stride))
        features = _fitted(self.up(self.trunk(images)), grid)
        return {
            "heatmap": self.heatmap(features),
            "size": self.size(features),
            "offset": self.offset(features),
            "features": features,
        }


def centernet(
    num_classes: int,
    *,
    trunk: str = "resnet18",
    weights: str | None = None,
    width: float = 1.0,
    until: str | None = None,
    widths: Sequence[int] = (256, 128, 64),
    hidden: int = 64,
    file: str | None = None,
) -> CenterNet:
    """CenterNet on any torchvision trunk.

    Args:
        num_classes: C.
        trunk: Name of the torchvision classifier: resnet18 (14 M parameters with the heads), ...
        weights: Of the trunk: "imagenet", a file, or random ones.
        width: Share of the trunk's channels, for a smaller one from random weights.
        until: Path of the trunk's last step that is kept.
        widths: Channels after each step up; a trunk of stride 32 takes three, one of stride 16 the
            last two of them, and so on.
        hidden: Channels within each head.
        file: Weights of the whole network, see `kd.nn.weights.load_network`; those of the trunk
            alone are then left aside.

    Raises:
        UserError: An option out of range, a trunk that cannot be built or whose stride is not 4
            times a power of two, or a file that does not fit.
    """
    at_least("centernet", num_classes=(num_classes, 1), hidden=(hidden, 1))
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
    network = CenterNet(seen, num_classes, widths=tuple(widths)[-steps:], hidden=hidden)
    load_network(network, file, what=f"centernet on {trunk}")
    return network


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


def _fitted(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Without the rows and columns that odd sides got on the way down and up.

    A trunk whose stem has no padding gives too few instead; they are stretched over the picture.
    """
    maps = maps[..., : grid[0], : grid[1]]
    if maps.shape[2:] == torch.Size(grid):
        return maps
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False)
