"""ESPNet and its encoder ESPNet-C (Mehta et al., 2018, https://arxiv.org/abs/1803.06815)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from kd.errors import UserError, at_least
from kd.nn.weights import load_network

BRANCHES = (1, 2, 4, 8, 16)  # dilations of the parallel convolutions in a spatial pyramid
_EPS = 1e-3  # epsilon of all batch norms, as published


class NormAct(nn.Sequential):
    """Batch norm and PReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels, eps=_EPS), nn.PReLU(channels))


def conv(
    inputs: int, outputs: int, side: int = 1, *, stride: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """Build a convolution without bias, padded to preserve height and width if the stride is 1."""
    padding = dilation * (side - 1) // 2
    return nn.Conv2d(inputs, outputs, side, stride, padding, dilation, bias=False)


def fitted(maps: Tensor, like: Tensor) -> Tensor:
    """Crop up-sampled maps, which can be one row or column too large, to the size of `like`."""
    return maps[..., : like.shape[-2], : like.shape[-1]]


class SpatialPyramid(nn.Module):
    """ESPNet's block: reduce the channels, convolve at five dilations, and concatenate.

    Maps of dilation 2 and above are summed cumulatively first, against grid artefacts (hierarchical
    feature fusion). With `residual` the input is added to the output if their shapes are equal.
    """

    def __init__(
        self, inputs: int, outputs: int, *, stride: int = 1, residual: bool = True
    ) -> None:
        super().__init__()
        narrow = outputs // len(BRANCHES)
        widths = [outputs - narrow * (len(BRANCHES) - 1), *[narrow] * (len(BRANCHES) - 1)]
        self.reduce = conv(inputs, narrow, 3 if stride > 1 else 1, stride=stride)
        self.branches = nn.ModuleList(
            conv(narrow, width, 3, dilation=dilation)
            for width, dilation in zip(widths, BRANCHES, strict=True)
        )
        self.residual = residual and stride == 1 and inputs == outputs
        self.end = NormAct(outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        reduced = self.reduce(maps)
        first, *rest = (branch(reduced) for branch in self.branches)
        result = torch.cat([first, *itertools.accumulate(rest)], dim=1)
        normed: Tensor = self.end(result + maps if self.residual else result)
        return normed


class ESPNetC(nn.Module):
    """ESPNet-C, the encoder with a classifier: 0.35 M parameters for 20 classes.

    Args:
        num_classes: Number of classes, C.
        shallow: Number of spatial pyramids at 1/4 of the image's size.
        deep: Number of spatial pyramids at 1/8 of the image's size.
        dropout: Probability of dropping a channel before the classifier; 0 as published.
        file: File with weights of the whole network, see `kd.nn.weights.load_network`.
    """

    stride = 8

    def __init__(
        self,
        num_classes: int,
        *,
        shallow: int = 2,
        deep: int = 8,
        dropout: float = 0.0,
        file: str | None = None,
    ) -> None:
        super().__init__()
        at_least("espnet", shallow=(shallow, 1), deep=(deep, 1))
        if not 0 <= dropout < 1:
            raise UserError(f"espnet: dropout must be in [0, 1), got {dropout}")
        self.halve = nn.AvgPool2d(3, stride=2, padding=1)
        self.stem = nn.Sequential(conv(3, 16, 3, stride=2), NormAct(16))
        self.norm1 = NormAct(16 + 3)
        self.down2 = SpatialPyramid(16 + 3, 64, stride=2)
        self.level2 = nn.Sequential(*(SpatialPyramid(64, 64) for _ in range(shallow)))
        self.norm2 = NormAct(128 + 3)
        self.down3 = SpatialPyramid(128 + 3, 128, stride=2)
        self.level3 = nn.Sequential(*(SpatialPyramid(128, 128) for _ in range(deep)))
        self.norm3 = NormAct(256)
        self.classifier = nn.Sequential(nn.Dropout2d(dropout), conv(256, num_classes))
        load_network(self, file, what="espnet_c")

    def levels(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute maps of 19, 131 and 256 channels at 1/2, 1/4 and 1/8 of the image's size."""
        half = self.halve(images)
        quarter = self.halve(half)
        first = self.norm1(torch.cat([self.stem(images), half], dim=1))
        down = self.down2(first)
        second = self.norm2(torch.cat([self.level2(down), down, quarter], dim=1))
        down = self.down3(second)
        return first, second, self.norm3(torch.cat([down, self.level3(down)], dim=1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalised images (N, 3, H, W) to `logits` (N, C, H/8, W/8)."""
        return {"logits": self.classifier(self.levels(images)[-1])}


class ESPNet(nn.Module):
    """ESPNet, with a light decoder: 0.36 M parameters for 20 classes; arguments as in `ESPNetC`."""

    stride = 1

    def __init__(
        self, num_classes: int, *, shallow: int = 2, deep: int = 8, file: str | None = None
    ) -> None:
        super().__init__()
        count = num_classes
        self.encoder = ESPNetC(count, shallow=shallow, deep=deep)
        self.norm = nn.BatchNorm2d(count, eps=_EPS)
        self.up3 = nn.ConvTranspose2d(count, count, 2, stride=2, bias=False)
        self.second = conv(128 + 3, count)
        self.join = nn.Sequential(
            NormAct(2 * count),
            SpatialPyramid(2 * count, count, residual=False),
            nn.ConvTranspose2d(count, count, 2, stride=2, bias=False),
            NormAct(count),
        )
        self.refine = nn.Sequential(conv(count + 16 + 3, count, 3), NormAct(count))
        self.classifier = nn.ConvTranspose2d(count, count, 2, stride=2, bias=False)
        load_network(self, file, what="espnet")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalised images (N, 3, H, W) to `logits` (N, C, H, W)."""
        first, second, third = self.encoder.levels(images)
        deep = fitted(self.up3(self.norm(self.encoder.classifier(third))), second)
        joined = fitted(self.join(torch.cat([self.second(second), deep], dim=1)), first)
        logits = self.classifier(self.refine(torch.cat([joined, first], dim=1)))
        return {"logits": fitted(logits, images)}
